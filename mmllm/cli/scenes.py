"""The command that draws the embedded world: scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mmllm.cli.options import path, user_errors

commands = typer.Typer()


@commands.command()
def scenes(
    out: Annotated[Path, typer.Argument(parser=path, help="A new folder; data/scenes is where the configs look.")],
    train: Annotated[int, typer.Option(min=0, help="Pictures to train on.")] = 12000,
    val: Annotated[int, typer.Option(min=0, help="Pictures to judge by, of scenes that training never shows.")] = 500,
    compositions: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Pictures of combinations that training never shows; default: as many as val."),
    ] = None,
    wordings: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Pictures asked about in words that training never shows; default: as many as val."),
    ] = None,
    reworded: Annotated[
        float, typer.Option(min=0, max=1, help="The fraction of training's questions that are in a person's own words.")
    ] = 0.5,
    small_talk: Annotated[
        bool, typer.Option(help="Also small talk, and questions about anything else; an LLM that talks needs none.")
    ] = True,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    num_processes: Annotated[Optional[int], typer.Option(min=1, help="Default: one a core.")] = None,  # noqa: UP045
) -> None:
    """Draw the embedded world's dataset: PNG files, a scene graph beside each, conversations in LLaVA's format."""
    with user_errors():
        from rich.progress import Progress

        from mmllm.scenes.write import write_scenes

        counts = {
            "train": train, "val": val, "compositions": val if compositions is None else compositions,
            "wordings": val if wordings is None else wordings,
        }  # fmt: skip
        with Progress() as progress:
            task = progress.add_task("drawing", total=sum(counts.values()))
            write_scenes(
                out, counts, seed, reworded=reworded, small_talk=small_talk, num_processes=num_processes,
                advance=lambda count: progress.update(task, advance=count),
            )  # fmt: skip
        print(f"pictures in {out}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
