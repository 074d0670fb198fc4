"""Paths as people write them are the same path in a config, an override and a command, and never a folder named `~`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mmllm.cli import app
from mmllm.config import ConfigError, StageConfig
from mmllm.config.file import load_config
from mmllm.paths import expand_path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "disk"))
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "me"


def test_each_way_to_write_a_path_is_understood(home: Path) -> None:
    disk = home.parent / "disk"
    (home.parent / "price$list").mkdir()
    meant = {
        "~": home,
        "~/a b": f"{home}/a b",
        "$HOME/x": f"{home}/x",
        "${DATA_ROOT}/x": f"{disk}/x",
        "local-dir:~/tower": f"local-dir:{home}/tower",
        "transformers:$DATA_ROOT/tower": f"transformers:{disk}/tower",
        "file:///a%20b/c.json": "/a b/c.json",
        "file://localhost/a": "/a",
        "file:///shards/{000..123}.tar": "/shards/{000..123}.tar",
        # no such paths: they stay
        "price$list": "price$list",  # there is such a folder
        "cost$5/x": "cost$5/x",
        "runs/a~b": "runs/a~b",
        "C:\\DATA~1\\x": "C:\\DATA~1\\x",
        "s3://bucket/~/x": "s3://bucket/~/x",
        "org/name": "org/name",
        "hf-hub:org/name": "hf-hub:org/name",
    }
    assert {text: expand_path(text) for text in meant} == {text: str(path) for text, path in meant.items()}


SETTINGS = (
    "out",
    "model.vision.source",
    "model.vision.pretrained",
    "model.language.source",
    "data.cache_folder",
    "validation.text_probe",
)


def tree_of(home: str) -> dict[str, object]:
    return {
        "stage": "stage2",
        "out": f"{home}/run",
        "model": {
            "vision": {"source": "ViT-B-32", "pretrained": f"{home}/clip.pt"},
            "projector": {"kind": "mlp"},
            "language": {"source": f"{home}/llm"},
            "template": "tokenizer",
        },
        "data": {
            "train": [{"path": f"{home}/rows.json", "images": f"{home}/pictures"}],
            "cache_folder": f"{home}/cache",
        },
        "train": ["projector", "language"],
        "optim": {"learning_rates": {"projector": 0.1, "language": 0.1}, "max_steps": 2},
        "compute": {"batch_size": 4},
        "validation": {"text_probe": f"{home}/talk.json", "tasks": [f"{home}/task"]},
    }


@pytest.mark.parametrize("written", ["~", "$HOME", "${HOME}"])
def test_every_path_of_a_config_and_of_its_overrides_is_understood(home: Path, written: str) -> None:
    home.mkdir()
    (home / "run.yaml").write_text(yaml.safe_dump(tree_of(written)))
    config = load_config(f"{written}/run.yaml", [f"data.val=[{{path: '{written}/val.json'}}]", f"out={written}/other"])
    assert isinstance(config, StageConfig)
    assert (
        config.model_dump()
        == load_config(home / "run.yaml", [f"data.val=[{{path: {home}/val.json}}]", f"out={home}/other"]).model_dump()
    )
    assert str(home) in config.data.train[0].path
    assert written not in str(config)


def test_what_is_not_there_is_refused_by_the_name_of_its_setting(home: Path) -> None:
    path = home.parent / "run.yaml"
    path.write_text(yaml.safe_dump(tree_of("/data")))
    for setting in SETTINGS:
        for written, wrong in (
            ("$NOT_SET/x", "no variable NOT_SET"),
            ("~nobody-of-this-name/x", "no home folder of ~nobody"),
        ):
            if setting == "model.vision.source" and written:
                written = f"local-dir:{written}"
            with pytest.raises(ConfigError, match=wrong) as caught:
                load_config(
                    path,
                    [
                        f"{setting}={written}",
                        *(["model.vision.pretrained=null"] if "vision" in setting and "source" in setting else []),
                    ],
                )
            assert setting in str(caught.value)
    with pytest.raises(ConfigError, match="NOT_SET"):
        load_config(path, ["out=${NOT_SET}/x"])


def test_a_command_understands_what_no_shell_has_expanded(home: Path) -> None:
    done = CliRunner().invoke(app, ["report", "~/run"])
    assert done.exit_code == 1
    assert str(home / "run") in done.output
    for written in ("$NOT_SET/x", "~nobody-of-this-name"):
        done = CliRunner().invoke(app, ["caption", "model", "pictures", "--out", written])
        assert done.exit_code == 2
        assert written in done.output
