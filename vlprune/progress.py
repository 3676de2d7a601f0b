"""One progress bar for everything: rate and remaining time on stderr, silent when stderr is no terminal."""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask


T = TypeVar("T")


class _RateColumn(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: RichTask):  # type: ignore[no-untyped-def]
        from rich.text import Text

        return Text(f"{task.speed:.1f}/s" if task.speed else "")


@contextmanager
def task(description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show a bar while the block runs.

    Args:
        description: what is being done.
        total: number of steps, None when unknown.

    Yields:
        Callable[..., None]: call it with the number of steps just finished and, if it changed, the new description.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        identifier = progress.add_task(description, total=total)
        yield lambda steps=1, text=None: progress.update(identifier, advance=steps, description=text)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar.

    Args:
        iterable: what to iterate over.
        description: what is being done.
        total: number of items, taken from `len(iterable)` when there is one.

    Yields:
        T: the items.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with task(description, total) as advance:
        for item in iterable:
            yield item
            del item  # it may be large, and the next one is made while this name still holds it
            advance(1)
