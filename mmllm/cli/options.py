"""What several commands share: kinds of arguments, and how errors are shown."""

from __future__ import annotations

import re
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, NoReturn, Optional

import typer

from mmllm.errors import EXIT_USAGE, MmllmError, report_errors

_debug = False


def show_tracebacks(shows: bool) -> None:
    """What `mmllm --debug COMMAND` asks for, for the command that follows."""
    global _debug
    _debug = shows


def user_errors() -> AbstractContextManager[None]:
    """Around a command: errors become one readable block, or a traceback with --debug."""
    return report_errors(debug=_debug)


def usage_error(text: str) -> NoReturn:
    """Ends the command for how it was called."""
    print(f"error: {text}", file=sys.stderr)
    sys.exit(EXIT_USAGE)


def source(text: str) -> str:
    """A folder or the name of something else; `~` and the like are understood here, also where no shell has done it."""
    from mmllm.paths import expand_path

    try:
        return expand_path(text)
    except MmllmError as error:
        raise typer.BadParameter(str(error)) from error


def path(text: str) -> Path:
    return Path(source(text))


Model = Annotated[Path, typer.Argument(parser=path, help="A checkpoint folder, such as runs/tiny/stage2.")]


def _device(name: Optional[str]) -> Optional[str]:  # noqa: UP045
    if name is not None and not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise typer.BadParameter(f"{name!r} is none of auto, cpu, mps, cuda, cuda:0, cuda:1 ...")
    return name


Device = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="cpu, cuda, cuda:1, mps, or auto: all GPUs and memory together; default: a GPU where there is one.",
        callback=_device,
    ),
]


def _dtype(name: Optional[str]) -> Optional[str]:  # noqa: UP045
    if name not in (None, "stored", "fp32", "bf16", "fp16"):
        raise typer.BadParameter(f"{name!r} is none of stored, fp32, bf16, fp16")
    return name


Dtype = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="What the weights are held in: fp32, bf16, fp16, or stored: each part as it is stored; default: bf16 or "
        "fp16 on a GPU; on a CPU as stored, or fp32 where it does not compute in 16 bits.",
        callback=_dtype,
    ),
]


Config = Annotated[Path, typer.Argument(parser=path, help="A YAML file of configs/.")]
ConfigWithData = Annotated[Path, typer.Argument(parser=path, help="A YAML file of configs/ with a data section.")]
Overrides = Annotated[Optional[list[str]], typer.Argument(help="section.key=value ...")]  # noqa: UP045
