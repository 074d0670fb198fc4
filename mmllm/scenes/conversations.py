"""Conversations about one scene, two, or none. The scenes are shown as pictures or described in text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmllm.batch import PICTURE_LABEL, Example, Message
from mmllm.scenes.captions import caption_clauses, write_caption
from mmllm.scenes.pair_questions import ask_about_two
from mmllm.scenes.questions import CAPTION_REQUESTS, QuestionTurn, ask_about
from mmllm.scenes.small_talk import ask_without_picture
from mmllm.scenes.world import Scene, Split, near_miss, sample_scene


@dataclass(frozen=True)
class SceneConversation:
    """Turns about some scenes; each scene is one picture."""

    scenes: tuple[Scene, ...]
    turns: tuple[QuestionTurn, ...]


def sample_twin(scene: Scene, rng: random.Random, split: Split) -> Scene:
    """A second scene for questions about two: the same scene, a near miss, or another one."""
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


def retelling(scene: Scene, rng: random.Random, num_turns: int) -> SceneConversation:
    """The scene described again and again in other words and another order, from which a small LM learns to look up."""
    captions = (
        QuestionTurn("caption", rng.choice(CAPTION_REQUESTS), write_caption(scene, rng, shuffled=True))
        for _ in range(num_turns)
    )
    return SceneConversation((scene,), tuple(captions))


DescribedParts = tuple[int | None, ...]  # for each piece of a message, the part of the scenes that it describes


def describe_conversation(
    conversation: SceneConversation, rng: random.Random, example_id: str
) -> tuple[Example, DescribedParts]:
    """The conversation with a description in place of each picture, one clause after another.

    Also returns, for each piece of the first message, the part of the scenes that it describes, or None. Parts are
    numbered as in `QuestionTurn.about`.
    """
    opening: list[tuple[str, int | None]] = []
    num_parts = 0
    for number, scene in enumerate(conversation.scenes, 1):
        if len(conversation.scenes) > 1:
            opening.append((PICTURE_LABEL.replace("{}", str(number)), None))
        clauses = caption_clauses(scene, rng, shuffled=rng.random() < 0.3)
        ends = " " * (len(clauses) - 1) + "\n"
        opening += [
            (clause + end, None if index is None else num_parts + index)
            for (clause, index), end in zip(clauses, ends, strict=True)
        ]
        num_parts += len(scene.parts)
    messages: list[Message] = []
    for number, turn in enumerate(conversation.turns):
        description = [text for text, _ in opening] if number == 0 else []
        messages.append(Message("user", (*description, turn.question)))
        messages.append(Message("assistant", (turn.answer,)))
    return Example(example_id, "text", tuple(messages)), (*(part for _, part in opening), None)


def text_example(conversation: SceneConversation, rng: random.Random, example_id: str) -> Example:
    """The example of `describe_conversation` alone."""
    return describe_conversation(conversation, rng, example_id)[0]


def sample_text(
    rng: random.Random,
    split: Split,
    num_turns: int,
    *,
    retell: float,
    two: float = 0.08,
    types: Sequence[str] = (),
) -> SceneConversation:
    """A conversation about descriptions of scenes.

    A fraction `retell` of them only describes the scene again in other words; a fraction `two` is about two scenes.
    `types` are those of `ask_about`.
    """
    draw = rng.random()
    if draw < retell:
        scene = sample_scene(rng, split)
        return retelling(scene, rng, 4 if len(scene.things) < 4 else 3)
    if draw < retell + 0.04:
        return about_none(rng, split, num_turns // 2)
    if draw < retell + 0.04 + two:
        first = sample_scene(rng, split, "objects")
        return about_two(first, sample_twin(first, rng, split), rng, 4)
    return about_one(sample_scene(rng, split), rng, num_turns, types)
