"""`validation.tasks`: each validation asks a few questions of each task, so that it stays short."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mmllm.evaluation.run import answer_all, shuffled_pictures
from mmllm.evaluation.scenes import find_task
from mmllm.evaluation.tasks import CAPTION, Question, exact_matches
from mmllm.inference.engine import Engine

BATCH_SIZE = 32


def check_tasks(names: Sequence[str]) -> None:
    """Raises TaskError where a task does not exist."""
    for name in names:
        find_task(name)


def some_questions(name: str, count: int) -> list[Question]:
    """At most `count` questions, evenly spaced over a task. Captions take long and are left to `mmllm eval`.

    Raises TaskError.
    """
    questions = [question for question in find_task(name).questions() if question.type != CAPTION]
    if len(questions) <= count:
        return questions
    return [questions[index * len(questions) // count] for index in range(count)]


def task_scores(engine: Engine, name: str, num_questions: int) -> dict[str, float]:
    """The share of exact matches with the right pictures (`exact`) and with exchanged ones (`shuffled`).

    `gain` is their difference over the questions that have pictures, with its standard error `gain_error`. A score
    without questions is left out.
    """
    questions = some_questions(name, num_questions)
    with_pictures = [question for question in questions if question.images]
    measures = {
        "exact": (questions, [question.images for question in questions]),
        "shuffled": (with_pictures, shuffled_pictures(with_pictures)),
    }
    matches = {}
    for measure, (subset, pictures) in measures.items():
        answers = answer_all(engine, subset, pictures, BATCH_SIZE, lambda count: None)
        matches[measure] = exact_matches(subset, answers)
    scores = {measure: sum(results) / len(results) for measure, results in matches.items() if results}
    if with_pictures:
        right = [match for match, question in zip(matches["exact"], questions, strict=True) if question.images]
        gains = [exact - shuffled for exact, shuffled in zip(right, matches["shuffled"], strict=True)]
        scores["gain"] = statistics.fmean(gains)
        scores["gain_error"] = statistics.pstdev(gains) / math.sqrt(len(gains))
    return scores
