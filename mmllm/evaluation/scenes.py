"""The splits of `mmllm scenes` as tasks: the questions of each row, and captions scored by the scene graph."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.batch import picture_marks
from mmllm.evaluation.tasks import CAPTION, Question, TaskError
from mmllm.scenes.captions import fact_counts
from mmllm.scenes.wordings import UNKNOWN_ANSWER
from mmllm.scenes.world import Scene

TASKS: dict[str, Path] = {
    "scenes-val": Path("data/scenes/val"),
    "scenes-compositions": Path("data/scenes/compositions"),
    "scenes-wordings": Path("data/scenes/wordings"),
}


@dataclass(frozen=True)
class ScenesTask:
    """One split: its folder holds `conversations.json`, the pictures, and a scene graph beside each."""

    name: str
    folder: Path
    refusal: str | None = UNKNOWN_ANSWER

    def questions(self, max_pictures: int | None = None) -> list[Question]:
        """Every question of the split, or those about its first `max_pictures`. Raises TaskError."""
        return read_questions(self.folder, max_pictures)

    def caption_facts(self, question: Question, answer: str) -> tuple[int, int, int]:
        """Numbers of facts: (right ones in the caption, all in the caption, all that are true of the picture)."""
        return fact_counts(answer, scene_of_picture(question.images[0]))


def find_task(name: str) -> ScenesTask:
    """The task with this name, or the task of a folder written by `mmllm scenes`. Raises TaskError."""
    folder = TASKS.get(name, Path(name))
    if not (folder / "conversations.json").is_file():
        known = ", ".join(TASKS)
        hint = "write it with `mmllm scenes data/scenes`" if name in TASKS else f"allowed: {known}, or a folder"
        raise TaskError(f"no task {name!r}: {folder} holds no conversations.json; {hint}")
    return ScenesTask(name, folder)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise TaskError(f"{path} is not JSON: {error}; write the split again with `mmllm scenes`") from error
    if not isinstance(rows, list) or not rows:
        raise TaskError(f"{path} must hold a list of conversations; write the split again with `mmllm scenes`")
    return rows


def read_questions(folder: Path, max_pictures: int | None = None) -> list[Question]:
    """All questions of a split, each with the earlier turns that it refers to. Raises TaskError.

    Captions of rows without a picture are left out.
    """
    questions: list[Question] = []
    pictures: set[str] = set()
    for row in _rows(folder / "conversations.json"):
        if missing := {"types", "needs", "conversations"} - set(row):
            raise TaskError(f"{folder}/conversations.json row {row.get('id')} lacks {', '.join(sorted(missing))}; "
                            "write the split with `mmllm scenes`")  # fmt: skip
        names = row.get("image", [])
        names = [names] if isinstance(names, str) else names
        pictures.update(names)
        if max_pictures and len(pictures) > max_pictures:
            break
        images = tuple(str(folder / name) for name in names)
        opening = picture_marks(len(images))
        values = [turn["value"].removeprefix(opening) for turn in row["conversations"]]
        turns = list(zip(values[::2], values[1::2], strict=True))
        plain = row.get("plain", [None] * len(turns))
        for number, (kind, needed) in enumerate(zip(row["types"], row["needs"], strict=True)):
            if kind == CAPTION and not images:
                continue  # no scene graph to score it by
            question, answer = turns[number]
            history = tuple(turns[number - needed : number])
            questions.append(Question(kind, images, history, question, answer, plain[number]))
    return questions


def scene_of_picture(path: str) -> Scene:
    """The scene graph of a picture, from the JSON file beside it."""
    return Scene.from_json(json.loads(Path(path).with_suffix(".json").read_text()))
