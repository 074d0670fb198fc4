"""Every cell of the compatibility matrix is true: a run that works, or the refusal that it says."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from mmllm.compatibility import AXES, REFUSALS, Cell, cells, print_matrix, refusal_of
from mmllm.config import ConfigError, VisionConfig
from mmllm.distributed.launch import STRATEGIES
from mmllm.errors import MmllmError
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.interop.hf_llava import export_hf
from mmllm.interop.towers import ExportError
from mmllm.stages.registry import build_stage
from projector import PROJECTORS
from tests.builders.conversations import MIXED
from tests.builders.launches import forked
from tests.builders.matrix import combination
from tests.builders.pairwise import covering_combinations
from tests.builders.strategies import HEAD, LAUNCHES
from tests.builders.tiny_runs import log_of, make_data, settings_of, train_in_process

# Each rank makes the runs of all these settings, one after the other, and says how each ended.
DRIVER = (
    HEAD
    + """
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from mmllm.config.file import load_config
from mmllm.stages.run import run

Accelerator.end_training = lambda self: None  # the processes go on to the next run
for path in sys.argv[1:]:
    AcceleratorState._reset_state()
    path, is_refused = path.removeprefix("refused:"), path.startswith("refused:")
    try:
        run(load_config(path, [f"out={path.removesuffix('.yaml')}", "compute.batch_size=2"]))
    except Exception:
        open(f"{path}.{os.environ['RANK']}.error", "w").write(traceback.format_exc())
        if not is_refused:
            os._exit(1)
"""
)
# A run in two processes takes five times as long as in one, so the strategies come first, which makes such runs fewest.
COSTLY_FIRST = {axis: AXES[axis] for axis in ("strategy", *(axis for axis in AXES if axis != "strategy"))}
COMBINATIONS = [
    {axis: choices[axis] for axis in AXES}
    for choices in covering_combinations(COSTLY_FIRST, lambda choices: refusal_of(choices) is not None)
]
REFUSED = [cell for cell in cells() if cell.refusal]


def named(value: Any) -> str:
    return "-".join((value.values if isinstance(value, Cell) else value).values()).replace(" ", "_")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_parts: Path) -> Path:
    folder = tmp_path_factory.mktemp("matrix")
    make_data(folder / "data")
    return folder


def settings(choices: dict[str, str], folder: Path, tiny_parts: Path) -> Path:
    return combination(choices, folder, tiny_parts, folder / "data")


@pytest.fixture(scope="module")
def launched(folder: Path, tiny_parts: Path) -> Callable[[str], dict[str, Path]]:
    """The settings of all combinations and refused cells of a strategy, whose runs have ended in two processes."""

    @functools.cache
    def launch(strategy: str) -> tuple[dict[str, Path], str]:
        driver = folder / "driver.py"
        driver.write_text(DRIVER)
        runs, refused = (
            {named(each): settings(each, folder, tiny_parts) for each in choices if each.get("strategy") == strategy}
            for choices in (COMBINATIONS, [cell.values for cell in REFUSED])
        )
        arguments = [*runs.values(), *(f"refused:{path}" for path in refused.values())]
        done = forked(driver, arguments, 2, LAUNCHES[strategy.lower().replace("-", "")])
        return runs | refused, done.stderr[-3000:] if done.returncode else ""

    def ended(strategy: str) -> dict[str, Path]:
        paths, error = launch(strategy)
        assert not error, error
        return paths

    return ended


def errors_of(path: Path) -> list[str]:
    return [file.read_text() for file in path.parent.glob(f"{path.name}.*.error")]


def test_each_cell_is_in_a_run_or_is_refused() -> None:
    held = {frozenset(pair) for choices in COMBINATIONS for pair in itertools.combinations(choices.items(), 2)}
    every = list(cells())
    assert len(every) == 750
    for cell in every:
        assert (frozenset(cell.values.items()) in held) == (cell.refusal is None), cell.values
    for refusal in REFUSALS:
        assert len(refusal.cells) == 2
        assert all(set(values) <= set(AXES[axis]) for axis, values in refusal.cells.items())


def test_the_axes_hold_what_can_be_chosen() -> None:
    assert set(AXES["projector"]) == set(PROJECTORS)
    assert set(AXES["image mode"]) == set(get_args(VisionConfig.model_fields["image_mode"].annotation))
    assert {name.lower().split("-")[0] for name in AXES["strategy"][1:]} == set(STRATEGIES)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("choices", COMBINATIONS, ids=named)
def test_a_combination_trains_and_answers(
    choices: dict[str, str], folder: Path, tiny_parts: Path, launched: Callable[[str], dict[str, Path]]
) -> None:
    if choices["strategy"] == "one process":
        path = settings(choices, folder, tiny_parts)
        out = train_in_process(path, path.with_suffix(""))
    else:
        path = launched(choices["strategy"])[named(choices)]
        out = path.with_suffix("")
        assert errors_of(path) == []
    losses = [row["loss"] for row in log_of(out) if "loss" in row]
    assert len(losses) == 2
    assert all(0 < loss < 50 for loss in losses)
    engine = Engine.load(out, device="cpu")
    together = engine.reply_batch(MIXED, Sampling(max_new_tokens=3))
    assert together[0].text == engine.reply(MIXED[0], Sampling(max_new_tokens=3)).text
    if choices["export"] == "Llava":
        comparison = export_hf(out, path.with_suffix(".llava"))
        assert comparison.max_logit_difference < 1e-3


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cell", REFUSED, ids=named)
def test_a_refused_cell_says_so(
    cell: Cell, folder: Path, tiny_parts: Path, launched: Callable[[str], dict[str, Path]]
) -> None:
    assert cell.refusal
    if "strategy" in cell.values:
        errors = errors_of(launched(cell.values["strategy"])[named(cell.values)])
        assert len(errors) == 2, "one of each rank"
        assert all(cell.refusal.message in error for error in errors)
        return
    path = settings(cell.values, folder, tiny_parts)
    out = path.with_suffix("")
    if "export" not in cell.values:
        with pytest.raises(ConfigError) as raised:
            build_stage(settings_of(path, out))
    else:
        stage = build_stage(settings_of(path, out))
        out.mkdir()
        stage.save(out, [{"step": 0}])
        with pytest.raises(ExportError) as raised:
            export_hf(out, path.with_suffix(".llava"))
    assert cell.refusal.message in str(raised.value)


def test_the_matrix_is_printed_whole_by_two_axes_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_matrix(())
    whole = capsys.readouterr().out
    assert "750 pairs of choices: 721 work together, 29 are refused" in whole
    assert whole.count("llm gpt2") == 2
    print_matrix(("llm", "packing"))
    table = capsys.readouterr().out
    assert "no (5)" in table
    assert "llm opt, mamba2 with packing always" in table
    assert "Llava" not in table
    print_matrix(("llm", "packing"), as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(AXES["llm"]) * 2
    assert [row["llm"] for row in rows if row["refused"]] == ["opt", "mamba2"]
    for axes in (("llm",), ("llm", "llm"), ("llm", "color")):
        with pytest.raises(MmllmError, match="matrix: give two of 'encoder', 'llm'"):
            print_matrix(axes)
