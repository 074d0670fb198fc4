"""The watchdog: a thread that reports a stalled run, what it waits for, and in which examples."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from mmllm.training.guards import shown_names

CHECKS = 4  # times per `stall_seconds` that the thread checks for progress


def say_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def mix_of(batches: Sequence[Any]) -> str:
    """Text with the numbers of pictures and text-only examples; empty for batches that do not count pictures."""
    counts = [count for batch in batches for count in getattr(batch, "images_per_example", ())]
    with_pictures = sum(count > 0 for count in counts)
    if not counts:
        return ""
    return f"; {sum(counts)} pictures in {with_pictures} examples, {len(counts) - with_pictures} text-only"


class Watchdog:
    """Reports what this process waits for after `stall_seconds` without progress. 0 turns it off.

    The loop calls `waiting_for` before each phase. The report is repeated each time the wait has doubled, and once more
    when the run goes on.
    """

    def __init__(
        self,
        stall_seconds: float,
        *,
        rank: int,
        world_size: int,
        names: Callable[[Any], list[str]],
        say: Callable[[str], None] = say_error,
    ):
        self.stall_seconds, self.names, self.say = stall_seconds, names, say
        self.who = f"process {rank} of {world_size}"
        self._now: tuple[float, int, str, Sequence[Any]] = (time.monotonic(), 0, "the first step", ())
        self._main = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def waiting_for(self, step: int, what: str, batches: Sequence[Any] = ()) -> None:
        """Records the phase that begins now, its step (from 0) and its micro-batches."""
        self._now = (time.monotonic(), step, what, batches)

    def step(self) -> int:
        return self._now[1]

    def __enter__(self) -> Watchdog:
        if self.stall_seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        reported: tuple[float, int, str, Sequence[Any]] | None = None
        limit = self.stall_seconds
        while not self._end.wait(self.stall_seconds / CHECKS):
            now = self._now
            if reported is not None and now is not reported:
                self.say(f"{self.who}: goes on after {now[0] - reported[0]:.0f} s")
                reported, limit = None, self.stall_seconds
            waited = time.monotonic() - now[0]
            if waited >= limit:
                self.say(self._text(now, waited))
                reported, limit = now, 2 * waited

    def _text(self, now: tuple[float, int, str, Sequence[Any]], waited: float) -> str:
        _, step, waits_for, batches = now
        text = f"{self.who}: no progress for {waited:.0f} s in step {step + 1}, waits for {waits_for}"
        if names := [name for batch in batches for name in self.names(batch)]:
            text += f". Examples: {shown_names(names)}{mix_of(batches)}"
        if frame := sys._current_frames().get(self._main):
            place = traceback.extract_stack(frame)[-1]
            text += f". It is in {place.name}, {place.filename}:{place.lineno}"
        return text
