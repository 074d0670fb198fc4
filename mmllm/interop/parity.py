"""Compares a model with transformers' Llava in a folder: tokens, pixels, logits and greedy answers."""

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

from mmllm.backbone_files.hub import quiet_transformers
from mmllm.batch import Example, ImageRef, Message, message
from mmllm.inference.engine import Engine
from mmllm.interop.towers import ExportError
from mmllm.model.probing import held_in_float32

# Largest difference of logits, relative to the largest logit: only the order of additions differs. Measured in fp32: up
# to 2e-5 on small models and on SmolLM2-135M.
TOLERANCE = 1e-4
# How much lower than the largest logit, relative to it, that of a generated token may be. Generation adds in another
# order than one pass over the whole answer, which moves the logits of some random models by up to 0.4%.
CHOICE_TOLERANCE = 0.01
NUM_NEW_TOKENS = 12


@dataclass(frozen=True)
class TransformersComparison:
    """The result of a comparison that held."""

    max_logit_difference: float
    num_conversations: int
    prompts: str = ""  # of an import: whether the folder's own processor gives the same prompts, in words


def probes() -> list[Example]:
    """Conversations with two pictures, one picture and none. The pictures are noise: wide, high and square."""
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
    """The model inputs that transformers' pipeline makes of these conversations."""
    chats = []
    for example in examples:
        pictures = iter(example.images)
        chats.append([{"role": turn.role, "content": _content(turn, pictures)} for turn in example.messages])
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True,
        processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
    )  # fmt: skip


def compare_with_transformers(
    engine: Engine, folder: str | Path, *, uses_folder_template: bool = True, adapt: Callable[[Any], Any] | None = None
) -> TransformersComparison:
    """Loads the folder with transformers alone and compares its outputs with the engine's. Raises ExportError.

    Both models run in fp32: bf16 rounds a logit of 40 by up to a quarter.

    Args:
        uses_folder_template: False where the folder's template differs: transformers is then given our token ids.
        adapt: turns the loaded model into the one to compare with; it attaches an adapter.
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
    largest = 0.0
    with held_in_float32(engine.model), torch.inference_mode():
        for group in ([examples[0]], [examples[1]], [examples[2]], examples):
            largest = max(largest, _compare(engine, theirs, processor, group, uses_folder_template))
    return TransformersComparison(largest, len(examples))


def _compare(engine: Engine, theirs: Any, processor: Any, examples: list[Example], uses_folder_template: bool) -> float:
    names = " and ".join(example.id for example in examples)
    rendered = [engine.renderer.render_example(example) for example in examples]
    ours = engine.inputs(rendered, [image for example in examples for image in example.images])
    images = [image for example in examples for image in example.images]
    inputs = _inputs_of(processor, examples) if uses_folder_template else dict(ours)
    if images and not uses_folder_template:
        inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    if not torch.equal(ours["input_ids"], inputs["input_ids"]):
        position, our_id, their_id = _first_difference(ours["input_ids"], inputs["input_ids"])
        raise ExportError(
            f"chat template: transformers' processor gives other tokens than ours for {names}: {their_id} for {our_id} "
            f"at position {position}; the tokenizer's own rules for begin tokens or spaces differ from the template's"
        )
    if "pixel_values" in ours:
        difference = (ours["pixel_values"] - inputs["pixel_values"].float()).abs().max().item()
        if difference > 1e-5:
            raise ExportError(f"image transform: pixels of {names} differ by up to {difference:.2g} from transformers'")
    kind = theirs.config.text_config.model_type
    inputs = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    attended = inputs["attention_mask"].bool()
    with _inside_llava(kind):
        their_logits = theirs(**inputs).logits
        answers = theirs.generate(**inputs, max_new_tokens=NUM_NEW_TOKENS, do_sample=False)
    our_logits = engine.model(**ours).logits
    difference = (our_logits - their_logits)[attended].abs().max().item()
    largest = max(1.0, our_logits[attended].abs().max().item())
    if not difference <= TOLERANCE * largest:  # also for NaN
        raise ExportError(
            f"logits of {names} differ by {difference:.2g} between this model and transformers' Llava, "
            f"allowed: {TOLERANCE * largest:.0e}; a part computes something else there"
        )
    check_answers(engine, ours, answers[:, attended.shape[1] :], names)
    return float(difference)


def check_answers(engine: Engine, prompts: dict[str, Tensor], answers: Tensor, names: str) -> None:
    """Raises ExportError for greedy answers [B, T] that this model would not give to these prompts.

    Two programs may choose differently between two tokens that are as likely. So each token must be the likeliest one
    here too, or as likely up to rounding, after those before it.
    """
    is_end = torch.isin(answers, torch.tensor([*engine.end_token_ids, engine.renderer.image_token_id]))
    is_said = is_end.cumsum(-1) - is_end.long() == 0  # up to the end, and with it
    whole = {
        name: torch.cat((prompts[name], new.to(prompts[name])), 1)
        for name, new in (("input_ids", answers.masked_fill(is_end | ~is_said, 0)), ("attention_mask", is_said))
    }
    logits = engine.model(**{**prompts, **whole}).logits[:, -answers.shape[1] - 1 : -1]
    gaps = logits.amax(-1) - logits.gather(-1, answers[..., None])[..., 0]
    allowed = CHOICE_TOLERANCE * max(1.0, logits.abs().max().item())
    if len(wrong := (is_said & ~(gaps <= allowed)).nonzero()):  # also for NaN
        row, place = wrong[0].tolist()
        here, there = (engine.renderer.decode([int(ids[row, place])]) for ids in (logits.argmax(-1), answers))
        raise ExportError(
            f"greedy answers to {names} differ: token {place + 1} is {here!r} here and {there!r} in transformers' "
            f"Llava, whose logit is {gaps[row, place]:.2g} lower here, allowed: {allowed:.1g}"
        )


@contextlib.contextmanager
def _inside_llava(kind: str) -> Iterator[None]:
    """Turns the error of an LLM that transformers' Llava was not written for into an ExportError."""
    try:
        yield
    except ExportError:
        raise
    except (AttributeError, TypeError, RuntimeError, ValueError, KeyError, IndexError) as error:
        raise ExportError(f"LLM: {kind} does not run inside transformers' Llava ({error})") from error


def _first_difference(ours: Tensor, theirs: Tensor) -> tuple[int, int, int]:
    """(position, our id, their id) of the first token that differs."""
    our_ids, their_ids = ours.flatten().tolist(), theirs.flatten().tolist()
    pairs = enumerate(zip(our_ids, their_ids, strict=False))
    position = next((index for index, pair in pairs if pair[0] != pair[1]), len(their_ids) - 1)
    return position, our_ids[min(position, len(our_ids) - 1)], their_ids[position]
