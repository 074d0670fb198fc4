"""The command that measures a model: eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmllm.cli.options import Device, Dtype, Model, path, source, user_errors

commands = typer.Typer()


@commands.command("eval")
def evaluate(
    model: Model,
    tasks: Annotated[
        list[str], typer.Argument(parser=source, help="scenes-val, scenes-compositions, or a folder of `mmllm scenes`.")
    ],
    out: Annotated[Optional[Path], typer.Option(parser=path, help="Write the results to this JSON file.")] = None,  # noqa: UP045
    max_pictures: Annotated[Optional[int], typer.Option(min=1, help="Ask about this many pictures only.")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Ask a model everything about pictures whose answers are known, with the right and with shuffled pictures."""
    with user_errors():
        from mmllm.evaluation.run import evaluate_model

        results = evaluate_model(
            model, tasks, max_pictures=max_pictures, batch_size=batch_size, device=device, dtype=dtype, quiet=as_json
        )
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=2) + "\n")
        if as_json:
            print(json.dumps(results, indent=2))
