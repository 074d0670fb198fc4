"""The bench of what only a GPU shows runs from end to end, in its small form on whatever this machine has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.__main__ import main
from bench.gpu_large import GIB, fitting_layers
from bench.gpu_steps import ProductDtypes
from bench.workload import SIZES


def rows_of(printed: str) -> dict[str, list[str]]:
    """Rows of its tables, without their heads, by what stands in the first column."""
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {line[0]: line for line in lines}


def test_the_losses_of_this_device_are_those_of_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--smoke", "--section", "losses"]) == 0
    rows = rows_of(capsys.readouterr().out)
    for variant in ("fp32, packed", "bf16, torch's flash kernel"):
        assert rows[variant][5] == "same"
        assert float(rows[variant][2]) <= float(rows[variant][4])
    assert [rows[dtype][1] for dtype in ("float32", "bfloat16")] == ["same", "same"]


def test_a_step_has_its_waits_and_products_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--smoke", "--section", "steps"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["stage 1"][1] == "not measured: no CUDA" or int(rows["stage 1"][1]) >= 0
    assert int(rows["stage 1"][2]) > 20
    assert float(rows["stage 1"][4].rstrip("%")) < 10, "but for the scores of attention on a CPU all is bf16"


def test_products_are_counted_forward_and_backward_by_their_precision() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    with ProductDtypes() as products:
        torch.addmm(torch.randn(5, 6), torch.randn(5, 4), weight).sum().backward()
        torch.randn(2, 3).bfloat16() @ torch.randn(3, 7).bfloat16()
    assert products.count == {"float32": 2, "bfloat16": 1}
    assert products.operations == {"float32": 2 * 2 * 5 * 4 * 6, "bfloat16": 2 * 2 * 3 * 7}
    assert products.wide == {"addmm [5, 4] x [4, 6]": 1, "mm [4, 5] x [5, 6]": 1}


def test_a_large_run_says_its_speed_and_what_plan_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--smoke", "--section", "lora-packed"]) == 0
    (_, row) = rows_of(capsys.readouterr().out).values()
    assert row[:2] == ["lora-packed", "2 of 2"]
    assert float(row[2]) > 0
    assert float(row[7]) > 0


def test_as_many_layers_are_trained_whole_as_the_memory_holds() -> None:
    size = SIZES["7b"]
    assert fitting_layers(size, 139 * GIB) == size.layers
    assert 12 <= fitting_layers(size, 79 * GIB) < size.layers


def test_a_section_that_fails_or_has_no_time_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = {"losses": ("| fp32 |\n\nFAILED with status 1:\n", 100.0), "steps": ("| stage 1 |\n", 100.0)}
    sections = {name: gpu.Section(name, seconds, print) for name, (_, seconds) in told.items()}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "SECTIONS", {**sections, "whole": gpu.Section("whole", 1e6, print)})
    monkeypatch.setattr(gpu, "_run_in_process", lambda name, seconds: told[name][0])
    monkeypatch.chdir(tmp_path)
    assert gpu.gpu() == 1
    printed = capsys.readouterr().out
    assert re.search(r"### losses\n\n\| fp32 \|\n\nFAILED", printed)
    assert "### whole\n\nLEFT OUT: it needs about 1000000 s" in printed
