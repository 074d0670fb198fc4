"""The scores of tasks while a model trains: a few questions, so that a validation stays short.

Imports lazily, since every training script hands it over, whether tasks are asked for or not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmllm.evaluation.tasks import Question
    from mmllm.inference.engine import Engine

BATCH_SIZE = 32


def some_questions(name: str, count: int) -> list[Question]:
    """At most `count` questions, evenly over a task; captions, which take long to write, are for `mmllm eval`.

    Raises TaskError.
    """
    from mmllm.evaluation.tasks import CAPTION, find_task, read_questions

    found = [question for question in read_questions(find_task(name)) if question.type != CAPTION]
    if len(found) <= count:
        return found
    return [found[index * len(found) // count] for index in range(count)]


class LiveTasks:
    """What `log.tasks` asks: exact match, and beside it the same with the pictures exchanged."""

    def check(self, names: Sequence[str]) -> None:
        """Raises TaskError where a task does not exist."""
        for name in names:
            from mmllm.evaluation.tasks import find_task

            find_task(name)

    def scores(self, engine: Engine, name: str, num_questions: int) -> dict[str, float]:
        """`exact` and `shuffled`, each where there are such questions; and where pictures are shown, `gain`.

        That is by how much the right pictures help, over the same questions, with its standard error `gain_error`.
        """
        from mmllm.evaluation.run import answer_all, hits_of, shuffled_pictures

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
        found = {measure: sum(some) / len(some) for measure, some in hits.items() if some}
        if seen:
            right = [hit for hit, question in zip(hits["exact"], questions, strict=True) if question.images]
            gains = [one - other for one, other in zip(right, hits["shuffled"], strict=True)]
            found["gain"] = statistics.fmean(gains)
            found["gain_error"] = statistics.pstdev(gains) / math.sqrt(len(gains))
        return found
