"""`mmllm check`: everything about a run's data in one report, before the run."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from mmllm.batch import Example, message
from mmllm.cli import app
from mmllm.config import DataConfig, SourceConfig
from mmllm.data import check
from mmllm.data.check import DataReport, inspect_sources, load_examples, why_left_out
from mmllm.data.inspection import PartReport, RowRules
from mmllm.data.sources import BadRow, DataError
from mmllm.diagnose.prompt_setup import load_prompt_setup
from mmllm.inference.engine import Engine
from tests.builders.tiny import model_config

ROOT = Path(__file__).parents[2]


def run(config: Path, *arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["check", str(config), *arguments])
    return done.exit_code, done.stdout, done.stderr


def write_config(folder: Path, parts: Path, train: list[Path], val: list[Path], **model: object) -> Path:
    settings = {
        "stage": "stage1",
        "out": str(folder / "run"),
        "model": model or model_config(parts).model_dump(exclude_none=True),
        "data": {"train": [{"path": str(path)} for path in train], "val": [{"path": str(path)} for path in val]},
        "train": ["projector"],
        "optim": {"learning_rates": {"projector": 0.001}, "max_steps": 1},
        "compute": {"batch_size": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def clean(tmp_path: Path, tiny_parts: Path, tiny_scenes: Path) -> Path:
    train, val = (tiny_scenes / split / "conversations.json" for split in ("train", "val"))
    return write_config(tmp_path, tiny_parts, [train], [val])


def row(question: str, *images: str) -> dict:
    turns = [{"from": "human", "value": "<image>\n" * len(images) + question}, {"from": "gpt", "value": "yes"}]
    return {"conversations": turns, **({"image": list(images)} if images else {})}


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """Data of which rows 1 to 4 and 6 cannot be used, each for another reason, or cannot be decoded."""
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"GIF89a, or so it says")
    rows = [
        row("is it?", "good.png"),
        row("is it?", "gone.png"),
        {"conversations": []},
        row("is it?", "broken.png"),
        row("what " * 3000, "good.png"),
        row("is it?", "good.png"),
        {**row("is it?"), "image": "good.png"},
        row("what is in the picture?"),
    ]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(rows))
    return path


def test_clean_data_is_counted_as_a_run_counts_it(clean: Path, tiny_checkpoint: Path, tiny_scenes: Path) -> None:
    status, out, _ = run(clean, "--json")
    report = json.loads(out)
    assert (status, report["starts"], report["problems"], report["bad_list"]) == (0, True, [], None)
    renderer = Engine.load(tiny_checkpoint).renderer
    for split in ("train", "val"):
        path = tiny_scenes / split / "conversations.json"
        examples, expected = load_examples([SourceConfig(path=str(path))], renderer, DataConfig(train=()))
        found = report[split]
        assert {key: found[key] for key in expected.to_json()} == expected.to_json()
        assert found["rows"] == found["usable"] == len(json.loads(path.read_text()))
        assert found["longest_example"] in [example.id for example in examples]
        assert found["without_image"] == sum(not example.images for example in examples) > 0
    assert report["image_tokens_per_image"] == 4
    assert json.loads((clean.parent / "run" / "check" / "report.json").read_text()).items() >= report.items()


def test_the_weights_of_the_llm_are_not_needed(tmp_path: Path, tiny_parts: Path, tiny_scenes: Path) -> None:
    shutil.copytree(tiny_parts, tmp_path / "parts")
    (tmp_path / "parts" / "language" / "model.safetensors").unlink()
    config = write_config(tmp_path, tmp_path / "parts", [tiny_scenes / "val" / "captions.json"], [])
    status, out, _ = run(config)
    assert status == 0
    assert "the run would start" in out


def test_a_checkpoint_brings_its_own_tokenizer_and_template(
    tmp_path: Path, tiny_checkpoint: Path, tiny_parts: Path, tiny_scenes: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    train = [tiny_scenes / "train" / "captions.json"]
    config = write_config(tmp_path, tiny_parts, train, [], checkpoint=str(tmp_path / "checkpoint"))
    own = json.loads(run(config, "--json")[1])
    other = json.loads(run(config, "model.template=vicuna_v1", "--json")[1])
    assert own["starts"]
    assert own["train"]["tokens"] < other["train"]["tokens"]
    assert own["train"]["image_tokens"] == other["train"]["image_tokens"] == 24 * 4


def test_every_problem_is_reported_at_once(tmp_path: Path, tiny_parts: Path, bad: Path) -> None:
    config = write_config(tmp_path, tiny_parts, [bad, tmp_path / "missing.json"], [bad])
    status, out, _ = run(config, "--json")
    report = json.loads(out)
    assert (status, report["starts"]) == (1, False)
    found = report["train"]
    assert (found["rows"], found["usable"], found["left_out"]) == (8, 3, 5)
    assert sorted(entry["row"] for entry in found["bad"]) == [1, 2, 3, 4, 6]
    assert (found["repeated"], found["undecodable_images"]) == (1, 1)
    assert (found["without_image"], found["without_image_asking_about_one"]) == (1, 1)
    assert sum(found["left_out_by_reason"].values()) == len(found["left_out_by_reason"]) == 5
    problems = "\n".join(report["problems"])
    for text in ("no data file at", "missing.json", "broken.png", "val: 5 of 8 rows"):
        assert text in problems
    assert any("3 val examples are in train too" in note for note in report["notes"])
    listed = [json.loads(line) for line in Path(report["bad_list"]).read_text().splitlines()]
    assert [(entry["split"], entry["row"]) for entry in listed if entry["split"] == "val"] == [
        ("val", entry["row"]) for entry in report["val"]["bad"]
    ]
    assert "max_length_tokens" in next(entry["reason"] for entry in listed if entry["row"] == 4)


def test_the_report_can_be_read_and_goes_with_its_cause(tmp_path: Path, tiny_parts: Path, bad: Path) -> None:
    config = write_config(tmp_path, tiny_parts, [bad], [])
    status, out, _ = run(config)
    assert status == 1
    for text in ("left out of train", "image files that cannot be decoded", "problem: train:", "bad.jsonl", "(#4)"):
        assert text in out
    good = [entry for number, entry in enumerate(json.loads(bad.read_text())) if number in (0, 7)]
    bad.write_text(json.dumps(good))
    status, out, _ = run(config)
    assert status == 0
    assert "the run would start" in out
    assert (tmp_path / "run" / "check" / "bad.jsonl").read_text() == ""


def test_without_a_model_the_rest_is_still_looked_at(tmp_path: Path, tiny_parts: Path, bad: Path) -> None:
    config = write_config(tmp_path, tiny_parts, [bad], [], checkpoint=str(tmp_path / "not-trained-yet"))
    status, out, _ = run(config, "--json")
    report = json.loads(out)
    assert status == 1
    assert "no model at" in report["problems"][0]
    assert report["train"]["undecodable_images"] == 1
    assert (report["train"]["usable"], report["train"]["tokens"]) == (4, 0)


def test_only_a_stage_with_data_can_be_checked() -> None:
    status, out, err = run(ROOT / "configs" / "tiny" / "warmup_vision.yaml")
    assert (status, out) == (2, "")
    assert "makes its own data" in err


def test_an_example_longer_than_the_llm_is_noted(tmp_path: Path, tiny_parts: Path, bad: Path) -> None:
    config = write_config(tmp_path, tiny_parts, [bad], [])
    report = json.loads(run(config, "--json", "data.max_length_tokens=100000")[1])
    assert any("the LLM was made for 2048" in note for note in report["notes"])


def test_a_run_refuses_what_the_check_refuses(tiny_parts: Path, bad: Path) -> None:
    renderer = load_prompt_setup(model_config(tiny_parts)).renderer
    sources = [SourceConfig(path=str(bad))]
    with pytest.raises(DataError, match="4 of 8 rows cannot be used") as caught:
        load_examples(sources, renderer, DataConfig(train=()))
    assert "bad.json row 4 (#4): " in str(caught.value)  # its place in the file, counted with the bad ones before it
    examples, report = load_examples(sources, renderer, DataConfig(train=(), max_bad_fraction=0.5))
    assert (len(examples), report.num_usable, len(report.lengths)) == (4, 4, 4)
    with pytest.raises(DataError, match="no data file at"):
        load_examples([*sources, SourceConfig(path="gone.json")], renderer, DataConfig(train=(), max_bad_fraction=1))


def test_processes_find_what_one_finds(tiny_parts: Path, tiny_scenes: Path, bad: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(check, "ROWS_PER_PART", 3)
    renderer = load_prompt_setup(model_config(tiny_parts)).renderer
    sources = [SourceConfig(path=str(path)) for path in (tiny_scenes / "train" / "captions.json", bad)]
    sources.append(SourceConfig(path=str(bad), max_examples=2))
    rules, found, random_before = RowRules(renderer, 512, decode=True), [], torch.get_rng_state()
    for num_processes in (1, 2):
        parts: list[PartReport] = []
        examples, report = inspect_sources(
            sources, rules, on_part=lambda source, part, to=parts: to.append(part), num_processes=num_processes
        )
        found.append((report.to_json(), list(examples), parts))
    assert found[0] == found[1]
    assert torch.equal(torch.get_rng_state(), random_before)
    report, examples, parts = found[0]
    assert len(examples) == report["usable"] == 24 + 3 + 2
    assert report["repeated"] == 3
    assert sum(len(part.ids) for part in parts) == report["rows"] == 24 + 8 + 6


@pytest.mark.parametrize(("answer", "length", "reason"), [
    ("yes", 512, None),
    ("yes", 3, "tokens (4 of them for images) are more than data.max_length_tokens = 3"),
    ("yes<|end|> and no", 512, None),  # what a person writes is text and ends nothing
])  # fmt: skip
def test_an_example_teaches_each_answer_and_one_end(
    tiny_parts: Path, answer: str, length: int, reason: str | None
) -> None:
    renderer = load_prompt_setup(model_config(tiny_parts)).renderer
    example = Example("x", "", (message("user", "<image> is it?"), message("assistant", answer)), ("a.png",))
    found = why_left_out(example, renderer, DataConfig(train=(), max_length_tokens=length))
    assert found is None if reason is None else reason in str(found)


def test_a_renderer_travels_to_other_processes(tiny_parts: Path) -> None:
    renderer = load_prompt_setup(model_config(tiny_parts)).renderer
    talk = (message("user", "<image> is it?"), message("assistant", "yes"))
    assert pickle.loads(pickle.dumps(renderer)).render(talk) == renderer.render(talk)


def test_reasons_are_grouped_by_what_is_wrong() -> None:
    reasons = ["no image at /a/b.png; check", "no image at /c/d e.png; check", "7 tokens", "18 tokens"]
    report = DataReport()
    report.add(PartReport(bad=[BadRow("x", number, "", reason) for number, reason in enumerate(reasons)]))
    assert ("… tokens", 2, BadRow("x", 2, "", "7 tokens")) in report.by_reason()
