"""Captioning jobs: caption MODEL INPUT ..., and the commands that look at their ledgers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from mmllm.cli.options import Device, Dtype, Model, path, source, usage_error, user_errors
from mmllm.errors import EXIT_FAILED


class RunByDefault(TyperGroup):
    """`mmllm caption MODEL INPUT ...` is `mmllm caption run MODEL INPUT ...`."""

    def with_default(self, words: list[str]) -> list[str]:
        is_named = not words or words[0] in (*self.commands, "--help")
        return words if is_named else ["run", *words]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self.with_default(args))


commands = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    help="Caption pictures: mmllm caption MODEL INPUT ... --out FILE. All its options: mmllm caption run --help. Then "
    "look at the job, and export its captions.",
)
LedgerPath = Annotated[Path, typer.Argument(parser=path, help="The ledger of a job: OUT.ledger beside its output.")]
FORMATS_HELP = "jsonl, parquet, txt, json, llava, kohya or webdataset."


@commands.command()
def run(
    model: Model,
    inputs: Annotated[
        list[str],
        typer.Argument(parser=source, help="Pictures, folders, patterns, lists (.jsonl .csv .parquet), .tar, or URLs."),
    ],
    out: Annotated[Path, typer.Option(parser=path, help="The file or folder to write; a second run continues it.")],
    prompt: Annotated[
        str, typer.Option(help="What the model is asked; {name}, {folder}, {tags} and columns of a list are filled in.")
    ] = "Describe the picture.",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures captioned at once.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Longest caption.")] = 128,
    num_captions: Annotated[int, typer.Option(min=1, help="Captions of each picture, all but the first sampled.")] = 1,
    output_format: Annotated[str, typer.Option("--format", help=FORMATS_HELP)] = "jsonl",
    redo: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Make anew what is cut, flagged, failed, or of other settings or models; may be repeated."),
    ] = None,
    image_column: Annotated[Optional[str], typer.Option(help="The column of a list that holds the picture.")] = None,  # noqa: UP045
    script: Annotated[
        str, typer.Option(help="Letters wanted: latin, cyrillic, han, japanese ..., any; auto: those of the prompt.")
    ] = "auto",
    retry: Annotated[bool, typer.Option("--retry/--no-retry", help="Try flagged captions once more.")] = True,
    prefix: Annotated[str, typer.Option(help="Each caption begins with this text.")] = "",
    ban: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="No caption may contain this text; may be repeated."),
    ] = None,
    json_schema: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(parser=path, help="A file with the JSON schema that each caption follows."),
    ] = None,
    regex: Annotated[Optional[str], typer.Option(help="Each caption matches this regular expression.")] = None,  # noqa: UP045
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Caption pictures in batches. A job that was killed continues; what cannot be read is reported and skipped."""
    with user_errors():
        from mmllm.captioning.command import CaptionOptions, caption_pictures

        options = CaptionOptions(
            prompt=prompt, batch_size=batch_size, max_new_tokens=max_new_tokens, num_captions=num_captions,
            output_format=output_format, redo=redo or (), image_column=image_column, script=script, retry=retry,
            prefix=prefix, banned=ban or (), regex=regex,
            json_schema=None if json_schema is None else json_schema.read_text(encoding="utf-8"),
            device=device, dtype=dtype,
        )  # fmt: skip
        if caption_pictures(model, inputs, out, options):
            sys.exit(EXIT_FAILED)


@commands.command()
def status(ledger: LedgerPath) -> None:
    """How far a job is: pictures by state, flags, failures, duplicates, and who works on it now."""
    with user_errors():
        from mmllm.captioning.ledger import Ledger
        from mmllm.captioning.status import describe_status

        with Ledger(ledger) as opened:
            print(describe_status(opened))


@commands.command()
def export(
    ledger: LedgerPath,
    out: Annotated[Path, typer.Option(parser=path, help="The file or folder to write.")],
    output_format: Annotated[str, typer.Option("--format", help=FORMATS_HELP)],
) -> None:
    """Write the captions of a job in another format; flagged ones are left out of llava, kohya, txt and webdataset."""
    with user_errors():
        from mmllm.captioning.ledger import Ledger
        from mmllm.captioning.outputs import export_captions

        with Ledger(ledger) as opened:
            print("\n".join(export_captions(opened, out, output_format)))


@commands.command()
def report(
    ledger: LedgerPath,
    out: Annotated[Path, typer.Option(parser=path, help="The HTML file to write; it holds small copies of pictures.")],
    pictures: Annotated[int, typer.Option(min=1, help="Pictures for each flag, and at random.")] = 24,
    seed: Annotated[int, typer.Option(help="Draws the same pictures again.")] = 0,
) -> None:
    """Write a page with counts, flagged pictures by flag, and pictures at random."""
    with user_errors():
        from mmllm.captioning.contact_sheet import write_report
        from mmllm.captioning.ledger import Ledger

        with Ledger(ledger) as opened:
            write_report(opened, out, num_pictures=pictures, seed=seed)
        print(f"{out} is written")


@commands.command()
def audit(
    ledger: LedgerPath,
    labels: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(parser=path, help="The table of --out with yes or no in its column `good`."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(parser=path, help="Write captions to label, as CSV.")] = None,  # noqa: UP045
    sample: Annotated[int, typer.Option(min=1, help="How many to write.")] = 100,
    seed: Annotated[int, typer.Option(help="Draws the same captions again.")] = 0,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
) -> None:
    """The rate of good captions of a whole job, from a person's labels for some: first --out, then --labels."""
    if (labels is None) == (out is None):
        usage_error("give --out FILE.csv to draw captions to label, or --labels FILE.csv when they are labelled")
    with user_errors():
        from mmllm.captioning import audit as audits
        from mmllm.captioning.ledger import Ledger

        with Ledger(ledger) as opened:
            if out is not None:
                count = audits.write_sample(opened, out, num_pictures=sample, seed=seed)
                print(f"{count} captions in {out}: write yes or no into the column `good`, then give it as --labels")
            elif labels is not None:
                print(audits.describe_audit(audits.audit(opened, labels, confidence=confidence), confidence))
