"""Optimizers and the schedule of the learning rate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmllm.config import ConfigError, OptimConfig
from mmllm.model.build import build_model
from mmllm.optimizers.layers import depths
from mmllm.optimizers.optim import build_optimizers, gradient_norm, lr_multiplier, set_learning_rates
from mmllm.runs import requirements as machine
from mmllm.stages.conversation import ConversationStage
from mmllm.stages.registry import build_stage
from tests.builders.tiny_backbones import BACKBONES, make_backbone_parts
from tests.builders.tiny_runs import losses_of, settings_of, train_in_process, weights_of


def settings(**options: Any) -> OptimConfig:
    given = {"learning_rates": {"projector": 0.1, "language": 0.01}, "max_steps": 100, **options}
    return OptimConfig(**given)


def parts() -> tuple[nn.Module, dict[str, list[tuple[str, nn.Parameter]]]]:
    """A module, and its trained parameters by part."""
    torch.manual_seed(0)
    projector, language = nn.Linear(4, 4), nn.ModuleDict({"embed_tokens": nn.Embedding(5, 4), "up": nn.Linear(4, 4)})
    named = {"projector": list(projector.named_parameters()), "language": list(language.named_parameters())}
    return nn.ModuleList([projector, language]), named


def test_the_rate_rises_stays_and_falls_as_a_cosine() -> None:
    config = settings(warmup_fraction=0.1, decay_fraction=0.5)
    factors = [lr_multiplier(step, config) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:51] == [1.0] * 41
    assert factors[75] == pytest.approx(0.5)
    assert factors[50:] == sorted(factors[50:], reverse=True)
    assert 0 < factors[-1] < 0.01


def test_no_warm_up_and_no_decay_are_the_full_rate() -> None:
    config = settings(warmup_fraction=0.0, decay_fraction=0.0)
    assert {lr_multiplier(step, config) for step in range(100)} == {1.0}
    assert lr_multiplier(0, settings(max_steps=1)) == 1.0


def test_each_part_has_its_rate_and_only_matrices_decay() -> None:
    [optimizer] = build_optimizers(*parts(), settings(weight_decay=0.5, beta2=0.9))
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
    module, given = parts()
    adamw, muon = build_optimizers(module, given, settings(kind="muon", muon_learning_rate=0.3))
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


ALL = ("train=[vision,projector,language]", "optim.learning_rates={vision: 0.1, projector: 0.2, language: 0.4}")


def rates_by_name(stage: ConversationStage) -> dict[str, float]:
    names = {id(p): name for name, p in stage.model.named_parameters()}
    optimizers = build_optimizers(stage.module, stage.parts, stage.config.optim, depths=stage.depths)
    return {names[id(p)]: g["peak"] for o in optimizers for g in o.param_groups for p in g["params"]}


@pytest.mark.parametrize("adapters", [(), ("lora={rank: 2}", "vision_lora={rank: 2}")])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_layer_below_the_top_learns_slower(
    kind: str, adapters: tuple[str, ...], tiny_runs: Path, tmp_path: Path
) -> None:
    options = (*ALL, "optim.layer_decay={vision: 0.5, language: 0.1}", f"optim.kind={kind}", *adapters)
    stage = ConversationStage(
        settings_of(tiny_runs / "stage2.yaml", tmp_path, *options, "optim.muon_learning_rate=0.8")
    )
    rates = rates_by_name(stage)
    assert rates.keys() == {name for named in stage.parts.values() for name, _ in named}
    places = {
        "vision_tower.": {"resblocks.1.": 1, "resblocks.0.": 0.5, "encoder.conv1": 0.25, "encoder.class_emb": 0.25},
        "projector.": {"": 1},
        "language_model.": {"lm_head": 1, "model.norm": 1, "layers.1.": 1, "layers.0.": 0.1, "embed_tokens": 0.01},
    }
    for part, base in (("vision", 0.1), ("projector", 0.2), ("language", 0.4)):
        for name, parameter in stage.parts[part]:
            prefix = next(prefix for prefix in places if name.startswith(prefix))
            factors = [factor for place, factor in places[prefix].items() if place in name]
            is_matrix = kind == "muon" and parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            expected = factors[0] if factors else 0.25
            assert rates[name] == pytest.approx((0.8 if is_matrix else base) * expected), name


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_llm_has_as_many_depths_as_layers_and_embeddings(kind: str, tiny_parts: Path, tmp_path: Path) -> None:
    model, _, _ = build_model(make_backbone_parts(tmp_path, kind, tiny_parts))
    found = depths(model)
    layers = model.config.text_config.num_hidden_layers
    language = {name: depth for name, depth in found.items() if name.startswith("language_model.")}
    assert set(language.values()) == set(range(layers + 1))
    assert {depth for name, depth in language.items() if "emb" in name or "wte" in name} == {layers}
    outside = {name: depth for name, depth in language.items() if not re.search(r"\.\d+\.", name)}
    assert {depth for name, depth in outside.items() if "norm" in name and "emb" not in name} <= {0}


def test_a_pattern_gives_its_rate_in_place_of_the_part_s(tiny_runs: Path, tmp_path: Path) -> None:
    patterns = "optim.learning_rate_overrides={'language_model.lm_head.*': 0.7, '*.embed_tokens.weight': 0.9}"
    stage = ConversationStage(settings_of(tiny_runs / "stage2.yaml", tmp_path, patterns, "optim.layer_decay=0.5"))
    rates = rates_by_name(stage)
    assert rates["language_model.lm_head.weight"] == 0.7
    assert rates["language_model.model.embed_tokens.weight"] == 0.9
    assert rates["language_model.model.layers.0.mlp.up_proj.weight"] == 0.01 * 0.5
    out = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out", patterns, "optim.max_steps=1")
    assert losses_of(out)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optim.learning_rate_overrides={'lm_head': 0.1}",
            "optim.learning_rate_overrides: 'lm_head' matches no trained parameter",
        ),
        (
            "optim.learning_rate_overrides={'vision_tower.*': 0.1}",
            "optim.learning_rate_overrides: 'vision_tower..' matches no trained parameter",
        ),
        (
            "optim.learning_rate_overrides={'*lm_head*': 0.1, 'language*': 0.2}",
            "both match language_model.lm_head.weight",
        ),
        ("freeze=['*nothing*']", "freeze: '.nothing.' matches no trained parameter"),
        ("freeze=['projector.*']", "freeze leaves nothing of projector to train"),
        ("optim.layer_decay={vision: 0.5}", r"optim.layer_decay has \['vision'\], but train lists"),
        ("optim.layer_decay=1.5", "optim.layer_decay"),
    ],
)
def test_what_names_nothing_or_twice_is_refused(override: str, message: str, tiny_runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        rates_by_name(ConversationStage(settings_of(tiny_runs / "stage2.yaml", tmp_path, override)))


def test_what_is_frozen_by_name_stays_as_it_was(tiny_runs: Path, tmp_path: Path) -> None:
    frozen = "freeze=['*embed_tokens*', 'language_model.*.layers.0.*']"
    before = weights_of(train_in_process(tiny_runs / "stage2.yaml", tmp_path / "one", frozen, "optim.max_steps=1"))
    after = weights_of(train_in_process(tiny_runs / "stage2.yaml", tmp_path / "two", frozen, "optim.max_steps=2"))
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {
        name
        for name in before
        if name.startswith("vision_tower.") or "embed_tokens" in name or "model.layers.0." in name
    }


def test_eight_bits_learn_what_thirty_two_do_with_a_quarter_of_the_state(tiny_runs: Path, tmp_path: Path) -> None:
    losses = {}
    for kind in ("adamw", "adamw8bit"):
        losses[kind] = losses_of(train_in_process(tiny_runs / "stage2.yaml", tmp_path / kind, f"optim.kind={kind}"))
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.02)
    assert losses["adamw8bit"][-1] < losses["adamw8bit"][0]

    parameter = nn.Parameter(torch.randn(128, 64))
    config = settings(kind="adamw8bit", learning_rates={"language": 0.01})
    [optimizer] = build_optimizers(nn.Module(), {"language": [("weight", parameter)]}, config)
    parameter.square().sum().backward()
    optimizer.step()
    assert {optimizer.state[parameter][name].dtype for name in ("state1", "state2")} == {torch.uint8}


@pytest.mark.skipif(torch.cuda.is_available(), reason="pages where there is a GPU")
@pytest.mark.parametrize("kind", ["paged_adamw", "paged_adamw8bit"])
def test_paging_without_a_gpu_is_refused_before_anything_loads(kind: str, tiny_runs: Path, tmp_path: Path) -> None:
    config = settings_of(
        tiny_runs / "stage2.yaml", tmp_path, f"optim.kind={kind}", "model.language.source=/nothing/here"
    )
    with pytest.raises(ConfigError, match=f"shows no CUDA GPU; use optim.kind={kind.removeprefix('paged_')}"):
        build_stage(config)


def test_a_package_that_is_missing_is_named_before_anything_loads(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    config = settings_of(
        tiny_runs / "stage2.yaml", tmp_path, "optim.kind=adamw8bit", "model.language.source=/nothing/here"
    )
    with pytest.raises(
        ConfigError, match=r"optim.kind=adamw8bit needs the package bitsandbytes: pip install 'mmllm\[quant"
    ):
        build_stage(config)
