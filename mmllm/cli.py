"""The `mmllm` command. Imports lazily: `mmllm --help` loads neither torch nor transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmllm.errors import EXIT_FAILED, EXIT_USAGE, MmllmError, report_errors

app = typer.Typer(
    name="mmllm", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Trains LLaVA-style vision-language models out of parts you pick, and puts them to work.",
)  # fmt: skip
_debug = False


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


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    global _debug
    _debug = debug


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(parser=path, help="A YAML file of configs/.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="section.key=value ...")] = None,  # noqa: UP045
) -> None:
    """Train a stage; the same as `accelerate launch train/STAGE.py CONFIG`. Goes on where a run was stopped."""
    with report_errors(debug=_debug):
        from mmllm.config import ConfigError

        given = [*(overrides or []), *context.args]
        if wrong := [text for text in given if text.startswith("-")]:
            raise ConfigError(f"unknown option {wrong[0]}; settings are given as section.key=value")
        from mmllm.stages.run import main

        main(None, [str(config), *given])


@app.command()
def report(
    run: Annotated[Path, typer.Argument(parser=path, help="The folder of a run, also of one that is not finished.")],
) -> None:
    """Write RUN/report.html anew: curves, answers, alarms and settings in one file."""
    with report_errors(debug=_debug):
        from mmllm.runs.report import write_report

        print(write_report(run))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(parser=path, help="A YAML file of configs/.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="section.key=value ...")] = None,  # noqa: UP045
    gpus: Annotated[int, typer.Option(min=1, help="Over how many devices such as this one the run is spread.")] = 1,
    memory: Annotated[Optional[str], typer.Option(help="Would it fit there? Such as 24GB; default: here.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Run the longest batch once; say what the run needs of memory, time and disk, and what to change to need less."""
    with report_errors(debug=_debug):
        from mmllm.config.file import load_config
        from mmllm.stages.plan import make_plan, parse_size, show, to_json

        limit = parse_size(memory) if memory else None
        made = make_plan(load_config(config, overrides or []), gpus=gpus, memory=limit)
        print(to_json(made)) if as_json else show(made)
        if not made.fits:
            sys.exit(EXIT_FAILED)


@app.command()
def check(
    config: Annotated[Path, typer.Argument(parser=path, help="A YAML file of configs/ with a data section.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="section.key=value ...")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Look at all data of a run before it starts: what is usable, what is not, and why."""
    with report_errors(debug=_debug):
        from mmllm.diagnose.check import check_data

        if not check_data(config, overrides or [], as_json=as_json):
            sys.exit(EXIT_FAILED)


@app.command()
def explain(
    config: Annotated[Path, typer.Argument(parser=path, help="A YAML file of configs/ with a data section.")],
    overrides: Annotated[Optional[list[str]], typer.Argument(help="section.key=value ...")] = None,  # noqa: UP045
    sample: Annotated[Optional[str], typer.Option(help="The id of an example; default: the first one.")] = None,  # noqa: UP045
    html: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(parser=path, help="Also write a page of one file for a browser."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what the model will see and be taught from one example, and whether it will be asked the same way."""
    with report_errors(debug=_debug):
        from mmllm.diagnose.explain_command import run_explain

        run_explain(config, overrides or [], sample=sample, html=html, as_json=as_json)


@app.command()
def chat(
    model: Model,
    image: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(parser=path, help="A picture to ask about; may be repeated."),
    ] = None,
    prompt: Annotated[Optional[str], typer.Option(help="Ask this one question and print the answer.")] = None,  # noqa: UP045
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    seed: Annotated[Optional[int], typer.Option(help="Makes a sampled answer repeatable.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help='Print {"text", ...}; needs --prompt.')] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Talk to a model in the terminal, or ask it one thing with --prompt."""
    with report_errors(debug=_debug):
        from mmllm.images import load_image
        from mmllm.inference.engine import Engine, Sampling
        from mmllm.inference.terminal_chat import ask_once, talk

        sampling = Sampling(temperature, top_p, max_new_tokens, seed)
        if as_json and prompt is None:
            _usage("--json prints one answer: give the question with --prompt")
        images = list(image or [])
        for path in images:
            load_image(path, may_shrink=True)  # a wrong one is told before the model is loaded
        engine = Engine.load(model, device=device, dtype=dtype)
        if prompt is not None:
            ask_once(engine, prompt, images, sampling, as_json=as_json)
        else:
            talk(engine, images, sampling)


@app.command()
def caption(
    model: Model,
    inputs: Annotated[
        list[Path], typer.Argument(parser=path, help="Pictures, or folders that are searched for pictures.")
    ],
    out: Annotated[
        Path, typer.Option(parser=path, help="The JSON-lines file to write; a second run goes on behind its last line.")
    ],
    prompt: Annotated[str, typer.Option(help="What the model is asked for each picture.")] = "Describe the picture.",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures captioned at once.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Longest caption.")] = 128,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Caption pictures in batches, one JSON line each; what cannot be read is reported and skipped."""
    with report_errors(debug=_debug):
        from mmllm.captioning.command import caption_pictures

        num_failed = caption_pictures(
            model, inputs, out, prompt=prompt, batch_size=batch_size, max_new_tokens=max_new_tokens, device=device,
            dtype=dtype,
        )  # fmt: skip
        if num_failed:
            sys.exit(EXIT_FAILED)


@app.command("eval")
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
    with report_errors(debug=_debug):
        from mmllm.evaluation.run import evaluate_model

        results = evaluate_model(
            model, tasks, max_pictures=max_pictures, batch_size=batch_size, device=device, dtype=dtype, quiet=as_json
        )
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=2) + "\n")
        if as_json:
            print(json.dumps(results, indent=2))


@app.command()
def merge(
    model: Annotated[Path, typer.Argument(parser=path, help="A checkpoint that a LoRA run left.")],
    out: Annotated[
        Path, typer.Argument(parser=path, help="A new folder, for the same model as one checkpoint without adapter.")
    ],
    device: Device = None,
) -> None:
    """Merge a LoRA adapter into its base in full precision, and prove that the model has stayed the same."""
    with report_errors(debug=_debug):
        from mmllm.checkpoint.merge import merge_checkpoint
        from mmllm.inference.placement import find_device

        found = merge_checkpoint(model, out, device=find_device(device))
        print(
            f"{out}: merged; on the golden prompts no logit moved by more than {found['moved']:.2g} "
            f"(the largest is {found['largest_logit']:.3g})"
        )


@app.command()
def demo(
    model: Model,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    dtype: Dtype = None,
) -> None:
    """Open the chat page on this machine."""
    with report_errors(debug=_debug):
        import mmllm

        root = Path(mmllm.__file__).resolve().parent.parent  # the page is installed beside this package
        # -P: not a `demo` that happens to lie in the working directory
        command = [sys.executable, "-P", "-m", "demo", str(model.resolve()), "--port", str(port)]
        command += ["--dtype", dtype] if dtype else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        sys.exit(subprocess.call([*command, "--open" if open_browser else "--no-open"], env=environment))


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(parser=path, help="A new folder; data/scenes is where the configs look.")],
    train: Annotated[int, typer.Option(min=0, help="Pictures to train on.")] = 12000,
    val: Annotated[int, typer.Option(min=0, help="Pictures to judge by, of scenes that training never shows.")] = 500,
    compositions: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Pictures of combinations that training never shows; default: as many as val."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    num_processes: Annotated[Optional[int], typer.Option(min=1, help="Default: one a core.")] = None,  # noqa: UP045
) -> None:
    """Draw the embedded world's dataset: PNG files, a scene graph beside each, conversations in LLaVA's format."""
    with report_errors(debug=_debug):
        from rich.progress import Progress

        from mmllm.scenes.write import write_scenes

        counts = {"train": train, "val": val, "compositions": val if compositions is None else compositions}
        with Progress() as progress:
            task = progress.add_task("drawing", total=sum(counts.values()))
            write_scenes(
                out, counts, seed, num_processes=num_processes,  # type: ignore[arg-type]
                advance=lambda count: progress.update(task, advance=count),
            )  # fmt: skip
        print(
            f"{counts['train']} train, {counts['val']} val and {counts['compositions']} compositions pictures in {out}"
        )


@app.command()
def doctor(
    model: Annotated[Optional[Path], typer.Argument(parser=path, help="Also verify this checkpoint.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what is installed, what works here, what is missing and why."""
    with report_errors(debug=_debug):
        from mmllm.diagnose.doctor import examine

        if not examine(model, as_json=as_json):
            sys.exit(EXIT_FAILED)


@app.command("import")
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
    with report_errors(debug=_debug):
        from mmllm.interop.import_llava import ImportOptions, import_model

        verdict = import_model(source, out, ImportOptions(template, vision, base, projector))
        print(f"{out}: imported from {source}")
        if verdict:
            print(
                f"given the same tokens, logits differ from transformers' by {verdict.max_logit_difference:.1e} at most"
            )
            print(verdict.prompts)


exports = typer.Typer(no_args_is_help=True, help="Write a model in a format that other programs read.")
app.add_typer(exports, name="export")


@exports.command("hf")
def export_hf(
    model: Model,
    out: Annotated[Path, typer.Argument(parser=path, help="A new folder.")],
) -> None:
    """Write a model for transformers, vLLM and TRL: LlavaForConditionalGeneration, compared before it is left there."""
    with report_errors(debug=_debug):
        from mmllm.interop.hf_llava import export_hf as export

        verdict = export(model, out)
        print(
            f"{out}: transformers reads it and gives the same tokens, pixels and answers for "
            f"{verdict.num_conversations} conversations; logits differ by at most {verdict.max_logit_difference:.1e}"
        )


def _usage(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(EXIT_USAGE)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
