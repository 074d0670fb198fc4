"""The commands that say what is installed and what works: doctor and matrix."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmllm.cli.options import path, user_errors
from mmllm.errors import EXIT_FAILED

commands = typer.Typer()


@commands.command()
def doctor(
    model: Annotated[Optional[Path], typer.Argument(parser=path, help="Also verify this checkpoint.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what is installed, what works here, what is missing and why."""
    with user_errors():
        from mmllm.diagnose.doctor import examine

        if not examine(model, as_json=as_json):
            sys.exit(EXIT_FAILED)


@commands.command()
def matrix(
    axes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="Two axes, such as llm trains, to see their table; default: what is refused, and why."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cells as JSON.")] = False,
) -> None:
    """Print which encoders, LLMs, projectors and other choices work together, and which are refused and why."""
    with user_errors():
        from mmllm.compatibility import print_matrix

        print_matrix(tuple(axes or ()), as_json=as_json)
