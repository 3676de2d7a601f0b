"""Layers side by side: one layer per thread beats one operation split over threads.

The operations here are short (a millisecond or less). Split over OpenMP threads, each ends in a barrier where threads
spin for the slowest; on a machine that does other work too, that made pruning many times slower.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch


T = TypeVar("T")
R = TypeVar("R")

# Each layer in work holds several copies of its weight; more threads than this would cost memory for little time.
WORKERS = 4


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call a function for every item, several at a time, each within one thread.

    Args:
        function: must not depend on the other calls.
        items: its arguments.

    Returns:
        list[R]: the results in the order of the items.
    """
    threads = torch.get_num_threads()
    try:
        # The number of threads is a setting of each thread, but threads that start later inherit the last one set.
        with ThreadPoolExecutor(min(threads, WORKERS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
