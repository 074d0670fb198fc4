"""What each stage trains and leaves alone, and that what it saves works everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmllm.batch import Example, message
from mmllm.checkpoint.folder import read_manifest
from mmllm.config import ConfigError
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.model.build import build_model
from mmllm.stages.conversation import ConversationStage
from tests.builders.tiny import model_config
from tests.builders.tiny_runs import SAMPLES, log_of, losses_of, settings_of, train_in_process, weights_of

CACHED = "data.cache_features=true"


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def untrained(tiny_parts: Path) -> dict[str, Tensor]:
    """The weights that every run begins with; the projector's are a run's own."""
    return dict(build_model(model_config(tiny_parts))[0].state_dict())


@pytest.fixture(scope="module")
def stage1(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    val = f"data.val=[{{path: {tiny_runs}/data/val.json}}]"
    out = tmp_path_factory.mktemp("stages") / "stage1"
    return train_in_process(tiny_runs / "stage1.yaml", out, val, SAMPLES, "validation.every_steps=3")


def test_stage_1_moves_the_projector_and_nothing_else(stage1: Path, untrained: dict[str, Tensor]) -> None:
    changed = moved(untrained, weights_of(stage1))
    assert changed == {name for name in untrained if name.startswith("projector.")}
    assert losses_of(stage1)[-1] < losses_of(stage1)[0]


def test_stage_2_begins_with_the_projector_of_stage_1_and_moves_the_llm_too(
    tiny_runs: Path, stage1: Path, tmp_path: Path
) -> None:
    tree = settings_of(tiny_runs / "stage2.yaml", tmp_path).model_dump(mode="json")
    tree["model"] = {"checkpoint": str(stage1)}
    path = tmp_path / "stage2.yaml"
    path.write_text(json.dumps(tree))
    still = ("optim.learning_rates={projector: 1e-30, language: 1e-30}", "optim.max_steps=1")
    kept = weights_of(train_in_process(path, tmp_path / "still", *still))
    for name, value in weights_of(stage1).items():
        torch.testing.assert_close(kept[name], value, rtol=0, atol=1e-20)
    out = train_in_process(path, tmp_path / "out")
    changed = moved(weights_of(stage1), weights_of(out))
    assert changed == {name for name in weights_of(stage1) if not name.startswith("vision_tower.")}
    manifest = read_manifest(out)
    assert manifest["origin"]["started_from"] == str(stage1)
    assert manifest["origin"]["vision"] == read_manifest(stage1)["origin"]["vision"]


def test_a_tower_that_is_trained_moves(tiny_runs: Path, tmp_path: Path, untrained: dict[str, Tensor]) -> None:
    rates = "optim.learning_rates={vision: 0.01, projector: 0.01, language: 0.01}"
    out = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out", "train=[vision,projector,language]", rates)
    assert moved(untrained, weights_of(out)) == set(untrained)


def test_of_a_tower_the_last_layers_alone_can_be_trained(
    tiny_runs: Path, tmp_path: Path, untrained: dict[str, Tensor]
) -> None:
    train = ("train=[vision,projector]", "optim.learning_rates={vision: 0.01, projector: 0.02}")
    out = train_in_process(tiny_runs / "stage1.yaml", tmp_path / "last", *train, "vision_last_layers=1")
    changed = {name for name in moved(untrained, weights_of(out)) if not name.startswith("projector.")}
    assert changed == {name for name in untrained if ".resblocks.1." in name}
    with pytest.raises(ConfigError, match="vision_last_layers: 3, but the tower runs 2 layers"):
        train_in_process(tiny_runs / "stage1.yaml", tmp_path / "none", *train, "vision_last_layers=3")
    with pytest.raises(ConfigError, match="train the tower, but train does not list vision"):
        settings_of(tiny_runs / "stage1.yaml", tmp_path / "none", "vision_last_layers=1")


def test_adapters_of_a_tower_are_all_trained_and_merged_at_the_end(
    tiny_runs: Path, tmp_path: Path, untrained: dict[str, Tensor]
) -> None:
    train = ("train=[vision,projector]", "optim.learning_rates={vision: 0.01, projector: 0.02}")
    lora = "vision_lora={rank: 2, alpha: 4}"
    stage = ConversationStage(settings_of(tiny_runs / "stage1.yaml", tmp_path, *train, lora))
    adapters = [name for name, _ in stage.parts["vision"]]
    assert adapters
    assert all(".lora_" in name for name in adapters)
    batch = stage.batch(range(4))
    for _, parameter in stage.parts["vision"]:  # as B begins with zeros, A would get no gradient
        torch.nn.init.normal_(parameter, std=0.1)
    stage.module(batch).backward()
    assert [name for name, p in stage.parts["vision"] if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        adapted = stage.model.eval().encode_images(batch.pixel_values)
        stage.tower_adapters.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(stage.model.encode_images(batch.pixel_values), adapted, rtol=1e-4, atol=1e-5)
    assert set(stage.model.vision_tower.state_dict()) == {
        name.removeprefix("vision_tower.") for name in untrained if name.startswith("vision_tower.")
    }

    out = train_in_process(tiny_runs / "stage1.yaml", tmp_path / "out", *train, lora)
    changed = {name for name in moved(untrained, weights_of(out)) if not name.startswith("projector.")}
    assert changed == {name for name in untrained if ".mlp.c_" in name and name.endswith("weight")}
    targets = "vision_lora={target_modules: [q_proj]}"
    with pytest.raises(ConfigError, match="finds no linear layer of the tower; it has c_fc, c_proj, out_proj"):
        train_in_process(tiny_runs / "stage1.yaml", tmp_path / "none", *train, targets)
    with pytest.raises(ConfigError, match="give vision_lora or vision_last_layers"):
        settings_of(tiny_runs / "stage1.yaml", tmp_path / "none", *train, lora, "vision_last_layers=1")


def test_a_model_without_encoder_learns_from_raw_patches(tiny_runs: Path, tmp_path: Path) -> None:
    source = ("model.vision={source: 'patches:8', image_size_px: 32}", "model.projector={kind: linear}")
    out = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out", *source)
    assert losses_of(out)[-1] < losses_of(out)[0]
    weights = weights_of(out)
    assert not [name for name in weights if name.startswith("vision_tower.")]
    assert weights["projector.layer.weight"].shape[1] == 3 * 8 * 8
    picture = Image.new("RGB", (32, 32), "red")
    example = Example("a", "", (message("user", "<image>\nwhat is it?"),), (picture,))
    assert Engine.load(out, device="cpu").reply(example, Sampling(max_new_tokens=4)).num_image_tokens == 16
    train = ("train=[vision,projector]", "optim.learning_rates={vision: 0.01, projector: 0.02}")
    with pytest.raises(ConfigError, match="patches:8 has no encoder to train"):
        train_in_process(tiny_runs / "stage1.yaml", tmp_path / "none", *train, *source)


def test_cached_features_give_the_loss_of_the_tower(tiny_runs: Path, tmp_path: Path) -> None:
    config, slow = tiny_runs / "stage2.yaml", "optim.learning_rates={projector: 1e-4, language: 1e-4}"
    plain = train_in_process(config, tmp_path / "a" / "plain", slow)
    cached = train_in_process(config, tmp_path / "a" / "cached", slow, CACHED)
    assert losses_of(cached) == pytest.approx(losses_of(plain), rel=5e-3), "to the precision of bf16"
    [folder] = (tmp_path / "a" / "cache").glob("features-*")
    assert sum(file.stat().st_size for file in folder.glob("*.bin")) == 12 * 16 * 32 * 2, "pictures, patches, width"
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    again = train_in_process(config, tmp_path / "a" / "again", slow, CACHED)
    assert losses_of(again) == losses_of(cached)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written, "the second run takes the first's"
    train_in_process(config, tmp_path / "a" / "other", CACHED, "model.vision.image_mode=pad", "optim.max_steps=1")
    other = list((tmp_path / "a" / "cache").glob("features-*"))
    assert len(other) == 2, "another transform has a cache of its own"


@pytest.mark.parametrize("override", ["compute.gradient_checkpointing=true", "model.language.attention=sdpa"])
@pytest.mark.parametrize("config", ["stage1.yaml", "stage2.yaml"])
def test_what_only_saves_memory_or_time_does_not_change_the_loss(
    tiny_runs: Path, tmp_path: Path, config: str, override: str
) -> None:
    plain = train_in_process(tiny_runs / config, tmp_path / "plain", "optim.max_steps=3")
    other = train_in_process(tiny_runs / config, tmp_path / "other", "optim.max_steps=3", override)
    assert losses_of(other) == pytest.approx(losses_of(plain), abs=1e-3)


def test_bf16_learns_what_fp32_learns(tiny_runs: Path, tmp_path: Path) -> None:
    fp32 = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "fp32", "optim.max_steps=3")
    bf16 = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "bf16", "optim.max_steps=3", "compute.precision=bf16")
    assert losses_of(bf16) == pytest.approx(losses_of(fp32), rel=0.05)
    assert {value.dtype for value in weights_of(bf16).values()} == {torch.float32}


def test_a_frozen_tower_does_not_drop_and_validation_leaves_the_modes_as_they_were(
    tiny_runs: Path, tmp_path: Path
) -> None:
    stage = ConversationStage(settings_of(tiny_runs / "stage2.yaml", tmp_path / "out"))
    for _ in range(2):
        assert stage.model.language_model.training
        assert stage.model.projector.training
        assert not stage.model.vision_tower.training
        stage.validation.examples = stage.examples[:2]
        assert stage.validate(1)["val_loss"] > 0


def test_validation_shows_answers_with_the_pictures_that_were_asked_about(stage1: Path) -> None:
    rows = log_of(stage1)
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 3, 6]
    page = (stage1 / "samples" / "step_0000006.md").read_text()
    assert "# Answers after step 6" in page
    assert "- question: what is it?\n" in page
    assert "- reference: a square\n" in page
    assert "- question: what color is the red one?\n" in page, "a conversation without a picture"
    pictures = sorted(path.name for path in (stage1 / "samples").glob("*.png"))
    assert pictures == ["two-0-0.png"], "the second picture stands behind the first answer"
    assert f"![what the model saw]({pictures[0]})" in page
    with Image.open(stage1 / "samples" / pictures[0]) as picture:
        assert picture.size == (32, 32)


def test_a_run_leaves_a_log_a_plot_its_settings_and_a_card(stage1: Path) -> None:
    row = next(row for row in log_of(stage1) if "loss" in row)
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "step"} <= set(row)
    with Image.open(stage1 / "train_loss.png") as plot:
        assert plot.size > (400, 200)
    manifest = read_manifest(stage1)
    assert manifest["settings"] == (stage1 / "config.yaml").read_text()
    assert settings_of(stage1 / "config.yaml", stage1).stage == "stage1"
    assert manifest["figures"]["val_loss"] == log_of(stage1)[-1]["val_loss"]
    card = (stage1 / "README.md").read_text()
    for text in (
        f"mmllm chat {stage1}",
        f"mmllm doctor {stage1}",
        "no adapter to merge",
        f"mmllm train {stage1}/config.yaml out=NEW_FOLDER",
        "16 examples",
    ):
        assert text in card


def test_what_a_stage_saves_works_in_transformers_alone(stage1: Path) -> None:
    from transformers import pipeline

    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    asked = (message("user", "<image>\nwhat is it?"), message("assistant", "a square"), message("user", "is it large?"))
    engine = Engine.load(stage1, device="cpu")
    example = Example("x", "", asked, (picture,))
    expected = engine.reply(example, Sampling(max_new_tokens=8))
    parts: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "\nwhat is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a square"}]},
        {"role": "user", "content": [{"type": "text", "text": "is it large?"}]},
    ]
    processor = engine.processor
    inputs = processor.apply_chat_template(
        parts, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["input_ids"][0].tolist() == engine.renderer.render_example(example).input_ids
    [answer] = pipeline("image-text-to-text", model=str(stage1))(
        text=parts, max_new_tokens=8, do_sample=False, return_full_text=False
    )
    assert answer["generated_text"].strip() == expected.text
    ends = engine.model.generation_config
    assert (ends.eos_token_id, ends.pad_token_id) == (engine.renderer.end_token_id, processor.tokenizer.pad_token_id)


def test_a_named_template_is_what_the_checkpoint_says_everywhere(tiny_runs: Path, tmp_path: Path) -> None:
    out = train_in_process(tiny_runs / "stage1.yaml", tmp_path / "out", "model.template=plain", "optim.max_steps=1")
    engine = Engine.load(out, device="cpu")
    assert engine.processor.template == "plain"
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "words that plain leaves out"}]}]
    assert engine.processor.apply_chat_template(parts, add_generation_prompt=True) == "<image>"
