"""Which examples a run can use, and why not the others. A run and `mmllm check` ask the same questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from mmllm.batch import Example
from mmllm.config import DataConfig, SourceConfig
from mmllm.data.chat import ChatError, Renderer
from mmllm.data.images import ImageError, load_image
from mmllm.data.sources import BadRow, DataError, read_source


@dataclass
class Report:
    """What was found: the length in tokens of each usable example, and every row that is left out, with its reason."""

    lengths: list[int] = field(default_factory=list)
    num_image_tokens: int = 0
    num_supervised: int = 0
    num_images: int = 0
    bad: list[BadRow] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.lengths) + len(self.bad)

    def to_json(self) -> dict[str, Any]:
        """The report for programs; `bad` is the list of what to mend or leave out."""
        return {
            "rows": self.num_rows,
            "usable": len(self.lengths),
            "left_out": len(self.bad),
            "images": self.num_images,
            "tokens": sum(self.lengths),
            "image_tokens": self.num_image_tokens,
            "supervised_tokens": self.num_supervised,
            "longest_tokens": max(self.lengths, default=0),
            "bad": [vars(row) for row in self.bad],
        }


def _shown(bad: Sequence[BadRow]) -> str:
    rows = [f"  {row.source} row {row.row} ({row.id}): {row.reason}" for row in bad[:5]]
    return "\n".join(rows + ([f"  and {len(bad) - 5} more"] if len(bad) > 5 else []))


def load_examples(
    sources: Iterable[SourceConfig], renderer: Renderer, config: DataConfig
) -> tuple[list[Example], Report]:
    """Every usable example, and the report. An example longer than `max_length_tokens` is left out, never cut.

    Raises DataError where nothing is usable, or more than `max_bad_fraction` is not.
    """
    examples: list[Example] = []
    report = Report()
    for source in sources:
        found = read_source(source)
        report.bad += found.bad
        for row, example in enumerate(found.examples):
            try:
                rendered = renderer.render_example(example)
            except ChatError as error:
                report.bad.append(BadRow(found.path, row, example.id, str(error)))
                continue
            length = len(rendered.input_ids)
            if length > config.max_length_tokens:
                reason = (
                    f"{length} tokens ({rendered.num_image_tokens} of them for images) are more than "
                    f"data.max_length_tokens = {config.max_length_tokens}"
                )
                report.bad.append(BadRow(found.path, row, example.id, reason))
                continue
            if not any(rendered.is_answer[1:]):
                report.bad.append(BadRow(found.path, row, example.id, "no answer token is supervised"))
                continue
            examples.append(example)
            report.lengths.append(length)
            report.num_image_tokens += rendered.num_image_tokens
            report.num_supervised += sum(rendered.is_answer)
            report.num_images += len(example.images)
    if not examples:
        raise DataError(f"no usable example in the data:\n{_shown(report.bad)}")
    if len(report.bad) > config.max_bad_fraction * report.num_rows:
        raise DataError(
            f"{len(report.bad)} of {report.num_rows} rows cannot be used, more than data.max_bad_fraction = "
            f"{config.max_bad_fraction} allows; mend them, or raise it to leave them out:\n{_shown(report.bad)}"
        )
    return examples, report


def _decode(images: list[str]) -> list[tuple[str, str]]:
    """(path, reason) of every file that is no image."""
    failed = []
    for path in images:
        try:
            load_image(path)
        except ImageError as error:
            failed.append((path, str(error)))
    return failed


def decode_all(examples: Sequence[Example], *, advance: Callable[[int], None] = lambda count: None) -> list[BadRow]:
    """Decodes every image of the examples in parallel; a row for each example with one that cannot be read."""
    paths = sorted({image for example in examples for image in example.images if isinstance(image, str)})
    chunks = [paths[start : start + 200] for start in range(0, len(paths), 200)]
    reasons: dict[str, str] = {}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for chunk, failed in zip(chunks, pool.map(_decode, chunks), strict=True):
            reasons.update(failed)
            advance(len(chunk))
    return [
        BadRow(example.source, -1, example.id, reasons[image])
        for example in examples
        for image in example.images
        if isinstance(image, str) and image in reasons
    ]


def repeated(examples: Sequence[Example]) -> int:
    """How many examples say the same about the same images as an earlier one."""
    seen = Counter((example.images, example.messages) for example in examples if all(isinstance(i, str) for i in example.images))
    return sum(count - 1 for count in seen.values())
