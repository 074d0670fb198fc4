"""What a captioning job tells while it runs."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class JobProgress:
    """A progress bar on a terminal, elsewhere a line every SECONDS_BETWEEN_LINES; both on stderr."""

    def __init__(self, total: int):
        self.total, self.num_done, self.num_flagged, self.begun = total, 0, 0, time.monotonic()
        self._said_once: set[str] = set()
        self._last_line = self.begun
        self.console = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
        columns = (TextColumn("captioning"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        self.bar = Progress(
            *columns, TimeRemainingColumn(), console=self.console, transient=True, disable=not self.console.is_terminal
        )
        self._task = self.bar.add_task("", total=total, rate="")

    def advance(self, count: int, *, num_flagged: int = 0) -> None:
        self.num_done += count
        self.num_flagged += num_flagged
        now = time.monotonic()
        per_second = self.num_done / max(now - self.begun, 1e-9)
        rate = f"{per_second:.1f} a second, {self.num_flagged / self.num_done:.1%} flagged"
        self.bar.update(self._task, advance=count, rate=rate)
        if not self.console.is_terminal and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = timedelta(seconds=round(max(0, self.total - self.num_done) / per_second))
            self.say(f"{self.num_done} of {self.total} pictures, {rate}, {left} left")

    def say(self, text: str) -> None:
        self.console.print(text)

    def say_once(self, text: str) -> None:
        """Says this the first time only; the numbers in it may differ."""
        words = "".join(character for character in text if not character.isdigit())
        if words not in self._said_once:
            self._said_once.add(words)
            self.say(text)
