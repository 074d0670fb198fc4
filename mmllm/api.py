"""The functions that `mmllm` offers to programs. Each does what the command of the same name does, and raises errors
instead of ending the process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmllm.inference.engine import Engine

Paths = str | Path | Sequence[str | Path]


def load(path: str | Path, *, device: str | None = None, dtype: str | None = None, verify: bool = True) -> Engine:
    """Load a checkpoint, ready to answer questions about pictures.

    Args:
        path: A checkpoint folder, such as a run leaves.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` to spread a large model over all GPUs and main memory.
            Default: a GPU where there is one.
        dtype: `fp32`, `bf16`, `fp16`, or `stored` for the precision of the files. Default: `bf16` or `fp16` on a GPU;
            on a CPU the stored precision, or `fp32` where the CPU has no 16-bit instructions.
        verify: Compare the model with the golden answers in its checkpoint.

    Raises:
        MmllmError: The folder holds no checkpoint, a file is damaged, or a golden answer has changed.

    Example:
        import mmllm

        model = mmllm.load("runs/tiny/stage2")
        reply = model.ask("How many objects are there?", ["data/scenes/val/images/000003.png"])
        print(reply.text)
    """
    from mmllm.inference.engine import Engine
    from mmllm.paths import expand_path

    return Engine.load(expand_path(str(path)), device=device, dtype=dtype, verify=verify)


def caption(
    model: str | Path, inputs: Paths, out: str | Path, *, prompt: str = "Describe the picture.", batch_size: int = 16,
    max_new_tokens: int = 128, device: str | None = None, dtype: str | None = None,
) -> dict[str, str]:  # fmt: skip
    """Caption pictures into a JSON-lines file. A job that was stopped continues where it stopped.

    Args:
        model: A checkpoint folder.
        inputs: A picture, a folder that is searched for pictures, or several of them.
        out: The file to write, one line a picture. Pictures that have a line are not captioned again.
        prompt: What the model is asked about each picture.
        batch_size: Pictures captioned at once.
        max_new_tokens: The longest caption.
        device: As for `load`.
        dtype: As for `load`.

    Returns:
        The caption of each picture of `inputs`, by path. A picture that cannot be read has none; it is listed, with
        the reason, in `OUT.failed.jsonl`.

    Raises:
        MmllmError: There are no pictures, `model` is no checkpoint, or `out` is something else than such a job's.

    Example:
        import mmllm

        captions = mmllm.caption("runs/tiny/stage2", "data/scenes/val/images", "captions.jsonl", max_new_tokens=32)
        for path, text in captions.items():
            print(path, text)
    """
    from mmllm.captioning.command import CaptionOptions, caption_pictures
    from mmllm.captioning.inputs import PictureInputs
    from mmllm.captioning.json_lines import read_captions
    from mmllm.paths import expand_path

    given = [inputs] if isinstance(inputs, str | Path) else inputs
    paths, output = [expand_path(str(one)) for one in given], Path(expand_path(str(out)))
    options = CaptionOptions(
        prompt=prompt, batch_size=batch_size, max_new_tokens=max_new_tokens, device=device, dtype=dtype
    )
    caption_pictures(Path(expand_path(str(model))), paths, output, options)
    captions = read_captions(output)
    places = sorted({picture.place for picture in PictureInputs(paths)})
    return {place: captions[place] for place in places if place in captions}


def train(config: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Train a stage in this process, from its settings to its finished checkpoint.

    A run that was stopped continues from its newest saved state when it is called again. For several GPUs use
    `accelerate launch train/STAGE.py CONFIG`.

    Args:
        config: A YAML file, such as those of `configs/`.
        overrides: Settings that replace those of the file, as `section.key=value`.

    Returns:
        The folder of the run, which is a checkpoint that `load` takes.

    Raises:
        MmllmError: A setting or the data cannot be used, or the run stopped itself, with the reason.

    Example:
        import mmllm

        folder = mmllm.train("configs/tiny/stage1.yaml", ["optim.max_steps=4", "out=runs/short"])
        model = mmllm.load(folder)
    """
    from mmllm.config.file import load_config
    from mmllm.stages.run import run

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warn where workers are forked
    settings = load_config(config, _overrides(overrides))
    run(settings)
    return Path(settings.out)


def evaluate(
    model: str | Path, tasks: str | Sequence[str], *, max_pictures: int | None = None, batch_size: int = 64,
    device: str | None = None, dtype: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Ask a model questions about pictures whose answers are known.

    Args:
        model: A checkpoint folder.
        tasks: `scenes-val`, `scenes-compositions`, or a folder that `mmllm scenes` wrote; or several of them.
        max_pictures: Ask about this many pictures of each task only.
        batch_size: Questions answered at once.
        device: As for `load`.
        dtype: As for `load`.

    Returns:
        For each task `exact` (the share of exact matches), `types` and `counts` by question type, `shuffled` (the same
        scores with the pictures exchanged), and `guess` (the best score without a picture, by question type).

    Raises:
        MmllmError: A task is unknown or its data are missing, or `model` is no checkpoint.

    Example:
        import mmllm

        results = mmllm.evaluate("runs/tiny/stage2", "data/scenes/val", max_pictures=2)
        print(results["data/scenes/val"]["exact"])
    """
    from mmllm.evaluation.run import evaluate_model

    names = [tasks] if isinstance(tasks, str) else tasks
    return evaluate_model(
        model, names, max_pictures=max_pictures, batch_size=batch_size, device=device, dtype=dtype, quiet=True
    )


def _overrides(given: Sequence[str]) -> list[str]:
    """Raises ConfigError for a bare text, whose letters would be taken for overrides."""
    from mmllm.config import ConfigError

    if isinstance(given, str):
        raise ConfigError(f"overrides must be a list of section.key=value, got the text {given!r}; put it into a list")
    return list(given)
