"""Writes the world of scenes as files: PNG pictures, a scene graph beside each, and two JSON files in LLaVA's format.

`wordings` has the scenes of `val`, asked about in wordings that training never shows.

Each picture follows from (seed, split, number) alone, so any number of processes writes the same bytes. The JSON files
are written last, and `conversations.json` after the other: if it exists, the split is complete.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmllm.batch import picture_marks
from mmllm.errors import MmllmError
from mmllm.processes import map_in_processes
from mmllm.scenes.captions import write_caption
from mmllm.scenes.conversations import SceneConversation, about_none, about_one, about_two, sample_twin, text_example
from mmllm.scenes.draw import draw
from mmllm.scenes.questions import CAPTION_REQUESTS, QUESTION_TYPES, QuestionTurn
from mmllm.scenes.small_talk import TEXT_ONLY
from mmllm.scenes.wordings import Wordings
from mmllm.scenes.world import SPLITS, Kind, Scene, Split, sample_kind, sample_scene

WORDINGS = "wordings"
FOLDERS = (*SPLITS, WORDINGS)
# Training has more of what takes longest to learn; the other splits have all kinds in their usual proportions.
TRAINING_KIND_WEIGHTS: dict[Kind, int] = {"objects": 40, "text": 42, "chart": 18}
TRAINING_QUESTION_TYPES = (*QUESTION_TYPES, *["compare", "count"] * 4, *["relation"] * 2, *["chart"] * 3, "follow_up")
TURNS_PER_PICTURE = 10
TWIN_EVERY = 8  # every eighth picture is the twin of the one before it, for questions about two
TEXT_EVERY = 16  # pictures for each conversation without a picture
PICTURES_PER_CHUNK = 250


def _random_for(seed: int, split: str, what: str, number: int) -> random.Random:
    return random.Random(f"{seed}/{split}/{what}/{number}")


def scene_of(seed: int, split: Split, number: int) -> Scene:
    """The scene of a picture. A twin follows a scene of objects."""
    rng = _random_for(seed, split, "scene", number)
    if number % TWIN_EVERY == TWIN_EVERY - 1:
        return sample_twin(scene_of(seed, split, number - 1), rng, split)
    has_twin = number % TWIN_EVERY == TWIN_EVERY - 2
    if has_twin:
        return sample_scene(rng, split, "objects")
    return sample_scene(rng, split, sample_kind(rng, TRAINING_KIND_WEIGHTS) if split == "train" else None)


def _picture_conversation(scene: Scene, rng: random.Random, split: Split) -> SceneConversation:
    return about_one(scene, rng, TURNS_PER_PICTURE, TRAINING_QUESTION_TYPES if split == "train" else ())


def _turns_json(turns: Sequence[QuestionTurn], opening: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for number, turn in enumerate(turns):
        rows.append({"from": "human", "value": (opening if number == 0 else "") + turn.question})
        rows.append({"from": "gpt", "value": turn.answer})
    return rows


def conversation_row(row_id: str, images: Sequence[str], conversation: SceneConversation) -> dict[str, Any]:
    """A row of LLaVA's JSON, with each turn's question type in `types` and its `num_needed` in `needs`.

    `plain` has the questions of a reworded conversation in the words of `questions.py`.
    """
    row: dict[str, Any] = {"id": row_id}
    if images:
        row["image"] = images[0] if len(images) == 1 else list(images)
    row["conversations"] = _turns_json(conversation.turns, picture_marks(len(images)))
    row["types"] = [turn.type for turn in conversation.turns]
    row["needs"] = [turn.num_needed for turn in conversation.turns]
    if any(turn.plain for turn in conversation.turns):
        row["plain"] = [turn.plain or turn.question for turn in conversation.turns]
    return row


def picture_name(number: int) -> str:
    return f"images/{number:06d}.png"


def _write_chunk(
    folder: str, seed: int, split: Split, numbers: range, wordings: Wordings
) -> tuple[list[Any], list[Any]]:
    """Draws the pictures of these numbers; returns their caption rows and conversation rows."""
    captions: list[Any] = []
    conversations: list[Any] = []
    for number in numbers:
        scene, name = scene_of(seed, split, number), picture_name(number)
        path = Path(folder) / name
        draw(scene, _random_for(seed, split, "draw", number)).save(path, optimize=False)
        path.with_suffix(".json").write_text(json.dumps(scene.to_json()))
        rng = _random_for(seed, split, "ask", number)
        words_rng = _random_for(seed, split, f"words, {wordings}", number)  # so that the questions stay the same
        caption = QuestionTurn("caption", rng.choice(CAPTION_REQUESTS), write_caption(scene, rng))
        captioned = wordings.reworded(SceneConversation((scene,), (caption,)), words_rng)
        captions.append(conversation_row(f"{split}-{number:06d}", [name], captioned))
        talk = wordings.apply(_picture_conversation(scene, rng, split), words_rng)
        conversations.append(conversation_row(f"{split}-{number:06d}", [name], talk))
        if number % TWIN_EVERY == TWIN_EVERY - 1:
            pair = wordings.apply(about_two(scene_of(seed, split, number - 1), scene, rng, 4), words_rng)
            names = [picture_name(number - 1), name]
            conversations.append(conversation_row(f"{split}-{number:06d}-two", names, pair))
        if number % TEXT_EVERY == 0:
            conversations.append(_text_row(f"{split}-{number:06d}-text", rng, split, scene, wordings, words_rng))
    return captions, conversations


def _text_row(
    row_id: str, rng: random.Random, split: Split, scene: Scene, wordings: Wordings, words_rng: random.Random
) -> dict[str, Any]:  # fmt: skip
    """A row without a picture: small talk, or questions about a described scene, so that the LLM still reads texts."""
    if rng.random() < 0.5 and wordings.small_talk:
        return conversation_row(row_id, [], wordings.apply(about_none(rng, split, 5), words_rng))
    talk = wordings.apply(_picture_conversation(scene, rng, split), words_rng)
    example = text_example(talk, rng, row_id)
    turns = tuple(
        # The description is in the first turn, so each turn needs all before it. A caption has no single right answer.
        QuestionTurn(turn.type if turn.type == "caption" else TEXT_ONLY, message.text, turn.answer, number)
        for number, (message, turn) in enumerate(zip(example.messages[::2], talk.turns, strict=True))
    )
    return conversation_row(row_id, [], SceneConversation((), turns))


def _write_json(rows: list[Any], path: Path) -> None:
    partial = path.with_suffix(".part")
    partial.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    partial.replace(path)


def write_split(
    out: Path,
    name: str,
    count: int,
    seed: int,
    *,
    reworded: float,
    small_talk: bool,
    num_processes: int,
    advance: Callable[[int], None],
) -> None:
    """Writes one folder of `count` pictures, and replaces what an interrupted run left there."""
    folder = out / name
    split: Split = "val" if name == WORDINGS else name  # type: ignore[assignment]
    fraction = {"train": reworded, WORDINGS: 1.0}.get(name, 0.0)
    wordings = Wordings(fraction, held_out=name == WORDINGS, small_talk=small_talk)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    chunks = [range(start, min(start + PICTURES_PER_CHUNK, count)) for start in range(0, count, PICTURES_PER_CHUNK)]
    captions: list[Any] = []
    conversations: list[Any] = []
    written = map_in_processes(
        _write_chunk, [(str(folder), seed, split, numbers, wordings) for numbers in chunks], num_processes=num_processes
    )
    for numbers, (chunk_captions, chunk_conversations) in zip(chunks, written, strict=True):
        captions += chunk_captions
        conversations += chunk_conversations
        advance(len(numbers))
    _write_json(captions, folder / "captions.json")
    _write_json(conversations, folder / "conversations.json")


def write_scenes(
    out: Path,
    counts: dict[str, int],
    seed: int,
    *,
    reworded: float = 0.5,
    small_talk: bool = True,
    num_processes: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Writes the FOLDERS with a count above 0; `reworded` is the fraction of training's questions in other words.

    Without `small_talk` all is about pictures or described scenes.

    Raises MmllmError where `out` holds anything else.
    """
    other_files = [path.name for path in out.iterdir() if path.name not in FOLDERS] if out.is_dir() else []
    if other_files:
        raise MmllmError(
            f"{out} holds {', '.join(sorted(other_files)[:3])}: give an empty or new folder for the scenes"
        )
    num_processes = num_processes or os.cpu_count() or 1
    for name, count in counts.items():
        if count > 0:
            write_split(
                out, name, count, seed, reworded=reworded, small_talk=small_talk, num_processes=num_processes,
                advance=advance,
            )  # fmt: skip
