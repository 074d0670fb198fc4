"""Every line of a log says how fast the run is and where its time goes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import log_of, train_in_process

from mmllm.batch import Batch
from mmllm.training.throughput import Throughput, recomputed

ALONE = SimpleNamespace(num_processes=1, device=torch.device("cpu"))


def test_every_line_of_the_log_has_the_figures(tiny_runs: Path, tmp_path: Path) -> None:
    out = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out", "optim.max_steps=3")
    rows = [row for row in log_of(out) if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["tokens_per_second"] > row["samples_per_second"] > 0
        assert 0 <= row["padding"] < 1
        assert 0 < row["data_wait"] < 1
        assert 0 < row["mfu"] <= row["hfu"] < 1


def test_padding_is_the_share_of_positions_without_a_token() -> None:
    ids = torch.zeros(2, 4, dtype=torch.long)
    throughput = Throughput(None, ALONE, "fp32")
    throughput.stepped([Batch(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), ids)])
    found = throughput.figures()
    assert found["padding"] == 0.25
    assert found["tokens_per_second"] == pytest.approx(3 * found["samples_per_second"])
    assert "mfu" not in found
    assert "padding" not in throughput.figures(), "each call begins anew"


@pytest.mark.parametrize(
    ("setting", "expected"), [(False, (False, False)), (True, (True, False)), (["language", "vision"], (True, True))]
)
def test_what_is_recomputed_is_read_in_either_shape(setting: Any, expected: tuple[bool, bool]) -> None:
    assert recomputed(SimpleNamespace(optim=SimpleNamespace(gradient_checkpointing=setting))) == expected
