"""What a replay shows of itself: one line at a time, on stderr."""

from __future__ import annotations

import contextlib
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bar:
    """The progress bar; where it is not ``shown`` it does nothing."""

    def __init__(self, shown: bool) -> None:
        columns = (
            TextColumn('{task.description:>17}'), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn('{task.fields[state]}', markup=False),
        )
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._task: Any = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._progress.stop()

    def begin(self, what: str, total: int | None) -> None:
        """Begin the next line; one without a total goes when it ends."""
        if self._task is not None:
            self._progress.stop_task(self._task)
            if self._progress.tasks[-1].total is None:
                self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=total, state='')

    def show(
        self, state: str, completed: float | None = None, total: float | None = None
    ) -> None:
        limits = {} if total is None else {'total': round(total)}
        done = {} if completed is None else {'completed': round(completed)}
        self._progress.update(self._task, state=state, **done, **limits)
