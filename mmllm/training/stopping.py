"""Ctrl-C and SIGTERM during training: a message at once, and a stop that loses no work."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

SAME_STOP_SECONDS = 2  # a launcher forwards Ctrl-C to processes that have got it from the terminal already
STEP = "the current step is completed, and the state is saved"


class BrokenOffError(BaseException):
    """Raised by the signal handler in a block that may be interrupted. No `except Exception` catches it."""


class StopSignal:
    """Records SIGINT and SIGTERM and prints what happens next.

    A second signal, more than SAME_STOP_SECONDS after the first, goes to the previous handler, which ends the process.
    Only one process of a run has `speaks`, since a terminal sends Ctrl-C to all of them.
    """

    def __init__(self, *, speaks: bool = True):
        self.speaks = speaks
        self.received: list[float] = []
        self._effect, self._breaks = STEP, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def during(self, effect: str, *, breaks: bool = False) -> Iterator[None]:
        """Around a long block: `effect` says how it ends after a signal; `breaks` means at once, by BrokenOffError."""
        if breaks and self.received:
            raise BrokenOffError
        previous_effect, self._effect, self._breaks = self._effect, effect, breaks
        try:
            yield
        finally:
            self._effect, self._breaks = previous_effect, False

    def _receive(self, number: int, frame: Any) -> None:
        self.received.append(time.monotonic())
        if self.received[-1] - self.received[0] > SAME_STOP_SECONDS:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
            return
        if self.speaks and len(self.received) == 1:
            # not print: the signal may have interrupted one
            os.write(2, f"\nstopping: {self._effect}. A second Ctrl-C ends it at once\n".encode())
        if self._breaks:
            self._breaks = False
            raise BrokenOffError
