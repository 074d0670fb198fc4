"""The base of errors that a user, a file or a disk caused. No message of theirs prints a whole picture or file."""

from __future__ import annotations

import re

_MAX_WORD = 300  # characters; longer ones are base64, or a file that was given as a value
_SHOWN = 80  # of those
_MAX_LINE = 5000
_LONG_WORD = re.compile(rf"\S{{{_MAX_WORD + 1},}}")


def shorten(text: str) -> str:
    """The text with the beginnings of words and lines that nobody reads to their end."""
    text = _LONG_WORD.sub(lambda word: f"{word[0][:_SHOWN]}... ({len(word[0]):,} characters)", text)
    if len(text) <= _MAX_LINE:
        return text
    return "\n".join(
        line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}... ({len(line):,} characters)"
        for line in text.splitlines()
    )


class UserError(ValueError):
    """What was given, what is allowed, and what to do; values that are too long to read are shortened."""

    def __init__(self, message: object = ""):
        super().__init__(shorten(str(message)))
