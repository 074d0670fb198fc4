"""Examples with pictures of noise, and what an engine makes of them: its inputs, its answers, a batch to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmllm.batch import Example, message
from mmllm.batching.collate import collate
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling

NEW = 10  # tokens generated where that many are compared


def picture(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


A, B = picture(1, 90, 40), picture(2, 50, 64)


def asked(text: str, *images: Image.Image) -> Example:
    return Example(text, "", (message("user", text),), images)


def inputs_of(engine: Engine, *examples: Example) -> dict[str, Tensor]:
    """What transformers' own way gives: prompts as text through the processor."""
    images = [image for example in examples for image in example.images]
    texts = [engine.renderer.text(example.messages) for example in examples]
    return dict(
        engine.processor(text=texts, images=images or None, padding=True, padding_side="left", return_tensors="pt")
    )


def generate(engine: Engine, *examples: Example, **options: Any) -> Tensor:
    inputs = inputs_of(engine, *examples)
    ends = {"eos_token_id": engine.renderer.end_token_id, "pad_token_id": engine.processor.tokenizer.pad_token_id}
    with torch.inference_mode():
        out = engine.model.generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW, **ends, **options})
    return out[:, inputs["input_ids"].shape[1] :]


TWO = asked("<image>\nis it like <image>?", A, B)


def batch_of(engine: Engine, *examples: Example) -> Any:
    rendered = [engine.renderer.render_example(example) for example in examples]
    images = [image for example in examples for image in example.images]
    names = [example.id for example in examples]
    pictures = engine.processor.load_pixels(images) if images else {}
    return collate(rendered, pad_token_id=0, example_ids=names, **pictures)


def answered(example: Example, answer: str) -> Example:
    return Example(example.id, "", (*example.messages, message("assistant", answer)), example.images)


ANSWERED = [
    answered(asked("<image>\nwhat is it?", A), "a small red circle and more"),
    answered(asked("hello"), "yes"),
    answered(TWO, "no, it is not"),
]


MIXED = [asked("hello"), asked("<image>\nwhat is in the picture?", A), TWO, asked("<image>?", B)]


def ask(folder: Path) -> str:
    asked = Example("x", "", (message("user", "is a circle round?"),))
    return Engine.load(folder, device="cpu").reply(asked, Sampling(max_new_tokens=8)).text
