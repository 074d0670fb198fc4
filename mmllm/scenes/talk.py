"""Conversations about scenes: about one, two or none. The same ones are asked of pictures and of descriptions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmllm.batch import PICTURE_LABEL, Example, Message
from mmllm.scenes.ask import CAPTION_REQUESTS, QUESTION_TYPES, QuestionTurn, ask_about
from mmllm.scenes.ask_two import TWO_PICTURES, ask_about_two
from mmllm.scenes.small_talk import TEXT_ONLY, ask_without_picture
from mmllm.scenes.tell import tell, tell_clauses
from mmllm.scenes.world import Scene, Split, near_miss, sample_scene

ALL_TYPES = (*QUESTION_TYPES, TWO_PICTURES, TEXT_ONLY)


@dataclass(frozen=True)
class SceneConversation:
    """Turns about the scenes, in which each scene stands for one picture."""

    scenes: tuple[Scene, ...]
    turns: tuple[QuestionTurn, ...]


def twin_of(scene: Scene, rng: random.Random, split: Split) -> Scene:
    """A second scene to ask about beside the first: the same, a near miss, or another."""
    form = rng.choice(("same", "near", "other"))
    if form == "same":
        return scene
    return near_miss(scene, rng, split) if form == "near" else sample_scene(rng, split, "objects")


def about_one(scene: Scene, rng: random.Random, num_turns: int, types: Sequence[str] = ()) -> SceneConversation:
    return SceneConversation((scene,), tuple(ask_about(scene, rng, num_turns, types)))


def about_two(first: Scene, second: Scene, rng: random.Random, num_turns: int) -> SceneConversation:
    return SceneConversation((first, second), tuple(ask_about_two(first, second, rng, num_turns)))


def about_none(rng: random.Random, split: Split, num_turns: int) -> SceneConversation:
    return SceneConversation((), tuple(ask_without_picture(rng, sample_scene(rng, split), num_turns)))


def retold(scene: Scene, rng: random.Random, num_turns: int) -> SceneConversation:
    """The scene told again and again in other words and another order: what teaches a small LM to look things up."""
    captions = (
        QuestionTurn("caption", rng.choice(CAPTION_REQUESTS), tell(scene, rng, shuffled=True)) for _ in range(num_turns)
    )
    return SceneConversation((scene,), tuple(captions))


Told = tuple[int | None, ...]


def describe(conversation: SceneConversation, rng: random.Random, example_id: str) -> tuple[Example, Told]:
    """The conversation with a description in the place of each picture, one clause after the other.

    With it goes what each piece of the first message tells of, as in `QuestionTurn.about`: a part of a scene, or None.
    """
    opening: list[tuple[str, int | None]] = []
    num_parts = 0
    for number, scene in enumerate(conversation.scenes, 1):
        if len(conversation.scenes) > 1:
            opening.append((PICTURE_LABEL.replace("{}", str(number)), None))
        clauses = tell_clauses(scene, rng, shuffled=rng.random() < 0.3)
        ends = " " * (len(clauses) - 1) + "\n"
        opening += [
            (clause + end, None if index is None else num_parts + index)
            for (clause, index), end in zip(clauses, ends, strict=True)
        ]
        num_parts += len(scene.parts)
    messages: list[Message] = []
    for number, turn in enumerate(conversation.turns):
        told = [text for text, _ in opening] if number == 0 else []
        messages.append(Message("user", (*told, turn.question)))
        messages.append(Message("assistant", (turn.answer,)))
    return Example(example_id, "text", tuple(messages)), (*(part for _, part in opening), None)


def as_text(conversation: SceneConversation, rng: random.Random, example_id: str) -> Example:
    """`describe` for those who only read it."""
    return describe(conversation, rng, example_id)[0]


def sample_text(
    rng: random.Random,
    split: Split,
    num_turns: int,
    *,
    retell: float,
    two: float = 0.08,
    types: Sequence[str] = (),
) -> SceneConversation:
    """A conversation to be had about descriptions.

    The share `retell` of them only tells the scene again in other words, the share `two` is about two scenes. A type of
    question that `types` names twice is asked twice as often.
    """
    draw = rng.random()
    if draw < retell:
        scene = sample_scene(rng, split)
        return retold(scene, rng, 4 if len(scene.things) < 4 else 3)
    if draw < retell + 0.04:
        return about_none(rng, split, num_turns // 2)
    if draw < retell + 0.04 + two:
        first = sample_scene(rng, split, "objects")
        return about_two(first, twin_of(first, rng, split), rng, 4)
    return about_one(sample_scene(rng, split), rng, num_turns, types)
