"""A progress bar on stderr: how many, how fast, how long still; nothing when stderr is no terminal."""

import sys
import time
from collections.abc import Iterator


WIDTH = 30  # characters of the bar
EVERY = 0.1  # seconds between two drawings


def track(total: int, size: int) -> Iterator[range]:
    """Yield batches of indices, drawing how far one is.

    Args:
        total: how many.
        size: of a batch; the last may be smaller.

    Yields:
        range: the indices of a batch.
    """
    shown, start, drawn = sys.stderr.isatty(), time.monotonic(), 0.0
    for first in range(0, total, size):
        batch = range(first, min(first + size, total))
        yield batch
        now = time.monotonic()
        if shown and (now - drawn > EVERY or batch.stop == total):
            drawn = now
            rate = batch.stop / max(now - start, 1e-9)
            bar = "#" * (WIDTH * batch.stop // total)
            left = (total - batch.stop) / rate
            text = f"\r{bar:-<{WIDTH}} {batch.stop}/{total} {rate:.1f}/s {left:.0f} s left "
            print(text, end="", file=sys.stderr, flush=True)
    if shown and total:
        print(file=sys.stderr)
