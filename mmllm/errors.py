"""Errors with a cause outside the code, and how every command ends with them: one readable block on stderr.

`MmllmError` and its children are caused by a user, a file or another program. They and the operating system's errors
(disk, network, memory) are printed as a block. Every other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The operating system's error in the message of a Rust library, which is what safetensors raises.
_RUST_ERROR = re.compile(r"code: (\d+), kind|\(os error (\d+)\)")
EXIT_USAGE = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

_MAX_WORD = 300  # characters; a longer word is base64, or a whole file that was given as a value
_SHOWN = 80  # characters that are shown of a longer word
_MAX_LINE = 5000  # characters
_LONG_WORD = re.compile(rf"\S{{{_MAX_WORD + 1},}}")


def shorten(text: str) -> str:
    """The text, in which words and lines that are too long to read are cut to their beginning."""
    text = _LONG_WORD.sub(lambda word: f"{word[0][:_SHOWN]}... ({len(word[0]):,} characters)", text)
    if len(text) <= _MAX_LINE:
        return text
    return "\n".join(
        line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}... ({len(line):,} characters)"
        for line in text.splitlines()
    )


class MmllmError(ValueError):
    """An error for users: what was given, what is allowed, and what to do. Its text is shortened by `shorten`.

    It is a ValueError too, so that pydantic reports it under its setting, and so that programs can catch it without
    importing this class.

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
    """Whether this error or one of its causes says that no more can be written: no space, no quota, a file limit."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK_FULL_ERRNOS:
            return True
        if type(cause).__name__ == "SafetensorError" and (match := _RUST_ERROR.search(str(cause))):
            return int(match[1] or match[2]) in DISK_FULL_ERRNOS
        cause = cause.__cause__ or cause.__context__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory. Of the CPU, torch says so only in the text of the error."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _explain(error: BaseException) -> tuple[str, int] | None:
    """(message, exit status) of an error with a cause outside the code; None for our own bugs."""
    if is_disk_full(error):
        return (
            "the disk is full, or a quota or file size limit is reached. What was saved before is intact; "
            "free some space and run the same command again",
            EXIT_FAILED,
        )
    if isinstance(error, MmllmError):
        return str(error), error.exit_status
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}", EXIT_FAILED
    if is_out_of_memory(error):
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"out of memory: {first_line}\nClose other programs that use this memory, lower --batch-size or "
            "--max-new-tokens where the command has them, give fewer or smaller pictures, or use --device auto (all "
            "GPUs and main memory together) or --device cpu"
        ), EXIT_FAILED
    return None


@contextlib.contextmanager
def report_errors(*, debug: bool = False) -> Iterator[None]:
    """Prints an error with a cause outside the code as one block and exits; any other error keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:
            # whoever read what is printed has left, as `head` does; else Python would say so once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # type: ignore[union-attr]
            sys.exit(EXIT_FAILED)
        explained = _explain(error)
        if explained is None or debug or os.environ.get("MMLLM_DEBUG"):
            raise
        print(f"error: {shorten(explained[0])}", file=sys.stderr)
        sys.exit(explained[1])
