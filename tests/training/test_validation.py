"""How a run is judged while it trains: per source, with others' pictures, on text alone, on tasks; and its alarms."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmllm.batch import Example, message
from mmllm.config import AlarmsConfig, ConfigError
from mmllm.evaluation.reliance import exchange_pictures
from mmllm.evaluation.tasks import CAPTION, TaskError
from mmllm.evaluation.validation_tasks import some_questions, task_scores
from mmllm.runs.alarms import forgetting_alarm, forgetting_of, reliance_alarm
from mmllm.stages.conversation import ConversationStage
from mmllm.stages.run import run
from mmllm.training.loop import TrainingError
from mmllm.training.validation import short_names
from tests.builders.tiny_runs import log_of, settings_of, train_in_process


@pytest.fixture(scope="module")
def pictured(tiny_runs: Path) -> Path:
    """Conversations about one picture each, and others on text alone; beside the data of `tiny_runs`."""
    rows = json.loads((tiny_runs / "data" / "train.json").read_text())
    (tiny_runs / "data" / "pictured.json").write_text(json.dumps(rows[:5]))
    (tiny_runs / "data" / "text.json").write_text(json.dumps(rows[-4:]))
    return tiny_runs / "data"


def sources(data: Path, *names: str) -> str:
    return "data.val=[" + ", ".join(f"{{path: {data}/{name}.json}}" for name in names) + "]"


def stage_of(tiny_runs: Path, out: Path, *overrides: str, config: str = "stage2.yaml") -> ConversationStage:
    return ConversationStage(settings_of(tiny_runs / config, out, "validation.num_samples=0", *overrides))


def about(*images: str) -> Example:
    return Example("x", "s", (message("user", "<image>" * len(images) + "?"), message("assistant", "yes")), images)


# Whether it looks at the picture


@pytest.mark.parametrize("seed", range(5))
def test_no_example_gets_its_own_pictures_and_each_gets_as_many(seed: int) -> None:
    examples = [
        about(),
        about("a"),
        about("b"),
        about("a"),
        about("c"),
        about("a", "b"),
        about("b", "a"),
        about("a", "b", "c"),
    ]
    found = exchange_pictures(examples, seed)
    assert sorted(found) == [1, 2, 3, 4, 5, 6], "not the one without pictures, nor the only one with three"
    for index, shown in found.items():
        assert shown.images != examples[index].images
        assert len(shown.images) == len(examples[index].images)
        assert shown.messages == examples[index].messages
    singles = [found[index].images for index in (1, 2, 4)]
    assert sorted(singles) == [("a",), ("b",), ("c",)], "each picture is shown, to one who has another"
    assert exchange_pictures(examples, seed) == found


def test_pictures_with_which_an_example_would_be_too_long_are_not_exchanged() -> None:
    found = exchange_pictures([about("a"), about("b")], 0, fits=lambda example: example.images == ("a",))
    assert list(found) == [1]


def test_image_reliance_is_the_loss_with_others_pictures_less_that_with_the_right_ones(
    tiny_runs: Path, pictured: Path, tmp_path: Path
) -> None:
    stage = stage_of(tiny_runs, tmp_path, sources(pictured, "pictured", "text"), "compute.batch_size=2")
    for parameter in stage.model.projector.parameters():
        torch.nn.init.normal_(parameter, std=1.0)  # so that pictures make a difference
    judge = stage.validation

    def loss(examples: list[Example]) -> float:
        batches = [stage.batches.make([example], use_features=False) for example in examples]
        with torch.no_grad():
            return sum(float(stage.module(batch)) for batch in batches) / sum(batch.num_supervised for batch in batches)

    stage.model.eval()
    right = [judge.examples[index] for index in judge.exchanged]
    expected = loss(list(judge.exchanged.values())) - loss(right)
    found = stage.validate(0)
    assert len(right) == 5
    assert abs(expected) > 1e-3
    assert found["image_reliance"] == pytest.approx(expected, abs=1e-4)


def test_a_model_that_gets_nothing_from_its_projector_has_no_image_reliance(
    tiny_runs: Path, pictured: Path, tmp_path: Path
) -> None:
    stage = stage_of(tiny_runs, tmp_path, sources(pictured, "pictured"))
    for parameter in stage.model.projector.parameters():
        torch.nn.init.zeros_(parameter)
    assert stage.validate(0)["image_reliance"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["text", "val"])
def test_where_pictures_cannot_be_exchanged_that_is_said_and_nothing_is_computed(
    tiny_runs: Path, pictured: Path, tmp_path: Path, name: str
) -> None:
    stage = stage_of(tiny_runs, tmp_path, sources(pictured, name))
    assert "image_reliance" not in stage.validate(0)
    assert stage.notes == [
        "image reliance is not computed: data.val has no two examples whose pictures can be exchanged"
    ]


def reliance_rows(*values: float) -> list[dict[str, Any]]:
    """Validations at steps 0, 10, 20 ... of 100."""
    return [{"step": 10 * number, "image_reliance": value} for number, value in enumerate(values)]


FLAT, FINE = 0.001, 0.5
ALARMS = AlarmsConfig(min_image_reliance=0.02, reliance_after=0.25, reliance_validations=3)
ALARMED: Any = SimpleNamespace(alarms=ALARMS, optim=SimpleNamespace(max_steps=100), train=("projector",))


@pytest.mark.parametrize(
    ("values", "alarms_at"),
    [
        ([FLAT] * 11, [50]),  # 30, 40 and 50 are the first three behind a quarter of the run
        ([FINE] * 11, []),
        ([FLAT] * 3 + [FINE] * 8, []),
        ([FINE] * 7 + [FLAT] * 3 + [FINE], [90]),
        ([FINE] * 3 + [FLAT, FLAT, FINE] * 2 + [FINE, FINE], []),
        ([FLAT] * 6 + [FINE] + [FLAT] * 4, [50, 90]),
        ([FINE] * 9 + [FLAT, FLAT], [100]),  # at the end two are enough
    ],
)
def test_flat_image_reliance_raises_one_alarm_until_it_was_above_again(
    values: list[float], alarms_at: list[int]
) -> None:
    rows = reliance_rows(*values)
    raised = [rows[end - 1]["step"] for end in range(1, len(rows) + 1) if reliance_alarm(rows[:end], ALARMED)]
    assert raised == alarms_at


def test_a_run_that_does_not_look_has_its_alarm_once_though_it_was_stopped(
    tiny_runs: Path, pictured: Path, tmp_path: Path, capsys: Any
) -> None:
    blind = (
        "alarms={min_image_reliance: 100, reliance_after: 0, reliance_validations: 2, forgetting_budget: 100}",
        "validation={num_samples: 0, every_steps: 1}",
        "log={every_steps: 1, save_every_steps: 3}",
        sources(pictured, "pictured"),
    )
    whole = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "whole", *blind)
    assert "ALARM at step 2: the model does not look at the picture" in capsys.readouterr().out
    out = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConversationStage, "num_tokens", stop_after(4))
        with pytest.raises(KeyboardInterrupt):
            train_in_process(tiny_runs / "stage2.yaml", out, *blind)
    assert [row["step"] for row in log_of(out) if "image_reliance" in row][-1] == 4, "one more than was saved"
    train_in_process(tiny_runs / "stage2.yaml", out, *blind)

    def told(out: Path) -> list[dict[str, Any]]:
        of_speed = {"tokens_per_second", "samples_per_second", "data_wait", "mfu", "hfu"}
        return [{name: row[name] for name in row if name not in of_speed} for row in log_of(out)]

    assert [row["step"] for row in told(out) if "alarm" in row] == [2]
    assert told(out) == told(whole), "the same curves, no line twice"


def stop_after(calls: int) -> Any:
    """`num_tokens` that raises, as a crash at the end of a step."""
    seen = []

    def num_tokens(self: ConversationStage, batch: Any) -> int:
        seen.append(batch)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return int(batch.attention_mask.sum())

    return num_tokens


def test_a_run_with_alarms_is_saved_and_fails_only_where_that_is_asked(
    tiny_runs: Path, pictured: Path, tmp_path: Path
) -> None:
    blind = ("alarms.min_image_reliance=100", sources(pictured, "pictured"), "optim.max_steps=1", "alarms.fail=true")
    with pytest.raises(TrainingError, match="the run is saved, but it had alarms"):
        train_in_process(tiny_runs / "stage1.yaml", tmp_path / "out", *blind)
    assert (tmp_path / "out" / "manifest.json").is_file()


# Losses of sources


def test_each_source_has_its_loss_and_that_of_all_weighs_them_by_their_tokens(
    tiny_runs: Path, pictured: Path, tmp_path: Path
) -> None:
    stage = stage_of(tiny_runs, tmp_path, sources(pictured, "pictured", "text"))
    found = stage.validate(0)
    for name in ("pictured", "text"):
        alone = stage_of(tiny_runs, tmp_path, sources(pictured, name)).validate(0)
        assert found[f"val_loss/{name}"] == pytest.approx(alone["val_loss"], abs=1e-4)
        assert f"val_loss/{name}" not in alone, "where there is one, it is val_loss"
    low, high = sorted((found["val_loss/pictured"], found["val_loss/text"]))
    assert low < found["val_loss"] < high


def test_sources_are_named_as_shortly_as_tells_them_apart() -> None:
    assert short_names(["data/a/val.json", "data/b/val.json", "c.jsonl"]) == {
        "data/a/val.json": "a/val", "data/b/val.json": "b/val", "c.jsonl": "c",
    }  # fmt: skip
    assert short_names(["x/{000..123}.tar"]) == {"x/{000..123}.tar": "_000..123_"}
    assert len(set(short_names(["a/x.json", "a/x.jsonl"]).values())) == 2


def test_samples_are_taken_over_all_of_the_validation_data(tiny_runs: Path, pictured: Path, tmp_path: Path) -> None:
    stage = stage_of(tiny_runs, tmp_path, sources(pictured, "pictured", "text"), "validation.num_samples=3")
    stage.validate(7)
    samples = json.loads((tmp_path / "samples" / "step_0000007.json").read_text())
    assert [one["id"] for one in samples] == ["one-0", "one-3", "text-green"]
    assert [len(one["pictures"]) for one in samples] == [1, 1, 0]
    assert (tmp_path / "samples" / samples[0]["pictures"][0]).is_file()


# What it forgets


def test_text_alone_is_looked_at_from_the_beginning_and_a_rise_over_the_budget_is_an_alarm(
    tiny_runs: Path, pictured: Path, tmp_path: Path, capsys: Any
) -> None:
    probe = f"validation.text_probe={pictured}/text.json"
    wild = ("optim.learning_rates={projector: 0.01, language: 1.0}", "validation.every_steps=2", probe)
    out = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "wild", *wild)
    rows = log_of(out)
    curve = [row["text_loss"] for row in rows if "text_loss" in row]
    assert len(curve) == 4, "at steps 0, 2, 4 and 6"
    before = stage_of(tiny_runs, tmp_path, probe).validate(0)
    assert before == {"text_loss": pytest.approx(curve[0], abs=1e-4)}
    assert forgetting_of(rows) == pytest.approx(curve[-1] - curve[0])
    assert curve[1] - curve[0] > 0.1
    assert [(row["step"], row["alarm"]) for row in rows if "alarm" in row][:1] == [(2, "forgetting")]
    assert "the LLM forgets how to talk" in capsys.readouterr().out


def test_forgetting_is_said_when_it_begins_and_not_while_it_lasts() -> None:
    rows = [{"step": step, "text_loss": loss} for step, loss in enumerate([1.0, 1.05, 1.2, 1.3, 1.0, 1.2])]
    config: Any = SimpleNamespace(alarms=AlarmsConfig(forgetting_budget=0.1))
    assert [end - 1 for end in range(1, 7) if forgetting_alarm(rows[:end], config)] == [2, 5]
    assert forgetting_alarm([], config) is None


def test_forgetting_is_for_a_trained_llm_and_needs_text(tiny_runs: Path, pictured: Path, tmp_path: Path) -> None:
    both = sources(pictured, "pictured", "text")
    assert "text_loss" in stage_of(tiny_runs, tmp_path, both).validate(0)
    assert "text_loss" not in stage_of(tiny_runs, tmp_path, both, config="stage1.yaml").validate(0)
    [note] = stage_of(tiny_runs, tmp_path, sources(pictured, "pictured")).notes
    assert note.startswith("what the LLM forgets is not measured")
    probe = f"validation.text_probe={pictured}/pictured.json"
    with pytest.raises(ConfigError, match="but train does not list language"):
        settings_of(tiny_runs / "stage1.yaml", tmp_path, probe)
    with pytest.raises(ValueError, match=r"validation\.text_probe: every conversation .* has a picture"):
        stage_of(tiny_runs, tmp_path, probe)


# Tasks


def test_a_few_questions_of_a_task_are_asked_at_each_validation(
    tiny_runs: Path, tiny_scenes: Path, tmp_path: Path
) -> None:
    task = str(tiny_scenes / "val")
    stage = stage_of(tiny_runs, tmp_path, f"validation.tasks=['{task}']", "validation.task_questions=5")
    found = stage.validate(0)
    assert set(found) == {f"task/val/{measure}" for measure in ("exact", "shuffled", "gain", "gain_error")}
    questions = some_questions(task, 5)
    assert len(questions) == 5
    assert CAPTION not in {question.type for question in questions}
    answers = {question.question: question.answer for question in questions}

    class Knows:
        def __getattr__(self, name: str) -> Any:
            return getattr(stage.validation.engine, name)

        def reply_batch(self, examples: list[Example], sampling: Any) -> Any:
            texts = [answers[example.messages[-1].text.strip()] for example in examples]
            return [type("Reply", (), {"text": text}) for text in texts]

    scores = task_scores(Knows(), task, 5)  # type: ignore[arg-type]
    assert scores == {"exact": 1.0, "shuffled": 1.0, "gain": 0.0, "gain_error": 0.0}, "it answers without looking"


def test_a_task_that_is_not_there_is_refused_before_anything_loads(tiny_runs: Path, tmp_path: Path) -> None:
    config = settings_of(tiny_runs / "stage1.yaml", tmp_path / "out", "validation.tasks=[nothing]")
    with pytest.raises(TaskError, match="no task 'nothing'"):
        run(config)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_a_task_that_is_not_there(tiny_runs: Path, tmp_path: Path, capsys: Any) -> None:
    from typer.testing import CliRunner

    from mmllm.cli import app

    result = CliRunner().invoke(
        app, ["train", str(tiny_runs / "stage1.yaml"), f"out={tmp_path}/out", "validation.tasks=[nothing]"]
    )
    assert result.exit_code == 1
    assert "no task 'nothing'" in result.output + capsys.readouterr().err
