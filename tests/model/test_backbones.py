"""Every LLM architecture through the whole pipeline: loss, training, generation, LoRA, vocabulary and files.

One loop over BACKBONES. The numbers are fp32, and what is the same mathematics is the same to 1e-5.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mmllm.batch import Batch
from mmllm.checkpoint.adapter import merge_adapter
from mmllm.checkpoint.folder import load_checkpoint, save_checkpoint
from mmllm.config import LoraConfig, ModelConfig, OptimConfig
from mmllm.inference.engine import Engine
from mmllm.model.build import build_model
from mmllm.model.capabilities import has_plain_head
from mmllm.model.language import load_language
from mmllm.optimizers.optim import build_optimizers
from mmllm.training.lora import add_lora
from mmllm.training.losses import conversation_loss_sum
from tests.builders.conversations import ANSWERED, MIXED, TWO, batch_of, generate, inputs_of
from tests.builders.tiny_backbones import BACKBONES, STATE_SPACE, make_backbone_parts

ADDED = ("<|one|>", "<|two|>")


class Backbone(NamedTuple):
    kind: str
    config: ModelConfig
    engine: Engine


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest, tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A model that the tests of this module must leave as it is."""
    config = make_backbone_parts(tmp_path_factory.mktemp(request.param), request.param, tiny_parts)
    return Backbone(request.param, config, build_engine(config))


def build_engine(config: ModelConfig) -> Engine:
    torch.manual_seed(0)
    model, processor, _ = build_model(config)
    return Engine(model.eval(), processor, name="tiny")


def with_language(config: ModelConfig, **changes: Any) -> ModelConfig:
    assert config.language
    return config.model_copy(update={"language": config.language.model_copy(update=changes)})


def loss_of(model: Any, batch: Batch) -> Tensor:
    return conversation_loss_sum(model, batch, plain_head=has_plain_head(model.language_model))


def logits_of(engine: Engine, model: Any = None) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = (model or engine.model)(**inputs_of(engine, TWO)).logits
    return logits


def is_tied(model: Any) -> bool:
    return bool(model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr())


def step(model: Any, batch: Batch, **optim: Any) -> None:
    """One step of training on all that has a gradient."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    config = OptimConfig(learning_rates={"all": 0.01}, max_steps=1, **optim)
    (optimizer,) = build_optimizers(model, {"all": named}, config)
    model.train()
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_loss_of_a_padded_batch_is_the_sum_of_its_rows_and_transformers_own(backbone: Backbone) -> None:
    engine, model = backbone.engine, backbone.engine.model
    assert has_plain_head(model.language_model) == (backbone.kind != "gemma2")
    for mode in (model.eval, model.train, model.eval):
        mode()
        with torch.no_grad():
            together = loss_of(model, batch_of(engine, *ANSWERED))
            apart = [loss_of(model, batch_of(engine, one)) for one in ANSWERED]
            whole = conversation_loss_sum(model, batch_of(engine, *ANSWERED), plain_head=False)
            batch = batch_of(engine, ANSWERED[0])
            own = model(batch.input_ids, batch.pixel_values, batch.attention_mask, labels=batch.labels).loss
        torch.testing.assert_close(together, sum(apart), rtol=1e-5, atol=0)
        torch.testing.assert_close(together, whole, rtol=1e-5, atol=0)
        torch.testing.assert_close(own * batch.num_supervised, apart[0], rtol=1e-5, atol=0)


def test_a_soft_cap_is_found_where_logits_are_too_small_to_show_it(tiny_parts: Path, tmp_path: Path) -> None:
    small = {"initializer_range": 1e-3, "final_logit_softcapping": 30.0}
    assert not has_plain_head(
        build_engine(make_backbone_parts(tmp_path, "gemma2", tiny_parts, **small)).model.language_model
    )


def test_generation_is_the_same_in_a_batch_alone_with_a_cache_and_without(backbone: Backbone) -> None:
    together = generate(backbone.engine, *MIXED).tolist()
    assert generate(backbone.engine, *MIXED, use_cache=False).tolist() == together
    for row, example in zip(together, MIXED, strict=True):
        assert generate(backbone.engine, example)[0].tolist() == row
        assert generate(backbone.engine, example, use_cache=False)[0].tolist() == row
    with torch.inference_mode():
        first = [backbone.engine.model(**inputs_of(backbone.engine, example)).logits[0, -1] for example in MIXED]
    for one, other in itertools.combinations(first, 2):
        assert not torch.allclose(one, other), "the prompt makes a difference"


def test_every_beam_of_a_row_keeps_its_own_state(backbone: Backbone) -> None:
    together = generate(backbone.engine, *MIXED, num_beams=2)
    for row, example in zip(together, MIXED, strict=True):
        alone = generate(backbone.engine, example, num_beams=2)[0]
        length = min(len(row), len(alone))  # padding after the end is cut where the longest beam ends, or later
        assert alone[:length].tolist() == row[:length].tolist()
        pad = backbone.engine.processor.tokenizer.pad_token_id
        assert set(alone[length:].tolist()) | set(row[length:].tolist()) <= {pad}


def test_a_step_changes_all_that_is_trained_and_nothing_else(backbone: Backbone) -> None:
    for train_language in (False, True):
        engine = build_engine(backbone.config)
        model = engine.model
        model.vision_tower.requires_grad_(False)
        model.language_model.requires_grad_(train_language)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(model, batch_of(engine, *ANSWERED))
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
        assert any(name.startswith("language_model.") for name in changed) == train_language


def test_gradients_do_not_depend_on_checkpointing(backbone: Backbone) -> None:
    engine = build_engine(backbone.config)
    model, gradients = engine.model.train(), []
    assert model.language_model.supports_gradient_checkpointing
    for checkpointing in (False, True):
        if checkpointing:
            model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model, batch_of(engine, *ANSWERED)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", BACKBONES)
def test_growth_keeps_old_rows_and_ties_and_a_saved_model_is_the_same(
    kind: str, tied: bool, tiny_parts: Path, tmp_path: Path
) -> None:
    config = make_backbone_parts(tmp_path, kind, tiny_parts, tie_word_embeddings=tied)
    assert config.language
    old, tokenizer = load_language(config.language)
    num_old = len(tokenizer)
    engine = build_engine(with_language(config, extra_special_tokens=ADDED, vocab_multiple=64))
    language_model = engine.model.language_model
    num_rows = -(-(num_old + 2) // 64) * 64
    assert language_model.config.vocab_size == num_rows > num_old + 2
    for table in ("get_input_embeddings", "get_output_embeddings"):
        was, weight = getattr(old, table)().weight, getattr(language_model, table)().weight
        assert weight.shape[0] == num_rows
        assert torch.equal(weight[:num_old], was)
        torch.testing.assert_close(weight[num_old:], was.mean(0).expand(num_rows - num_old, -1))
    save_checkpoint(tmp_path / "out", engine.model, engine.processor, card="")
    again = load_checkpoint(tmp_path / "out")[0]
    assert is_tied(old) == is_tied(language_model) == is_tied(again.language_model) == tied
    assert torch.equal(logits_of(engine, again), logits_of(engine))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", BACKBONES)
def test_lora_trains_every_adapter_and_the_rows_of_added_tokens_but_no_other_row(
    kind: str, tied: bool, tiny_parts: Path, tmp_path: Path
) -> None:
    config = make_backbone_parts(tmp_path, kind, tiny_parts, tie_word_embeddings=tied)
    engine = build_engine(with_language(config, extra_special_tokens=ADDED))
    model, tokenizer = engine.model, engine.processor.tokenizer
    tables = [model.language_model.get_input_embeddings().weight, model.language_model.get_output_embeddings().weight]
    before = [table.detach().clone() for table in tables]
    model.requires_grad_(False)
    add_lora(model, LoraConfig(rank=2, alpha=4))
    added = [tokenizer.convert_tokens_to_ids(token) for token in ADDED]
    batch = batch_of(engine, *ANSWERED)
    batch.input_ids[:, 0], batch.input_ids[:, -1] = added[0], added[1]  # -1 is padding in all rows but the longest
    batch.labels[:, 5] = added[0]
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained)
    for _ in range(2):  # A gets its first gradient when B is no longer zero
        step(model, batch, weight_decay=0.1)
    unchanged = [name for name, p in model.named_parameters() if name in trained and torch.equal(p, trained[name])]
    assert unchanged == []
    assert all("lora_" in name or "trainable_tokens" in name for name in trained)
    logits = logits_of(engine, model.eval())
    merge_adapter(model)
    torch.testing.assert_close(logits_of(engine), logits, rtol=1e-4, atol=1e-4)
    language_model = model.language_model
    after = [language_model.get_input_embeddings().weight, language_model.get_output_embeddings().weight]
    assert is_tied(language_model) == tied
    for was, now in zip(before, after, strict=True):
        assert [index for index in range(len(was)) if not torch.equal(was[index], now[index])] == added


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_pictures_and_words_enter_the_llm_on_the_scale_that_transformers_own_llava_gives_them(
    kind: str, tiny_parts: Path, tmp_path: Path
) -> None:
    """Gemma multiplies the embeddings of words, and only of words, by the root of its width."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaModel

    engine = build_engine(make_backbone_parts(tmp_path, kind, tiny_parts))
    model, inputs = engine.model, inputs_of(engine, TWO)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(
        vision_config=vision, text_config=model.config.text_config, image_token_index=model.config.image_token_id
    )
    llava = LlavaModel(config).eval()
    llava.language_model.load_state_dict(model.language_model.model.state_dict())
    with torch.inference_mode():
        embeds = model.embed(inputs["input_ids"], model.encode_images(inputs["pixel_values"]))
        ours = model.get_decoder()(inputs_embeds=embeds).last_hidden_state
        projected = model.projector(model.encode_images(inputs["pixel_values"])).flatten(0, 1)
        llava.multi_modal_projector.register_forward_hook(lambda *_: projected[None])
        pixels = torch.zeros(1, 3, vision.image_size, vision.image_size)
        theirs = llava(input_ids=inputs["input_ids"], pixel_values=pixels).last_hidden_state
        words = model.get_input_embeddings()(inputs["input_ids"])
    if "gemma" in kind:
        torch.testing.assert_close(words, model.get_input_embeddings().weight[inputs["input_ids"]] * 32**0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_mixtures_router_loss_is_added_in_training_where_its_config_asks_for_it(
    tiny_parts: Path, tmp_path: Path
) -> None:
    losses, asked_for = {}, {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    for name, changes in (("without", {}), ("with", asked_for)):
        engine = build_engine(make_backbone_parts(tmp_path / name, "mixtral", tiny_parts, **changes))
        batch = batch_of(engine, *ANSWERED)
        with torch.no_grad():
            losses[name] = [loss_of(mode(), batch) for mode in (engine.model.train, engine.model.eval)]
            if changes:
                out = engine.model(batch.input_ids, batch.pixel_values, batch.attention_mask, labels=batch.labels)
                assert not has_plain_head(engine.model.language_model)
    torch.testing.assert_close(losses["with"][0], out.loss * batch.num_supervised, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["with"][1], losses["without"][1], rtol=1e-5, atol=0)
    assert losses["with"][0] > losses["without"][0] + 0.1 * batch.num_supervised


def test_state_space_backbones_carry_their_state_instead_of_keys_and_values(backbone: Backbone) -> None:
    model, inputs = backbone.engine.model, inputs_of(backbone.engine, TWO)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True, do_sample=False, use_cache=True)
    assert (out.past_key_values.is_linear == [True, True]) == (backbone.kind in STATE_SPACE)
