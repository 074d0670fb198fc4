"""Questions that take for granted what a picture does not show, and answers that say so."""

from __future__ import annotations

import random

from mmllm.scenes.questions import ATTRIBUTE_QUESTIONS, BAR_QUESTIONS, LINE_QUESTIONS, QuestionTurn
from mmllm.scenes.world import COLORS, SHAPES, Scene

ABSENT = "absent"


def ask_absent(scene: Scene, rng: random.Random) -> QuestionTurn:
    """A question such as "where is the star?" about a scene without a star, and the answer "there is no star."

    What is asked for has a shape or a color that the scene does not show at all: a scene has fewer parts than there are
    shapes or colors, so there always is one.
    """
    shape = rng.choice([shape for shape in SHAPES if shape not in {thing.shape for thing in scene.things}])
    color = rng.choice([color for color in COLORS if color not in {part.color for part in scene.parts}])
    missing = [kind for kind in ("word", "number") if kind not in {line.kind for line in scene.lines}]
    forms = ["shape", "shape", "color", "both", *["bar"] * (4 if scene.bars else 1)]
    form = rng.choice([*forms, *["line"] * (len(missing) if scene.lines else 1)])
    if form == "line" and missing:
        kind = rng.choice(missing)
        return _absent(kind, rng.choice(LINE_QUESTIONS).format(kind))
    if form == "bar":
        return _absent(f"{color} bar", rng.choice(BAR_QUESTIONS).format(color))
    if form == "color":
        return _ask_attribute(f"{color} object", ("shape", "size", "place"), rng)
    if form == "both":
        first, second = rng.choice(((color, rng.choice(SHAPES)), (rng.choice(COLORS), shape)))
        return _ask_attribute(f"{first} {second}", ("size", "place"), rng)
    return _ask_attribute(shape, ("color", "size", "place"), rng)


def _ask_attribute(noun: str, names: tuple[str, ...], rng: random.Random) -> QuestionTurn:
    return _absent(noun, rng.choice(ATTRIBUTE_QUESTIONS[rng.choice(names)]).format(noun))


def _absent(noun: str, question: str) -> QuestionTurn:
    return QuestionTurn(ABSENT, question, f"there is no {noun}.")
