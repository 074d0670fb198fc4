"""The scripts of train/ as people start them: exit statuses, and one readable block for whatever goes wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import SafetensorError

from mmllm.errors import is_disk_full, report_errors
from mmllm.stages.run import main
from tests.builders.launches import script

ROOT = Path(__file__).parents[2]


def real_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train" / name), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def in_process(capsys: Any, stage: str, *arguments: object) -> tuple[int, str]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as ended:
        main(stage, [str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err


def test_a_wrong_setting_ends_with_2_before_anything_is_loaded(tiny_runs: Path, tmp_path: Path) -> None:
    done = real_script("stage1.py", tiny_runs / "stage1.yaml", f"out={tmp_path / 'out'}", "optim.max_step=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tiny_runs / 'stage1.yaml'} cannot be used:\n  optim.max_step: unknown key")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_data_ends_with_1_and_says_which_row_and_why(tiny_runs: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "yes"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": "blind", "image": "gone.png", "conversations": turns}]))
    data = f"data.train=[{{path: {path}}}]"
    done = script(ROOT / "train" / "stage1.py", tiny_runs / "stage1.yaml", f"out={tmp_path / 'out'}", data)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[0] == "error: no usable example in the data:"
    assert lines[1].strip().startswith(f"{path} row 0 (blind): 0 <image> marks in the human turns but 1 image")
    assert len(lines) == 2
    assert done.stdout == ""


def test_a_script_runs_its_own_stage_only(tiny_runs: Path, tmp_path: Path, capsys: Any) -> None:
    status, error = in_process(capsys, "stage1", tiny_runs / "stage2.yaml", f"out={tmp_path / 'out'}")
    assert status == 2
    assert "is for stage2, this script runs stage1: use train/stage2.py" in error


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-x"]])
def test_a_script_without_a_config_says_how_it_is_used(capsys: Any, arguments: list[str]) -> None:
    status, error = in_process(capsys, "stage1", *arguments)
    assert status == 2
    assert "CONFIG.yaml [section.key=value ...]" in error


@pytest.mark.parametrize(
    ("override", "status", "expected"),
    [
        ("model.vision.source=local-dir:nowhere", 2, "model.vision.source: no folder nowhere"),
        ("model.language.source=nowhere", 2, "model.language.source: nowhere is no folder here"),
        (
            "model.projector.kind=perceiver",
            2,
            "model.projector: no projector of kind 'perceiver'; allowed: linear, mlp",
        ),
        ("model.projector.options.factor=3", 2, "model.projector: downsample projector"),
        ("model.template=alpaca", 2, "model.template: no chat template 'alpaca'; allowed: plain"),
        ("data.train=[{path: gone.json}]", 1, "no data file at gone.json"),
        ("data.max_length_tokens=4", 1, "are more than data.max_length_tokens = 4"),
        ("compute.batch_size=17", 1, "16 usable examples are fewer than one global batch of 17"),
        ("out=/dev/null/x", 1, "/dev/null/x: Not a directory"),
    ],
)
def test_whatever_is_missing_is_named(
    tiny_runs: Path, tmp_path: Path, capsys: Any, override: str, status: int, expected: str
) -> None:
    found, error = in_process(capsys, "stage2", tiny_runs / "stage2.yaml", f"out={tmp_path / 'out'}", override)
    assert expected in error
    assert found == status
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_a_model_to_start_from_that_is_no_checkpoint_is_named(tiny_runs: Path, tmp_path: Path, capsys: Any) -> None:
    tree = yaml.safe_load((tiny_runs / "stage2.yaml").read_text())
    tree["model"] = {"checkpoint": str(tmp_path / "gone")}
    path = tmp_path / "stage2.yaml"
    path.write_text(yaml.safe_dump(tree))
    status, error = in_process(capsys, "stage2", path, f"out={tmp_path / 'out'}")
    assert status == 1
    assert error.startswith(f"error: no model at {tmp_path / 'gone'}: there is no such folder; ")


def test_an_error_keeps_its_traceback_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMLLM_DEBUG", "1")
    with pytest.raises(ValueError, match="usage"):
        main("stage1", [])


def test_mistakes_of_ours_are_not_dressed_up() -> None:
    with pytest.raises(AttributeError), report_errors():
        raise AttributeError("no such thing")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_of_a_full_disk_is_one(code: int) -> None:
    plain = OSError(code, os.strerror(code))
    assert is_disk_full(plain)
    wrapped = RuntimeError("unexpected pos 64 vs 0")
    wrapped.__context__ = plain
    assert is_disk_full(wrapped)
    assert is_disk_full(SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"))
    assert is_disk_full(SafetensorError(f"Error while serializing: IoError(Os {{ code: {code}, kind: Other }})"))


def test_other_errors_are_no_full_disk() -> None:
    assert not is_disk_full(OSError(errno.EACCES, "no"))
    assert not is_disk_full(SafetensorError("Error while deserializing header: (os error 2)"))
    assert not is_disk_full(RuntimeError(f"code: {errno.ENOSPC}, kind"))
