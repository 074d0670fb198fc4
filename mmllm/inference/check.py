"""`mmllm check`: everything that a run would find in its data, before it starts. The LLM's weights stay on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmllm.batch import IMAGE_TOKEN, Example
from mmllm.config import ConfigError, ModelConfig, StageConfig, load_config
from mmllm.data.chat import Renderer
from mmllm.data.check import (
    Report,
    Row,
    choose_examples,
    decode_all,
    image_paths,
    num_repeated,
    num_shared,
    read_rows,
    refusal,
)
from mmllm.data.sources import BadRow
from mmllm.model.checkpoint import read_manifest
from mmllm.model.language import load_tokenizer
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vision import load_tower
from mmllm.model.vlm import VisionLanguageConfig
from projector import build_projector

MAX_REASONS_SHOWN = 12
FILE_WIDTH = 140  # of tables where no terminal gives one
# Numbers, quoted words, paths and file names: what differs between two rows that are bad for the same reason.
_PARTICULARS = re.compile(r"'[^']*'|\S*/\S*|\b\S+\.\w{3,4}\b|\d[\d,]*")
_PICTURE_WORDS = re.compile(r"\b(picture|image|photo|photograph)s?\b", re.IGNORECASE)


@dataclass(frozen=True)
class TextSide:
    """What turns conversations into tokens, without the LLM. `max_positions` is None where the LLM has no limit."""

    renderer: Renderer
    max_positions: int | None


@dataclass
class Findings:
    """What one split of the data holds."""

    report: Report
    examples: list[Example]
    undecodable: dict[str, str]
    refusal: str | None

    def to_json(self) -> dict[str, Any]:
        lone = [example for example in self.examples if not example.images]
        return {
            **self.report.to_json(),
            "longest_example": self.longest_example(),
            "undecodable_images": len(self.undecodable),
            "repeated": num_repeated(self.examples),
            "without_image": len(lone),
            "without_image_asking_about_one": sum(bool(_PICTURE_WORDS.search(e.messages[0].text)) for e in lone),
            "left_out_by_reason": {reason: len(rows) for reason, rows in by_reason(self.report.bad).items()},
        }

    def longest_example(self) -> str | None:
        lengths = self.report.lengths
        return self.examples[lengths.index(max(lengths))].id if lengths else None


def by_reason(bad: Sequence[BadRow]) -> dict[str, list[BadRow]]:
    """Rows by what is wrong with them, the most frequent first; names and numbers are left out of the reason."""
    groups: dict[str, list[BadRow]] = {}
    for row in bad:
        groups.setdefault(_PARTICULARS.sub("…", row.reason), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def load_text_side(config: ModelConfig) -> TextSide:
    """Tokenizer, template and the number of image tokens of a model. Raises ValueError where a part is missing."""
    if config.checkpoint:
        read_manifest(config.checkpoint)
        processor = VisionLanguageProcessor.from_pretrained(config.checkpoint)
        tokenizer, num_image_tokens = processor.tokenizer, processor.num_image_tokens
        template = config.template or processor.template
        text_config = VisionLanguageConfig.from_pretrained(config.checkpoint).text_config
    else:
        from transformers import AutoConfig

        assert config.vision
        assert config.projector
        assert config.language
        assert config.template
        language = config.language
        tokenizer = load_tokenizer(language.source, revision=language.revision, add_tokens=language.add_tokens)
        found = AutoConfig.from_pretrained(config.language.source, revision=config.language.revision)
        text_config = found.get_text_config()
        tower = load_tower(config.vision)
        projector = build_projector(
            config.projector.kind,
            vision_dim=tower.width,
            llm_dim=text_config.hidden_size,
            num_patches=tower.num_patches,
            **config.projector.options,
        )
        num_image_tokens, template = projector.num_tokens(tower.num_patches), config.template
    renderer = Renderer(
        tokenizer,
        template,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        num_image_tokens=num_image_tokens,
    )
    return TextSide(renderer, getattr(text_config, "max_position_embeddings", None))


def check_data(config_path: Path, overrides: list[str], *, as_json: bool) -> bool:
    """Prints what a run of these settings would find; True where it would start and read every picture.

    What cannot be used is listed in `<out>/check/bad.jsonl`. Raises ConfigError for settings that are wrong, or that
    are not those of a stage with data.
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
    found = _examine(config, text_side)
    for name, findings in found.items():
        _judge(name, findings, text_side, problems, notes)
    if "val" in found and (shared := num_shared(found["val"].examples, found["train"].examples)):
        notes.append(f"{shared} val examples are in train too, so val says too little")
    quarantine = _write_quarantine(Path(config.out) / "check" / "bad.jsonl", found)
    result = {
        "config": str(config_path),
        "image_tokens_per_image": text_side.renderer.num_image_tokens if text_side else None,
        **{name: findings.to_json() for name, findings in found.items()},
        "problems": problems,
        "notes": notes,
        "bad_list": str(quarantine) if quarantine else None,
        "starts": not problems,
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print(result, found)
    return not problems


def _examine(config: StageConfig, text_side: TextSide | None) -> dict[str, Findings]:
    """Reads all rows, decodes each image once, then looks at what is left."""
    sources = {"train": config.data.train, **({"val": config.data.val} if config.data.val else {})}
    read = {name: read_rows(files) for name, files in sources.items()}
    paths = image_paths(row for rows, _ in read.values() for row in rows)
    with _progress("decoding images", len(paths)) as advance:
        reasons = decode_all(paths, advance=advance)
    renderer = text_side.renderer if text_side else None
    found = {}
    for name, (rows, report) in read.items():
        examples = choose_examples(rows, report, renderer, config.data, undecodable=reasons)
        found[name] = Findings(report, examples, _of_rows(rows, reasons), refusal(report, config.data))
    return found


def _of_rows(rows: Sequence[Row], reasons: Mapping[str, str]) -> dict[str, str]:
    return {path: reasons[path] for path in image_paths(rows) if path in reasons}


def _judge(name: str, found: Findings, text_side: TextSide | None, problems: list[str], notes: list[str]) -> None:
    if found.refusal:
        problems.append(f"{name}: {found.refusal}")
    if found.undecodable:
        shown = "\n".join(f"  {reason}" for reason in list(found.undecodable.values())[:5])
        more = f"\n  and {len(found.undecodable) - 5} more" if len(found.undecodable) > 5 else ""
        problems.append(
            f"{name}: image files that cannot be decoded: {len(found.undecodable)}. The run would stop where it meets "
            f"them; mend them or take their rows out:\n{shown}{more}"
        )
    longest, limit = max(found.report.lengths, default=0), text_side.max_positions if text_side else None
    if limit and longest > limit:
        notes.append(f"{name}: the longest example has {longest} tokens, but the LLM was made for {limit}")


def _write_quarantine(path: Path, found: Mapping[str, Findings]) -> Path | None:
    """One line for each row that is left out; no file where there is none."""
    lines = [
        json.dumps({"split": name, **vars(row)}) for name, findings in found.items() for row in findings.report.bad
    ]
    if not lines:
        path.unlink(missing_ok=True)
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, one line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{what}: {total}")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
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
    table = Table(title=f"{result['config']}: {result['image_tokens_per_image'] or '?'} image tokens an image")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    columns = [result[name] for name in found]
    for key, label in ROWS.items():
        values = [column[key] for column in columns]
        table.add_row(label, *(f"{v:,}" if isinstance(v, int) else str(v or "-") for v in values))
    console.print(table)
    for name, findings in found.items():
        _print_reasons(console, name, findings.report.bad)
    for note in result["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    for problem in result["problems"]:
        console.print(f"problem: {problem}", style="red", soft_wrap=True)
    if result["bad_list"]:
        console.print(f"every row that is left out, and why: {result['bad_list']}", soft_wrap=True)
    verdict = "the run would start" if result["starts"] else "the run would not get through"
    console.print(verdict, style="bold green" if result["starts"] else "bold red")


def _print_reasons(console: Console, name: str, bad: Sequence[BadRow]) -> None:
    if not bad:
        return
    groups = by_reason(bad)
    table = Table(title=f"left out of {name}")
    table.add_column("rows", justify="right")
    table.add_column("why", overflow="fold")
    table.add_column("such as", overflow="fold")
    for reason, rows in list(groups.items())[:MAX_REASONS_SHOWN]:
        first = rows[0]
        table.add_row(str(len(rows)), reason, f"{first.source} row {first.row} ({first.id})")
    if rest := list(groups.values())[MAX_REASONS_SHOWN:]:
        table.add_row(str(sum(map(len, rest))), f"{len(rest)} other reasons", "")
    console.print(table)
