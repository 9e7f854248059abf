"""Long work that can be watched: callbacks `(stage, done, total)`, and bars with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich import progress as rich
from rich.console import Console

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`."""


class Bars:
    """Progress bars for callbacks `(stage, done, total)`: one bar a stage, or one line a stage where nobody watches.

    ```python
    with Bars() as bars:
        isolate(model, conflicts, progress=bars)
    ```
    """

    def __init__(self, console: Console | None = None):
        console = self.console = console or Console(stderr=True, highlight=False)
        kinds = rich.BarColumn, rich.MofNCompleteColumn, rich.TimeElapsedColumn, rich.TimeRemainingColumn
        columns = [rich.TextColumn("{task.description}"), *(kind() for kind in kinds)]
        self._progress = rich.Progress(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, rich.TaskID] = {}
        self._begun: dict[str, float] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Move one stage's bar on; a stage that is done prints its time where nobody watches."""
        self._begun.setdefault(stage, time.monotonic())
        if self.console.is_terminal:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total)
            self._progress.update(self._tasks[stage], completed=done, total=total)
        elif done >= total:
            self.console.print(f"{stage}: {total} in {time.monotonic() - self._begun[stage]:.1f} s")
        if done >= total:
            self._begun.pop(stage, None)
            self._tasks.pop(stage, None)


def part_of(show: Progress, number: int, parts: int) -> Progress:
    """Make the progress of one of several equal parts progress of all."""
    return lambda stage, done, total: show(stage, number * total + done, parts * total)


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


def named(progress: Progress | None, name: str) -> Progress:
    """Put a name before every stage that is told; of None, the callback that tells nobody."""
    return silent if progress is None else lambda stage, done, total: progress(f"{name}: {stage}", done, total)


@contextmanager
def watched(progress: Progress | bool | None) -> Generator[Progress]:
    """Turn what a caller passed as `progress` into a callback."""
    if callable(progress):
        yield progress
    elif progress:
        with Bars() as bars:
            yield bars
    else:
        yield silent
