"""Commands that make one model out of another: merge, import, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mmllm.cli.options import Device, Model, path, source, user_errors

commands = typer.Typer()


@commands.command()
def merge(
    model: Annotated[Path, typer.Argument(parser=path, help="A checkpoint that a LoRA run left.")],
    out: Annotated[
        Path, typer.Argument(parser=path, help="A new folder, for the same model as one checkpoint without adapter.")
    ],
    device: Device = None,
) -> None:
    """Merge a LoRA adapter into its base in full precision, and prove that the model has stayed the same."""
    with user_errors():
        from mmllm.checkpoint.merge import merge_checkpoint
        from mmllm.inference.placement import find_device

        found = merge_checkpoint(model, out, device=find_device(device))
        print(
            f"{out}: merged; on the golden prompts no logit moved by more than {found['moved']:.2g} "
            f"(the largest is {found['largest_logit']:.3g})"
        )


@commands.command("import")
def import_(
    source: Annotated[
        str, typer.Argument(parser=source, help="A folder or hub name: transformers' Llava, LLaVA's own, or an LLM.")
    ],
    out: Annotated[Path, typer.Argument(parser=path, help="A new folder, for the checkpoint.")],
    template: Annotated[Optional[str], typer.Option(help="Its chat template, where its files do not say.")] = None,  # noqa: UP045
    vision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(parser=source, help="Its vision tower, such as transformers:FOLDER."),
    ] = None,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(parser=source, help="The LLM that a lone projector or LoRA belongs to."),
    ] = None,
    projector: Annotated[str, typer.Option(help="The fresh projector between an LLM and --vision.")] = "mlp",
) -> None:
    """Make a checkpoint of somebody else's model, compared with transformers where transformers can read it."""
    with user_errors():
        from mmllm.interop.import_llava import ImportOptions, import_model

        verdict = import_model(source, out, ImportOptions(template, vision, base, projector))
        print(f"{out}: imported from {source}")
        if verdict:
            print(
                f"given the same tokens, logits differ from transformers' by {verdict.max_logit_difference:.1e} at most"
            )
            print(verdict.prompts)


exports = typer.Typer(no_args_is_help=True, help="Write a model in a format that other programs read.")
commands.add_typer(exports, name="export")


@exports.command("hf")
def export_hf(
    model: Model,
    out: Annotated[Path, typer.Argument(parser=path, help="A new folder.")],
) -> None:
    """Write a model for transformers, vLLM and TRL: LlavaForConditionalGeneration, compared before it is left there."""
    with user_errors():
        from mmllm.interop.hf_llava import export_hf as export

        verdict = export(model, out)
        print(
            f"{out}: transformers reads it and gives the same tokens, pixels and answers for "
            f"{verdict.num_conversations} conversations; logits differ by at most {verdict.max_logit_difference:.1e}"
        )
