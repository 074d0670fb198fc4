"""Which examples a run can use, and why not the others. A run and `mmllm check` ask the same questions.

A source is looked at in parts, many of them in parallel. What stays in memory of a row are a few numbers.
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
from mmllm.data.inspection import Inspector, Part, Quarantine, Rules, check_tokens
from mmllm.data.shards import ShardedFile
from mmllm.data.sources import BadRow, DataFile, Examples, later_repeats
from mmllm.readers.files import DataError, RowError

ROWS_A_PART = 500
MAX_LISTED = 10_000  # bad rows that stay in memory; the list that `mmllm check` writes has them all
# Numbers, quoted words, paths and file names: what differs between two rows that are bad for the same reason.
_PARTICULARS = re.compile(r"'[^']*'|\S*/\S*|\b\S+\.\w{3,4}\b|\d[\d,]*")


def left_out(
    example: Example, renderer: Renderer, config: DataConfig, *, max_positions: int | None = None
) -> str | None:
    """Why a run with these settings does not use this example; None where it does."""
    try:
        check_tokens(example, renderer, config.max_length_tokens, max_positions=max_positions)
    except (RowError, ChatError) as error:
        return str(error)
    return None


def _found(inspect: Callable[[], Part]) -> Part | DataError:
    """An error that a worker process raises would arrive with its traceback, so it is handed over."""
    try:
        return inspect()
    except DataError as error:
        return error
    except OSError as error:
        return DataError(f"the data cannot be read any more: {error}")


class FileParts(Dataset[Part | DataError]):
    """A data file in parts of some hundred rows, each inspected when it is asked for."""

    def __init__(self, file: DataFile, rules: Rules):
        self.file, self.rules = file, rules

    def __len__(self) -> int:
        return -(-len(self.file) // ROWS_A_PART)

    def __getitem__(self, number: int) -> Part | DataError:
        return _found(lambda: self.inspect(number, None))

    def inspect(self, number: int, max_usable: int | None) -> Part:
        """Up to the row that is the last one wanted."""
        inspector, file = Inspector(self.rules), self.file
        for row in range(number * ROWS_A_PART, min((number + 1) * ROWS_A_PART, len(file))):
            if len(inspector.part.rows) == max_usable:
                break
            inspector.look(file.path, row, functools.partial(file.raw, row), file.peek)
        return inspector.part


class ShardParts(Dataset[Part | DataError]):
    """The shards of a streamed source, each inspected from front to back."""

    def __init__(self, file: ShardedFile, rules: Rules):
        self.file, self.rules = file, rules

    def __len__(self) -> int:
        return len(self.file.shards.names)

    def __getitem__(self, number: int) -> Part | DataError:
        return _found(lambda: self._inspect(number))

    def _inspect(self, number: int) -> Part:
        inspector, shards = Inspector(self.rules), self.file.shards
        for row, read in shards.read(number, 0):
            inspector.look(shards.names[number], row, read, self.file.peek)
        return inspector.part


def _as_is(part: Any) -> Any:
    return part


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the workers too; the process that they work for decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def inspect_all(parts: Any, *, num_processes: int | None = None) -> Iterator[Part]:
    """Every part in order, made ahead in processes: by default one a core. With one part or core, in this process.

    Raises DataError where a file turns out not to be readable to its end.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = min(num_processes or cores, len(parts))
    loader: DataLoader[Part | DataError] = DataLoader(
        parts,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=wanted if wanted > 1 else 0,
        worker_init_fn=_ignore_interrupt,
        generator=torch.Generator(),  # of its own: drawing from torch's would change how a model begins
    )
    for part in loader:
        if isinstance(part, DataError):
            raise part
        yield part


# The report


@dataclass
class Report:
    """What was found: tokens and pictures of each usable example, and every row that is left out, with its reason."""

    lengths: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    images: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    contents: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    num_usable: int = 0
    num_bad: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    bad: list[BadRow] = field(default_factory=list)  # the first MAX_LISTED
    reasons: dict[str, tuple[int, BadRow]] = field(default_factory=dict)  # without particulars: how often, the first
    undecodable: dict[str, str] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)  # files of folders that are no rows; reason: how many
    unreadable: list[str] = field(default_factory=list)  # data files that cannot be used at all, and why

    @property
    def num_rows(self) -> int:
        return self.num_usable + self.num_bad

    @property
    def num_images(self) -> int:
        return self.counts["images"]

    def add(self, part: Part) -> None:
        """Counts what was found in some more rows."""
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
        """(what is wrong, how often, the first such row), the most frequent first."""
        found = [(reason, count, first) for reason, (count, first) in self.reasons.items()]
        return sorted(found, key=lambda one: -one[1])

    def to_json(self) -> dict[str, Any]:
        """The report for programs; `bad` begins the list of what to mend or leave out."""
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


def refusal(report: Report, config: DataConfig) -> str | None:
    """Why a run does not start on this data: a file cannot be read, nothing is usable, or too much is not."""
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


Watch = Callable[[SourceConfig, Part], None]
Found = tuple[DataFile, NDArray[np.int64], NDArray[np.int64]]  # the numbers of usable rows, and of repeated ids


def inspect_sources(
    sources: Iterable[SourceConfig],
    rules: Rules,
    *,
    watch: Watch = lambda source, part: None,
    num_processes: int | None = None,
) -> tuple[Examples, Report]:
    """Every usable example of the indexed sources, and the report on all. `watch` sees each part as it comes.

    Raises nothing for bad data.
    """
    report = Report()
    found: list[Found] = []
    columns: dict[str, list[NDArray[np.int64]]] = {"lengths": [], "images": [], "contents": []}
    for source in sources:
        own: dict[str, list[NDArray[np.int64]]] = {"rows": [], "ids": [], **{name: [] for name in columns}}
        try:
            file = ShardedFile(source) if source.streaming else DataFile(source)
            for part in _parts_of(file, rules, num_processes):
                report.add(part)
                watch(source, part)
                for name, arrays in own.items():
                    arrays.append(np.asarray(getattr(part, name), np.int64))
        except DataError as error:
            report.unreadable.append(str(error))
            continue
        if isinstance(file, DataFile):
            report.passed_over.update(file.passed_over)
            found.append((file, np.concatenate(own["rows"]), later_repeats(np.concatenate(own["ids"]))))
        for name, arrays in columns.items():
            arrays += own[name]
    if columns["lengths"]:
        report.lengths, report.images, report.contents = (np.concatenate(arrays) for arrays in columns.values())
    return Examples(found), report


def _parts_of(file: DataFile | ShardedFile, rules: Rules, num_processes: int | None) -> Iterator[Part]:
    """The parts of a source, up to the `max_examples`-th usable row of a data file."""
    if isinstance(file, ShardedFile):
        yield from inspect_all(ShardParts(file, rules), num_processes=num_processes)
        return
    parts, left = FileParts(file, rules), file.max_examples
    if left is not None and left < ROWS_A_PART:
        num_processes = 1  # most likely one part is enough
    for number, part in enumerate(inspect_all(parts, num_processes=num_processes)):
        if left is not None and len(part.rows) >= left:
            yield parts.inspect(number, left)
            return
        left = None if left is None else left - len(part.rows)
        yield part


def load_examples(
    sources: Sequence[SourceConfig],
    renderer: Renderer,
    config: DataConfig,
    *,
    quarantine: Quarantine | None = None,
    num_processes: int | None = None,
    max_positions: int | None = None,
) -> tuple[Examples, Report]:
    """Every usable example, and the report. Raises DataError with the `refusal` where there is one."""
    rules = Rules(renderer, config.max_length_tokens, quarantine=quarantine or {}, max_positions=max_positions)
    examples, report = inspect_sources(sources, rules, num_processes=num_processes)
    if reason := refusal(report, config):
        raise DataError(reason)
    return examples, report


def num_shared(contents: NDArray[np.int64], others: NDArray[np.int64]) -> int:
    """How many examples say the same about the same pictures as one of the others."""
    return int(np.isin(contents, others).sum())
