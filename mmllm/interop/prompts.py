"""Compares the prompts of an imported model with those of its folder's own processor, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from mmllm.backbone_files.hub import quiet_transformers
from mmllm.chat.conversation import Conversation
from mmllm.inference.engine import Engine

_SIDE_PX = 64
# Turns of (number of pictures, question, answer); the last question has no answer yet.
_CHATS: dict[str, tuple[tuple[int, str, str], ...]] = {
    "one picture": ((1, "What color is it?", ""),),
    "two pictures": ((2, "Which one has a star?", ""),),
    "a second turn": ((1, "What is in the picture?", "A red circle."), (0, "And above it?", "")),
    "no picture": ((0, "Hello, who are you?", ""),),
}


@dataclass(frozen=True)
class ProcessorComparison:
    """How many prompts are equal, and where the first other one differs."""

    num_equal: int
    num_prompts: int
    first_difference: str = ""

    def __str__(self) -> str:
        if self.num_equal == self.num_prompts:
            return f"{self.num_equal} prompts of its own processor match ours, token by token"
        return (
            f"{self.num_prompts - self.num_equal} of {self.num_prompts} prompts of its own processor differ from ours: "
            f"{self.first_difference}"
        )


def compare_with_processor(engine: Engine, folder: str | Path) -> ProcessorComparison:
    """Compares the prompts of the folder's own processor and of the engine for the same conversations.

    Some templates write the line break between a picture and its question, others leave it to the question. A prompt is
    equal where it matches with or without that line break.
    """
    from transformers import AutoProcessor

    with quiet_transformers():
        processor = AutoProcessor.from_pretrained(folder)
    num_equal, first = 0, ""
    for name, turns in _CHATS.items():
        ours = _our_ids(engine, turns)
        try:
            theirs = [_their_ids(processor, turns, break_) for break_ in ("", "\n")]
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            first = first or f"of {name}, it gives none ({error})"
            continue
        if ours in theirs:
            num_equal += 1
        elif not first:
            pairs = enumerate(zip(ours, theirs[0], strict=False))
            position = next((index for index, pair in pairs if pair[0] != pair[1]), min(len(ours), len(theirs[0])))
            decode = engine.processor.tokenizer.decode
            our_text, their_text = (decode(ids[position : position + 8]) for ids in (ours, theirs[0]))
            first = f"of {name}, the text from token {position} on is {their_text!r} there and {our_text!r} here"
    return ProcessorComparison(num_equal, len(_CHATS), first)


def _our_ids(engine: Engine, turns: tuple[tuple[int, str, str], ...]) -> list[int]:
    conversation = Conversation(label=engine.picture_label)
    for number, question, answer in turns[:-1]:
        conversation.add(question, [_picture()] * number, answer)
    number, question, _ = turns[-1]
    return engine.renderer.render_example(conversation.ask(question, [_picture()] * number)).input_ids


def _their_ids(processor: Any, turns: tuple[tuple[int, str, str], ...], line_break: str) -> list[int]:
    chat = []
    for number, question, answer in turns:
        pictures = [{"type": "image", "image": _picture()} for _ in range(number)]
        text = {"type": "text", "text": (line_break if number else "") + question}
        chat.append({"role": "user", "content": [*pictures, text]})
        if answer:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    ids: list[int] = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]  # fmt: skip
    return list(ids)


def _picture() -> Image.Image:
    return Image.new("RGB", (_SIDE_PX, _SIDE_PX))
