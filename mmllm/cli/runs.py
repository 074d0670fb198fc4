"""Commands about a run: train, report, plan, check, explain."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmllm.cli.options import Config, ConfigWithData, Overrides, path, user_errors
from mmllm.errors import EXIT_FAILED

commands = typer.Typer()


@commands.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[
        int, typer.Option(min=1, help="On this machine; they share compute.batch_size. On a CPU 2 beat 2 threads.")
    ] = 1,
) -> None:
    """Train a stage; the same as `accelerate launch train/STAGE.py CONFIG`. Goes on where a run was stopped."""
    with user_errors():
        from mmllm.config import ConfigError

        given = [*(overrides or []), *context.args]
        if wrong := [text for text in given if text.startswith("-")]:
            raise ConfigError(f"unknown option {wrong[0]}; settings are given as section.key=value")
        if processes > 1:
            from mmllm.config.file import load_config
            from mmllm.distributed.torchrun import launch

            launch(config, given, load_config(config, given), processes)
        from mmllm.stages.run import main

        main(None, [str(config), *given])


@commands.command()
def report(
    run: Annotated[Path, typer.Argument(parser=path, help="The folder of a run, also of one that is not finished.")],
) -> None:
    """Write RUN/report.html anew: curves, answers, alarms and settings in one file."""
    with user_errors():
        from mmllm.runs.report import write_report

        print(write_report(run))


@commands.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Over how many devices such as this one the run is spread.")] = 1,
    memory: Annotated[Optional[str], typer.Option(help="Would it fit there? Such as 24GB; default: here.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Run the longest batch once; say what the run needs of memory, time and disk, and what to change to need less."""
    with user_errors():
        from mmllm.config.file import load_config
        from mmllm.stages.plan import make_plan, parse_size, show, to_json

        limit = parse_size(memory) if memory else None
        made = make_plan(load_config(config, overrides or []), gpus=gpus, memory=limit)
        print(to_json(made)) if as_json else show(made)
        if not made.fits:
            sys.exit(EXIT_FAILED)


@commands.command()
def check(
    config: ConfigWithData,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Look at all data of a run before it starts: what is usable, what is not, and why."""
    with user_errors():
        from mmllm.diagnose.check import check_data

        if not check_data(config, overrides or [], as_json=as_json):
            sys.exit(EXIT_FAILED)


@commands.command()
def explain(
    config: ConfigWithData,
    overrides: Overrides = None,
    sample: Annotated[Optional[str], typer.Option(help="The id of an example; default: the first one.")] = None,  # noqa: UP045
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(parser=path, help="Also write a page of one file for a browser."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what the model will see and be taught from one example, and whether it will be asked the same way."""
    with user_errors():
        from mmllm.diagnose.explain_command import run_explain

        run_explain(config, overrides or [], sample=sample, html=html, as_json=as_json)
