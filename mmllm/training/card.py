"""The model card: what a checkpoint is, what it was made of, and the commands that put it to work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmllm.config import StageConfig

_CARD = """---
library_name: mmllm
pipeline_tag: image-text-to-text
---

# {name}

A vision-language model trained with mmllm: {stage}, {steps} steps on {num_examples} examples.

| part | from |
|---|---|
{parts}

| measure, at the end of training | value |
|---|---|
{figures}

The settings of the run are in `config.yaml`; `mmllm train {folder}/config.yaml out=NEW_FOLDER` runs it again.

    mmllm chat {folder} --image PICTURE.png
    mmllm demo {folder}
    mmllm caption {folder} FOLDER_OF_PICTURES --out captions.jsonl
    mmllm eval {folder} scenes-val

What it says about pictures unlike its training data is a guess.
"""


def model_card(
    out: Path, config: StageConfig, origin: dict[str, Any], figures: dict[str, Any], num_examples: int | None
) -> str:
    """The README.md of a checkpoint directory."""
    shown = {name: value for name, value in figures.items() if name not in ("step", "grad_norm", "learning_rate")}
    return _CARD.format(
        name=out.name,
        folder=out,
        stage=config.stage,
        steps=config.optim.max_steps,
        num_examples="streamed" if num_examples is None else num_examples,
        parts="\n".join(f"| {part.replace('_', ' ')} | {source} |" for part, source in origin.items()),
        figures="\n".join(f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in shown.items())
        or "| none | |",
    )
