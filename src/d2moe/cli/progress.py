"""Progress on stderr with the time left, for whatever lasts longer than two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

SHOW_AFTER_S = 2.0
LINE_EVERY_S = 10.0
"""Where stderr is not a terminal: a plain line this often."""
REDRAW_EVERY_S = 0.2


class Bar:
    """Call it with (done, total). A terminal gets a bar; `light` keeps the bar's library out of a measured process."""

    def __init__(self, text: str, light: bool = False):
        self._text, self._light = text, light
        self._begun = self._drawn = time.monotonic()
        self._from: int | None = None
        self._shown = False
        self._rich: Any = None
        self._task: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._shown and sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def begin(self, done: int, total: int) -> None:
        """Begin anew, with `done` of `total` from before: what comes has a pace of its own."""
        self._begun, self._from = time.monotonic(), done
        if self._rich is not None:
            self._rich.reset(self._task, total=total, completed=done)
        self(done, total)

    def __call__(self, done: int, total: int, detail: str = "") -> None:
        if self._from is None:
            self._from = done  # what an earlier run did says nothing about this one's speed
        now = time.monotonic()
        if now - self._begun < SHOW_AFTER_S:
            return
        if sys.stderr.isatty() and not self._light:
            self._draw_bar(done, total, detail)
        elif now - self._drawn >= (REDRAW_EVERY_S if sys.stderr.isatty() else LINE_EVERY_S) or not self._shown:
            self._drawn = now
            self._draw_line(done, total, detail, now)
        self._shown = True

    def _draw_line(self, done: int, total: int, detail: str, now: float) -> None:
        fresh = done - (self._from or 0)
        left = f", {_span((now - self._begun) / fresh * (total - done))} left" if fresh > 0 else ""
        line = f"{self._text}: {100 * done // max(total, 1)} %{left}{f' ({detail})' if detail else ''}"
        sys.stderr.write(f"\r\x1b[K{line[:120]}" if sys.stderr.isatty() else f"{line}\n")
        sys.stderr.flush()

    def _draw_bar(self, done: int, total: int, detail: str) -> None:
        if self._rich is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._rich = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("left {task.fields[detail]}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._rich.add_task(self._text, total=total, completed=self._from or 0, detail="")
            self._rich.start()
        self._rich.update(self._task, completed=done, detail=detail)


def _span(seconds: float) -> str:
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
