"""`mmllm check`: inspects all data of a run before it starts. The LLM's weights are not read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mmllm.config import ConfigError, SourceConfig, StageConfig
from mmllm.config.file import load_config
from mmllm.data.check import DataReport, inspect_sources, num_shared_contents, refusal_reason
from mmllm.data.inspection import PartReport, RowRules, positions_note
from mmllm.data.quarantine import QuarantineWriter
from mmllm.data.sources import Examples
from mmllm.diagnose.prompt_setup import PromptSetup, load_prompt_setup
from mmllm.readers.folders import describe_passed_over

MAX_REASONS_SHOWN = 12
TABLE_WIDTH = 140  # in characters, where the output is not a terminal


@dataclass
class SplitReport:
    """The inspection of one split of the data."""

    report: DataReport
    examples: Examples
    refusal: str | None  # why a run would not start with this split; None where it would

    def to_json(self) -> dict[str, Any]:
        return {**self.report.to_json(), "longest_example": self.longest_example()}

    def longest_example(self) -> str | None:
        """The id of the longest example; None for a streamed source, whose examples cannot be indexed."""
        lengths = self.report.lengths
        return self.examples[int(lengths.argmax())].id if len(lengths) == len(self.examples) > 0 else None


def check_data(config_path: Path, overrides: list[str], *, as_json: bool) -> bool:
    """Prints a report on the data of a run with these settings; returns whether the run would start.

    Writes the report to `<out>/check/report.json`, and the rows that cannot be used to `<out>/check/bad.jsonl`; the run
    leaves those rows out. Raises ConfigError for wrong settings, and for a stage that makes its own data.
    """
    config = load_config(config_path, overrides)
    if not isinstance(config, StageConfig):
        raise ConfigError(f"{config_path} is for {config.stage}, which makes its own data; there is nothing to check")
    problems: list[str] = []
    notes: list[str] = []
    setup = None
    try:
        setup = load_prompt_setup(config.model)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        problems.append(f"model: {error}\nso no tokens are counted")
    sources = _splits(config)
    writer = QuarantineWriter(config.out, [source for files in sources.values() for source in files])
    renderer, max_positions = (setup.renderer, setup.max_positions) if setup else (None, None)
    rules = RowRules(renderer, config.data.max_length_tokens, decode=True, max_positions=max_positions)
    if max_positions and max_positions < config.data.max_length_tokens:
        notes.append(positions_note(config.data.max_length_tokens, max_positions))
    splits = {}
    for name, files in sources.items():
        with _progress(f"inspecting {name}") as advance:

            def watch(source: SourceConfig, part: PartReport, name: str = name, advance: Any = advance) -> None:
                writer.add(name, source, part)
                advance(len(part.ids))

            examples, report = inspect_sources(files, rules, on_part=watch)
        splits[name] = SplitReport(report, examples, refusal_reason(report, config.data))
        _judge(name, splits[name], setup, problems, notes)
    if "val" in splits and (
        shared := num_shared_contents(splits["val"].report.contents, splits["train"].report.contents)
    ):
        notes.append(f"{shared} val examples are in train too, so val overstates how well the model generalises")
    result = {
        "config": str(config_path),
        "image_tokens_per_image": setup.layout.num_view_tokens if setup else None,
        "image_layout": setup.layout.kind if setup else None,
        **{name: split.to_json() for name, split in splits.items()},
        "problems": problems,
        "notes": notes,
        "bad_list": str(writer.path) if any(split.report.num_bad for split in splits.values()) else None,
        "starts": not problems,
    }
    writer.close(result)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(result, splits)
    return not problems


def _splits(config: StageConfig) -> dict[str, Sequence[SourceConfig]]:
    data = config.data
    replay = [data.replay.as_source()] if data.replay else []
    return {name: files for name, files in {"train": data.train, "replay": replay, "val": data.val}.items() if files}


def _judge(name: str, split: SplitReport, setup: PromptSetup | None, problems: list[str], notes: list[str]) -> None:
    """Adds what is wrong with a split to `problems`, and what is worth knowing about it to `notes`."""
    report = split.report
    if split.refusal:
        problems.append(f"{name}: {split.refusal}")
    longest, limit = int(report.lengths.max(initial=0)), setup.trained_length_tokens if setup else None
    if limit and longest > limit:
        notes.append(f"{name}: the longest example has {longest} tokens, but the LLM was made for {limit}")
    if passed_over := describe_passed_over(report.passed_over):
        notes.append(f"{name}: {passed_over}")
    if report.unread:
        keys = ", ".join(f"{key} ({count:,} rows)" for key, count in report.unread.most_common(8))
        notes.append(f"{name}: keys that the reader ignores: {keys}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int], None]]:
    """On a terminal a running count of rows, elsewhere one line. The total is not known before the last row is read."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(what)
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,} rows"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda count: progress.advance(task, count)


ROWS = {
    "rows": "rows",
    "usable": "usable",
    "left_out": "left out",
    "images": "images in usable rows",
    "undecodable_images": "image files that cannot be decoded",
    "tokens": "tokens",
    "image_tokens": "of them for images",
    "supervised_tokens": "of them supervised",
    "longest_tokens": "longest example, tokens",
    "longest_example": "its id",
    "repeated": "repeated examples",
    "without_image": "examples without image",
    "without_image_asking_about_one": "of them, asking about one",
}


def _print(result: Mapping[str, Any], splits: Mapping[str, SplitReport]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    unit = "an image" if result["image_layout"] in (None, "single") else f"a view, images as {result['image_layout']}"
    table = Table(title=f"{result['config']}: {result['image_tokens_per_image'] or '?'} image tokens {unit}")
    table.add_column("")
    for name in splits:
        table.add_column(name, justify="right")
    columns = [result[name] for name in splits]
    for key, label in ROWS.items():
        values = [column[key] for column in columns]
        table.add_row(label, *(f"{v:,}" if isinstance(v, int) else str(v or "-") for v in values))
    console.print(table)
    for name, split in splits.items():
        _print_reasons(console, name, split.report)
    for note in result["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    for problem in result["problems"]:
        console.print(f"problem: {problem}", style="red", soft_wrap=True)
    if result["bad_list"]:
        console.print(f"all rows that are left out, with their reasons: {result['bad_list']}", soft_wrap=True)
    verdict = "the run would start" if result["starts"] else "the run would not start"
    console.print(verdict, style="bold green" if result["starts"] else "bold red")


def _print_reasons(console: Console, name: str, report: DataReport) -> None:
    if not report.num_bad:
        return
    groups = report.by_reason()
    table = Table(title=f"left out of {name}")
    table.add_column("rows", justify="right")
    table.add_column("why", overflow="fold")
    table.add_column("such as", overflow="fold")
    for reason, count, first in groups[:MAX_REASONS_SHOWN]:
        table.add_row(str(count), reason, f"{first.source} row {first.row} ({first.id})")
    if rest := groups[MAX_REASONS_SHOWN:]:
        table.add_row(str(sum(count for _, count, _ in rest)), f"{len(rest)} other reasons", "")
    console.print(table)
