"""Optimizers and the schedule of the learning rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmllm.config import OptimConfig
from mmllm.training.optim import build_optimizers, gradient_norm, rate_factor, set_learning_rates


def settings(**options: Any) -> OptimConfig:
    given = {"learning_rates": {"projector": 0.1, "language": 0.01}, "max_steps": 100, "batch_size": 1, **options}
    return OptimConfig(**given)


def parts() -> dict[str, list[tuple[str, nn.Parameter]]]:
    torch.manual_seed(0)
    projector, language = nn.Linear(4, 4), nn.ModuleDict({"embed_tokens": nn.Embedding(5, 4), "up": nn.Linear(4, 4)})
    return {"projector": list(projector.named_parameters()), "language": list(language.named_parameters())}


def test_the_rate_rises_stays_and_falls_as_a_cosine() -> None:
    config = settings(warmup_fraction=0.1, decay_fraction=0.5)
    factors = [rate_factor(step, config) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:51] == [1.0] * 41
    assert factors[75] == pytest.approx(0.5)
    assert factors[50:] == sorted(factors[50:], reverse=True)
    assert 0 < factors[-1] < 0.01


def test_no_warm_up_and_no_decay_are_the_full_rate() -> None:
    config = settings(warmup_fraction=0.0, decay_fraction=0.0)
    assert {rate_factor(step, config) for step in range(100)} == {1.0}
    assert rate_factor(0, settings(max_steps=1)) == 1.0


def test_each_part_has_its_rate_and_only_matrices_decay() -> None:
    [optimizer] = build_optimizers(parts(), settings(weight_decay=0.5, beta2=0.9))
    groups = [(g["part"], g["lr"], g["weight_decay"], [p.ndim for p in g["params"]]) for g in optimizer.param_groups]
    assert groups == [
        ("projector", 0.1, 0.5, [2]),
        ("projector", 0.1, 0.0, [1]),
        ("language", 0.01, 0.5, [2, 2]),
        ("language", 0.01, 0.0, [1]),
    ]
    assert {g["betas"] for g in optimizer.param_groups} == {(0.9, 0.9)}
    set_learning_rates([optimizer], 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.05, 0.005, 0.005]
    set_learning_rates([optimizer], 1.0)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1, 0.01, 0.01]


def test_muon_takes_the_matrices_between_hidden_layers_and_adamw_the_rest() -> None:
    given = parts()
    adamw, muon = build_optimizers(given, settings(kind="muon", matrix_learning_rate=0.3))
    matrices = [given["projector"][0][1], dict(given["language"])["up.weight"]]
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(p) for p in matrices]
    assert muon.param_groups[0]["lr"] == 0.3
    everything = {id(p) for named in given.values() for _, p in named}
    assert {id(p) for g in adamw.param_groups for p in g["params"]} == everything - {id(p) for p in matrices}


def test_the_gradient_norm_is_over_all_and_zero_without_any() -> None:
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    assert float(gradient_norm([one, other])) == 0
    one.grad = torch.tensor([3.0, 0.0])
    assert float(gradient_norm([one, other])) == 3
    other.grad = torch.tensor([4.0])
    assert float(gradient_norm([one, other])) == 5
