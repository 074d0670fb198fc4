"""The `mmllm` command, a file for each group of commands.

Imports lazily: each command imports what it needs when it runs, so that `mmllm --help` loads neither torch nor
transformers.
"""

from __future__ import annotations

from typing import Annotated

import typer

from mmllm.cli import answers, caption, configs, doctor, evaluation, models, runs, scenes
from mmllm.cli.options import show_tracebacks

app = typer.Typer(
    name="mmllm", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Trains LLaVA-style vision-language models out of parts you pick, and puts them to work.",
)  # fmt: skip


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    show_tracebacks(debug)


for group in (runs, answers, evaluation, models, scenes, doctor):
    app.add_typer(group.commands)
app.add_typer(caption.commands, name="caption")
app.add_typer(configs.commands, name="configs")


def main() -> None:
    """The console script."""
    app()
