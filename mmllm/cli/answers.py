"""Commands that ask a model: chat, and demo for the page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmllm.cli.options import Device, Dtype, Model, path, usage_error, user_errors

commands = typer.Typer()


@commands.command()
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
    top_k: Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0: from all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the likeliest one's probability.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said is less likely again.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted from the logits of what was answered.")] = 0.0,
    stop: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="End the answer before this text; may be repeated."),
    ] = None,
    ban: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="The answer must not contain this text; may be repeated."),
    ] = None,
    prefix: Annotated[str, typer.Option(help="The answer begins with this text.")] = "",
    json_schema: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(parser=path, help="A file with the JSON schema that the answer follows."),
    ] = None,
    regex: Annotated[Optional[str], typer.Option(help="The answer matches this regular expression.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help='Print {"text", ...}; needs --prompt.')] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Talk to a model in the terminal, or ask it one thing with --prompt."""
    with user_errors():
        from mmllm.images import load_image
        from mmllm.inference.engine import Engine
        from mmllm.inference.sampling import Sampling
        from mmllm.inference.terminal_chat import ask_once, talk

        sampling = Sampling(
            temperature, top_p, max_new_tokens, seed, top_k, min_p, repetition_penalty, presence_penalty,
            stop=tuple(stop or ()), banned=tuple(ban or ()), prefix=prefix, regex=regex,
            json_schema=None if json_schema is None else json_schema.read_text(encoding="utf-8"),
        )  # fmt: skip
        if as_json and prompt is None:
            usage_error("--json prints one answer: give the question with --prompt")
        images = list(image or [])
        for path in images:
            load_image(path, may_shrink=True)  # a wrong one is told before the model is loaded
        engine = Engine.load(model, device=device, dtype=dtype)
        if prompt is not None:
            ask_once(engine, prompt, images, sampling, as_json=as_json)
        else:
            talk(engine, images, sampling)


@commands.command()
def demo(
    model: Model,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    dtype: Dtype = None,
) -> None:
    """Open the chat page on this machine."""
    with user_errors():
        import mmllm

        root = Path(mmllm.__file__).resolve().parent.parent  # the page is installed beside this package
        # -P: not a `demo` that happens to lie in the working directory
        command = [sys.executable, "-P", "-m", "demo", str(model.resolve()), "--port", str(port)]
        command += ["--dtype", dtype] if dtype else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        sys.exit(subprocess.call([*command, "--open" if open_browser else "--no-open"], env=environment))
