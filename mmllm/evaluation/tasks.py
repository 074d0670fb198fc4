"""Tasks: pictures with questions whose right answers are known; each name is a folder of `mmllm scenes`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.batch import PICTURE_LABEL, Example, Message, message, picture_marks
from mmllm.scenes.world import Scene
from mmllm.user_error import UserError

TASKS: dict[str, Path] = {
    "scenes-val": Path("data/scenes/val"),
    "scenes-compositions": Path("data/scenes/compositions"),
}
CAPTION = "caption"  # the one type that is scored by its facts and not word by word


class TaskError(UserError):
    """A task that does not exist or cannot be read."""


@dataclass(frozen=True)
class Question:
    """One question with the pictures it is about and the turns that are needed to understand it."""

    type: str
    images: tuple[str, ...]
    history: tuple[tuple[str, str], ...]  # (question, right answer) of the turns before
    question: str
    answer: str

    def example(self, images: Sequence[str] | None = None, *, label: str = PICTURE_LABEL) -> Example:
        """The conversation that is put to the model, with its own or with other pictures; `label` is the model's."""
        shown = tuple(images or self.images)
        opening = picture_marks(len(shown), label)
        texts = [text for turn in self.history for text in turn] + [self.question]
        messages: list[Message] = []
        for number, text in enumerate(texts):
            role = "assistant" if number % 2 else "user"
            messages.append(message(role, opening + text if number == 0 else text))  # type: ignore[arg-type]
        return Example(self.question, "eval", tuple(messages), shown)


def find_task(name: str) -> Path:
    """The folder of a task's name, or of a split that `mmllm scenes` wrote. Raises TaskError."""
    folder = TASKS.get(name, Path(name))
    if not (folder / "conversations.json").is_file():
        known = ", ".join(TASKS)
        hint = "write it with `mmllm scenes data/scenes`" if name in TASKS else f"allowed: {known}, or a folder"
        raise TaskError(f"no task {name!r}: {folder} holds no conversations.json; {hint}")
    return folder


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text())
    except ValueError as error:
        raise TaskError(f"{path} is no JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise TaskError(f"{path} must hold a list of conversations")
    return rows


def read_questions(folder: Path, max_pictures: int | None = None) -> list[Question]:
    """Every question of a split, each by itself with just the turns that it follows. Raises TaskError.

    Captions of rows without picture are left out.
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
        for number, (kind, needed) in enumerate(zip(row["types"], row["needs"], strict=True)):
            if kind == CAPTION and not images:
                continue  # no scene graph to score it by
            question, answer = turns[number]
            questions.append(Question(kind, images, tuple(turns[number - needed : number]), question, answer))
    return questions


def scene_of_picture(path: str) -> Scene:
    """The scene graph beside a picture."""
    return Scene.from_json(json.loads(Path(path).with_suffix(".json").read_text()))


def guess_accuracy(questions: Sequence[Question]) -> dict[str, float]:
    """What the best guess without a picture gets right, per type: always the commonest answer to a question like this.

    Questions are alike if they are of one type and open with the same two words.
    """
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.type, " ".join(question.question.split()[:2])][question.answer] += 1
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for (kind, _), counts in answers.items():
        right[kind] += max(counts.values())
        total[kind] += sum(counts.values())
    return {kind: right[kind] / total[kind] for kind in total}
