"""`mmllm check`: everything that a run would find in its data, before it starts. The LLM's weights stay on disk."""

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

from mmllm.batch import IMAGE_TOKEN, PICTURE_LABEL, TEXT_ENCODING
from mmllm.chat.renderer import Renderer
from mmllm.checkpoint.folder import read_manifest
from mmllm.config import ConfigError, ModelConfig, SourceConfig, StageConfig
from mmllm.config.file import load_config
from mmllm.data.check import DataReport, inspect_sources, num_shared_contents, refusal_reason
from mmllm.data.inspection import PartReport, RowRules, positions_note
from mmllm.data.quarantine import QuarantineWriter
from mmllm.data.sources import Examples
from mmllm.model.build import count_image_tokens, fitting_projector
from mmllm.model.language import load_tokenizer
from mmllm.model.layout import Layout, new_layout
from mmllm.model.positions import position_limit_of
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vision import load_tower
from mmllm.model.vlm import VisionLanguageConfig
from mmllm.readers.folders import describe_passed_over

MAX_REASONS_SHOWN = 12
FILE_WIDTH = 140  # of tables where no terminal gives one


@dataclass(frozen=True)
class TextSide:
    """What turns conversations into tokens, without the LLM.

    `max_positions` is the longest row that the LLM can be given, None where it has no such end; `trained_length_tokens`
    is the longest that it was made for, where its config says so.
    """

    renderer: Renderer
    layout: Layout
    max_positions: int | None
    picture_label: str
    trained_length_tokens: int | None


@dataclass
class Findings:
    """What one split of the data holds."""

    report: DataReport
    examples: Examples
    refusal: str | None

    def to_json(self) -> dict[str, Any]:
        return {**self.report.to_json(), "longest_example": self.longest_example()}

    def longest_example(self) -> str | None:
        """The id of the longest example, where examples can be asked for by number."""
        lengths = self.report.lengths
        return self.examples[int(lengths.argmax())].id if len(lengths) == len(self.examples) > 0 else None


def load_text_side(config: ModelConfig) -> TextSide:
    """Tokenizer, template and the number of image tokens of a model. Raises ValueError where a part is missing."""
    if config.checkpoint:
        read_manifest(config.checkpoint)
        processor = VisionLanguageProcessor.from_pretrained(config.checkpoint)
        tokenizer, layout = processor.tokenizer, processor.image_layout
        template, saved = config.template or processor.template, processor.chat_template
        encoding = TEXT_ENCODING if config.template else processor.encoding
        label = processor.picture_label
        text_config = VisionLanguageConfig.from_pretrained(config.checkpoint).text_config
    else:
        from transformers import AutoConfig

        assert config.vision
        assert config.projector
        assert config.language
        assert config.template
        language = config.language
        tokenizer = load_tokenizer(language.source, revision=language.revision, add_tokens=language.add_tokens)
        text_config = AutoConfig.from_pretrained(language.source, revision=language.revision)
        tower = load_tower(config.vision)
        projector = fitting_projector(config.projector, tower, text_config.hidden_size)
        layout = new_layout(config.vision, tower, projector, count_image_tokens(tower, projector))
        template, saved, encoding, label = config.template, None, TEXT_ENCODING, PICTURE_LABEL
    renderer = Renderer(
        tokenizer,
        template,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        num_image_tokens=layout.num_image_tokens,
        encoding=encoding,
        saved_jinja=saved,
    )
    renderer.require_end()
    trained_length = getattr(text_config, "max_position_embeddings", None)
    label = label if config.picture_label is None else config.picture_label
    return TextSide(renderer, layout, position_limit_of(text_config), label, trained_length)


def check_data(config_path: Path, overrides: list[str], *, as_json: bool) -> bool:
    """Prints what a run of these settings would find; True where it would start.

    The report is kept in `<out>/check/report.json`, and what cannot be used is listed in `<out>/check/bad.jsonl`, which
    the run leaves out. Raises ConfigError for settings that are wrong, or that are not those of a stage with data.
    """
    config = load_config(config_path, overrides)
    if not isinstance(config, StageConfig):
        raise ConfigError(f"{config_path} is for {config.stage}, which makes its own data; there is nothing to check")
    problems: list[str] = []
    notes: list[str] = []
    text_side = None
    try:
        text_side = load_text_side(config.model)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        problems.append(f"model: {error}\nso no tokens are counted")
    sources = _splits(config)
    writer = QuarantineWriter(config.out, [source for files in sources.values() for source in files])
    renderer, max_positions = (text_side.renderer, text_side.max_positions) if text_side else (None, None)
    rules = RowRules(renderer, config.data.max_length_tokens, decode=True, max_positions=max_positions)
    if max_positions and max_positions < config.data.max_length_tokens:
        notes.append(positions_note(config.data.max_length_tokens, max_positions))
    found = {}
    for name, files in sources.items():
        with _progress(f"looking at {name}") as advance:

            def watch(source: SourceConfig, part: PartReport, name: str = name, advance: Any = advance) -> None:
                writer.add(name, source, part)
                advance(len(part.ids))

            examples, report = inspect_sources(files, rules, on_part=watch)
        found[name] = Findings(report, examples, refusal_reason(report, config.data))
        _judge(name, found[name], text_side, problems, notes)
    if "val" in found and (shared := num_shared_contents(found["val"].report.contents, found["train"].report.contents)):
        notes.append(f"{shared} val examples are in train too, so val says too little")
    result = {
        "config": str(config_path),
        "image_tokens_per_image": text_side.layout.num_view_tokens if text_side else None,
        "image_layout": text_side.layout.kind if text_side else None,
        **{name: findings.to_json() for name, findings in found.items()},
        "problems": problems,
        "notes": notes,
        "bad_list": str(writer.path) if any(findings.report.num_bad for findings in found.values()) else None,
        "starts": not problems,
    }
    writer.close(result)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(result, found)
    return not problems


def _splits(config: StageConfig) -> dict[str, Sequence[SourceConfig]]:
    data = config.data
    replay = [data.replay.as_source()] if data.replay else []
    return {name: files for name, files in {"train": data.train, "replay": replay, "val": data.val}.items() if files}


def _judge(name: str, found: Findings, text_side: TextSide | None, problems: list[str], notes: list[str]) -> None:
    report = found.report
    if found.refusal:
        problems.append(f"{name}: {found.refusal}")
    longest, limit = int(report.lengths.max(initial=0)), text_side.trained_length_tokens if text_side else None
    if limit and longest > limit:
        notes.append(f"{name}: the longest example has {longest} tokens, but the LLM was made for {limit}")
    if passed_over := describe_passed_over(report.passed_over):
        notes.append(f"{name}: {passed_over}")
    if report.unread:
        keys = ", ".join(f"{key} ({count:,} rows)" for key, count in report.unread.most_common(8))
        notes.append(f"{name}: keys of rows that are not read: {keys}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int], None]]:
    """The number of rows so far on a terminal, one line elsewhere. How many there are is known when they are seen."""
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


def _print(result: Mapping[str, Any], found: Mapping[str, Findings]) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    unit = "an image" if result["image_layout"] in (None, "single") else f"a view, images as {result['image_layout']}"
    table = Table(title=f"{result['config']}: {result['image_tokens_per_image'] or '?'} image tokens {unit}")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    columns = [result[name] for name in found]
    for key, label in ROWS.items():
        values = [column[key] for column in columns]
        table.add_row(label, *(f"{v:,}" if isinstance(v, int) else str(v or "-") for v in values))
    console.print(table)
    for name, findings in found.items():
        _print_reasons(console, name, findings.report)
    for note in result["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    for problem in result["problems"]:
        console.print(f"problem: {problem}", style="red", soft_wrap=True)
    if result["bad_list"]:
        console.print(f"every row that is left out, and why: {result['bad_list']}", soft_wrap=True)
    verdict = "the run would start" if result["starts"] else "the run would not get through"
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
