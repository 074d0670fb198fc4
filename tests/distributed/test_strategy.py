"""Two processes under every strategy are one with twice the batch, and a stopped run goes on with as many or fewer."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmllm.config import ConfigError
from mmllm.distributed.launch import STRATEGIES, launched_strategy
from mmllm.runs.state import saved_steps
from mmllm.stages.conversation import ConversationStage
from tests.builders.launches import forked, under_torchrun
from tests.builders.strategies import HEAD, LAUNCHES
from tests.builders.tiny_runs import (
    UNGROUPED,
    log_of,
    losses_of,
    mixed_seed,
    settings_of,
    streamed,
    train_in_process,
    weights_of,
)

SETTINGS = ("optim.max_steps=4", "log.save_every_steps=2")

# The real command, which all processes leave without a word behind as many states as DIES says. CALLS_HEAD: the
# LLM's head is called, and its gradient is not found beside it, as where its weight is gathered when it is called.
DRIVER = (
    HEAD
    + """
from mmllm.training import loop, losses
from mmllm.stages import run

if "CALLS_HEAD" in os.environ:
    losses.is_plain_linear = lambda head: False

save_state, num_saved = loop.save_state, 0
def save_and_die(*given, **named):
    global num_saved
    save_state(*given, **named)
    num_saved += 1
    if num_saved == int(os.environ.get("DIES", 0)):
        given[2].accelerator.wait_for_everyone()
        os._exit(9)
loop.save_state = save_and_die
run.main("stage2", sys.argv[1:])
"""
)


def launch(
    config: Path,
    out: Path,
    num_processes: int,
    environment: dict[str, str],
    *overrides: str,
    start: Callable[..., subprocess.CompletedProcess[str]] = forked,
) -> str:
    """The whole run, four examples a step. Gives what it printed."""
    driver = out.with_name(f"{out.name}.py")
    driver.write_text(DRIVER)
    arguments = [config, f"out={out}", f"compute.batch_size={4 // num_processes}", *overrides]
    done = start(driver, arguments, num_processes, environment)
    assert (done.returncode != 0) == ("DIES" in environment), done.stderr[-3000:]
    return done.stdout


def shared(tiny_runs: Path) -> tuple[str, ...]:
    """Batches of which some hold pictures on one rank only, pictures for validation, and a start from words."""
    start = "word_start={steps: 2, num_examples: 16}"
    return (*SETTINGS, UNGROUPED, start, f"seed={mixed_seed()}", f"data.val=[{{path: {tiny_runs}/data/val.json}}]")


def assert_same(one: Path, other: Path) -> None:
    """The same curves and weights, but for the order of sums."""
    assert losses_of(other) == pytest.approx(losses_of(one), rel=1e-4)
    ours, theirs = ([row["val_loss"] for row in log_of(out) if "val_loss" in row] for out in (one, other))
    assert len(ours) == 2, "at the beginning and at the end"
    assert theirs == pytest.approx(ours, rel=1e-3)
    weights = weights_of(one)
    assert weights.keys() == weights_of(other).keys()
    for name, value in weights_of(other).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=2e-3, msg=lambda text, n=name: f"{n}: {text}")


def trains(*parts: str) -> tuple[str, ...]:
    rates = ", ".join(f"{part}: 0.01" for part in parts)
    return f"train=[{', '.join(parts)}]", f"optim.learning_rates={{{rates}}}"


FROZEN_TOWER, WITH_TOWER = ("projector", "language"), ("vision", "projector", "language")


@pytest.fixture(scope="module")
def alone(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """One process on the same four examples a step."""
    folder, config = tmp_path_factory.mktemp("alone"), tiny_runs / "stage2.yaml"
    return {
        parts: train_in_process(config, folder / str(len(parts)), *shared(tiny_runs), *trains(*parts))
        for parts in (FROZEN_TOWER, WITH_TOWER)
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "parts"),
    [*((kind, WITH_TOWER) for kind in LAUNCHES), ("zero3", FROZEN_TOWER)],  # ZeRO-3 divides a frozen tower too
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_two_processes_are_one_with_twice_the_batch(
    kind: str, parts: tuple[str, ...], alone: dict[tuple[str, ...], Path], tiny_runs: Path, tmp_path: Path
) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    start = under_torchrun if parts == WITH_TOWER else forked
    told = launch(config, out, 2, LAUNCHES[kind], *shared(tiny_runs), *trains(*parts), start=start)
    assert f"2 process(es) on cpu, {'zero' if kind.startswith('zero') else kind}" in told
    assert re.search(r"verified saving: [\d.]+ MB written, read back and compared", told)
    assert_same(alone[parts], out)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "num_later"), [("fsdp2", 2), ("fsdp2", 1), ("zero2", 2), ("zero2", 1), ("zero3", 1)])
def test_a_stopped_run_goes_on_with_as_many_processes_or_fewer(
    kind: str, num_later: int, alone: dict[tuple[str, ...], Path], tiny_runs: Path, tmp_path: Path
) -> None:
    config, out, overrides = tiny_runs / "stage2.yaml", tmp_path / "out", (*shared(tiny_runs), *trains(*FROZEN_TOWER))
    launch(config, out, 2, {**LAUNCHES[kind], "DIES": "1"}, *overrides)
    assert [path.name for path in saved_steps(out)] == ["step_0000002"]
    assert "goes on from step 2" in launch(config, out, num_later, LAUNCHES[kind], *overrides)
    assert_same(alone[FROZEN_TOWER], out)


@pytest.mark.timeout(600)
def test_streamed_data_and_a_damaged_shard_under_fsdp2(tiny_runs: Path, tmp_path: Path) -> None:
    config, out = tiny_runs / "stage2.yaml", tmp_path / "out"
    overrides = (*shared(tiny_runs), *trains(*FROZEN_TOWER), *streamed(tiny_runs / "data"))
    overrides = (*overrides, "word_start=null", "log.save_every_steps=1")  # a stream has no examples to start from
    alone = train_in_process(config, tmp_path / "alone", *overrides)
    launch(config, out, 2, {**LAUNCHES["fsdp2"], "DIES": "2"}, *overrides)
    assert [path.name for path in saved_steps(out)] == ["step_0000001", "step_0000002"]
    shard = sorted((saved_steps(out)[-1] / "shards").glob("*.distcp"))[-1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    told = launch(config, out, 2, LAUNCHES["fsdp2"], *overrides)
    assert f"passed over: {shard.parent} is damaged at {shard.name}" in told
    assert "goes on from step 1" in told
    assert_same(alone, out)


@pytest.mark.timeout(600)
def test_adapters_of_an_llm_in_bf16_learn_under_fsdp2_what_they_learn_under_ddp(
    tiny_runs: Path, tmp_path: Path
) -> None:
    options = (
        "model.language.dtype=bf16",
        "lora.rank=4",
        "compute.precision=bf16",
        "compute.gradient_checkpointing=true",
    )
    for kind in ("ddp", "fsdp2"):
        launch(tiny_runs / "stage2.yaml", tmp_path / kind, 2, LAUNCHES[kind], *shared(tiny_runs), *options)
    assert_same(tmp_path / "ddp", tmp_path / "fsdp2")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "beside"), [("zero2", {}), ("zero3", {"CALLS_HEAD": "1"})])
def test_zero_computes_in_bf16_what_ddp_does(
    kind: str, beside: dict[str, str], tiny_runs: Path, tmp_path: Path
) -> None:
    options = (*shared(tiny_runs), *trains(*FROZEN_TOWER), "compute.precision=bf16")
    for name, environment in (("ddp", beside), (kind, LAUNCHES[kind])):
        launch(tiny_runs / "stage2.yaml", tmp_path / name, 2, environment, *options)
    assert_same(tmp_path / "ddp", tmp_path / kind)


def test_every_strategy_can_be_launched() -> None:
    assert {kind.rstrip("23") if kind.startswith("zero") else kind for kind in LAUNCHES} == set(STRATEGIES)


@pytest.mark.parametrize(
    ("override", "told"),
    [("optim.kind=muon", "optim.kind: muon works on whole tensors, which {} divides; use adamw, or launch with DDP"),
     ("lora={rank: 2, quantise: int8}", "lora.quantise: {} cannot divide quantised weights; leave it out, or launch")],
)  # fmt: skip
@pytest.mark.parametrize(("kind", "name"), [("fsdp2", "FSDP2"), ("zero", "ZeRO")])
def test_what_works_on_whole_tensors_is_refused(
    kind: str, name: str, override: str, told: str, tiny_runs: Path, tmp_path: Path
) -> None:
    config = settings_of(tiny_runs / "stage2.yaml", tmp_path / "out", override)
    stage = ConversationStage(config)
    with pytest.raises(ConfigError, match=told.format(name)):
        STRATEGIES[kind](None, stage.module, stage.parts, config, stage.depths)


def test_the_first_kind_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="fsdp_version: 1 of accelerate's config is not supported; set fsdp_version"):
        launched_strategy()
