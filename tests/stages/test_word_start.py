"""The projector's start from words: real weights see more from the first step, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mmllm.config import ConfigError, StageConfig
from mmllm.scenes.write import write_scenes
from mmllm.stages import word_start
from mmllm.stages.conversation import ConversationStage
from tests.builders.tiny_runs import log_of, losses_of, settings_of, train_in_process, weights_of

ROOT = Path(__file__).resolve().parents[2]
STARTED = "word_start={steps: 60, num_examples: 300}"


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of 300 scenes, few of which a tower needs to tell words apart."""
    folder = tmp_path_factory.mktemp("words")
    write_scenes(folder, {"train": 300, "val": 16}, 0, num_processes=1)
    return folder


def stage_of(captions: Path, out: Path, *overrides: str) -> ConversationStage:
    config = settings_of(
        ROOT / "configs" / "tiny" / "stage1.yaml", out,
        f"model.vision.source=local-dir:{ROOT}/weights/tiny-vision",
        f"model.language.source={ROOT}/weights/tiny-language",
        f"data.train=[{{path: {captions}/train/captions.json}}]", f"data.val=[{{path: {captions}/val/captions.json}}]",
        "data.cache_features=false", STARTED, *overrides,
    )  # fmt: skip
    return ConversationStage(config)


def loss_of(stage: ConversationStage, *, rolled: bool = False) -> float:
    """The mean loss of sixteen captions with their pictures, or with those of the next ones."""
    batch = stage.batch(list(range(16)))
    assert batch.pixel_values is not None
    if rolled:
        batch.pixel_values = batch.pixel_values.roll(1, 0)
    with torch.no_grad():
        out = stage.loss(stage.module, batch)
    return float(out.total) / float(out.denominator)


def test_with_tiles_the_newline_stays_and_no_gradient_is_left(captions: Path, tmp_path: Path) -> None:
    stage = stage_of(captions, tmp_path, "model.vision.image_mode=anyres", "word_start.num_examples=60")
    newline = stage.model.image_newline.clone()
    projector = [weight.clone() for weight in stage.model.projector.parameters()]
    stage.start_projector(torch.device("cpu"))
    assert torch.equal(stage.model.image_newline, newline)
    assert not torch.equal(next(stage.model.projector.parameters()), projector[0])
    assert all(weight.grad is None for weight in stage.model.parameters()), "else step 1 adds them to its own"


def test_the_llm_reads_pictures_before_the_first_step(captions: Path, tmp_path: Path) -> None:
    stage = stage_of(captions, tmp_path)
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    was_trained = {name for name, value in stage.model.named_parameters() if value.requires_grad}
    first = loss_of(stage)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    stage.start_projector(torch.device("cpu"))
    assert torch.equal(torch.rand(1), expected), "the run's random numbers are not used up"
    assert loss_of(stage) < first - 0.3
    assert loss_of(stage, rolled=True) > loss_of(stage) + 0.05, "and the right picture helps"
    after = stage.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("projector.")}
    assert {name for name, value in stage.model.named_parameters() if value.requires_grad} == was_trained
    assert all(weight.grad is None for weight in stage.model.parameters())
    assert stage.model.training
    assert not stage.model.vision_tower.training
    note = stage.notes[-1]
    found, by_frequency = (float(note.split(mark)[0].split()[-1].strip("(")) for mark in (" are read off", " by freq"))
    assert found > by_frequency + 0.1, note


def test_every_start_is_the_same_and_a_resumed_run_has_none(tiny_runs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(word_start, "RARE", 2)
    settings = ("word_start={steps: 3, num_examples: 12}", "log.save_every_steps=3")
    one, other = (train_in_process(tiny_runs / "stage1.yaml", tmp_path / name, *settings) for name in ("one", "other"))
    assert losses_of(one) == losses_of(other)
    for name, value in weights_of(one).items():
        assert torch.equal(value, weights_of(other)[name])
    assert any("word start: 3 steps on" in line for line in (one / "about.json").read_text().splitlines())
    plain = train_in_process(tiny_runs / "stage1.yaml", tmp_path / "plain", "log.save_every_steps=3")
    assert losses_of(plain) != losses_of(one)

    class Killed(BaseException):
        pass

    starts: list[str] = []
    start = word_start.start_from_words
    monkeypatch.setattr(
        "mmllm.stages.conversation.start_from_words", lambda *given: starts.append("start") or start(*given)
    )
    batch, killed_at = ConversationStage.batch, 4
    count = 0

    def batch_or_kill(self: ConversationStage, indices):
        nonlocal count
        count += 1
        if count == killed_at + 2:
            raise Killed
        return batch(self, indices)

    monkeypatch.setattr(ConversationStage, "batch", batch_or_kill)
    with pytest.raises(Killed):
        train_in_process(tiny_runs / "stage1.yaml", tmp_path / "again", *settings)
    monkeypatch.setattr(ConversationStage, "batch", batch)
    again = train_in_process(tiny_runs / "stage1.yaml", tmp_path / "again", *settings)
    assert starts == ["start"]
    assert losses_of(again) == losses_of(one)
    assert log_of(again)[-1]["step"] == log_of(one)[-1]["step"]


def test_a_start_that_has_nothing_to_learn_is_refused(tiny_runs: Path, captions: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"word_start: of the words in the answers of 3 examples with pictures, 0 are in 5 or more"
    ):
        train_in_process(tiny_runs / "stage1.yaml", tmp_path / "few", "word_start={num_examples: 3}")
    tree = settings_of(tiny_runs / "stage2.yaml", tmp_path, STARTED).model_dump(mode="json")
    tree["train"], tree["optim"]["learning_rates"] = ["language"], {"language": 0.01}
    with pytest.raises(ValidationError, match="word_start trains the projector, but train does not"):
        StageConfig.model_validate(tree)
    with pytest.raises(ConfigError, match=r"data\.train is streamed"):
        settings_of(tiny_runs / "stage1.yaml", tmp_path, STARTED,
                    f"data.train=[{{path: {captions}/train/captions.json, streaming: true}}]")  # fmt: skip


def test_a_rare_word_counts_more_than_one_that_most_answers_have() -> None:
    """A projector that reads only the frequent word loses more than one that reads only the rare one."""
    has_word = torch.tensor([[1.0, 1.0], *[[1.0, 0.0]] * 5, *[[0.0, 0.0]] * 4])
    pictures = word_start._Pictures([torch.zeros(1, 1, 2)] * 10, [None] * 10, has_word)
    torch.testing.assert_close(pictures.word_weights, -torch.tensor([0.6, 0.1]).log())

    class Model:
        def project_images(self, features: Tensor, sizes: None) -> Tensor:
            return features[:, 0]

    def loss_of(first: float, second: float) -> float:
        reader = word_start.WordReader(torch.eye(2))
        reader.forward = lambda tokens: torch.tensor([[[first, second]]])  # type: ignore[method-assign, assignment]
        with_distance = word_start._loss(Model(), reader, pictures, [0]).item()  # type: ignore[arg-type]
        distance = reader.distance(torch.zeros(1, 1, 2), torch.tensor([[[first, second]]])).item()
        return with_distance - word_start.TOKEN_WEIGHT * distance

    assert loss_of(0.9, 0.1) > loss_of(0.1, 0.9) + 0.5
