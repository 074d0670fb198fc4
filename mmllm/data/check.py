"""Which examples a run can use, and why not the others. A run and `mmllm check` apply the same rules.

A source is inspected in parts, many of them in parallel. Of each row, only a few numbers stay in memory.
"""

from __future__ import annotations

import functools
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mmllm.batch import Example
from mmllm.chat.renderer import ChatError, Renderer
from mmllm.config import DataConfig, SourceConfig
from mmllm.data.inspection import PartReport, Quarantine, RowInspector, RowRules, check_tokens
from mmllm.data.shards import ShardedFile
from mmllm.data.sources import BadRow, DataFile, Examples, UsableRows, later_duplicates
from mmllm.readers.files import DataError, RowError

ROWS_PER_PART = 500
MAX_LISTED = 10_000  # bad rows that stay in memory; the list of `mmllm check` has all of them
# Numbers, quoted words, paths and file names: they differ between two rows that are bad for the same reason.
_PARTICULARS = re.compile(r"'[^']*'|\S*/\S*|\b\S+\.\w{3,4}\b|\d[\d,]*")


def why_left_out(
    example: Example, renderer: Renderer, config: DataConfig, *, max_positions: int | None = None
) -> str | None:
    """Why a run with these settings leaves this example out; None where it uses it."""
    try:
        check_tokens(example, renderer, config.max_length_tokens, max_positions=max_positions)
    except (RowError, ChatError) as error:
        return str(error)
    return None


def _report_or_error(inspect: Callable[[], PartReport]) -> PartReport | DataError:
    """The report, or the error as a value: one that a worker process raises would arrive with its traceback as text."""
    try:
        return inspect()
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"the data can no longer be read: {error}")


class FileParts(Dataset[PartReport | DataError]):
    """A data file in parts of ROWS_PER_PART rows, each inspected when it is indexed."""

    def __init__(self, file: DataFile, rules: RowRules):
        self.file, self.rules = file, rules

    def __len__(self) -> int:
        return -(-len(self.file) // ROWS_PER_PART)

    def __getitem__(self, number: int) -> PartReport | DataError:
        return _report_or_error(lambda: self.inspect(number, None))

    def inspect(self, number: int, max_usable: int | None) -> PartReport:
        """The report on one part, which ends early at its `max_usable`-th usable row."""
        inspector, file = RowInspector(self.rules), self.file
        for row in range(number * ROWS_PER_PART, min((number + 1) * ROWS_PER_PART, len(file))):
            if len(inspector.report.rows) == max_usable:
                break
            inspector.inspect(file.path, row, functools.partial(file.raw_row, row), file.lazy_example)
        return inspector.report


class ShardParts(Dataset[PartReport | DataError]):
    """The shards of a streamed source as parts, each inspected from front to back when it is indexed."""

    def __init__(self, file: ShardedFile, rules: RowRules):
        self.file, self.rules = file, rules

    def __len__(self) -> int:
        return len(self.file.shards.names)

    def __getitem__(self, number: int) -> PartReport | DataError:
        return _report_or_error(lambda: self._inspect(number))

    def _inspect(self, number: int) -> PartReport:
        inspector, shards = RowInspector(self.rules), self.file.shards
        for row, read in shards.read(number, 0):
            inspector.inspect(shards.names[number], row, read, self.file.lazy_example)
        return inspector.report


def _unchanged(part: Any) -> Any:
    return part


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the workers too, but only the main process acts on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def inspect_parts(parts: Any, *, num_processes: int | None = None) -> Iterator[PartReport]:
    """The report on every part, in order. Parts are inspected ahead of time in processes, by default one per core.

    With one part or one core, no process is started. Raises DataError where a file cannot be read to its end.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_workers = min(num_processes or cores, len(parts))
    loader: DataLoader[PartReport | DataError] = DataLoader(
        parts,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers if num_workers > 1 else 0,
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator(),  # drawing from torch's own would change how a model is initialised
    )
    for part in loader:
        if isinstance(part, DataError):
            raise part
        yield part


# The report


@dataclass
class DataReport:
    """What was found in all parts: numbers of the usable examples, and the rows that are left out, with the reasons."""

    # One value for each usable example, see PartReport.
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    images: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    contents: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    num_usable: int = 0
    num_bad: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    bad: list[BadRow] = field(default_factory=list)  # the first MAX_LISTED
    reasons: dict[str, tuple[int, BadRow]] = field(
        default_factory=dict
    )  # {reason without particulars: (how often, first row)}
    undecodable: dict[str, str] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)  # {reason: files of folders that are not rows}
    unreadable: list[str] = field(default_factory=list)  # why some data files cannot be used at all

    @property
    def num_rows(self) -> int:
        return self.num_usable + self.num_bad

    @property
    def num_images(self) -> int:
        return self.counts["images"]

    def add(self, part: PartReport) -> None:
        """Adds the report on one more part."""
        self.num_usable += len(part.rows)
        self.num_bad += len(part.bad)
        self.counts.update(part.counts)
        self.unread.update(part.unread)
        self.undecodable.update(part.undecodable)
        self.bad += part.bad[: MAX_LISTED - len(self.bad)]
        for row in part.bad:
            reason = _PARTICULARS.sub("…", row.reason)
            count, first = self.reasons.get(reason, (0, row))
            self.reasons[reason] = (count + 1, first)

    def by_reason(self) -> list[tuple[str, int, BadRow]]:
        """(reason, how often, the first such row), the most frequent first."""
        reasons = [(reason, count, first) for reason, (count, first) in self.reasons.items()]
        return sorted(reasons, key=lambda reason: -reason[1])

    def to_json(self) -> dict[str, Any]:
        """The report for programs. `bad` holds the first MAX_LISTED rows to mend or leave out."""
        return {
            "rows": self.num_rows,
            "usable": self.num_usable,
            "left_out": self.num_bad,
            "images": self.num_images,
            "undecodable_images": len(self.undecodable),
            "tokens": int(self.lengths.sum()),
            "image_tokens": self.counts["image_tokens"],
            "supervised_tokens": self.counts["supervised"],
            "longest_tokens": int(self.lengths.max(initial=0)),
            "repeated": len(self.contents) - len(np.unique(self.contents)),
            "without_image": self.counts["without_image"],
            "without_image_asking_about_one": self.counts["asking"],
            "unread_keys": dict(self.unread.most_common()),
            "left_out_by_reason": {reason: count for reason, count, _ in self.by_reason()},
            "passed_over": dict(self.passed_over.most_common()),
            "unreadable": self.unreadable,
            "bad": [vars(row) for row in self.bad],
        }


def refusal_reason(report: DataReport, config: DataConfig) -> str | None:
    """Why a run must not start on this data: a file is unreadable, no row is usable, or too many rows are bad."""
    shown = "\n".join(f"  {row.source} row {row.row} ({row.id}): {row.reason}" for row in report.bad[:5])
    shown += f"\n  and {report.num_bad - 5} more" if report.num_bad > 5 else ""
    if report.unreadable:
        return "\n".join(report.unreadable)
    if not report.num_usable:
        return f"no usable example in the data:\n{shown}"
    if report.num_bad > config.max_bad_fraction * report.num_rows:
        return (
            f"{report.num_bad} of {report.num_rows} rows cannot be used, more than data.max_bad_fraction = "
            f"{config.max_bad_fraction} allows; mend them, or raise it to leave them out:\n{shown}"
        )
    return None


PartCallback = Callable[[SourceConfig, PartReport], None]


def inspect_sources(
    sources: Iterable[SourceConfig],
    rules: RowRules,
    *,
    on_part: PartCallback = lambda source, part: None,
    num_processes: int | None = None,
) -> tuple[Examples, DataReport]:
    """Every usable example of the indexed sources, and the report on all sources.

    `on_part` is called with each part as it comes. Bad data raises no error; it is in the report.
    """
    report = DataReport()
    usable: list[UsableRows] = []
    columns: dict[str, list[NDArray[np.int64]]] = {"lengths": [], "images": [], "contents": []}
    for source in sources:
        source_columns: dict[str, list[NDArray[np.int64]]] = {"rows": [], "ids": [], **{name: [] for name in columns}}
        try:
            file = ShardedFile(source) if source.streaming else DataFile(source)
            for part in _parts_of(file, rules, num_processes):
                report.add(part)
                on_part(source, part)
                for name, arrays in source_columns.items():
                    arrays.append(np.asarray(getattr(part, name), np.int64))
        except DataError as error:
            report.unreadable.append(str(error))
            continue
        if isinstance(file, DataFile):
            report.passed_over.update(file.passed_over)
            rows, ids = (np.concatenate(source_columns[name]) for name in ("rows", "ids"))
            usable.append((file, rows, later_duplicates(ids)))
        for name, arrays in columns.items():
            arrays += source_columns[name]
    if columns["lengths"]:
        report.lengths, report.images, report.contents = (np.concatenate(arrays) for arrays in columns.values())
    return Examples(usable), report


def _parts_of(file: DataFile | ShardedFile, rules: RowRules, num_processes: int | None) -> Iterator[PartReport]:
    """The reports on a source's parts, for a data file up to its `max_examples`-th usable row."""
    if isinstance(file, ShardedFile):
        yield from inspect_parts(ShardParts(file, rules), num_processes=num_processes)
        return
    parts, num_left = FileParts(file, rules), file.max_examples
    if num_left is not None and num_left < ROWS_PER_PART:
        num_processes = 1  # one part is most likely enough
    for number, part in enumerate(inspect_parts(parts, num_processes=num_processes)):
        if num_left is not None and len(part.rows) >= num_left:
            yield parts.inspect(number, num_left)
            return
        num_left = None if num_left is None else num_left - len(part.rows)
        yield part


def load_examples(
    sources: Sequence[SourceConfig],
    renderer: Renderer,
    config: DataConfig,
    *,
    quarantine: Quarantine | None = None,
    num_processes: int | None = None,
    max_positions: int | None = None,
) -> tuple[Examples, DataReport]:
    """Every usable example, and the report. Raises DataError with the `refusal_reason`, if there is one."""
    rules = RowRules(renderer, config.max_length_tokens, quarantine=quarantine or {}, max_positions=max_positions)
    examples, report = inspect_sources(sources, rules, num_processes=num_processes)
    if reason := refusal_reason(report, config):
        raise DataError(reason)
    return examples, report


def num_shared_contents(contents: NDArray[np.int64], others: NDArray[np.int64]) -> int:
    """How many examples have the same messages and pictures as one of the others. Both are DataReport.contents."""
    return int(np.isin(contents, others).sum())
