"""The guards of a step, one by one, and the voice of a process that does not get on."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmllm.checkpoint.folder import read_manifest
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.inference.terminal_chat import ask_once
from mmllm.optimizers.optim import gradient_norm
from mmllm.stages.conversation import ConversationStage
from mmllm.training import guards, loop
from mmllm.training.guards import MIN_REMEMBERED, Guards, TrainingError, explain_lost_peers, module_of
from mmllm.training.watchdog import Watchdog
from tests.builders.tiny_runs import log_of, settings_of, train_in_process


class TwoLayers:
    """A stage of one part, a batch of which is a list of names."""

    def __init__(self) -> None:
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.parts = {"language": list(self.model.named_parameters())}

    def can_train(self, part: str, batch: list[str]) -> bool:
        return True

    def names(self, batch: list[str]) -> list[str]:
        return batch

    def count(self, batch: list[str]) -> int:
        return len(batch)

    def give_gradient(self, *values: float) -> None:
        for layer, value in zip(self.model.layers, values, strict=True):
            for parameter in layer.parameters():
                parameter.grad = torch.full_like(parameter, value)


def check(guards: Guards, step: int, losses: list[float], norm: float, batches: list[list[str]]) -> None:
    guards.check(step, losses, norm, batches, [float(gradient_norm(module)) for module in guards.modules])


@pytest.fixture
def stage() -> TwoLayers:
    one = TwoLayers()
    one.give_gradient(1, 1)
    return one


def test_only_the_micro_batch_whose_loss_is_not_finite_is_named(stage: TwoLayers) -> None:
    with pytest.raises(TrainingError) as caught:
        check(Guards(stage, stage.parts), 4, [1.0, float("inf"), 2.0], float("nan"), [["a"], ["b", "c"], ["d"]])
    assert str(caught.value) == (
        "step 5: the loss is not finite (inf), the update was not made. Examples: b, c. Lower optim.learning_rates, or "
        "look at these examples with `mmllm check`"
    )


def test_a_gradient_that_is_not_finite_names_all_of_the_step(stage: TwoLayers) -> None:
    with pytest.raises(TrainingError, match=r"step 1: the gradient is not finite \(inf\), .* Examples: a, b\. Lower"):
        check(Guards(stage, stage.parts), 0, [1.0, 2.0], float("inf"), [["a"], ["b"]])


def test_one_layer_without_gradient_is_found_though_others_have_one(stage: TwoLayers) -> None:
    one = Guards(stage, stage.parts)
    stage.give_gradient(1, 0)
    check(one, 0, [1.0], 1.0, [["a"]])
    check(one, 1, [1.0], 1.0, [["a"]])
    stage.give_gradient(1, 1)
    check(one, 2, [1.0], 1.0, [["a"]])
    stage.give_gradient(1, 0)
    check(one, 3, [1.0], 1.0, [["a"]])
    check(one, 4, [1.0], 1.0, [["a"]])
    with pytest.raises(TrainingError, match=r"^step 6: layers\.1 got no gradient in 3 steps"):
        check(one, 5, [1.0], 1.0, [["a"]])


def test_a_loss_of_exactly_0_stops_a_run_after_three_steps_in_a_row(stage: TwoLayers) -> None:
    one = Guards(stage, stage.parts)
    for step, loss in enumerate([0.0, 0.0, 0.1, 0.0, 0.0]):
        check(one, step, [loss, 0.0], 1.0, [["a"], []])
    with pytest.raises(TrainingError, match=r"^step 6: the loss was exactly 0 in 3 steps, .* by heart\? a$"):
        check(one, 5, [0.0, 0.0], 1.0, [["a"], []])


def test_a_loss_far_above_the_last_ones_is_a_warning_with_its_examples(stage: TwoLayers) -> None:
    one = Guards(stage, stage.parts)
    for step in range(MIN_REMEMBERED):
        check(one, step, [2.0 + 0.1 * (step % 5)], 1.0, [["a"]])
    assert one.warnings == [], "and none for those that it is compared with"
    check(one, 40, [2.5, 9.0, 0.1], 1.0, [["a"], ["b", "c"], ["d"]])
    (row,) = one.warnings
    assert (row["step"], row["examples"], row["loss"]) == (41, ["b", "c"], 4.5)
    assert row["warning"] == "step 41: the loss of b, c is 4.5, the median is 2.2"


def test_layers_are_judged_one_by_one_and_what_has_no_number_by_its_module() -> None:
    names = {
        "model.language_model.model.layers.11.self_attn.q_proj.lora_A.default.weight":
            "model.language_model.model.layers.11",
        "model.language_model.lm_head.weight": "model.language_model.lm_head",
        "model.image_newline": "model",
        "logit_scale": "logit_scale",
    }  # fmt: skip
    assert {name: module_of(name) for name in names} == names


def test_other_errors_are_not_taken_for_a_lost_process() -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, explain_lost_peers(lambda: 3):
        raise RuntimeError("shapes do not match")
    assert not isinstance(caught.value, TrainingError)
    with (
        pytest.raises(TrainingError, match="step 4: another process of this run has ended"),
        explain_lost_peers(lambda: 3),
    ):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:8840")


def test_warnings_stand_in_the_log_once_and_no_figure_is_made_of_them(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(guards, "MIN_REMEMBERED", 2)
    monkeypatch.setattr(guards, "OUTLIER_DEVIATIONS", -1e9)
    out = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out", "optim.max_steps=4", "log.every_steps=2")
    rows = log_of(out)
    assert [row["step"] for row in rows] == [2, 4, 3, 4]
    assert [len(row["examples"]) for row in rows if "warning" in row] == [4, 4]
    assert "warning: step 3: the loss of " in capsys.readouterr().out
    assert "warning" not in read_manifest(out)["figures"]
    assert {"step", "loss", "learning_rate", "grad_norm"} <= set(read_manifest(out)["figures"])


def test_a_process_that_makes_no_progress_says_what_it_waits_for_and_when_it_goes_on() -> None:
    told: list[str] = []
    heard = threading.Event()

    def say(text: str) -> None:
        told.append(text)
        heard.set()

    batch = SimpleNamespace(names=["a", "b", "c"], images_per_example=[2, 0, 1])
    with Watchdog(0.02, rank=1, world_size=4, names=lambda batch: batch.names, say=say) as heart:
        heart.waiting_for(40, "the forward pass", [batch])
        assert heard.wait(60)
        heard.clear()
        while not heard.is_set():  # it goes on, and stalls no more
            heart.waiting_for(41, "data")
    assert told[0].startswith("process 1 of 4: no progress for 0 s in step 41, waits for the forward pass. Examples: ")
    assert "Examples: a, b, c; 3 pictures in 2 examples, 1 text-only. It is in wait, " in told[0]
    assert any("process 1 of 4: goes on after " in text for text in told)


def test_a_run_that_stalls_speaks_and_one_with_0_seconds_does_not(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    heard = threading.Event()
    whole = ConversationStage.batch

    def batch(self: Any, indices: Any) -> Any:
        if len(told) == 0 and not heard.is_set():
            heard.wait(0.5 if self.config.log.stall_seconds == 0 else 60)
        return whole(self, indices)

    class Loud(Watchdog):
        def __init__(self, *given: Any, **options: Any):
            super().__init__(*given, **options, say=lambda text: (told.append(text), heard.set()))  # type: ignore[func-returns-value]

    monkeypatch.setattr(ConversationStage, "batch", batch)
    monkeypatch.setattr(loop, "Watchdog", Loud)
    train_in_process(tiny_runs / "stage2.yaml", tmp_path / "silent", "log.stall_seconds=0", "optim.max_steps=1")
    assert told == []
    train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out", "log.stall_seconds=0.05", "optim.max_steps=1")
    assert told[0].startswith("process 0 of 1: no progress for 0 s in step 1, waits for data. It is in wait, ")


@pytest.mark.parametrize("override", ["train=[projector,language]", "lora.rank=4", "vision"])
def test_the_best_model_is_kept_and_answers(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, override: str
) -> None:
    config, losses = tiny_runs / "stage2.yaml", {0: 1.0, 2: 3.0, 4: 2.0, 6: 2.5}
    vision = ("train=[vision,projector,language]", "vision_lora.rank=2", "optim.learning_rates.vision=0.01")
    overrides = (*(vision if override == "vision" else [override]), "validation.every_steps=2")
    monkeypatch.setattr(ConversationStage, "validate", lambda self, step, writes: {"val_loss": losses[step]})
    out = train_in_process(config, tmp_path / "out", *overrides)
    plain = train_in_process(config, tmp_path / "plain", *overrides, "validation.keep_best=false")
    assert [row for row in log_of(out) if "val_loss" in row][2] == {"step": 4, "val_loss": 2.0}
    assert read_manifest(out / "best")["figures"]["val_loss"] == 2.0
    assert "4 steps on 16 examples" in (out / "best" / "README.md").read_text()
    assert f"lowest val_loss 2 at step 4: {out / 'best'}" in capsys.readouterr().out
    assert [row.get("loss") for row in log_of(out)] == [row.get("loss") for row in log_of(plain)], "it changes nothing"
    assert not (plain / "best").exists()
    ask_once(Engine.load(out / "best"), "what?", [], Sampling(max_new_tokens=3), as_json=False)


def test_the_best_model_goes_where_the_last_one_is_better(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {0: 1.0, 2: 3.0, 4: 4.0, 6: 2.0}
    monkeypatch.setattr(ConversationStage, "validate", lambda self, step, writes: {"val_loss": losses[step]})
    out = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "out", "validation.every_steps=2")
    assert not (out / "best").exists()
    assert settings_of(tiny_runs / "stage2.yaml", out).validation.keep_best
