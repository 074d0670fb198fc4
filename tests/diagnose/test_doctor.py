"""`mmllm doctor`: it says what is missing or broken, and never breaks itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mmllm.checkpoint.folder import load_checkpoint, save_checkpoint
from mmllm.cli import app
from mmllm.diagnose.machine_findings import CORE, EXTRAS, package_finding
from tests.builders.findings import by_name, examine, states

ROOT = Path(__file__).parents[2]
GOLDEN = ("golden prompts", "golden pictures", "golden answers")


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def test_it_knows_every_package_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=\[; ]", line)[0].lower() for line in requirements}

    assert {name.lower() for name in CORE} == names(project["dependencies"])
    extras = project["optional-dependencies"]
    assert {extra: {name.lower() for name in EXTRAS.get(extra, {})} for extra in extras} == {
        extra: names(lines) for extra, lines in extras.items()
    }


def test_here_everything_that_is_needed_works(
    monkeypatch: pytest.MonkeyPatch, tiny_scenes: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    status, findings = examine()
    assert status == 0
    assert findings["packages", "torch"]["text"] == version("torch")
    assert findings["torch", "torchvision"]["state"] == "ok"
    assert findings["files", "scenes"]["state"] == findings["files", "tiny weights"]["state"] == "note"
    assert "mmllm scenes data/scenes" in findings["files", "scenes"]["text"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scenes").symlink_to(tiny_scenes)
    (tmp_path / "weights" / "tiny-language").mkdir(parents=True)
    _, findings = examine()
    assert findings["files", "scenes"]["text"] == "train, val in data/scenes"
    assert findings["files", "tiny weights"]["text"] == "tiny-language"


def test_a_missing_package_is_named_with_what_it_is_for() -> None:
    core = package_finding("no-such-package", "pictures", {})
    assert core.state == "broken"
    assert "missing: pictures" in core.text
    extra = package_finding("no-such-package", "the chat page", {}, extra="demo")
    assert extra.state == "note"
    assert 'pip install "mmllm[demo]"' in extra.text
    old = package_finding("torch", "everything", {"torch": SpecifierSet(">=99")})
    assert old.state == "broken"
    assert ">=99 is needed" in old.text


@pytest.mark.parametrize(
    ("module", "error", "broken", "text"),
    [
        ("torch", "ImportError('libtorch.so: cannot open')", "torch", "libtorch.so"),
        (
            "torchvision",
            "RuntimeError('operator torchvision::nms does not exist')",
            "torchvision",
            "nms does not exist",
        ),
    ],
)
def test_a_package_that_does_not_import_is_a_line_of_the_report(
    tmp_path: Path, module: str, error: str, broken: str, text: str
) -> None:
    (tmp_path / f"{module}.py").write_text(f"raise {error}\n")
    done = subprocess.run(
        [sys.executable, "-m", "mmllm.cli", "doctor", str(tmp_path), "--json"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "")
    findings = by_name(done.stdout)
    assert text in findings["torch", broken]["text"]
    assert findings["torch", broken]["state"] == "broken"
    assert findings["model", "manifest"]["state"] == "broken"


def test_a_good_checkpoint_passes_every_step(checkpoint: Path) -> None:
    status, findings = examine(checkpoint)
    assert status == 0
    assert states(findings, "model") == dict.fromkeys(("manifest", "files", "loading", "LLM", *GOLDEN, "answer"), "ok")
    assert "4 image tokens" in findings["model", "loading"]["text"]
    assert "red circle" in findings["model", "answer"]["text"]
    assert "continuous batching of up to" in findings["model", "LLM"]["text"]
    assert findings["model", "LLM"]["text"].startswith("llama: takes embeddings, padding on either side and a KV cache")
    text = CliRunner().invoke(app, ["doctor", str(checkpoint)]).stdout
    assert "all that is needed works" in text


def test_a_changed_file_is_named_and_the_rest_still_tried(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("changed")
    status, findings = examine(checkpoint)
    assert status == 1
    assert states(findings, "model") == {
        "manifest": "ok", "files": "broken", "loading": "ok", "LLM": "ok", **dict.fromkeys(GOLDEN, "ok"), "answer": "ok"
    }  # fmt: skip
    assert "README.md" in findings["model", "files"]["text"]


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    name = next(key for key in weights if key.startswith("projector."))
    del weights[name]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    status, findings = examine(checkpoint)
    assert status == 1
    assert states(findings, "model") == {"manifest": "ok", "files": "broken", "loading": "broken"}
    assert name in findings["model", "loading"]["text"]


def test_weights_that_are_no_numbers_are_found(checkpoint: Path) -> None:
    model, processor, _ = load_checkpoint(checkpoint)
    with torch.no_grad():
        next(model.projector.parameters())[0] = float("nan")
    save_checkpoint(checkpoint, model, processor, card="")
    status, findings = examine(checkpoint)
    assert status == 1
    assert findings["model", "files"]["state"] == "ok"
    assert "not all numbers are finite in projector." in findings["model", "loading"]["text"]


def test_a_checkpoint_of_an_older_version_works_and_has_no_golden_answers(checkpoint: Path) -> None:
    model, processor, _ = load_checkpoint(checkpoint)
    save_checkpoint(checkpoint, model, processor, card="")
    status, findings = examine(checkpoint)
    assert status == 0
    assert findings["model", "golden answers"]["state"] == "note"
    assert findings["model", "golden answers"]["text"].startswith("none: it was saved by an older version")
    assert findings["model", "answer"]["state"] == "ok"


def test_a_folder_without_model_is_a_line_of_the_report(tmp_path: Path) -> None:
    status, findings = examine(tmp_path / "gone")
    assert status == 1
    assert states(findings, "model") == {"manifest": "broken"}
    assert "make demo" in findings["model", "manifest"]["text"]
