"""Errors with a cause outside the code, and how every command ends with them: one readable block on stderr.

`MmllmError` and its children are what a user, a file or another program did. They and the operating system's own errors
(disk, network, memory) are told in a block; every other exception is a mistake of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How writers that are not Python's own tell the operating system's error: safetensors, in the words of Rust.
_RUST_ERROR = re.compile(r"code: (\d+), kind|\(os error (\d+)\)")
EXIT_USAGE = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

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


class MmllmError(ValueError):
    """What was given, what is allowed, and what to do; values that are too long to read are shortened.

    A ValueError too, so that pydantic reports it by setting, and so that a program may catch it without importing us.

    Example:
        import mmllm

        try:
            mmllm.load("no/such/folder")
        except mmllm.MmllmError as error:
            print(error)
    """

    exit_status = EXIT_FAILED

    def __init__(self, message: object = ""):
        super().__init__(shorten(str(message)))


def is_disk_full(error: BaseException) -> bool:
    """Whether this error, or one behind it, says that no more can be written: no space, no quota, a file limit."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK_FULL_ERRNOS:
            return True
        if type(seen).__name__ == "SafetensorError" and (found := _RUST_ERROR.search(str(seen))):
            return int(found[1] or found[2]) in DISK_FULL_ERRNOS
        seen = seen.__cause__ or seen.__context__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left; torch says so of the CPU in words alone."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _explain(error: BaseException) -> tuple[str, int] | None:
    """(message, exit status) of an error that has a cause outside the code; None for our own mistakes."""
    if is_disk_full(error):
        return (
            "the disk is full, or a limit on what may be written is reached. What was saved before is whole; "
            "free some space and start the same command again",
            EXIT_FAILED,
        )
    if isinstance(error, MmllmError):
        return str(error), error.exit_status
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}", EXIT_FAILED
    if is_out_of_memory(error):
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"out of memory: {first}\nClose what else uses this memory, lower --batch-size or --max-new-tokens where "
            "the command has them, give fewer or smaller pictures, or use --device auto (all GPUs and main memory "
            "together) or --device cpu"
        ), EXIT_FAILED
    return None


@contextlib.contextmanager
def report_errors(*, debug: bool = False) -> Iterator[None]:
    """Ends the process with one block for an error with an outside cause; anything else keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        explained = _explain(error)
        if explained is None or debug or os.environ.get("MMLLM_DEBUG"):
            raise
        print(f"error: {shorten(explained[0])}", file=sys.stderr)
        sys.exit(explained[1])
