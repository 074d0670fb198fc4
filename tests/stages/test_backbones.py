"""Runs on LLMs other than Llama: all of them through stage 2 with LoRA, and what a run may do with their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmllm.checkpoint.folder import load_checkpoint
from mmllm.checkpoint.merge import merge_checkpoint
from mmllm.config import ConfigError, ModelConfig
from mmllm.diagnose.check import check_data
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.model.language import load_language
from mmllm.stages.registry import build_stage
from tests.builders.conversations import MIXED
from tests.builders.tiny_backbones import BACKBONES, make_backbone_parts
from tests.builders.tiny_runs import make_data, settings_of, train_in_process, weights_of, write_settings

CHATML = ("<|im_start|>", "<|im_end|>")
LORA = ("lora={rank: 2, alpha: 4}", "optim.max_steps=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("backbones") / "data")


def settings(folder: Path, kind: str, tiny_parts: Path, data: Path, train: tuple[str, ...], **language: Any) -> Path:
    """The settings of a stage on this LLM; `language` are further settings of it."""
    config: ModelConfig = make_backbone_parts(folder / "parts", kind, tiny_parts)
    path = write_settings(folder / "run.yaml", tiny_parts, data, train=train)
    values = yaml.safe_load(path.read_text())
    values["model"] = config.model_dump(mode="json", exclude_none=True)
    values["model"]["language"] |= language
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_run_with_lora_ends_in_a_checkpoint_that_answers(
    kind: str, tiny_parts: Path, data: Path, tmp_path: Path
) -> None:
    path = settings(tmp_path, kind, tiny_parts, data, ("projector", "language"))
    out = train_in_process(path, tmp_path / "out", *LORA, "compute.gradient_checkpointing=true")
    engine = Engine.load(out, device="cpu")
    together = engine.reply_batch(MIXED, Sampling(max_new_tokens=4))
    assert [reply.text for reply in together] == [
        engine.reply(example, Sampling(max_new_tokens=4)).text for example in MIXED
    ]
    merge_checkpoint(out, tmp_path / "merged", device="cpu")
    merged = Engine.load(tmp_path / "merged", device="cpu").reply_batch(MIXED, Sampling(max_new_tokens=4))
    assert [reply.text for reply in merged] == [reply.text for reply in together]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_tokens_of_a_template_are_learnt_under_lora_and_no_other_row_moves(
    dtype: str, tiny_parts: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = settings(
        tmp_path, "llama", tiny_parts, data, ("projector", "language"), extra_special_tokens=CHATML, dtype=dtype
    )
    overrides = ("model.template=chatml", "optim.weight_decay=0.1", "optim.max_steps=2", *LORA)
    assert check_data(path, [*overrides, f"out={tmp_path / 'out'}"], as_json=False)
    out = tmp_path / "merged"
    merge_checkpoint(train_in_process(path, tmp_path / "out", *overrides), out, device="cpu")
    language = settings_of(path, out, *overrides).model.language
    assert language
    before, tokenizer = load_language(language)
    model, processor, _ = load_checkpoint(out)
    new = [tokenizer.convert_tokens_to_ids(token) for token in CHATML]
    assert [processor.tokenizer.convert_tokens_to_ids(token) for token in CHATML] == new
    for table in ("get_input_embeddings", "get_output_embeddings"):
        was, now = (getattr(llm, table)().weight.float() for llm in (before, model.language_model))
        assert [row for row in range(len(was)) if not torch.equal(was[row], now[row])] == new
    assert model.generation_config.eos_token_id == new[1]
    assert {value.dtype for value in weights_of(out).values()} == {torch.float32}  # merged in full precision


def test_a_frozen_llm_is_held_in_bf16_while_the_projector_learns_in_fp32(
    tiny_parts: Path, data: Path, tmp_path: Path
) -> None:
    path = settings(tmp_path, "llama", tiny_parts, data, ("projector",), dtype="bf16")
    stage = build_stage(settings_of(path, tmp_path / "out"))
    model = stage.model  # type: ignore[attr-defined]
    assert {p.dtype for p in model.language_model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.projector.parameters()} == {torch.float32}
    held = {f"language_model.{name}": p.clone() for name, p in model.language_model.named_parameters()}
    fresh = {f"projector.{name}": p.clone() for name, p in model.projector.named_parameters()}
    for precision in ("fp32", "bf16"):
        out = train_in_process(path, tmp_path / precision, f"compute.precision={precision}", "optim.max_steps=2")
        saved = weights_of(out)
        assert all(torch.equal(saved[name], value) for name, value in held.items())
        assert all(saved[name].dtype == torch.float32 for name in fresh)
        assert not any(torch.equal(saved[name], value) for name, value in fresh.items())
        again = load_checkpoint(out)[0]
        assert all(torch.equal(again.get_parameter(name), value.float()) for name, value in held.items())
        assert all(torch.equal(again.get_parameter(name), saved[name]) for name in fresh)


PRECISIONS = [
    (("language",), "bf16", "would lose small updates of an LLM that is trained whole; leave it at fp32"),
    (("projector",), "fp16", "fp16 is for answers only, since small gradients vanish in it"),
    (("projector",), "fp32", "flash_attention_2 has no fp32; set compute.precision=bf16"),
]


@pytest.mark.parametrize(("train", "dtype", "message"), PRECISIONS)
def test_weights_that_cannot_be_trained_as_they_are_held_are_refused(
    train: tuple[str, ...], dtype: str, message: str, tiny_parts: Path, data: Path, tmp_path: Path
) -> None:
    path = write_settings(tmp_path / "run.yaml", tiny_parts, data, train=train)
    with pytest.raises(ConfigError, match=message):
        settings_of(path, tmp_path, f"model.language.dtype={dtype}", "model.language.attention=flash_attention_2")


def test_an_llm_that_cannot_recompute_its_layers_is_named(
    tiny_parts: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 512}
    monkeypatch.setitem(BACKBONES, "ctrl", shape)
    path = settings(tmp_path, "ctrl", tiny_parts, data, ("projector",))
    with pytest.raises(ConfigError, match="gradient_checkpointing: ctrl cannot recompute its layers"):
        build_stage(settings_of(path, tmp_path / "out", "compute.gradient_checkpointing=true"))
    train_in_process(path, tmp_path / "out", "optim.max_steps=1")
