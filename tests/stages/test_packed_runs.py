"""Runs with packed rows: pictures stay with their examples, ranks stay in step, and a stopped run goes on exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.config import ConfigError
from mmllm.stages.conversation import ConversationStage
from mmllm.training.loop import InterruptedRunError
from tests.builders.launches import ROOT, forked
from tests.builders.stopped_runs import assert_same_run, before_step, interrupt
from tests.builders.tiny import model_config
from tests.builders.tiny_runs import losses_of, settings_of, train_in_process, weights_of

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tiles": {"image_mode": "anyres"},
    "native": {"image_mode": "native", "max_image_tokens": 9},
}
UNGROUPED = "data.group_by_length=false"
DIVIDED = (UNGROUPED, "compute.batch_size=2", "compute.accumulate_steps=2")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows: pictures of many shapes, two of them in one row, text before, between and behind, of unlike lengths."""
    folder = tmp_path_factory.mktemp("shapes")
    rows: list[dict[str, Any]] = []
    for number, size in enumerate([(90, 40), (40, 90), (32, 32), (200, 30), (1, 300), (64, 60), (50, 50)]):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images = [f"{number}.png"] if number != 2 else ["2.png", "0.png"]
        value = "<image>\n" * len(images) + "what is in the picture?"
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "a red circle " * (1 + number * 2 % 5)}]
        rows.append({"id": f"row-{number}", "image": images, "conversations": turns})
    for number in (0, 4, 8):
        turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "blue " * (number * 3 + 1)}]
        rows.insert(number, {"id": f"text-{number}", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("features", ["false", "true"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_stay_with_their_examples(
    layout: str, features: str, tiny_runs: Path, tiny_parts: Path, shapes: Path, tmp_path: Path
) -> None:
    vision = model_config(tiny_parts, **LAYOUTS[layout]).vision
    assert vision
    given = [f"data.train=[{{path: {shapes}/train.json}}]", f"data.cache_features={features}"]
    given += [f"model.vision.{name}={value}" for name, value in vision.model_dump(exclude_none=True).items()]

    def build(packing: str) -> ConversationStage:
        config = settings_of(tiny_runs / "stage2.yaml", tmp_path / "out", *given, f"data.packing={packing}")
        stage = ConversationStage(config)
        if stage.features:
            stage.prepare_features(torch.device("cpu"), rank=0, world_size=1)
        return stage

    if features == "true" and layout != "single":
        with pytest.raises(ConfigError, match="cache_features keeps one view"):
            build("always")
        return
    plain, packed = build("never"), build("always")
    batch = packed.batch(range(10))
    assert len(batch.input_ids) < 10
    assert batch.position_ids is not None
    assert batch.example_ids != plain.batch(range(10)).example_ids, "examples change places, and their pictures do"
    with torch.no_grad():
        alone = [float(plain.module(plain.batch([number]))) for number in range(10)]
        assert float(packed.module(batch)) == pytest.approx(sum(alone), rel=1e-6)
        if layout == "single":  # the others have other numbers of tokens
            shifted = {name: value.roll(1, 0) for name in ("image_features", "pixel_values")
                       if (value := getattr(batch, name)) is not None}  # fmt: skip
            mixed_up = float(packed.module(replace(batch, **shifted)))
            assert mixed_up != pytest.approx(sum(alone), rel=1e-5), "the model tells pictures apart"


def test_two_processes_that_pack_are_one_that_does_not(tiny_runs: Path, tmp_path: Path) -> None:
    shared = [UNGROUPED, "optim.max_steps=3"]
    one = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "one", *shared, "data.packing=never")
    two = tmp_path / "two"
    divided = ["data.packing=always", "compute.batch_size=1", "compute.accumulate_steps=2"]
    arguments = [tiny_runs / "stage2.yaml", f"out={two}", *shared, *divided]
    done = forked(ROOT / "train" / "stage2.py", arguments, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-4)
    ours, theirs = weights_of(one), weights_of(two)
    for name, value in ours.items():
        torch.testing.assert_close(
            theirs[name], value, rtol=0, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("packing", ["auto", "always"])
def test_a_run_that_packs_goes_on_where_it_stopped(
    packing: str, tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    overrides = (*DIVIDED, f"data.packing={packing}", "data.num_workers=1")
    with monkeypatch.context() as patch:
        before_step(patch, 2, interrupt)
        with pytest.raises(InterruptedRunError):
            train_in_process(config, out, *overrides)
    train_in_process(config, out, *overrides)
    assert_same_run(out, train_in_process(config, tmp_path / "unbroken", *overrides))


def test_a_run_may_go_on_with_another_packing(tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    with monkeypatch.context() as patch:
        before_step(patch, 2, interrupt)
        with pytest.raises(InterruptedRunError):
            train_in_process(config, out, UNGROUPED, "data.packing=never")
    train_in_process(config, out, *DIVIDED, "data.packing=always")
    unbroken = train_in_process(config, tmp_path / "unbroken", UNGROUPED, "data.packing=never")
    assert losses_of(out) == pytest.approx(losses_of(unbroken), abs=1e-3)


def test_where_lengths_are_alike_auto_changes_nothing(tiny_runs: Path, tmp_path: Path) -> None:
    same, out = "optim.max_steps=4", tmp_path / "out"
    auto, never = (
        ConversationStage(settings_of(tiny_runs / "stage2.yaml", out, same, f"data.packing={packing}"))
        for packing in ("auto", "never")
    )
    kinds = set()
    for step in range(4):
        items = auto.sampler(4).rank_items(step, 0, 1)
        assert items == never.sampler(4).rank_items(step, 0, 1), "the order of examples is not packing's"
        ours, theirs = (stage.batch(stage.sampler(4).split_step(items, 1)[0]) for stage in (auto, never))
        assert sorted(ours.example_ids) == sorted(theirs.example_ids)
        kinds.add(ours.position_ids is None)
        if ours.position_ids is None:
            assert ours.example_ids == theirs.example_ids
            assert torch.equal(ours.input_ids, theirs.input_ids)
    assert True in kinds


def test_micro_batches_of_streamed_examples_are_balanced_too(tiny_runs: Path, tmp_path: Path) -> None:
    streamed = f"data.train=[{{path: {tiny_runs}/data/train.jsonl, streaming: true}}]"
    rows = json.loads((tiny_runs / "data" / "train.json").read_text())
    (tiny_runs / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stage = ConversationStage(settings_of(tiny_runs / "stage2.yaml", tmp_path / "out", streamed))
    order = stage.sampler(8)
    items = order.rank_items(0, 0, 1)
    groups = order.split_step(items, 2)
    assert sorted(item.id for group in groups for item in group) == sorted(item.id for item in items)  # type: ignore[union-attr]
    tokens = [sum(stage.data.size_of(item)[0] for item in group) for group in groups]
    assert abs(tokens[0] - tokens[1]) <= max(stage.data.size_of(item)[0] for item in items)
