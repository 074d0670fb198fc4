"""Tasks: questions about pictures with known answers, and the rules for scoring answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mmllm.batch import PICTURE_LABEL, Example, Message, message, picture_marks
from mmllm.errors import MmllmError

CAPTION = "caption"  # the only type that is scored by its facts, not by exact match


class TaskError(MmllmError):
    """A task that does not exist or cannot be read."""


@dataclass(frozen=True)
class Question:
    """One question, its pictures, and the earlier turns that it refers to."""

    type: str
    images: tuple[str, ...]
    history: tuple[tuple[str, str], ...]  # (question, right answer) of the turns before
    question: str
    answer: str
    plain: str | None = None  # the question in the words by which guesses are grouped, where it is in other words

    def example(self, images: Sequence[str] | None = None, *, label: str = PICTURE_LABEL) -> Example:
        """The conversation for the model, with these pictures or the right ones; `label` is its picture label."""
        pictures = tuple(images or self.images)
        opening = picture_marks(len(pictures), label)
        texts = [text for turn in self.history for text in turn] + [self.question]
        messages: list[Message] = []
        for number, text in enumerate(texts):
            role = "assistant" if number % 2 else "user"
            messages.append(message(role, opening + text if number == 0 else text))  # type: ignore[arg-type]
        return Example(self.question, "eval", tuple(messages), pictures)


class Task(Protocol):
    """Questions, and the scoring rule for captions; all other answers are scored by exact match.

    `refusal` is the answer to what no picture tells, or None.
    """

    @property
    def name(self) -> str: ...
    @property
    def refusal(self) -> str | None: ...
    def questions(self, max_pictures: int | None = None) -> list[Question]: ...
    def caption_facts(self, question: Question, answer: str) -> tuple[int, int, int]: ...  # right, stated, true


def normalise(text: str) -> str:
    """The form in which answers are compared: lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def exact_matches(questions: Sequence[Question], answers: Sequence[str]) -> list[bool]:
    """Whether each answer matches the right one, as `normalise` writes both."""
    pairs = zip(questions, answers, strict=True)
    return [normalise(answer) == normalise(question.answer) for question, answer in pairs]


def guess_accuracy(questions: Sequence[Question]) -> dict[str, float]:
    """The accuracy of the best guess without a picture, by question type.

    The guess is the most common answer among questions of the same type that begin with the same two words.
    """
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.type, " ".join((question.plain or question.question).split()[:2])][question.answer] += 1
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for (kind, _), counts in answers.items():
        right[kind] += max(counts.values())
        total[kind] += sum(counts.values())
    return {kind: right[kind] / total[kind] for kind in total}
