"""The model: pictures land in their slots, generation is the same however it is run, and nothing is lost on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.batch import IMAGE_TOKEN, Example
from mmllm.checkpoint.folder import load_checkpoint, save_checkpoint
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.model.build import build_model
from mmllm.model.capabilities import has_plain_head
from mmllm.training.losses import conversation_loss_sum
from tests.builders.conversations import (
    ANSWERED,
    NEW,
    TWO,
    A,
    B,
    asked,
    batch_of,
    generate,
    inputs_of,
)
from tests.builders.tiny import make_checkpoint, model_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tiles": {"image_mode": "anyres"},
    "native": {"image_mode": "native", "max_image_tokens": 9},
}


@pytest.fixture(scope="module")
def square_engine(tiny_checkpoint: Path) -> Engine:
    return Engine.load(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module", params=LAYOUTS)
def engine(request: Any, tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("layout") / request.param
    return Engine.load(make_checkpoint(folder, tiny_parts, **LAYOUTS[request.param]), device="cpu")


def test_the_processor_writes_the_prompt_that_the_renderer_writes(engine: Engine) -> None:
    for example in (asked("hello"), asked("<image>\nwhat is it?", A), TWO):
        rendered = engine.renderer.render_example(example)
        inputs = inputs_of(engine, example)
        assert inputs["input_ids"][0].tolist() == rendered.input_ids
        pictures = {"pixel_values", "image_sizes"} if engine.model.layout.has_newline else {"pixel_values"}
        assert set(inputs) == {"input_ids", "attention_mask"} | (pictures if example.images else set())
        for name, value in engine.processor.load_pixels(example.images).items() if example.images else ():
            assert torch.equal(value.float(), inputs[name].float())


@pytest.mark.parametrize("example", [asked("hello"), asked("<image>\nwhat is it?", A), TWO], ids=["none", "one", "two"])
def test_generation_with_a_cache_is_generation_without(engine: Engine, example: Example) -> None:
    inputs = inputs_of(engine, example)
    ids, new = inputs.pop("input_ids"), []
    with torch.inference_mode():
        for _ in range(NEW):  # the plain definition: ask for one more token again and again
            pixels = {name: value for name, value in inputs.items() if name != "attention_mask"}
            token = engine.model(input_ids=ids, **pixels).logits[:, -1].argmax(-1)
            new.append(int(token))
            ids = torch.cat([ids, token[:, None]], dim=1)
    assert generate(engine, example, use_cache=True)[0].tolist() == new
    assert generate(engine, example, use_cache=False)[0].tolist() == new


def test_generation_in_a_batch_is_generation_one_by_one(engine: Engine) -> None:
    examples = [asked("hello"), asked("<image>\nwhat is in the picture?", A), TWO, asked("<image>?", B)]
    together = generate(engine, *examples)
    assert together.shape == (4, NEW)
    for row, example in zip(together.tolist(), examples, strict=True):
        assert generate(engine, example)[0].tolist() == row
    replies = engine.reply_batch(examples, Sampling(max_new_tokens=NEW))
    assert [reply.text for reply in replies] == [engine.renderer.decode(row) for row in together.tolist()]


def test_beams_and_samples_of_a_row_see_all_its_pictures(engine: Engine) -> None:
    rows = (TWO, asked("<image>?", B))
    expected = generate(engine, *rows).repeat_interleave(2, 0)
    drawn = generate(engine, *rows, do_sample=True, top_k=1, num_return_sequences=2)
    assert drawn.tolist() == expected.tolist()
    assert generate(engine, *rows, num_beams=2).shape == (2, NEW)


def test_pictures_land_in_their_slots_in_the_order_of_the_text(square_engine: Engine) -> None:
    engine = square_engine
    model = engine.model
    inputs = inputs_of(engine, TWO)
    slots = inputs["input_ids"] == engine.processor.image_token_id
    with torch.inference_mode():
        features = model.encode_images(inputs["pixel_values"])
        embeds = model.embed(inputs["input_ids"], features)
        one_by_one = [model.projector(features[index : index + 1])[0] for index in (0, 1)]
        words = model.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(embeds[slots], torch.cat(one_by_one))
    assert torch.equal(embeds[~slots], words[~slots])
    assert int(slots.sum()) == 2 * engine.processor.num_image_tokens

    swapped = asked(TWO.id, B, A)
    with torch.inference_mode():
        logits, others = (model(**inputs_of(engine, example)).logits[:, -1] for example in (TWO, swapped))
    assert not torch.allclose(logits, others, atol=1e-3)


def test_slots_and_image_tokens_that_do_not_agree_are_both_named(engine: Engine) -> None:
    model, inputs = engine.model, inputs_of(engine, TWO)
    one, both = (engine.renderer.render_example(example).num_image_tokens for example in (asked("<image>", A), TWO))
    first = {name: value[:1] for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
    with pytest.raises(ValueError, match=f"^{both} image slots in the text but {one} image tokens .1 images"):
        model(input_ids=inputs["input_ids"], **first)
    with pytest.raises(ValueError, match=f"^{both} image slots in the text but no image was given"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    for text, images in ((f"{IMAGE_TOKEN}?", [A, B]), (f"{IMAGE_TOKEN}?", None), ("hello", [A])):
        named = f"{text.count(IMAGE_TOKEN)} {IMAGE_TOKEN} in the text but {len(images or ())} images were given"
        with pytest.raises(ValueError, match=named):
            engine.processor(text=text, images=images)


def test_the_loss_of_a_batch_is_the_sum_of_its_rows_and_transformers_own(engine: Engine) -> None:
    model = engine.model
    assert has_plain_head(model.language_model)
    together = conversation_loss_sum(model, batch_of(engine, *ANSWERED), plain_head=True)
    apart = [conversation_loss_sum(model, batch_of(engine, one), plain_head=True) for one in ANSWERED]
    torch.testing.assert_close(together, sum(apart))
    whole = conversation_loss_sum(model, batch_of(engine, *ANSWERED), plain_head=False)
    torch.testing.assert_close(whole, together)
    batch = batch_of(engine, ANSWERED[0])
    pictures = {"pixel_values": batch.pixel_values, "image_sizes": batch.image_sizes}
    own = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, **pictures).loss
    torch.testing.assert_close(own * batch.num_supervised, apart[0])


def test_a_batch_without_pictures_keeps_the_projector_in_the_graph_with_no_gradient(engine: Engine) -> None:
    model = copy.deepcopy(engine.model)
    newline = {} if model.image_newline is None else {"image_newline": model.image_newline}
    between = {**dict(model.projector.named_parameters()), **newline}
    batch = batch_of(engine, ANSWERED[1])
    assert batch.pixel_values is None
    conversation_loss_sum(model, batch, plain_head=True).backward()
    assert [name for name, p in between.items() if p.grad is None] == []
    assert not any(p.grad.any() for p in between.values())
    assert model.get_output_embeddings().weight.grad.any()
    model.zero_grad()
    conversation_loss_sum(model, batch_of(engine, *ANSWERED), plain_head=True).backward()
    assert all(p.grad.any() for p in between.values())


def test_a_frozen_tower_keeps_no_activations(tiny_checkpoint: Path) -> None:
    model = load_checkpoint(tiny_checkpoint)[0]
    pixels = torch.zeros(1, 3, 32, 32)
    assert model.encode_images(pixels).requires_grad
    model.vision_tower.requires_grad_(False)
    assert not model.encode_images(pixels).requires_grad


def logits_of(model: Any, engine: Engine) -> Tensor:
    with torch.inference_mode():
        return model(**inputs_of(engine, TWO)).logits


def test_a_saved_model_is_the_same_model(engine: Engine, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, engine.model, engine.processor, card="A card.\n", origin={"vision": "here"})
    model, processor, manifest = load_checkpoint(tmp_path)
    assert torch.equal(logits_of(model, engine), logits_of(engine.model, engine))
    assert not model.training
    assert processor.image_processor.to_dict() == engine.processor.image_processor.to_dict()
    assert (processor.template, processor.num_image_tokens) == (engine.processor.template, 4)
    assert manifest["origin"] == {"vision": "here"}
    assert manifest["versions"]["torch"]
    assert (tmp_path / "README.md").read_text() == "A card.\n"


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_the_embedding_stays_it_and_one_that_is_not_stays_apart(
    tiny_parts: Path, tmp_path: Path, square_engine: Engine, tied: bool
) -> None:
    import shutil

    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    parts = tmp_path / "parts"
    shutil.copytree(tiny_parts, parts)
    config = AutoConfig.from_pretrained(parts / "language", tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(parts / "language")
    model, processor, _ = build_model(model_config(parts))
    save_checkpoint(tmp_path / "out", model, processor, card="")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert ("language_model.lm_head.weight" in file.keys()) == (not tied)  # noqa: SIM118
    again = load_checkpoint(tmp_path / "out")[0]
    one, other = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert (one.data_ptr() == other.data_ptr()) == tied
    assert torch.equal(logits_of(again, square_engine), logits_of(model.eval(), square_engine))


def test_transformers_finds_the_model_and_its_processor_by_itself(engine: Engine, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    save_checkpoint(tmp_path, engine.model, engine.processor, card="")
    processor = AutoProcessor.from_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(processor).__name__ == "VisionLanguageProcessor"
    inputs = processor(text=engine.renderer.text(TWO.messages), images=[A, B], return_tensors="pt")
    end = engine.renderer.end_token_id
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0)
    reply = engine.reply(TWO, Sampling(max_new_tokens=NEW))
    assert engine.renderer.decode(ids[0, inputs["input_ids"].shape[1] :]) == reply.text
