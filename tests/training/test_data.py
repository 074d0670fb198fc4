"""What a stage trains on: sources mixed and streamed, with what `mmllm check` found left out, resumed exactly."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmllm.cli import app
from mmllm.config import ConfigError
from mmllm.data.sources import DataError
from mmllm.runs.state import saved_steps
from mmllm.stages.conversation import ConversationStage
from mmllm.training import loop
from mmllm.training.loop import InterruptedRunError
from tests.builders.launches import forked
from tests.builders.tiny_runs import losses_of, settings_of, train_in_process, weights_of


@pytest.fixture
def parquet(tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cauldron's shape with the pictures inside, in row groups of three."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    rows = [
        {
            "images": [{"bytes": (tiny_runs / "data" / f"{number}.png").read_bytes(), "path": None}],
            "texts": [{"user": "what is it?", "assistant": f"a {color} circle"}],
        }
        for number, color in enumerate(("red", "green", "blue", "yellow", "white") * 2)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=3)
    return tmp_path / "data.parquet"


def text_only(folder: Path) -> Path:
    path = folder / "text.jsonl"
    turns = [{"role": "user", "content": "what color?"}, {"role": "assistant", "content": "red"}]
    rows = [{"id": f"text-{number}", "messages": turns} for number in range(5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def train_on(*sources: str) -> str:
    return f"data.train=[{', '.join(f'{{{source}}}' for source in sources)}]"


def test_sources_of_several_formats_are_mixed_with_replay(tiny_runs: Path, tmp_path: Path, parquet: Path) -> None:
    config = tiny_runs / "stage2.yaml"
    overrides = (
        train_on(f"path: {tiny_runs}/data/train.json, weight: 2", f"path: {parquet}, weight: 0.5"),
        f"data.replay={{path: {text_only(tmp_path)}, fraction: 0.25}}",
    )
    stage = ConversationStage(settings_of(config, tmp_path / "out", *overrides))
    assert (stage.num_examples, stage.examples.sizes) == (16 + 10 + 5, [16, 10, 5])
    order: Any = stage.sampler(5)
    assert order.source_counts == [(16, 32), (10, 5), (5, 12)]
    ids = [name for step in range(order.batches_per_epoch) for name in stage.batch(order.batch(step)).example_ids]
    shown = {kind: sum(name.startswith(kind) for name in ids) for kind in ("one-", "#", "text-")}
    assert 16 <= shown["one-"] <= 20, "twice, but for the last batch"
    assert shown["#"] <= 5
    assert len(ids) == 45
    out = train_in_process(config, tmp_path / "out", *overrides)
    assert len(losses_of(out)) == 6


def test_features_of_pictures_inside_files_are_cached(tiny_runs: Path, tmp_path: Path, parquet: Path) -> None:
    config, train = tiny_runs / "stage2.yaml", train_on(f"path: {parquet}", f"path: {tiny_runs}/data/train.json")
    plain = train_in_process(config, tmp_path / "a" / "plain", train)
    cached = train_in_process(config, tmp_path / "a" / "cached", train, "data.cache_features=true")
    assert losses_of(cached)[0] == pytest.approx(losses_of(plain)[0], abs=1e-2)
    stage = ConversationStage(settings_of(config, tmp_path / "a" / "again", train, "data.cache_features=true"))
    assert stage.features is not None
    assert stage.features.num_missing == 0
    assert len({*stage.features.row_names.values()}) == 12, "the same pictures in both"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_streamed_run_that_was_stopped_ends_in_the_weights_of_one_that_was_not(
    tiny_runs: Path, tmp_path: Path, parquet: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    overrides = (
        train_on(f"path: {parquet}, streaming: true", f"path: {parquet.parent}/*.jsonl, streaming: true"),
        f"data.replay={{path: {text_only(tmp_path)}, fraction: 0.25}}",
        f"data.num_workers={num_workers}",
    )
    unbroken = train_in_process(config, tmp_path / "unbroken", *overrides)
    whole_step = loop.Stepper.run_step

    def step(self: Any, current: int, data: Any) -> Any:
        if current == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole_step(self, current, data)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stepper, "run_step", step)
        with pytest.raises(InterruptedRunError, match="stopped after step 3 of 6"):
            train_in_process(config, out, *overrides)
    train_in_process(config, out, *overrides)
    assert losses_of(out) == losses_of(unbroken)
    ours, theirs = weights_of(out), weights_of(unbroken)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert "on streamed examples" in (out / "README.md").read_text()


# Both ranks of a run are asked to stop as its third step begins.
DRIVER = """
import os, signal, sys
from mmllm.training import loop
from mmllm.stages import run
whole_step = loop.Stepper.run_step
def step(self, number, data):
    if number == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return whole_step(self, number, data)
loop.Stepper.run_step = step
run.main("stage2", sys.argv[1:])
"""


@pytest.mark.timeout(400)
def test_one_process_goes_on_where_two_stopped_in_a_stream(tiny_runs: Path, tmp_path: Path, parquet: Path) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    train = train_on(f"path: {parquet}, streaming: true")
    unbroken = train_in_process(config, tmp_path / "unbroken", train)
    (tmp_path / "driver.py").write_text(DRIVER)
    done = forked(tmp_path / "driver.py", [config, f"out={out}", train, "compute.batch_size=2"], 2)
    assert "stopped after step 3 of 6" in done.stderr, done.stderr[-3000:]
    (state,) = saved_steps(out)
    position = torch.load(state / "state.pt", weights_only=True)["position"]
    assert sorted(position) == [0, 1, 2, 3], "a shard reader for each of the four slots, of both ranks"
    train_in_process(config, out, train)
    assert losses_of(out) == pytest.approx(losses_of(unbroken), abs=1e-4)


def check(config: Path, *overrides: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["check", str(config), *overrides, "--json"])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def with_a_broken_picture(tiny_runs: Path, folder: Path) -> Path:
    rows = [
        {"id": f"row-{number}", "image": str(tiny_runs / "data" / f"{number}.png"), "caption": f"a circle {number}"}
        for number in range(8)
    ]
    (folder / "broken.png").write_bytes((tiny_runs / "data" / "0.png").read_bytes()[:200])
    rows[3]["image"] = str(folder / "broken.png")
    path = folder / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_leaves_out_what_the_check_found_unless_the_file_has_changed(
    tiny_runs: Path, tmp_path: Path, streaming: str
) -> None:
    config, out, path = tiny_runs / "stage1.yaml", tmp_path / "out", with_a_broken_picture(tiny_runs, tmp_path)
    overrides = (train_on(f"path: {path}, streaming: {streaming}"), "data.max_bad_fraction=0.2")
    report = check(config, f"out={out}", *overrides)
    assert (report["starts"], report["train"]["usable"], report["train"]["undecodable_images"]) == (True, 7, 1)
    assert [row["because"] for row in report["train"]["bad"]] == ["picture"]
    assert len(losses_of(train_in_process(config, out, *overrides, "compute.batch_size=7"))) == 6
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=r"broken\.png is damaged or cut off"):
        train_in_process(config, tmp_path / "other", *overrides, "compute.batch_size=8")


def test_a_run_refuses_what_was_listed_past_the_limit_and_names_it(tiny_runs: Path, tmp_path: Path) -> None:
    config, out, path = tiny_runs / "stage1.yaml", tmp_path / "out", with_a_broken_picture(tiny_runs, tmp_path)
    assert not check(config, f"out={out}", train_on(f"path: {path}"))["starts"]
    (tmp_path / "broken.png").write_bytes((tiny_runs / "data" / "0.png").read_bytes())
    with pytest.raises(
        DataError, match=r"(?s)1 of 8 rows cannot be used.*row 3 \(row-3\).*damaged or cut off"
    ) as caught:
        ConversationStage(settings_of(config, out, train_on(f"path: {path}")))
    assert str(out / "check" / "bad.jsonl") in str(caught.value)
    assert check(config, f"out={out}", train_on(f"path: {path}"))["starts"], "it was mended"
    assert ConversationStage(settings_of(config, out, train_on(f"path: {path}"))).num_examples == 8


def test_a_damaged_list_is_named(tiny_runs: Path, tmp_path: Path) -> None:
    config, out = tiny_runs / "stage1.yaml", tmp_path / "out"
    check(config, f"out={out}")
    (out / "check" / "report.json").write_text("{}")
    with pytest.raises(DataError, match=r"check does not hold what `mmllm check` writes .* run it again"):
        ConversationStage(settings_of(config, out))


@pytest.mark.parametrize(("train", "more", "text"), [
    ("{path: a, streaming: true}, {path: b}", "", "train mixes streamed and indexed sources"),
    ("{path: a, streaming: true, max_examples: 3}", "", "max_examples needs an index of the rows"),
    ("{path: a, streaming: true}", "data.cache_features=true", "cache_features needs all pictures beforehand"),
    ("{path: a}", "data.val=[{path: b, streaming: true}]", "val is read whole"),
    ("{path: a}", "data.val=[{path: b, weight: 2}]", "val is read whole and once; set streaming and weight for train"),
    ("{path: a, weight: 0}", "", "data.train.0.weight: Input should be greater than 0"),
    ("{path: a}", "data.replay={path: b, fraction: 1}", "data.replay.fraction: Input should be less than 1"),
])  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(
    tiny_runs: Path, tmp_path: Path, train: str, more: str, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(tiny_runs / "stage1.yaml", tmp_path, f"data.train=[{train}]", *filter(None, [more]))
    assert text in str(caught.value)
