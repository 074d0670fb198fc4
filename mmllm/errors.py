"""How every command ends when something goes wrong: one readable block on stderr, and the right exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator

from mmllm.user_error import shorten

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How writers that are not Python's own tell the operating system's error: safetensors, in the words of Rust.
_RUST_ERROR = re.compile(r"code: (\d+), kind|\(os error (\d+)\)")
USAGE = 2
FAILED = 1
INTERRUPTED = 130


def is_disk_full(error: BaseException) -> bool:
    """Whether this error, or one behind it, says that no more can be written: no space, no quota, a file limit."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK_FULL:
            return True
        if type(seen).__name__ == "SafetensorError" and (found := _RUST_ERROR.search(str(seen))):
            return int(found[1] or found[2]) in DISK_FULL
        seen = seen.__cause__ or seen.__context__
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left; torch says so of the CPU in words alone."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _explain(error: BaseException) -> tuple[str, int] | None:
    """(message, exit status) of an error that has a cause outside the code; None for our own mistakes."""
    from mmllm.config import ConfigError

    if isinstance(error, ConfigError):
        return str(error), USAGE
    if is_disk_full(error):
        return (
            "the disk is full, or a limit on what may be written is reached. What was saved before is whole; "
            "free some space and start the same command again",
            FAILED,
        )
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}", FAILED
    name = type(error).__name__
    if isinstance(error, ValueError) or name in ("TrainingError", "InterruptedRunError"):
        return str(error), INTERRUPTED if name == "InterruptedRunError" else FAILED
    if is_out_of_memory(error):
        first = str(error).splitlines()[0] if str(error) else name
        return (
            f"out of memory: {first}\nClose what else uses this memory, lower --batch-size or --max-new-tokens where "
            "the command has them, give fewer or smaller pictures, or use --device auto (all GPUs and main memory "
            "together) or --device cpu"
        ), FAILED
    return None


@contextlib.contextmanager
def report_errors(*, debug: bool = False) -> Iterator[None]:
    """Ends the process with one block for an error with an outside cause; anything else keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        explained = _explain(error)
        if explained is None or debug or os.environ.get("MMLLM_DEBUG"):
            raise
        print(f"error: {shorten(explained[0])}", file=sys.stderr)
        sys.exit(explained[1])
