"""Conversations about scenes: about one, two or none. The same ones are asked of pictures and of descriptions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmllm.batch import Example, Message
from mmllm.scenes.ask import CAPTION_REQUESTS, Turn, ask_about, ask_about_two, ask_without_picture
from mmllm.scenes.tell import tell
from mmllm.scenes.world import WHOLE, Limits, Scene, Split, near_miss, sample_scene


@dataclass(frozen=True)
class Conversation:
    """Turns about the scenes, in which each scene stands for one picture."""

    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]


def twin_of(scene: Scene, rng: random.Random, split: Split) -> Scene:
    """A second scene to ask about beside the first: the same, a near miss, or another."""
    form = rng.choice(("same", "near", "other"))
    if form == "same":
        return scene
    return near_miss(scene, rng, split) if form == "near" else sample_scene(rng, split, "objects")


def about_one(scene: Scene, rng: random.Random, num_turns: int, types: Sequence[str] = ()) -> Conversation:
    return Conversation((scene,), tuple(ask_about(scene, rng, num_turns, types)))


def about_two(first: Scene, second: Scene, rng: random.Random, num_turns: int) -> Conversation:
    return Conversation((first, second), tuple(ask_about_two(first, second, rng, num_turns)))


def about_none(rng: random.Random, split: Split, num_turns: int) -> Conversation:
    return Conversation((), tuple(ask_without_picture(rng, sample_scene(rng, split), num_turns)))


def retold(scene: Scene, rng: random.Random, num_turns: int) -> Conversation:
    """The scene told again and again in other words and another order: what teaches a small LM to look things up."""
    captions = (
        Turn("caption", rng.choice(CAPTION_REQUESTS), tell(scene, rng, shuffled=True)) for _ in range(num_turns)
    )
    return Conversation((scene,), tuple(captions))


def picture_marks(num_pictures: int, mark: str = "<image>") -> str:
    """How a question names its pictures: one stands alone, several are numbered."""
    if num_pictures == 1:
        return f"{mark}\n"
    return "".join(f"Picture {number}: {mark}\n" for number in range(1, num_pictures + 1))


def as_text(conversation: Conversation, rng: random.Random, example_id: str) -> Example:
    """The conversation with a description in the place of each picture."""
    descriptions = [tell(scene, rng, shuffled=rng.random() < 0.3) for scene in conversation.scenes]
    opening = picture_marks(len(descriptions), "{}").format(*descriptions) if descriptions else ""
    messages: list[Message] = []
    for number, turn in enumerate(conversation.turns):
        messages.append(Message("user", ((opening if number == 0 else "") + turn.question,)))
        messages.append(Message("assistant", (turn.answer,)))
    return Example(example_id, "text", tuple(messages))


@dataclass(frozen=True)
class Lesson:
    """What a language warm-up is taught for a while: how much of the world, which questions, how much retelling.

    `types` empty is every kind of question, among them those about two scenes and about none.
    """

    limits: Limits = WHOLE
    types: tuple[str, ...] = ()
    retell: float = 0.0


def sample_text(
    rng: random.Random, split: Split, num_turns: int, example_id: str, lesson: Lesson
) -> tuple[Example, Conversation]:
    """A conversation about described scenes, as this lesson has them."""
    draw, limits = rng.random(), lesson.limits
    if draw < lesson.retell:
        scene = sample_scene(rng, split, None, limits)
        conversation = retold(scene, rng, 4 if len(scene.things) < 4 else 3)
    elif not lesson.types and draw < lesson.retell + 0.04:
        conversation = about_none(rng, split, num_turns // 2)
    elif not lesson.types and draw < lesson.retell + 0.12:
        first = sample_scene(rng, split, "objects", limits)
        conversation = about_two(first, twin_of(first, rng, split), rng, 4)
    else:
        conversation = about_one(sample_scene(rng, split, None, limits), rng, num_turns, lesson.types)
    return as_text(conversation, rng, example_id), conversation
