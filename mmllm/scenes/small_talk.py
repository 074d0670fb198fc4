"""Turns without a picture, and small talk beside one."""

from __future__ import annotations

import random

from mmllm.scenes.questions import QUESTION_TYPES, QuestionTurn
from mmllm.scenes.world import MAX_VALUE, Scene

TEXT_ONLY = "text_only"
# fmt: off
SMALL_TALK = (
    ("hello.", "hello! show me a picture."),
    ("hi!", "hello! show me a picture."),
    ("who are you?", "a small model that looks at pictures."),
    ("what can you do?", "i answer questions about pictures."),
    ("thank you.", "you are welcome."),
    ("goodbye.", "goodbye!"),
    ("how many sides does a triangle have?", "3"),
    ("how many sides does a square have?", "4"),
    ("is a circle round?", "yes"),
    ("is a square round?", "no"),
    ("what is the opposite of left?", "right"),
    ("what is the opposite of above?", "below"),
    ("what is the opposite of large?", "small"),
    ("name a color.", "red"),
    ("name a shape.", "circle"),
)
# fmt: on
WITH_PICTURE = {"hello! show me a picture.": "hello! ask me about the picture."}
NO_PICTURE = "there is no picture."


def talk(rng: random.Random, has_picture: bool) -> QuestionTurn:
    """A turn of small talk. Who has shown a picture is not asked for one."""
    question, answer = rng.choice(SMALL_TALK)
    return QuestionTurn(TEXT_ONLY, question, WITH_PICTURE.get(answer, answer) if has_picture else answer)


def ask_without_picture(rng: random.Random, scene: Scene, num_turns: int) -> list[QuestionTurn]:
    """Turns without a picture: small talk, numbers, and questions that would need a picture."""
    turns: list[QuestionTurn] = []
    for _ in range(num_turns):
        form = rng.choice(("talk", "more", "next", "picture"))
        if form == "talk":
            turns.append(talk(rng, has_picture=False))
        elif form == "more":
            x, y = rng.sample(range(MAX_VALUE + 5), 2)
            turns.append(QuestionTurn(TEXT_ONLY, f"which is more, {x} or {y}?", str(max(x, y))))
        elif form == "next":
            x = rng.randrange(9)
            turns.append(QuestionTurn(TEXT_ONLY, f"what number comes after {x}?", str(x + 1)))
        else:
            name = rng.choice([n for n in QUESTION_TYPES if n not in ("exists", "follow_up")])
            scene_turns = QUESTION_TYPES[name](scene, rng)
            if scene_turns:
                turns.append(QuestionTurn(TEXT_ONLY, scene_turns[0].question, NO_PICTURE))
    return turns
