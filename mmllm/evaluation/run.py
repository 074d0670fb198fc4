"""`mmllm eval`: asks a model a task's questions with the right and with shuffled pictures, and scores them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmllm.evaluation.reliance import exchange_partners
from mmllm.evaluation.scenes import find_task
from mmllm.evaluation.tasks import CAPTION, Question, Task, guess_accuracy, normalise
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling

MAX_CAPTION_TOKENS, MAX_ANSWER_TOKENS = 96, 48


def shuffled_pictures(questions: Sequence[Question], seed: int = 0) -> list[tuple[str, ...]]:
    """For each question, another question's pictures, as many as its own; its own ones if no other has as many."""
    partners = dict(exchange_partners([question.images for question in questions], seed))
    return [partners.get(question.images, question.images) for question in questions]


def answer_all(
    engine: Engine, questions: Sequence[Question], pictures: Sequence[tuple[str, ...]], batch_size: int, progress: Any
) -> list[str]:
    """The model's greedy answer to each question, in order. Questions of similar length share a batch."""
    examples = [
        question.example(images, label=engine.picture_label)
        for question, images in zip(questions, pictures, strict=True)
    ]

    def length(index: int) -> tuple[bool, int]:
        return questions[index].type == CAPTION, len(engine.renderer.render_example(examples[index]).input_ids)

    order = sorted(range(len(examples)), key=length)
    answers = [""] * len(examples)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        has_caption = any(questions[index].type == CAPTION for index in batch)
        sampling = Sampling(max_new_tokens=MAX_CAPTION_TOKENS if has_caption else MAX_ANSWER_TOKENS)
        replies = engine.reply_batch([examples[index] for index in batch], sampling)
        for index, reply in zip(batch, replies, strict=True):
            answers[index] = reply.text
        progress(len(batch))
    return answers


def f1(num_right: int, num_stated: int, num_true: int) -> float:
    """Harmonic mean of precision and recall, as SPICE scores captions: https://arxiv.org/abs/1607.08822"""
    return 2 * num_right / (num_stated + num_true) if num_stated + num_true else 0.0


def score(task: Task, questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Scores the answers.

    `exact` is the share of exact matches over all questions but captions, `types` the same for each question type, and
    `counts` their numbers. `refused` is the share of questions with another answer that got the task's refusal.
    `caption_f1` follows the task's rule for captions.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    refused: list[bool] = []
    facts = [0, 0, 0]  # right, stated, true
    for question, answer in zip(questions, answers, strict=True):
        if question.type == CAPTION:
            facts = [total + new for total, new in zip(facts, task.caption_facts(question, answer), strict=True)]
        else:
            right[question.type].append(normalise(answer) == normalise(question.answer))
            if task.refusal and question.answer != task.refusal:
                refused.append(normalise(answer) == normalise(task.refusal))
    all_hits = [hit for hits in right.values() for hit in hits]
    result: dict[str, Any] = {
        "exact": sum(all_hits) / len(all_hits) if all_hits else None,
        "types": {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())},
        "counts": {kind: len(hits) for kind, hits in sorted(right.items())},
    }
    if refused:
        result["refused"] = sum(refused) / len(refused)
    if facts[2]:
        result["caption_f1"] = f1(*facts)
    return result


def evaluate_task(
    engine: Engine, name: str, *, max_pictures: int | None, batch_size: int, progress: Any
) -> dict[str, Any]:
    """The result of one task: `score` with the right pictures, `shuffled` with others, `guess` without any."""
    task = find_task(name)
    questions = task.questions(max_pictures)
    bar = progress.add_task(name, total=2 * len(questions))

    def advance(count: int) -> None:
        progress.update(bar, advance=count)

    result = score(task, questions, answer_all(engine, questions, [q.images for q in questions], batch_size, advance))
    with_pictures = [question for question in questions if question.images]
    progress.update(bar, total=len(questions) + len(with_pictures))
    answers = answer_all(engine, with_pictures, shuffled_pictures(with_pictures), batch_size, advance)
    result["shuffled"] = score(task, with_pictures, answers)
    result["guess"] = guess_accuracy([question for question in questions if question.type != CAPTION])
    return result


def show(name: str, result: dict[str, Any], console: Console) -> None:
    """Prints the result of one task as a table."""
    table = Table(title=f"{name}: exact match", title_justify="left")
    for column in ("question type", "questions", "right picture", "shuffled", "best guess"):
        table.add_column(column, justify="left" if column == "question type" else "right")
    for kind, value in result["types"].items():
        shuffled = result["shuffled"]["types"].get(kind)
        cells = [f"{value:.3f}", "" if shuffled is None else f"{shuffled:.3f}", f"{result['guess'][kind]:.3f}"]
        table.add_row(kind.replace("_", " "), str(result["counts"][kind]), *cells)
    table.add_section()
    table.add_row(
        "all", str(sum(result["counts"].values())), f"{result['exact']:.3f}", f"{result['shuffled']['exact']:.3f}", ""
    )
    if "refused" in result:
        table.add_row("refused", "", f"{result['refused']:.3f}", "", "")
    if "caption_f1" in result:
        table.add_row("caption F1", "", f"{result['caption_f1']:.3f}", f"{result['shuffled']['caption_f1']:.3f}", "")
    console.print(table)


def evaluate_model(
    model: str | Path, tasks: Sequence[str], *, max_pictures: int | None = None, batch_size: int = 64,
    device: str | None = None, dtype: str | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`{task: result}` for every task. Raises TaskError or CheckpointError before the first question."""
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
