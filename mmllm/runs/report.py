"""`report.html`: what a run did, as one file that needs no network, made from the files in the run's folder.

It is written when a run ends or is stopped, and by `mmllm report RUN`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from mmllm.checkpoint.folder import library_versions
from mmllm.config.file import saved_settings
from mmllm.errors import MmllmError
from mmllm.evaluation.reliance import RELIANCE, RELIANCE_ERROR
from mmllm.runs.alarms import TEXT_LOSS, forgetting_of
from mmllm.runs.charts import Curve, chart
from mmllm.runs.folder import RunFolder
from mmllm.runs.run_log import metric_curves, read_log
from mmllm.web_page import png_data_uri, self_contained_page

MAX_SIDE_PX = 512  # of a picture on the page
MAX_ANSWERS = 6  # shown per sample, spread over the run


def write_about(out: Path, notes: Sequence[str], machine: str) -> None:
    """Writes what the log does not say about the newest start: versions, the machine, what is not measured."""
    versions = {"python": platform.python_version(), **library_versions()}
    RunFolder(out).about.write_text(
        json.dumps({"versions": versions, "machine": machine, "notes": list(notes)}, indent=2)
    )


def write_report(out: Path) -> Path:
    """Writes `report.html` into a run's folder and returns its path. Raises MmllmError if the folder holds no run."""
    folder = RunFolder(out)
    if not folder.log.is_file() or not folder.settings.is_file():
        raise MmllmError(
            f"no run in {out}: it needs {folder.log.name} and {folder.settings.name}, which `mmllm train` writes"
        )
    partial = folder.report.with_suffix(".part")
    partial.write_text(_page(out), encoding="utf-8")
    return partial.replace(folder.report)


def _page(out: Path) -> str:
    folder = RunFolder(out)
    rows = read_log(folder.log)
    text = folder.settings.read_text()
    settings = saved_settings(text)
    about = json.loads(folder.about.read_text()) if folder.about.is_file() else {}
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    title = escape(out.resolve().name)
    curves: dict[str, Curve] = dict(metric_curves(rows))
    body = [
        _head(out, rows, settings, about), _alarms(rows, about), _charts(curves, settings), _samples(folder.samples),
        _table(rows), _other_charts(curves, settings), _settings(text, about),
    ]  # fmt: skip
    return self_contained_page(f"{title} - mmllm report", style, "".join(body))


def _head(out: Path, rows: Sequence[Mapping[str, Any]], settings: Any, about: Mapping[str, Any]) -> str:
    last, steps = (rows[-1]["step"] if rows else 0), settings["optim"]["max_steps"]
    state = "finished" if RunFolder(out).is_finished or last >= steps else "stopped"
    machine = f", {escape(about['machine'])}" if about else ""
    return (
        f"<header><p class=over>{escape(settings['stage'])}</p><h1>{escape(out.resolve().name)}</h1>"
        f'<p class=where><b class="{state}">{state}</b> after {last} of {steps} steps{machine}</p></header>\n'
    )


def _alarms(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    alarms = [
        f"<p class='banner wrong'><b>Step {row['step']}</b> {escape(row['text'])}</p>" for row in rows if "alarm" in row
    ]
    notes = [f"<p class='banner note'>{escape(note)}</p>" for note in about.get("notes", [])]
    return "".join(alarms + notes)


def _charts(curves: dict[str, Curve], settings: Any) -> str:
    """The main charts: losses, image reliance, text-only loss and answers. Removes their curves from `curves`."""
    alarms, steps = settings.get("alarms", {}), settings["optim"]["max_steps"]
    text = curves.get(TEXT_LOSS)
    budget = text[0][1] + alarms["forgetting_budget"] if text else None

    def pop_curves(*parts: str) -> dict[str, Curve]:
        names = [name for part in parts for name in curves if name == part or name.startswith((f"{part}/", f"{part}_"))]
        names = [name for name in names if name != RELIANCE_ERROR]  # its scale differs: it is under More curves
        return {name: curves.pop(name) for name in dict.fromkeys(names)}

    groups: list[tuple[str, dict[str, Curve], float | None, str]] = [
        ("Loss, nats per token", pop_curves("loss", "val_loss"), None, ""),
        ("Image reliance, nats per token", pop_curves(RELIANCE), alarms.get("min_image_reliance"), "alarm below"),
        ("Loss on text alone, nats per token", pop_curves(TEXT_LOSS), budget, "forgetting budget"),
        ("Tasks", {name.removeprefix("task/"): curve for name, curve in pop_curves("task").items()}, None, ""),
        ("Answers that are exactly right", pop_curves("exact"), None, ""),
    ]
    drawn = [
        _section(name, chart(group, max_step=steps, line=line, line_name=line_name))
        for name, group, line, line_name in groups
        if group
    ]
    return f"<div class=charts>{''.join(drawn)}</div>\n"


def _other_charts(curves: Mapping[str, Curve], settings: Any) -> str:
    """The remaining curves of the log, folded away."""
    steps = settings["optim"]["max_steps"]
    drawn = [
        f"<div><h2>{escape(name.replace('_', ' '))}</h2>{chart({name: curve}, max_step=steps)}</div>"
        for name, curve in curves.items()
    ]
    if not drawn:
        return ""
    folded = f"<details><summary>More curves</summary><div class=charts>{''.join(drawn)}</div></details>"
    return f"<section>{folded}</section>\n"


def _section(name: str, content: str) -> str:
    return f"<section><h2>{escape(name)}</h2>{content}</section>\n"


def _samples(folder: Path) -> str:
    """Each sample with its pictures and its answers over the run."""
    samples: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[tuple[int, str]]] = {}
    for path in sorted(folder.glob("step_*.json")):
        for sample in json.loads(path.read_text()):
            samples[sample["id"]] = sample
            answers.setdefault(sample["id"], []).append((int(path.stem.removeprefix("step_")), sample["answer"]))
    if not samples:
        return ""
    cards = []
    for name, sample in samples.items():
        history = answers[name]
        shown = [history[index * (len(history) - 1) // max(1, MAX_ANSWERS - 1)] for index in range(MAX_ANSWERS)]
        lines = "".join(f"<tr><td class=number>{step}<td>{_words(answer)}" for step, answer in dict.fromkeys(shown))
        pictures = "".join(
            f'<img src="{_data_uri(folder / file)}" alt="What the model saw">' for file in sample["pictures"]
        )
        cards.append(
            f"<article><div class=pictures>{pictures}</div><div><p class=question>{_words(sample['question'])}</p>"
            f"<table class=answers><tr><th>step<th>answer{lines}<tr class=right><td>right"
            f"<td>{_words(sample['reference'])}</table></div></article>"
        )
    return _section("Answers", f"<div class=samples>{''.join(cards)}</div>")


def _words(text: str) -> str:
    return escape("".join(c if c.isprintable() or c == "\n" else "�" for c in text)) or "<i>nothing</i>"


def _data_uri(path: Path) -> str:
    with Image.open(path) as picture:
        return png_data_uri(picture.convert("RGB"), max_side_px=MAX_SIDE_PX)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"<tr><td>{escape(name)}<td class=number>{curve[0][1]:.4g}<td class=number>{curve[-1][1]:.4g}"
        f"<td class=number>{curve[-1][0]}"
        for name, curve in metric_curves(rows).items()
    ]
    if (forgetting := forgetting_of(rows)) is not None:
        lines.append(f"<tr><td>forgetting: text_loss above its first value<td><td class=number>{forgetting:.4g}<td>")
    head = "<tr><th>metric<th class=number>first<th class=number>last<th class=number>at step"
    return _section("Metrics", f"<div class=wide><table>{head}{''.join(lines)}</table></div>")


def _settings(text: str, about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{escape(name)} {escape(number)}" for name, number in about.get("versions", {}).items())
    return (
        _section("Versions", f"<p class=where>{versions or 'not known'}</p>") + "<section>"
        f"<details><summary>Settings</summary><pre>{escape(text)}</pre></details></section>\n"
    )
