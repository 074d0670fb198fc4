"""Every line of a log says how fast the run is and where its time goes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmllm.batch import Batch
from mmllm.runs.flops import Flops, Peak
from mmllm.runs.throughput import Throughput
from tests.builders.tiny_runs import log_of, train_in_process

ALONE = SimpleNamespace(num_processes=1, device=torch.device("cpu"))


def test_every_line_of_the_log_has_the_figures(tiny_runs: Path, tmp_path: Path) -> None:
    out = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out", "optim.max_steps=3")
    rows = [row for row in log_of(out) if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["tokens_per_second"] > row["samples_per_second"] > 0
        assert 0 <= row["padding"] < 1
        assert 0 < row["data_wait"] < 1
        assert 0 < row["mfu"] <= row["hfu"] <= 1


def test_padding_is_the_share_of_positions_without_a_token() -> None:
    ids = torch.zeros(2, 4, dtype=torch.long)
    throughput = Throughput(None, ALONE, lambda batch: int(batch.attention_mask.sum()))
    throughput.stepped([Batch(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), ids)])
    found = throughput.metrics()
    assert found["padding"] == 0.25
    assert found["tokens_per_second"] == pytest.approx(3 * found["samples_per_second"])
    assert "mfu" not in found
    assert "padding" not in throughput.metrics(), "each call begins anew"


def busy_throughput(model: Flops) -> Throughput:
    """After a step of these operations, with peaks that a busy machine measured: far too low."""
    flops: Any = SimpleNamespace(in_bf16=[True, False, False], count=lambda batch: model, note=None)
    throughput = Throughput(flops, ALONE, lambda batch: 4)
    throughput.peaks = {"bf16": Peak(2e3, "measured"), "fp32": Peak(1e3, "measured")}
    ids = torch.zeros(1, 4, dtype=torch.long)
    throughput.stepped([Batch(ids, torch.ones_like(ids), ids)])
    return throughput


def test_a_run_that_beats_the_measured_peak_raises_it_and_says_so() -> None:
    throughput = busy_throughput(Flops(0.8e12, 1e12, 0.4e12, 0.5e12))
    found = throughput.metrics()
    assert found["hfu"] == pytest.approx(1)
    assert found["mfu"] == pytest.approx(0.8)
    assert throughput.peaks["bf16"].flops_per_second == pytest.approx(2 * throughput.peaks["fp32"].flops_per_second)
    told = throughput.beaten_text()
    assert told is not None
    assert "this run is faster than the peak" in told
    assert "FLOP/s in bf16 (reached by this run)" in told
    assert throughput.beaten_text() is None, "once"


def test_products_in_bf16_are_measured_against_the_peak_of_bf16() -> None:
    shares = []
    for in_bf16 in (0.0, 1e3):
        throughput = busy_throughput(Flops(1e3, 1e3, in_bf16, in_bf16))
        throughput.peaks = {"bf16": Peak(2e15, "measured"), "fp32": Peak(1e15, "measured")}
        shares.append(throughput._least_seconds(1e3, in_bf16))
    assert shares[0] == 2 * shares[1]
