"""A progress bar, in a terminal, of what takes long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

T = TypeVar("T")
_PATIENCE = 1.0  # seconds without a bar


def shown(items: Iterable[T], description: str, progress: bool = True, console: Console | None = None) -> Iterator[T]:
    """The items, with a bar on stderr once more than a second has passed.

    Args:
      items: what is gone through.
      description: what they are.
      progress: whether there is a bar at all.
      console: where; none is shown in one that is no terminal.
    """
    console = console or Console(stderr=True)
    if not (progress and (console.is_terminal or console.is_jupyter)):
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=console, transient=True)
    task, begin = bar.add_task(description, total=total), time.monotonic()
    try:
        for done, item in enumerate(items):
            if time.monotonic() - begin >= _PATIENCE:
                bar.start()
                bar.update(task, completed=done)
            yield item
    finally:
        bar.stop()
