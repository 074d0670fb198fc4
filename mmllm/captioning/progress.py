"""What a captioning job tells while it runs: its progress, and the pictures that failed."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class JobProgress:
    """A progress bar on a terminal, elsewhere a line every SECONDS_BETWEEN_LINES; both on stderr."""

    def __init__(self, total: int):
        self.total, self.num_done, self.begun = total, 0, time.monotonic()
        self._last_line = self.begun
        self.console = Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)
        columns = (TextColumn("captioning"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        self.bar = Progress(
            *columns, TimeRemainingColumn(), console=self.console, transient=True, disable=not self.console.is_terminal
        )
        self._task = self.bar.add_task("", total=total, rate="")

    def advance(self, count: int) -> None:
        self.num_done += count
        now = time.monotonic()
        rate = f"{self.num_done / max(now - self.begun, 1e-9):.1f} a second"
        self.bar.update(self._task, advance=count, rate=rate)
        if not self.console.is_terminal and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"{self.num_done} of {self.total} pictures, {rate}")

    def say(self, text: str) -> None:
        self.console.print(text)


class FailureList:
    """The pictures that failed in this run: printed at once, and listed in a file beside the captions."""

    def __init__(self, out: Path, progress: JobProgress):
        self.path = out.with_name(f"{out.name}.failed.jsonl")
        self._progress = progress
        self.count = 0
        self.path.unlink(missing_ok=True)

    def add(self, image: str, reason: str) -> None:
        self._progress.say(f"failed: {reason}")
        self.count += 1
        with self.path.open("a") as file:
            file.write(json.dumps({"image": image, "error": reason}) + "\n")
