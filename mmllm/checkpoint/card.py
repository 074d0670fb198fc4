"""Model cards, the README.md of a model's folder: what it is, what it was made of, and the commands that use it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_SETTINGS = (
    "The settings of the run are in `config.yaml`; `mmllm train {folder}/config.yaml out=NEW_FOLDER` runs it again."
)
_ADAPTER = (
    "It holds a LoRA adapter in peft's format (`adapter/`), the projector and the vision tower. All other weights are "
    "those of `{source}`, read from there and refused where they have changed. Merged, it needs neither them nor peft."
)
_WHOLE = "It is whole: there is no adapter to merge."
_NOT_SHOWN = ("step", "grad_norm", "learning_rate")  # values of a log line that do not measure the model


def build_card(title: str, sections: Iterable[str], *, library: str = "mmllm") -> str:
    """The text of a card: the front matter of the model hub, the title, and sections with an empty line between."""
    front_matter = f"---\nlibrary_name: {library}\npipeline_tag: image-text-to-text\n---"
    return "\n\n".join([front_matter, f"# {title}", *sections]) + "\n"


def code_section(*lines: str) -> str:
    """Lines that Markdown shows as code."""
    return "\n".join(f"    {line}" for line in lines)


def origin_section(origin: Mapping[str, Any]) -> str:
    """A table of the model's parts and the sources of their weights."""
    rows = [f"| {part.replace('_', ' ')} | {source} |" for part, source in origin.items()]
    return "\n".join(["| part | from |", "|---|---|", *rows])


def model_card(
    folder: Path,
    made: str,
    origin: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    base: Mapping[str, Any] | None = None,
    has_settings: bool = False,
) -> str:
    """The card of a checkpoint.

    Args:
        made: how it was made, a phrase.
        origin: the source of each part.
        metrics: the last line of the run's log.
        base: of a LoRA checkpoint, the manifest's `base`.
        has_settings: whether the folder holds the run's settings, `config.yaml`.
    """
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in metrics.items() if name not in _NOT_SHOWN]
    merge = [f"mmllm merge {folder} NEW_FOLDER"] if base else []
    return build_card(
        folder.name,
        [
            f"A vision-language model made with mmllm: {made}.",
            origin_section(origin),
            "\n".join(["| measure, at the end of training | value |", "|---|---|", *(rows or ["| none | |"])]),
            *([_SETTINGS.format(folder=folder)] if has_settings else []),
            _ADAPTER.format(source=base["source"]) if base else _WHOLE,
            code_section(
                f"mmllm chat {folder} --image PICTURE.png",
                f"mmllm demo {folder}",
                f"mmllm caption {folder} FOLDER_OF_PICTURES --out captions.jsonl",
                f"mmllm eval {folder} scenes-val",
                f"mmllm doctor {folder}    # every file, and whether it still gives the answers in `golden.json`",
                *merge,
            ),
            "What it says about pictures unlike its training data is a guess.",
        ],
    )
