"""Ctrl-C and SIGTERM while a run trains: a word at once, and an end at which nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

SAME_STOP_SECONDS = 2  # launchers pass a Ctrl-C on to their processes, which got it from the terminal already
STEP = "the step in hand ends, and the state is saved"


class BrokenOffError(BaseException):
    """Raised by the signal itself, in what may be broken off. No `except Exception` on its way takes it."""


class StopSignal:
    """Collects both signals and says what happens now. A later, second one ends the process as it stands.

    `speaks` is set in one of the processes of a run: a terminal sends its Ctrl-C to all of them.
    """

    def __init__(self, *, speaks: bool = True):
        self.speaks = speaks
        self.received: list[float] = []
        self._does, self._breaks = STEP, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def during(self, does: str, *, breaks: bool = False) -> Iterator[None]:
        """Around something long: `does` says how a stop ends it. With `breaks` that is at once, by BrokenOffError."""
        if breaks and self.received:
            raise BrokenOffError
        before, self._does, self._breaks = self._does, does, breaks
        try:
            yield
        finally:
            self._does, self._breaks = before, False

    def _receive(self, number: int, frame: Any) -> None:
        self.received.append(time.monotonic())
        if self.received[-1] - self.received[0] > SAME_STOP_SECONDS:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
            return
        if self.speaks and len(self.received) == 1:
            # not print: the signal may have come in the middle of one
            os.write(2, f"\nstopping: {self._does}. A second Ctrl-C ends it as it stands\n".encode())
        if self._breaks:
            self._breaks = False
            raise BrokenOffError
