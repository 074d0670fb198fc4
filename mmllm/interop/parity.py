"""Whether a folder of transformers' Llava says what our model says: tokens, pixels, logits and greedy answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmllm.batch import Example, ImageRef, Message, message
from mmllm.inference.engine import Engine, Sampling
from mmllm.interop.towers import ExportError
from mmllm.model.hub import quiet_transformers
from mmllm.model.probing import held_in_float32

# Largest difference of logits, as a share of the largest one: the same sums in another order. Measured in fp32: up to
# 2e-5 on small models and on SmolLM2-135M.
TOLERANCE = 1e-4
NUM_NEW_TOKENS = 12


@dataclass(frozen=True)
class Verdict:
    """What a comparison gave, where it held."""

    max_logit_difference: float
    num_conversations: int
    prompts: str = ""  # of an import: whether the folder's own processor gives our prompts


def probes() -> list[Example]:
    """Conversations with two pictures, with one and with none; pictures are noise, wide, high and square."""
    generator = np.random.default_rng(0)
    pictures = [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in ((40, 90), (75, 50), (64, 64))
    ]
    turns = (
        message("user", "<image>\nWhat is in the picture?"),
        message("assistant", "a circle"),
        message("user", "And in <image>?", 1),
    )
    return [
        Example("two pictures", "", turns, (pictures[0], pictures[1])),
        Example("one picture", "", (message("user", "<image>\nWhat color is it?"),), (pictures[2],)),
        Example("no picture", "", (message("user", "Hello, who are you?"),)),
    ]


def _content(turn: Message, pictures: Iterator[Any]) -> list[dict[str, Any]]:
    return [
        {"type": "image", "image": next(pictures)} if isinstance(p, ImageRef) else {"type": "text", "text": p}
        for p in turn.parts
    ]


def _inputs_of(processor: Any, examples: list[Example]) -> Any:
    """What transformers' pipeline makes of these conversations."""
    chats = []
    for example in examples:
        pictures = iter(example.images)
        chats.append([{"role": turn.role, "content": _content(turn, pictures)} for turn in example.messages])
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True,
        processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
    )  # fmt: skip


def compare_with_transformers(
    engine: Engine, folder: str | Path, *, asks_alike: bool = True, adapt: Callable[[Any], Any] | None = None
) -> Verdict:
    """Loads the folder with transformers alone and asks it what the engine is asked. Raises ExportError.

    Both are held in fp32 while they are compared: in bf16 a logit of 40 is rounded by a quarter, however right it is.
    `adapt` makes of what was loaded the model to compare with: it lays an adapter on it.
    Where `asks_alike` is False, the folder's own chat template is another one: it gets the engine's tokens.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    kind = engine.model.config.text_config.model_type
    with quiet_transformers(), _inside_llava(kind):
        theirs, report = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(folder)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[what])):
            raise ExportError(f"transformers reads the written model with {what.replace('_', ' ')}: {names[0]} ...")
    theirs = adapt(theirs.eval()) if adapt else theirs.eval()
    examples = probes()
    worst = 0.0
    with held_in_float32(engine.model), torch.inference_mode():
        for group in ([examples[0]], [examples[1]], [examples[2]], examples):
            worst = max(worst, _compare(engine, theirs, processor, group, asks_alike))
    return Verdict(worst, len(examples))


def _compare(engine: Engine, theirs: Any, processor: Any, examples: list[Example], asks_alike: bool) -> float:
    names = " and ".join(example.id for example in examples)
    rendered = [engine.renderer.render_example(example) for example in examples]
    ours = engine.inputs(rendered, [image for example in examples for image in example.images])
    images = [image for example in examples for image in example.images]
    inputs = _inputs_of(processor, examples) if asks_alike else dict(ours)
    if images and not asks_alike:
        inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    if not torch.equal(ours["input_ids"], inputs["input_ids"]):
        place, own, other = _first_difference(ours["input_ids"], inputs["input_ids"])
        raise ExportError(
            f"chat template: transformers' processor gives other tokens than ours for {names}: {other} for {own} at "
            f"{place}; the tokenizer's own rules for begin tokens or spaces differ from the template's"
        )
    if "pixel_values" in ours:
        off = (ours["pixel_values"] - inputs["pixel_values"].float()).abs().max().item()
        if off > 1e-5:
            raise ExportError(
                f"image transform: pixels of {names} differ by up to {off:.2g} between here and transformers"
            )
    kind = theirs.config.text_config.model_type
    inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    attended = inputs["attention_mask"].bool()
    own_logits = engine.model(**ours).logits
    with _inside_llava(kind):
        their_logits = theirs(**inputs).logits
    difference = (own_logits - their_logits)[attended].abs().max().item()
    allowed = TOLERANCE * max(1.0, own_logits[attended].abs().max().item())
    if not difference <= allowed:  # also where it is not a number
        raise ExportError(
            f"logits of {names} differ by {difference:.2g} between this model and transformers' Llava, allowed is "
            f"{allowed:.0e}; a part works otherwise there"
        )
    answers = [reply.text for reply in engine.reply_batch(examples, Sampling(max_new_tokens=NUM_NEW_TOKENS))]
    generated = theirs.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    texts = [_decoded(engine, row) for row in generated[:, inputs["input_ids"].shape[1] :]]
    if texts != answers:
        raise ExportError(f"greedy answers differ: {answers} here, {texts} in transformers' Llava")
    return float(difference)


@contextlib.contextmanager
def _inside_llava(kind: str) -> Iterator[None]:
    """An LLM that transformers' Llava was not written for fails with whatever it lacks."""
    try:
        yield
    except ExportError:
        raise
    except (AttributeError, TypeError, RuntimeError, ValueError, KeyError, IndexError) as error:
        raise ExportError(f"LLM: {kind} does not run inside transformers' Llava ({error})") from error


def _decoded(engine: Engine, row: Tensor) -> str:
    ids = row.tolist()
    end = next((place for place, token in enumerate(ids) if token in engine.end_token_ids), len(ids))
    return engine.renderer.decode(ids[: end + 1])


def _first_difference(ours: Tensor, theirs: Tensor) -> tuple[int, int, int]:
    one, other = ours.flatten().tolist(), theirs.flatten().tolist()
    place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other) - 1)
    return place, one[min(place, len(one) - 1)], other[place]
