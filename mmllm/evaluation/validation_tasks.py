"""What `validation.tasks` asks at each validation: a few of a task's questions, so that a validation stays short."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mmllm.evaluation.run import answer_all, shuffled_pictures
from mmllm.evaluation.scenes import find_task
from mmllm.evaluation.tasks import CAPTION, Question, hits_of
from mmllm.inference.engine import Engine

BATCH_SIZE = 32


def check_tasks(names: Sequence[str]) -> None:
    """Raises TaskError where a task does not exist."""
    for name in names:
        find_task(name)


def some_questions(name: str, count: int) -> list[Question]:
    """At most `count` questions, evenly over a task; captions, which take long to write, are for `mmllm eval`.

    Raises TaskError.
    """
    questions = [question for question in find_task(name).questions() if question.type != CAPTION]
    if len(questions) <= count:
        return questions
    return [questions[index * len(questions) // count] for index in range(count)]


def task_scores(engine: Engine, name: str, num_questions: int) -> dict[str, float]:
    """`exact` and `shuffled`, each where there are such questions; and where pictures are shown, `gain`.

    That is by how much the right pictures help, over the same questions, with its standard error `gain_error`.
    """
    questions = some_questions(name, num_questions)
    seen = [question for question in questions if question.images]
    asked = {
        "exact": (questions, [question.images for question in questions]),
        "shuffled": (seen, shuffled_pictures(seen)),
    }
    hits = {}
    for measure, (some, pictures) in asked.items():
        answers = answer_all(engine, some, pictures, BATCH_SIZE, lambda count: None)
        hits[measure] = hits_of(some, answers)
    scores = {measure: sum(some) / len(some) for measure, some in hits.items() if some}
    if seen:
        right = [hit for hit, question in zip(hits["exact"], questions, strict=True) if question.images]
        gains = [one - other for one, other in zip(right, hits["shuffled"], strict=True)]
        scores["gain"] = statistics.fmean(gains)
        scores["gain_error"] = statistics.pstdev(gains) / math.sqrt(len(gains))
    return scores
