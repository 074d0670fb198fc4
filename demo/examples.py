"""Pictures with a question to start a chat from, drawn when the page starts; the same every time."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmllm.scenes.draw import draw
from mmllm.scenes.pair_questions import TWO_PICTURES, ask_about_two
from mmllm.scenes.questions import QUESTION_TYPES, QuestionTurn
from mmllm.scenes.world import Kind, Scene, near_miss, sample_scene

# (kind of scene, question type, seed), chosen for variety; scenes are of the val split, which training never shows
EXAMPLES: tuple[tuple[Kind, str, int], ...] = (
    ("objects", "caption", 12),
    ("objects", "color", 5),
    ("objects", "count", 4),
    ("objects", "relation", 7),
    ("text", "text", 2),
    ("text", "text", 11),
    ("chart", "chart", 12),
    ("objects", TWO_PICTURES, 8),
)
MIN_OBJECTS = 3
MIN_SIDE_PX = 96  # smaller drawn pictures are hard to look at


@dataclass(frozen=True)
class ExampleQuestion:
    """Pictures on disk, a question about them, and a right answer (for a caption, one of several)."""

    question: str
    answer: str
    pictures: tuple[Path, ...]


def _scene(kind: Kind, rng: random.Random) -> Scene:
    """A scene of the val split; one of objects has at least MIN_OBJECTS."""
    while True:
        scene = sample_scene(rng, "val", kind)
        if scene.kind != "objects" or len(scene.things) >= MIN_OBJECTS:
            return scene


def _picture(scene: Scene, rng: random.Random) -> Image.Image:
    while True:
        picture = draw(scene, rng)
        if min(picture.size) >= MIN_SIDE_PX:
            return picture


def _example(kind: Kind, question_type: str, seed: int) -> tuple[QuestionTurn, list[Image.Image]]:
    """A turn and its pictures. Scenes are sampled until one has a question of this type."""
    rng = random.Random(seed)
    while True:
        scenes = [_scene(kind, rng)]
        if question_type == TWO_PICTURES:
            scenes.append(near_miss(scenes[0], rng, "val"))
            turns = ask_about_two(scenes[0], scenes[1], rng, 1)
        else:
            turns = QUESTION_TYPES[question_type](scenes[0], rng)
        if turns:
            return turns[0], [_picture(scene, rng) for scene in scenes]


def draw_examples(folder: Path) -> list[ExampleQuestion]:
    """Draws the pictures of every example into `folder`, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number, (kind, question_type, seed) in enumerate(EXAMPLES, 1):
        turn, pictures = _example(kind, question_type, seed)
        paths = []
        for letter, picture in zip("ab", pictures, strict=False):
            paths.append(folder / f"example-{number}{letter if len(pictures) > 1 else ''}.png")
            picture.save(paths[-1])
        question = turn.question[0].upper() + turn.question[1:]
        examples.append(ExampleQuestion(question, turn.answer, tuple(paths)))
    return examples
