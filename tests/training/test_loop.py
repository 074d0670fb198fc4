"""The loop: what the loss averages over, several processes as one, and the guards that stop a run that is no use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.batch import Example, message
from mmllm.batching.sampler import IndexedSampler
from mmllm.data.sources import DataError
from mmllm.distributed.ranks import build_accelerator
from mmllm.images import ImageError
from mmllm.stages.conversation import ConversationStage
from mmllm.training.guards import TrainingError
from mmllm.training.loop import train
from tests.builders.tiny_runs import UNGROUPED, log_of, losses_of, settings_of, train_in_process

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stage(tiny_runs: Path, tmp_path: Path) -> ConversationStage:
    return ConversationStage(settings_of(tiny_runs / "stage2.yaml", tmp_path / "out"))


def run(stage: ConversationStage) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    Path(stage.config.out).mkdir()
    train(stage.config, stage, build_accelerator(stage.config), lambda: stage)


def stopped(stage: ConversationStage) -> str:
    with pytest.raises(TrainingError) as caught:
        run(stage)
    return str(caught.value)


def test_the_loss_does_not_depend_on_how_a_batch_is_divided(tiny_runs: Path, tmp_path: Path) -> None:
    config = tiny_runs / "stage2.yaml"
    slow = "optim.learning_rates={projector: 0.002, language: 0.001}"  # last bits do not grow in six steps
    whole = train_in_process(config, tmp_path / "whole", slow)
    halves = train_in_process(config, tmp_path / "halves", slow, "compute.batch_size=2", "compute.accumulate_steps=2")
    ones = train_in_process(config, tmp_path / "ones", slow, "compute.batch_size=1", "compute.accumulate_steps=4")
    assert len(losses_of(whole)) == 6
    for other in (halves, ones):
        assert losses_of(other) == pytest.approx(losses_of(whole), abs=1e-4)
        norms = [[row["grad_norm"] for row in log_of(out)] for out in (whole, other)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_the_first_loss_is_that_of_every_supervised_token_of_the_batch(tiny_runs: Path, tmp_path: Path) -> None:
    stage = ConversationStage(settings_of(tiny_runs / "stage2.yaml", tmp_path / "out", UNGROUPED))
    indices = IndexedSampler(16, 4, 3, stage.lengths, group_by_length=False).batch(0)
    with torch.no_grad():
        sums = [float(stage.module(stage.batch([index]))) for index in indices]
    num_tokens = sum(stage.batch([index]).num_supervised for index in indices)
    assert num_tokens == stage.count(stage.batch(indices))
    out = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "run", UNGROUPED)
    assert losses_of(out)[0] == pytest.approx(sum(sums) / num_tokens, abs=1e-4)
    assert losses_of(out)[-1] < losses_of(out)[0], "and it learns"


def test_fewer_processes_than_launched_are_refused(tiny_runs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were launched but accelerate runs 1; .*ACCELERATE_USE_CPU=true"):
        build_accelerator(settings_of(tiny_runs / "stage2.yaml", tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(stage: ConversationStage) -> None:
    before = {name: p.detach().clone() for name, p in stage.model.language_model.named_parameters()}
    with torch.no_grad():
        next(stage.model.projector.parameters()).fill_(float("nan"))
    text = stopped(stage)
    first = IndexedSampler(16, 4, 3, stage.lengths).batch(0)
    assert text.startswith("step 1: the loss is not finite (nan), the update was not made. Examples: ")
    assert ", ".join(stage.examples[index].id for index in first) in text
    assert "Lower optim.learning_rates, or look at these examples with `mmllm check`" in text
    assert all(torch.equal(p, before[name]) for name, p in stage.model.language_model.named_parameters())


def replace_examples(stage: ConversationStage, *messages: Any, images: tuple[Any, ...] = ()) -> None:
    """Other conversations in place of those that were read, and were checked then."""
    stage.examples = [Example(f"odd-{number}", "", tuple(messages), images) for number in range(16)]


def test_a_projector_that_gets_no_gradient_stops_the_run(stage: ConversationStage) -> None:
    picture = stage.examples[0].images[:1]
    replace_examples(
        stage, message("user", "hi"), message("assistant", "yes"), message("user", "<image>"), images=picture
    )
    text = stopped(stage)
    assert text.startswith("step 3: projector got no gradient in 3 steps, so it learns nothing. Does an answer follow")
    assert "odd-" in text


def test_conversations_without_pictures_do_not_stop_a_run(stage: ConversationStage) -> None:
    replace_examples(stage, message("user", "hi"), message("assistant", "yes"))
    before = {name: p.detach().clone() for name, p in stage.model.projector.named_parameters()}
    run(stage)
    assert len(losses_of(Path(stage.config.out))) == 6
    assert all(torch.equal(p, before[name]) for name, p in stage.model.projector.named_parameters())


def test_a_step_with_nothing_to_learn_stops_the_run(stage: ConversationStage) -> None:
    replace_examples(stage, message("user", "is anybody there?"))
    text = stopped(stage)
    assert text.startswith("step 1: nothing to learn, no token of these examples is supervised: odd-")
    assert text.count("odd-") == 4


def write_rows(path: Path, rows: list[dict[str, Any]]) -> list[str]:
    path.write_text(json.dumps(rows))
    return [f"data.train=[{{path: {path}}}]"]


def test_a_projector_without_any_picture_to_learn_from_is_refused(tiny_runs: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]
    data = write_rows(tmp_path / "text.json", [{"conversations": turns}] * 8)
    with pytest.raises(DataError, match=r"train lists projector, but no example of data.train has an image"):
        train_in_process(tiny_runs / "stage1.yaml", tmp_path / "out", *data)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_that_cannot_be_decoded_is_named_in_one_line(
    tiny_runs: Path, tmp_path: Path, num_workers: int
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "yes"}]
    data = write_rows(tmp_path / "rows.json", [{"image": "broken.png", "conversations": turns}] * 8)
    with pytest.raises(ImageError) as caught:
        train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out", *data, f"data.num_workers={num_workers}")
    assert str(caught.value).startswith(f"{tmp_path / 'broken.png'} is not an image that can be read")
    assert "Traceback" not in str(caught.value)


def test_worker_processes_change_nothing(tiny_runs: Path, tmp_path: Path) -> None:
    alone = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "alone", "optim.max_steps=3")
    helped = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "helped", "optim.max_steps=3", "data.num_workers=1")
    assert losses_of(helped) == losses_of(alone)
