"""Which examples a run can use, and why not the others. A run and `mmllm check` ask the same questions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

from mmllm.batch import Example
from mmllm.config import DataConfig, SourceConfig
from mmllm.data.chat import ChatError, Renderer
from mmllm.data.images import ImageError, load_image
from mmllm.data.sources import BadRow, DataError, read_source


@dataclass(frozen=True)
class Row:
    """An example, and where it stands: its file and its row there, from 0."""

    source: str
    row: int
    example: Example


@dataclass
class Report:
    """What was found: the length in tokens of each usable example, and every row that is left out, with its reason."""

    num_usable: int = 0
    lengths: list[int] = field(default_factory=list)
    num_image_tokens: int = 0
    num_supervised: int = 0
    num_images: int = 0
    bad: list[BadRow] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # data files that cannot be used at all, and why

    @property
    def num_rows(self) -> int:
        return self.num_usable + len(self.bad)

    def to_json(self) -> dict[str, Any]:
        """The report for programs; `bad` is the list of what to mend or leave out."""
        return {
            "rows": self.num_rows,
            "usable": self.num_usable,
            "left_out": len(self.bad),
            "images": self.num_images,
            "tokens": sum(self.lengths),
            "image_tokens": self.num_image_tokens,
            "supervised_tokens": self.num_supervised,
            "longest_tokens": max(self.lengths, default=0),
            "unreadable": self.unreadable,
            "bad": [vars(row) for row in self.bad],
        }


def _shown(bad: Sequence[BadRow]) -> str:
    rows = [f"  {row.source} row {row.row} ({row.id}): {row.reason}" for row in bad[:5]]
    return "\n".join(rows + ([f"  and {len(bad) - 5} more"] if len(bad) > 5 else []))


def read_rows(sources: Iterable[SourceConfig]) -> tuple[list[Row], Report]:
    """Every row that can be read, and a report that holds what cannot. Raises nothing."""
    rows: list[Row] = []
    report = Report()
    for source in sources:
        try:
            found = read_source(source)
        except DataError as error:
            report.unreadable.append(str(error))
            continue
        report.bad += found.bad
        bad = {row.row for row in found.bad}
        numbers = (number for number in itertools.count() if number not in bad)
        rows += [Row(found.path, number, example) for number, example in zip(numbers, found.examples, strict=False)]
    return rows, report


def choose_examples(
    rows: Iterable[Row],
    report: Report,
    renderer: Renderer | None,
    config: DataConfig,
    *,
    undecodable: Mapping[str, str] = {},
) -> list[Example]:
    """The usable examples of these rows; the report gets their figures, and the others with their reasons.

    An example longer than `max_length_tokens` is left out, never cut. Without a renderer no token is counted.
    `undecodable` has the reason for each image that cannot be decoded.
    """
    examples: list[Example] = []
    for row in rows:
        reason = next((undecodable[i] for i in row.example.images if isinstance(i, str) and i in undecodable), None)
        if reason is None and renderer is not None:
            reason = _count_tokens(row.example, report, renderer, config)
        if reason is not None:
            report.bad.append(BadRow(row.source, row.row, row.example.id, reason))
            continue
        examples.append(row.example)
        report.num_usable += 1
        report.num_images += len(row.example.images)
    return examples


def _count_tokens(example: Example, report: Report, renderer: Renderer, config: DataConfig) -> str | None:
    """Adds the example's tokens to the report, or says why it cannot be used."""
    try:
        rendered = renderer.render_example(example)
    except ChatError as error:
        return str(error)
    length = len(rendered.input_ids)
    if length > config.max_length_tokens:
        return (
            f"{length} tokens ({rendered.num_image_tokens} of them for images) are more than "
            f"data.max_length_tokens = {config.max_length_tokens}"
        )
    if not any(rendered.is_answer[1:]):
        return "no answer token is supervised"
    report.lengths.append(length)
    report.num_image_tokens += rendered.num_image_tokens
    report.num_supervised += sum(rendered.is_answer)
    return None


def refusal(report: Report, config: DataConfig) -> str | None:
    """Why a run does not start on this data: a file cannot be read, nothing is usable, or too much is not."""
    if report.unreadable:
        return "\n".join(report.unreadable)
    if not report.num_usable:
        return f"no usable example in the data:\n{_shown(report.bad)}"
    if len(report.bad) > config.max_bad_fraction * report.num_rows:
        return (
            f"{len(report.bad)} of {report.num_rows} rows cannot be used, more than data.max_bad_fraction = "
            f"{config.max_bad_fraction} allows; mend them, or raise it to leave them out:\n{_shown(report.bad)}"
        )
    return None


def load_examples(
    sources: Iterable[SourceConfig], renderer: Renderer, config: DataConfig
) -> tuple[list[Example], Report]:
    """Every usable example, and the report. Raises DataError with the `refusal` where there is one."""
    rows, report = read_rows(sources)
    examples = choose_examples(rows, report, renderer, config)
    if reason := refusal(report, config):
        raise DataError(reason)
    return examples, report


CHUNK = 200


def _decode(images: list[str]) -> dict[str, str]:
    failed = {}
    for path in images:
        try:
            load_image(path)
        except ImageError as error:
            failed[path] = str(error)
    return failed


def image_paths(rows: Iterable[Row]) -> list[str]:
    """The image files of these rows, each once."""
    return sorted({image for row in rows for image in row.example.images if isinstance(image, str)})


def decode_all(paths: Sequence[str], *, advance: Callable[[int], None] = lambda count: None) -> dict[str, str]:
    """Decodes every image file, many of them in parallel; the reason for each one that cannot be decoded."""
    chunks = [list(paths[start : start + CHUNK]) for start in range(0, len(paths), CHUNK)]
    undecodable: dict[str, str] = {}
    if len(chunks) == 1:  # starting processes takes longer
        undecodable = _decode(chunks[0])
        advance(len(paths))
    elif chunks:
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            for chunk, failed in zip(chunks, pool.map(_decode, chunks), strict=True):
                undecodable.update(failed)
                advance(len(chunk))
    return undecodable


def _content(example: Example) -> Any:
    return example.images, example.messages


def num_repeated(examples: Sequence[Example]) -> int:
    """How many examples say the same about the same image files as an earlier one."""
    return len(examples) - len({_content(example) for example in examples})


def num_shared(examples: Sequence[Example], others: Sequence[Example]) -> int:
    """How many examples say the same about the same image files as one of the others."""
    known = {_content(example) for example in others}
    return sum(_content(example) in known for example in examples)
