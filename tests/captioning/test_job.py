"""The work of a captioning job on pictures and models that make trouble."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmllm.captioning.inputs import PictureInputs
from mmllm.captioning.job import CaptionJob
from mmllm.captioning.ledger import JobSettings, Ledger
from mmllm.captioning.progress import JobProgress
from mmllm.checkpoint.folder import load_checkpoint
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from tests.builders.caption_ledgers import write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "in")


def run_job(
    engine: Engine, ledger: Ledger, folder: Path, *, batch_size: int = 4, max_new_tokens: int = 2, **settings: object
) -> CaptionJob:
    values = JobSettings("model", "hash", "what is this?", **settings)  # type: ignore[arg-type]
    ledger.add(PictureInputs([str(folder)]), values, max_new_tokens=max_new_tokens)
    job = CaptionJob(engine, ledger, JobProgress(6), values, batch_size=batch_size, max_new_tokens=max_new_tokens)
    job.run()
    return job


def rows_of(ledger: Ledger) -> dict[str, dict]:
    return {Path(row["place"]).name: dict(row) for row in ledger.database.execute("SELECT * FROM pictures")}


class ScriptedEngine(Engine):
    """An engine whose errors, texts and finish reason a test gives; all else is the model's."""

    finish: str | None = None

    def fail(self, examples: Sequence[object]) -> None: ...

    def say(self, text: str, sampling: Sampling) -> str:
        return text

    def reply_batch(self, examples, sampling):
        self.fail(examples)
        replies = super().reply_batch(examples, sampling)
        return [
            replace(reply, text=self.say(reply.text, sampling), finish_reason=self.finish or reply.finish_reason)
            for reply in replies
        ]


def engine_of(tiny_checkpoint: Path, **methods: object) -> Engine:
    model, processor, _ = load_checkpoint(tiny_checkpoint)
    kind = type("Scripted", (ScriptedEngine,), methods)
    return kind(model, processor, name="scripted")


def test_out_of_memory_halves_the_batch_and_goes_on(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    sizes = []

    def fail(self: Engine, examples: Sequence[object]) -> None:
        sizes.append(len(examples))
        if len(examples) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with Ledger(tmp_path / "a.ledger", may_create=True) as ledger:
        job = run_job(engine_of(tiny_checkpoint, fail=fail), ledger, folder)
        assert sizes == [4, 2, 1, 1, 1, 1, 1, 1]
        assert job.batch_size == 1
        assert {row["finish"] for row in rows_of(ledger).values()} == {"length"}


def test_a_picture_that_the_model_cannot_take_fails_alone(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    def fail(self: Engine, examples: Sequence[object]) -> None:
        if any("3.png" in example.id for example in examples):
            raise RuntimeError("this one is too strange")

    with Ledger(tmp_path / "a.ledger", may_create=True) as ledger:
        run_job(engine_of(tiny_checkpoint, fail=fail), ledger, folder)
        rows = rows_of(ledger)
        assert {name for name, row in rows.items() if row["state"] == "failed"} == {"3.png"}
        assert "this one is too strange" in rows["3.png"]["reason"]
        assert all(row["record"] for name, row in rows.items() if name != "3.png")


def test_a_model_that_fails_on_every_picture_is_an_error(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    def fail(self: Engine, examples: Sequence[object]) -> None:
        raise RuntimeError("no model at all")

    with Ledger(tmp_path / "a.ledger", may_create=True) as ledger:
        with pytest.raises(RuntimeError, match="no model at all"):
            run_job(engine_of(tiny_checkpoint, fail=fail), ledger, folder)
        assert {row["state"] for row in rows_of(ledger).values()} == {"taken"}  # which `close` gives back


def test_a_flagged_caption_is_tried_once_more_and_kept_where_it_is_right_then(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    asked = []

    def say(self: Engine, text: str, sampling: Sampling) -> str:
        asked.append(sampling)
        return "I'm sorry, I cannot help with that." if sampling.temperature == 0 else "a red square"

    engine = engine_of(tiny_checkpoint, say=say, finish="end")
    with Ledger(tmp_path / "a.ledger", may_create=True) as ledger:
        assert run_job(engine, ledger, folder).num_retried == 6
        assert {row["state"] for row in rows_of(ledger).values()} == {"done"}
        assert len(asked) == 12
    with Ledger(tmp_path / "b.ledger", may_create=True) as ledger:
        run_job(engine, ledger, folder, retry=False)
        assert {(row["state"], row["flags"]) for row in rows_of(ledger).values()} == {("flagged", '["refusal"]')}


def test_several_captions_of_a_picture_differ_and_do_not_depend_on_the_batch(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    found = []
    for batch_size in (1, 4):
        engine = engine_of(tiny_checkpoint, finish="end")
        with Ledger(tmp_path / f"{batch_size}.ledger", may_create=True) as ledger:
            run_job(engine, ledger, folder, batch_size=batch_size, num_captions=3, max_new_tokens=4, script="any")
            found.append([json.loads(row["record"]) for row in ledger.records(with_flagged=True)])
    assert found[0] == found[1]
    for record in found[0]:
        texts = [record["caption"], *record["other_captions"]]
        assert 1 < len(texts) <= 3
        assert len(set(texts)) == len(texts)


def test_a_prompt_with_fields_is_filled_in_for_each_picture(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / "0.png", folder / "untagged.png")
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"tag {number}\n")
    values = JobSettings("model", "hash", 'Of {folder}, {name}: {tags}? {"json": 1}')
    with Ledger(tmp_path / "a.ledger", may_create=True) as ledger:
        ledger.add(PictureInputs([str(folder)]), values, max_new_tokens=2)
        CaptionJob(engine_of(tiny_checkpoint), ledger, JobProgress(7), values, batch_size=4, max_new_tokens=2).run()
        rows = rows_of(ledger)
        assert json.loads(rows["2.png"]["record"])["prompt"] == 'Of in, 2: tag 2? {"json": 1}'
        assert "untagged.txt, whose text the prompt names as {tags}" in rows["untagged.png"]["reason"]


def test_captions_begin_as_wanted_hold_nothing_banned_and_follow_a_pattern(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    engine = Engine.load(tiny_checkpoint, device="cpu")
    with Ledger(tmp_path / "plain.ledger", may_create=True) as ledger:
        run_job(engine, ledger, folder, max_new_tokens=8)
        plain = {json.loads(row["record"])["caption"] for row in rows_of(ledger).values()}
    letter = next(letter for text in plain for letter in text if letter.isalpha())
    with Ledger(tmp_path / "wanted.ledger", may_create=True) as ledger:
        job = run_job(engine, ledger, folder, max_new_tokens=8, prefix="is", banned=(letter,) * (letter not in "is"))
        captions = [json.loads(row["record"])["caption"] for row in rows_of(ledger).values()]
        assert job.num_captioned == 6
        assert all(text.startswith("is") for text in captions)
        assert letter in "is" or not any(letter.lower() in text.lower() for text in captions)
    with Ledger(tmp_path / "pattern.ledger", may_create=True) as ledger:
        run_job(engine, ledger, folder, max_new_tokens=8, regex="(one|two)")
        assert {json.loads(row["record"])["caption"].strip() for row in rows_of(ledger).values()} <= {"one", "two"}
    keys = {JobSettings("m", "h", "p", **one).key for one in ({}, {"prefix": "a"}, {"regex": "a"}, {"banned": ("a",)})}  # type: ignore[arg-type]
    assert len(keys) == 4
