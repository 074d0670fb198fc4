"""What is said of every setting, and the commands that show it and hand out config files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmllm.cli import app
from mmllm.config import CONFIGS, ConfigError
from mmllm.config.file import load_config
from mmllm.config.old_names import OLD_NAMES
from mmllm.config.reference import all_settings, find_settings, resumable_paths, settings_markdown

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))


def mmllm(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("setting", all_settings(), ids=lambda setting: f"{setting.path} of {setting.stages[0]}")
def test_every_setting_says_what_it_does(setting: Any) -> None:
    assert re.fullmatch(r"([A-Z`0-9]|open_clip's ).*(\.|https://\S+)", setting.description), setting.description
    assert len(setting.description) > 15
    assert setting.type


def test_types_defaults_and_bounds_are_those_of_the_fields() -> None:
    found = {(one.path, one.stages[0]): (one.type, one.default) for one in all_settings()}
    assert found["compute.batch_size", "stage1"] == ("integer > 0", "required")
    assert found["compute.precision", "stage1"] == ("one of fp32, bf16, auto", "fp32")
    assert found["optim.learning_rates", "stage1"] == ("mapping of text to number > 0", "required")
    assert found["optim.layer_decay", "stage1"][0] == ("number > 0 and <= 1 or mapping of text to number > 0 and <= 1")
    assert found["validation.tasks", "stage1"] == ("list of paths", "[]")
    assert found["log.trackers", "stage1"][0] == "list of tensorboard, wandb, trackio"
    assert found["data.train[].path", "stage1"] == ("path", "required")
    assert found["data.train[].weight", "stage1"] == ("number > 0", "1.0")
    assert found["data.replay.fraction", "stage1"] == ("number > 0 and < 1", "0.05")
    assert found["model.vision.tile_grids", "stage1"] == ("list of [integer > 0, integer > 0]", "none")
    assert found["model.vision.fuse_with.feature_layer", "stage1"] == ("integer or list of integer", "-2")
    assert found["lora.rank", "stage1"] == ("integer > 0", "16")
    assert found["language.source", "warmup_language"] == ("path", '""')
    assert found["stage", "warmup_vision"][0] == "warmup_vision"


def test_a_setting_that_several_stages_share_is_there_once() -> None:
    (setting,) = find_settings("seed")
    assert setting.stages == tuple(CONFIGS)
    (setting,) = find_settings("freeze")
    assert setting.stages == ("stage1", "stage2")


def test_what_may_change_on_resume_is_what_carries_the_mark() -> None:
    top = {path for path in resumable_paths() if "." not in path}
    assert top == {"out", "validation", "alarms", "log"}
    parts = {path for path in resumable_paths() if path.startswith(("compute.", "data.", "optim.", "model."))}
    assert parts == {
        "compute.batch_size", "compute.accumulate_steps", "compute.gradient_checkpointing", "compute.compile",
        "compute.loss_chunk_tokens", "compute.num_threads", "data.num_workers", "data.packing", "data.cache_folder",
    }  # fmt: skip


def test_show_prints_one_setting_a_section_or_all() -> None:
    assert mmllm("configs", "show", "compute.batch_size").output == (
        "compute.batch_size\n  type     integer > 0\n  default  required\n  resume   may change\n"
        "  Examples of one process in one micro-step.\n"
    )
    section = mmllm("configs", "show", "alarms").output
    assert re.findall(r"^\S+", section, re.MULTILINE) == [
        "alarms", "alarms.min_image_reliance", "alarms.reliance_after", "alarms.reliance_validations",
        "alarms.forgetting_budget", "alarms.fail",
    ]  # fmt: skip
    everything = mmllm("configs", "show").output
    assert len(re.findall(r"^\S+", everything, re.MULTILINE)) == len(all_settings())
    old = mmllm("configs", "show", "optim.batch_size").output
    assert old.startswith("optim.batch_size is an old name of compute.batch_size\n\ncompute.batch_size\n")
    assert "default  1.0\n" in mmllm("configs", "show", "data.train.weight").output
    assert (
        mmllm("configs", "show", "data.train.0.weight").output == mmllm("configs", "show", "data.train.weight").output
    )


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("batch_size", "did you mean compute.batch_size?"),
        ("optim.every_steps", "did you mean validation.every_steps, log.every_steps?"),
        ("lorra", "did you mean lora, lora."),
        ("%", "there are stage, out, seed, compute, optim, validation, alarms, log, model, data, train"),
    ],
)
def test_an_unknown_setting_is_answered_with_near_ones(key: str, hint: str) -> None:
    done = mmllm("configs", "show", key)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: there is no setting {key!r}; {hint}")
    with pytest.raises(ConfigError):
        find_settings(key)


def test_every_old_name_is_answered_with_todays() -> None:
    for old, new in OLD_NAMES.items():
        assert find_settings(old)[0].path == new, old


def test_the_reference_has_every_setting_in_its_section_and_whole_tables() -> None:
    text = settings_markdown()
    sections = dict(re.findall(r"^## `?([^`\n]+)`?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for setting in all_settings():
        parent, _, name = setting.path.rpartition(".")
        assert f"| `{name}` | " in sections[parent or "Top level"], setting.path
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(columns) == 1, table
    assert "| `optim.batch_size` | `compute.batch_size` |  |" in sections["Old names"]
    assert "`tiles` is `anyres`" in sections["Old names"]
    assert "see its settings" in sections["Top level"]
    for name in re.findall(r"\]\(#(\w+)\)", text):
        assert any(re.sub(r"\W", "", section) == name for section in sections), name


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_file_begins_with_the_command_that_runs_it(path: Path) -> None:
    command = path.read_text().splitlines()[0].removeprefix("# ").split()
    assert command[:2] in (["mmllm", "train"], ["accelerate", "launch"])
    assert str(path.relative_to(ROOT)) in command
    files = [word for word in command if word.endswith((".yaml", ".py"))]
    assert [file for file in files if not (ROOT / file).is_file()] == []
    if script := next((word for word in command if word.endswith(".py")), None):
        assert path.parent.name == "accelerate" or load_config(path).stage == Path(script).stem


def test_configs_lists_the_files_with_their_commands() -> None:
    done = mmllm("configs")
    assert done.exit_code == 0
    rows = dict(line.split(maxsplit=1) for line in done.output.splitlines())
    assert rows["tiny/stage2"] == "mmllm train configs/tiny/stage2.yaml"
    assert rows["accelerate/one_gpu"].startswith("accelerate launch --config_file configs/accelerate/one_gpu.yaml")
    assert len(rows) == len(SHIPPED)


@pytest.mark.parametrize("name", ["tiny/stage2", "tiny/stage2.yaml", "configs/tiny/stage2.yaml"])
def test_copy_makes_a_file_that_trains_the_same_and_names_itself(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = load_config(ROOT / "configs" / "tiny" / "stage2.yaml")
    monkeypatch.chdir(tmp_path)
    assert mmllm("configs", "copy", name).output == "stage2.yaml: mmllm train stage2.yaml\n"
    assert load_config("stage2.yaml") == original
    assert mmllm("configs", "copy", name, "mine/first.yaml").output == "mine/first.yaml: mmllm train mine/first.yaml\n"
    assert load_config("mine/first.yaml") == original
    assert mmllm("configs", "copy", name, "mine").output == "mine/stage2.yaml: mmllm train mine/stage2.yaml\n"


def test_copy_overwrites_nothing_and_says_which_configs_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stage2.yaml").write_text("mine\n")
    done = mmllm("configs", "copy", "tiny/stage2")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: stage2.yaml exists; remove it, or name another file")
    assert (tmp_path / "stage2.yaml").read_text() == "mine\n"
    done = mmllm("configs", "copy", "tiny/stage3")
    assert done.exit_code == 2
    assert "there is no config 'tiny/stage3'; there are accelerate/ddp, " in done.stderr


def test_without_a_checkout_the_commands_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmllm.cli.configs.FOLDER", tmp_path / "configs")
    for arguments in (["configs"], ["configs", "copy", "tiny/stage2"]):
        done = mmllm(*arguments)
        assert done.exit_code == 2
        assert done.stderr == (
            "error: the configs are not part of the installed package: clone the repository and run it there\n"
        )
    assert mmllm("configs", "show", "seed").exit_code == 0
    shutil.copytree(ROOT / "configs" / "tiny", tmp_path / "configs" / "tiny")
    assert len(mmllm("configs").output.splitlines()) == len(list((ROOT / "configs" / "tiny").glob("*.yaml")))
