"""The model card: what a checkpoint is, what it was made of, and the commands that put it to work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_CARD = """---
library_name: mmllm
pipeline_tag: image-text-to-text
---

# {name}

A vision-language model made with mmllm: {made}.

| part | from |
|---|---|
{parts}

| measure, at the end of training | value |
|---|---|
{figures}

{notes}

    mmllm chat {folder} --image PICTURE.png
    mmllm demo {folder}
    mmllm caption {folder} FOLDER_OF_PICTURES --out captions.jsonl
    mmllm eval {folder} scenes-val
    mmllm doctor {folder}    # every file, and whether it still gives the answers in `golden.json`
{merge}
What it says about pictures unlike its training data is a guess.
"""
_SETTINGS = (
    "The settings of the run are in `config.yaml`; `mmllm train {folder}/config.yaml out=NEW_FOLDER` runs it again."
)
_ADAPTER = (
    "It holds a LoRA adapter in peft's format (`adapter/`), the projector and the vision tower. All other weights are "
    "those of `{source}`, read from there and refused where they have changed. Merged, it needs neither them nor peft."
)
_WHOLE = "It is whole: there is no adapter to merge."


def model_card(
    folder: Path,
    made: str,
    origin: dict[str, Any],
    figures: dict[str, Any],
    *,
    base: dict[str, Any] | None = None,
    has_settings: bool = False,
) -> str:
    """The README.md of a checkpoint directory."""
    shown = {name: value for name, value in figures.items() if name not in ("step", "grad_norm", "learning_rate")}
    notes = [_SETTINGS.format(folder=folder)] if has_settings else []
    notes.append(_ADAPTER.format(source=base["source"]) if base else _WHOLE)
    return _CARD.format(
        name=folder.name,
        folder=folder,
        made=made,
        notes="\n\n".join(notes),
        merge=f"    mmllm merge {folder} NEW_FOLDER\n" if base else "",
        parts="\n".join(f"| {part.replace('_', ' ')} | {source} |" for part, source in origin.items()),
        figures="\n".join(f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in shown.items())
        or "| none | |",
    )
