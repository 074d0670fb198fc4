"""The compatibility matrix: which choices work together, and which are refused and why. `mmllm matrix` prints it.

A cell is a pair of values of two axes. tests/test_compatibility.py tests each cell. A cell that works is part of a run
that trains, saves, loads, answers and, where the cell says so, is exported. A refused cell raises its message.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mmllm.errors import MmllmError

# The first value of each axis is the one that a refusal is shown with.
AXES: dict[str, tuple[str, ...]] = {
    "encoder": (
        "open_clip ViT", "timm ViT", "timm ConvNeXt", "CLIP", "SigLIP", "SigLIP 2", "DINOv2", "patches",
        "two encoders",
    ),
    "llm": ("llama", "qwen3", "gemma2", "phi3", "mixtral", "opt", "gpt2", "mamba2"),
    "projector": ("mlp", "linear", "downsample", "resampler", "c_abstractor"),
    "image mode": ("pad", "stretch", "crop", "anyres", "native"),
    "trains": ("projector and LLM", "projector", "all parts", "LoRA", "QLoRA nf4", "QLoRA int8"),
    "packing": ("never", "always"),
    "strategy": ("one process", "DDP", "FSDP2", "ZeRO-2", "ZeRO-3"),
    "export": ("none", "Llava"),
}  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """Pairs of values that are refused, and why.

    Attributes:
        cells: values of two axes; every pair of them, one from each axis, is refused.
        message: a part of the error's text.
        reason: the reason in the documentation and in the output of `mmllm matrix`.
    """

    cells: dict[str, tuple[str, ...]]
    message: str
    reason: str

    @property
    def sentence(self) -> str:
        """The pairs and the reason."""
        pairs = " with ".join(f"{axis} {', '.join(values)}" for axis, values in self.cells.items())
        return f"{pairs}: {self.reason}."


_QLORA = ("QLoRA nf4", "QLoRA int8")
REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        {"encoder": ("patches",), "trains": ("all parts",)}, "has no encoder to train",
        "raw patches have no weights",
    ),
    Refusal(
        {"projector": ("resampler",), "image mode": ("anyres", "native")},
        "a projector whose tokens keep the grid",
        "its tokens have no place in the picture, so tiles and rows cannot be joined",
    ),
    Refusal(
        {"llm": ("gpt2",), "trains": _QLORA}, "has no linear layers that bitsandbytes can hold",
        "its layers are a class of their own, not torch's Linear",
    ),
    Refusal(
        {"llm": ("mamba2",), "trains": _QLORA}, "reads its weights past its layers",
        "its kernels read the weights without calling the layers that would be quantised",
    ),
    Refusal(
        {"llm": ("opt", "mamba2"), "packing": ("always",)}, "does not keep examples of one row apart",
        "it takes no mask or positions that keep the examples of a row apart; `data.packing: auto` packs nothing",
    ),
    Refusal(
        {"trains": _QLORA, "strategy": ("FSDP2", "ZeRO-2", "ZeRO-3")}, "cannot divide quantised weights",
        "quantised weights cannot be sharded; launch with DDP",
    ),
    Refusal(
        {
            "encoder": ("timm ViT", "timm ConvNeXt", "SigLIP 2", "DINOv2", "patches", "two encoders"),
            "export": ("Llava",),
        },
        "vision tower: ",
        "transformers' Llava takes CLIP and SigLIP, also as open_clip or timm build them, and no ViT of timm with a "
        "class token",
    ),
    Refusal(
        {"projector": ("downsample", "resampler", "c_abstractor"), "export": ("Llava",)}, "projector: Llava's is two",
        "Llava's projector is one or two linear layers",
    ),
    Refusal(
        {"image mode": ("native",), "export": ("Llava",)}, "image_mode: native",
        "Llava sees squares, and LlavaNext tiles",
    ),
    Refusal(
        {"llm": ("gemma2",), "export": ("Llava",)}, "caps its logits", "Llava does not cap logits",
    ),
    Refusal(
        {"llm": ("gpt2", "mamba2"), "export": ("Llava",)}, "classic names do not cover",
        "Llava's names of weights, which other programs read, have no place for its own",
    ),
    Refusal(
        {"llm": ("opt",), "export": ("Llava",)}, "does not run inside transformers' Llava",
        "transformers' Llava cannot reach its embeddings",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """Two values, by their axes; `refusal` is None if they work together."""

    values: dict[str, str]
    refusal: Refusal | None


def cells(*axes: str) -> Iterator[Cell]:
    """All cells of two axes, or of all pairs of axes."""
    for first, second in [axes] if axes else itertools.combinations(AXES, 2):
        for values in itertools.product(AXES[first], AXES[second]):
            pair = dict(zip((first, second), values, strict=True))
            yield Cell(pair, refusal_of(pair))


def refusal_of(choices: dict[str, str]) -> Refusal | None:
    """The first refusal that applies to these choices, `{axis: value}`; None if they work together."""
    for refusal in REFUSALS:
        if all(choices.get(axis) in values for axis, values in refusal.cells.items()):
            return refusal
    return None


def rows_of(first: str, second: str) -> list[list[str]]:
    """The cells of two axes as a table: a heading, then one row for each value of `first`, with `yes` or `no (NUMBER)`.

    The number is the position of the refusal in REFUSALS, from 1.
    """
    table = [[first, *AXES[second]], *([value] for value in AXES[first])]
    for cell in cells(first, second):
        number = REFUSALS.index(cell.refusal) + 1 if cell.refusal else 0
        table[1 + AXES[first].index(cell.values[first])].append(f"no ({number})" if number else "yes")
    return table


def summary() -> str:
    """How many cells there are, and how many work."""
    every = list(cells())
    num_refused = sum(cell.refusal is not None for cell in every)
    return (
        f"{len(every)} pairs of choices: {len(every) - num_refused} work together, {num_refused} are refused before a "
        "run begins, or before an export"
    )


def matrix_markdown() -> str:
    """The page of the documentation: the axes, a table for each pair of axes that has refusals, and the reasons."""
    lines = [
        "# What works with what", "",
        f"{summary()}. Each pair that works is part of a run in the tests, which trains, saves, loads, answers and is "
        "exported where the pair says so. Each refusal is tested by its message. `mmllm matrix` prints the refusals, "
        "`mmllm matrix llm trains` one of these tables.", "",
        *(f"- **{axis}**: {', '.join(values)}" for axis, values in AXES.items()), "",
        "Other encoders, LLMs and towers than these are accepted too, and tried by a probe when they are loaded.", "",
    ]  # fmt: skip
    for first, second in itertools.combinations(AXES, 2):
        if any(cell.refusal for cell in cells(first, second)):
            heading, *rows = rows_of(first, second)
            lines += [f"## {first} and {second}", "", f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
            lines += [f"| {' | '.join(row)} |" for row in rows]
            lines.append("")
    lines += ["## Why", "", *(f"{number}. {refusal.sentence}" for number, refusal in enumerate(REFUSALS, 1))]
    return "\n".join(lines) + "\n"


def print_matrix(axes: Sequence[str], *, as_json: bool = False) -> None:
    """Prints all refusals or the table of two axes, as text or as JSON. Raises MmllmError for unknown axes."""
    from rich.console import Console
    from rich.table import Table

    if axes and (len(axes) != 2 or len(set(axes)) == 1 or not set(axes) <= AXES.keys()):
        raise MmllmError(f"matrix: give two of {', '.join(map(repr, AXES))}, or none; got {' '.join(axes)}")
    if as_json:
        rows = [{**cell.values, "refused": cell.refusal.reason if cell.refusal else None} for cell in cells(*axes)]
        print(json.dumps(rows, indent=2))
        return
    console = Console()
    if axes:
        heading, *rows_of_axis = rows_of(*axes)
        table = Table(*heading)
        for row in rows_of_axis:
            table.add_row(*row)
        console.print(table)
    else:
        console.print(summary() + ". Refused are:")
    shown = [cell.refusal for cell in cells(*axes)]
    grid = Table.grid(padding=(0, 1))
    for number, refusal in enumerate(REFUSALS, 1):
        if refusal in shown:
            grid.add_row(f"{number}.", refusal.sentence)
    console.print(grid)
    if not axes:
        console.print(f"`mmllm matrix AXIS AXIS` shows a table; the axes are {', '.join(map(repr, AXES))}.")
