"""One line of `mmllm doctor`'s report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

GIB = 2**30
# What broken packages, files and models raise; each becomes a line of the report.
FAILURES = (ImportError, OSError, RuntimeError, ValueError, KeyError, AttributeError)

State = Literal["ok", "note", "broken"]  # a note is worth knowing; only `broken` makes the command fail


@dataclass(frozen=True)
class Finding:
    """What was examined, and the result in words."""

    area: str
    name: str
    state: State
    text: str


def attempt(area: str, name: str, examine: Callable[[], str], *, otherwise: State = "broken") -> Finding:
    """The text that `examine` returns, or the error that it raised with the state `otherwise`."""
    try:
        return Finding(area, name, "ok", examine())
    except FAILURES as error:
        return Finding(area, name, otherwise, str(error) or type(error).__name__)
