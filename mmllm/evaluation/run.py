"""Asks a model every question of a task twice, with the right and with shuffled pictures, and scores the answers."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmllm.evaluation.scenes import find_task
from mmllm.evaluation.tasks import CAPTION, Question, Task, guess_accuracy, normalise
from mmllm.inference.engine import Engine, Sampling


def shuffled_pictures(questions: Sequence[Question], seed: int = 0) -> list[tuple[str, ...]]:
    """For each question the pictures of another, with as many of them; never its own where there is a choice."""
    groups: dict[int, list[tuple[str, ...]]] = defaultdict(list)
    for question in questions:
        if question.images not in groups[len(question.images)]:
            groups[len(question.images)].append(question.images)
    rng = random.Random(seed)
    other: dict[tuple[str, ...], tuple[str, ...]] = {}
    for group in groups.values():
        order = list(group)
        rng.shuffle(order)
        other.update(zip(order, order[1:] + order[:1], strict=True))
    return [other[question.images] for question in questions]


def answer_all(
    engine: Engine, questions: Sequence[Question], pictures: Sequence[tuple[str, ...]], batch_size: int, progress: Any
) -> list[str]:
    """The model's greedy answer to each question, in order. Questions of like length share a batch."""
    examples = [
        question.example(shown, label=engine.picture_label) for question, shown in zip(questions, pictures, strict=True)
    ]

    def cost(index: int) -> tuple[bool, int]:
        return questions[index].type == CAPTION, len(engine.renderer.render_example(examples[index]).input_ids)

    order = sorted(range(len(examples)), key=cost)
    answers = [""] * len(examples)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = 96 if any(questions[index].type == CAPTION for index in chosen) else 16
        replies = engine.reply_batch([examples[index] for index in chosen], Sampling(max_new_tokens=longest))
        for index, reply in zip(chosen, replies, strict=True):
            answers[index] = reply.text
        progress(len(chosen))
    return answers


def f1(num_right: int, num_stated: int, num_true: int) -> float:
    """Harmonic mean of precision and recall; as SPICE scores captions, https://arxiv.org/abs/1607.08822"""
    return 2 * num_right / (num_stated + num_true) if num_stated + num_true else 0.0


def score(task: Task, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """`exact` over all questions but captions, `types` per question type, `caption_f1` by the task's own rule."""
    right: dict[str, list[bool]] = defaultdict(list)
    counts = [0, 0, 0]
    for question, answer in zip(questions, answers, strict=True):
        if question.type == CAPTION:
            found = task.caption_facts(question, answer)
            counts = [total + new for total, new in zip(counts, found, strict=True)]
        else:
            right[question.type].append(normalise(answer) == normalise(question.answer))
    every = [hit for hits in right.values() for hit in hits]
    result: dict[str, Any] = {
        "exact": sum(every) / len(every) if every else None,
        "types": {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())},
        "counts": {kind: len(hits) for kind, hits in sorted(right.items())},
    }
    if counts[2]:
        result["caption_f1"] = f1(counts[0], counts[1], counts[2])
    return result


def evaluate_task(
    engine: Engine, name: str, *, max_pictures: int | None, batch_size: int, progress: Any
) -> dict[str, Any]:
    """The result of one task: `score`, beside it `shuffled` (pictures exchanged) and `guess` (no picture at all)."""
    task = find_task(name)
    questions = task.questions(max_pictures)
    bar = progress.add_task(name, total=2 * len(questions))

    def advance(count: int) -> None:
        progress.update(bar, advance=count)

    result = score(task, questions, answer_all(engine, questions, [q.images for q in questions], batch_size, advance))
    seen = [question for question in questions if question.images]
    progress.update(bar, total=len(questions) + len(seen))
    answers = answer_all(engine, seen, shuffled_pictures(seen), batch_size, advance)
    result["shuffled"] = score(task, seen, answers)
    result["guess"] = guess_accuracy([question for question in questions if question.type != CAPTION])
    return result


def show(name: str, result: dict[str, Any], console: Console) -> None:
    """The result as a table for people."""
    table = Table(title=f"{name}: exact match", title_justify="left")
    for column in ("question type", "questions", "right picture", "shuffled", "best guess"):
        table.add_column(column, justify="left" if column == "question type" else "right")
    for kind, value in result["types"].items():
        wrong = result["shuffled"]["types"].get(kind)
        cells = [f"{value:.3f}", "" if wrong is None else f"{wrong:.3f}", f"{result['guess'][kind]:.3f}"]
        table.add_row(kind.replace("_", " "), str(result["counts"][kind]), *cells)
    table.add_section()
    table.add_row(
        "all", str(sum(result["counts"].values())), f"{result['exact']:.3f}", f"{result['shuffled']['exact']:.3f}", ""
    )
    if "caption_f1" in result:
        table.add_row("caption F1", "", f"{result['caption_f1']:.3f}", f"{result['shuffled']['caption_f1']:.3f}", "")
    console.print(table)


def evaluate_model(
    model: str | Path, tasks: Sequence[str], *, max_pictures: int | None = None, batch_size: int = 64,
    device: str | None = None, dtype: str | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`{task: result}` for every task. Raises TaskError or CheckpointError before anything is asked."""
    for name in tasks:
        find_task(name)
    engine = Engine.load(model, device=device, dtype=dtype)
    console = Console(stderr=quiet)
    results = {}
    with Progress(console=console, disable=quiet) as progress:
        for name in tasks:
            results[name] = evaluate_task(
                engine, name, max_pictures=max_pictures, batch_size=batch_size, progress=progress
            )
    if not quiet:
        for name, result in results.items():
            show(name, result, console)
    return results
