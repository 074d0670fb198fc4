"""Saved states: the trained weights and optimizers that a run needs to resume exactly where it stopped.

A state is saved whole or not at all: it is written to a temporary folder, synced to disk and then renamed. Each state
carries checksums; a damaged one is passed over for the state before it.

No random generator is saved: order, dropout and all other randomness follow from the seed, step and rank. The position
in streamed data is saved.
"""

from __future__ import annotations

import pickle
import shutil
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mmllm.config import CONFIGS, ConfigError
from mmllm.config.file import saved_settings
from mmllm.config.reference import resumable_paths
from mmllm.disk import sync
from mmllm.distributed.ranks import gather_all
from mmllm.distributed.shards import damaged_shards, shard_checksums
from mmllm.distributed.strategy import Strategy
from mmllm.errors import MmllmError
from mmllm.fault_points import fault_point
from mmllm.runs.folder import RunFolder

STATE_FILE = "state.pt"
STATE_OF_WEIGHTS = 3  # most times the size of the trained weights that a state takes: AdamW adds two numbers each
SHARDS = "shards"  # key and folder, for strategies whose ranks hold a shard each


class StateError(MmllmError):
    """A saved state cannot be used, or none can be saved; the message says why."""


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in _leaves(value, f"{path}.{key}" if path else str(key)).items()
    }


def _with_defaults(text: str) -> Any:
    """Dumped settings, with defaults for settings that did not exist yet when they were dumped."""
    tree = saved_settings(text)
    if not isinstance(tree, dict) or tree.get("stage") not in CONFIGS:
        return tree
    try:
        return CONFIGS[tree["stage"]].model_validate(tree).model_dump(mode="json")
    except ValidationError:
        return tree


def settings_differences(saved: str, current: str) -> list[str]:
    """Differences between two dumped settings in what decides the weights, one line per key.

    Fields marked RESUMABLE may change. The global batch may not, but how it is split may, and so may what is recomputed
    to save memory.
    """
    old, new = (_leaves(_with_defaults(text)) for text in (saved, current))
    free = resumable_paths()
    keys = [key for key in {**old, **new} if not any(f"{key}.".startswith(f"{path}.") for path in free)]
    values = [(key, old.get(key, "nothing"), new.get(key, "nothing")) for key in keys]
    return [f"{key}: {before} there, {now} here" for key, before, now in values if before != now]


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def saved_steps(out: Path) -> list[Path]:
    """The completely written states of a run, oldest first."""
    folders = [path for path in RunFolder(out).states.glob("step_*") if (path / STATE_FILE).is_file()]
    return sorted((path for path in folders if path.name[5:].isdigit()), key=_step_of)


def _partial(folder: Path) -> Path:
    return folder.with_name(f"part_{folder.name.removeprefix('step_')}")


def _begin(folder: Path) -> None:
    """Creates the empty temporary folder for the files of a new state."""
    for left in folder.parent.glob("part_*"):  # left by a killed process; its disk space is needed
        shutil.rmtree(left)
    _partial(folder).mkdir(parents=True)


def _commit(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes the state, and renames its folder once all is on disk. Raises OSError, and leaves nothing behind then."""
    partial = _partial(folder)
    try:
        with (partial / STATE_FILE).open("wb") as file:  # opened here, so that a full disk raises OSError
            torch.save(dict(state), file)
        fault_point(f"{folder.name}: before sync")
        for path in (*partial.rglob("*"), partial):
            sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # an incomplete state must not fill the disk
        raise
    shutil.rmtree(folder, ignore_errors=True)
    fault_point(f"{folder.name}: before rename")
    partial.rename(folder)
    sync(folder.parent)


def _read(folder: Path) -> dict[str, Any]:
    """A saved state. Raises StateError if it cannot be read or differs from the checksums in torch's zip file."""
    path = folder / STATE_FILE
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise StateError(f"{path} is damaged at {damaged}")
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise StateError(f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if not isinstance(state, dict) or {"step", "settings"} - set(state):
        raise StateError(f"{path} is not a saved state of a run")
    return dict(state)


def save_state(
    out: Path,
    step: int,
    strategy: Strategy,
    *,
    settings: str,
    global_batch: int,
    position: Mapping[int, Any],
    best: Mapping[str, Any] | None,
    keep: int,
) -> None:
    """Saves the state after `step` steps, then removes all but it and the `keep - 1` states before it.

    Every rank has to call it. Raises OSError if the state cannot be written.
    """
    accelerator = strategy.accelerator
    target = RunFolder(out).states / f"step_{step:07d}"
    if accelerator.is_main_process:
        _begin(target)
    accelerator.wait_for_everyone()
    checksums = _save_shards(strategy, _partial(target)) if strategy.state_io.has_shards else {}
    if not accelerator.is_main_process:
        return
    state = {
        "step": step,
        "strategy": strategy.name,
        "num_ranks": accelerator.num_processes,
        **({SHARDS: checksums} if strategy.state_io.has_shards else strategy.state_io.whole_state()),
        "settings": settings,
        "global_batch": global_batch,
        "position": dict(position),
        "best": best,
    }
    _commit(target, state)
    fault_point(f"{target.name}: before older states are removed")
    kept = [path for path in saved_steps(out) if _step_of(path) <= step][-keep:]
    for other in RunFolder(out).states.iterdir():  # later ones were unreadable, else this run had resumed there
        if other not in kept:
            shutil.rmtree(other)


def _save_shards(strategy: Strategy, folder: Path) -> dict[str, str]:
    """Writes this rank's shard of the state. Returns the checksums of all files. Every rank has to call it."""
    strategy.state_io.save_shards(folder / SHARDS)
    strategy.accelerator.wait_for_everyone()
    return shard_checksums(folder / SHARDS, strategy.accelerator)


def check_room(out: Path, trained_bytes: int, num_states: int) -> None:
    """Raises StateError if the disk lacks room for `num_states` states and one being written, less those saved."""
    size = STATE_OF_WEIGHTS * trained_bytes
    needed = size * max(1, num_states + 1 - len(saved_steps(out)))
    if (free := shutil.disk_usage(out).free) < needed:
        raise StateError(
            f"a saved state takes up to {size / 1e9:.3g} GB, and {needed / 1e9:.3g} GB are needed for them in {out}, "
            f"but {free / 1e9:.3g} GB are free: make room, lower log.keep_checkpoints, or give another out=FOLDER"
        )


def verify_saving(out: Path, strategy: Strategy, settings: str) -> str:
    """Saves the weights like a state, reads them back, compares and removes them. Returns a line with size and time.

    Every rank has to call it. Raises StateError if the weights read back differ, OSError if they cannot be written.
    """
    accelerator, folder, begun = strategy.accelerator, RunFolder(out).states / "rehearsal", time.monotonic()
    if accelerator.is_main_process:
        _begin(folder)
    accelerator.wait_for_everyone()
    state: dict[str, Any] = {"step": 0, "settings": settings}
    if strategy.state_io.has_shards:
        state[SHARDS] = _save_shards(strategy, _partial(folder))
    else:
        state |= {"weights": strategy.state_io.whole_weights(), "optimizers": []}
    if accelerator.is_main_process:
        _commit(folder, state)
    accelerator.wait_for_everyone()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    wrong: list[str] = []
    fault_point(f"{folder.name}: before it is read back")
    try:
        if strategy.state_io.has_shards or accelerator.is_main_process:
            before = strategy.state_io.local_weights()
            back = (
                strategy.state_io.reread(folder / SHARDS) if strategy.state_io.has_shards else _read(folder)["weights"]
            )
            wrong = [name for name, value in before.items() if not same_bits(back.get(name), value)]
        wrong_by_rank = gather_all(accelerator, {accelerator.process_index: wrong[:1]})
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder)
    if names := [name for rank_names in wrong_by_rank.values() for name in rank_names]:
        raise StateError(f"weights read back from {out} differ from those saved, first {names[0]}: check the disk")
    return f"verified saving: {size / 1e6:.1f} MB written, read back and compared in {time.monotonic() - begun:.1f} s"


def same_bits(actual: Tensor | None, expected: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits, so that a NaN equals itself."""
    if actual is None or actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    return torch.equal(*(value.cpu().contiguous().flatten().view(torch.uint8) for value in (actual, expected)))


def check_same_run(out: Path, saved: str, current: str) -> None:
    """Raises ConfigError if the settings of the run saved in `out` differ from those of this run."""
    if differences := settings_differences(saved, current):
        listed = "\n".join(f"  {line}" for line in differences)
        raise ConfigError(
            f"{out} holds a run with other settings:\n{listed}\n"
            f"give another out=FOLDER, remove {out} to begin anew, or go on with {RunFolder(out).settings}"
        )


def read_newest(out: Path, say: Callable[[str], None], accelerator: Any) -> dict[str, Any] | None:
    """The newest state that all ranks can read; `say` reports each state passed over. None if none was saved.

    Every rank has to call it. Raises StateError if ranks see different states, or if states exist and none can be read:
    a run never starts anew by itself.
    """
    folders, rank = saved_steps(out), accelerator.process_index
    if len({tuple(names) for names in gather_all(accelerator, {rank: [path.name for path in folders]}).values()}) > 1:
        raise StateError(f"not all processes see the same states in {out}: all machines must see the same folder")
    wrong: list[str] = []
    for folder in reversed(folders):
        state, error = _try_read(folder, accelerator)
        if error is None:
            return state
        say(f"passed over: {error}")
        wrong.append(error)
    if wrong:
        listed = "\n".join(f"  {line}" for line in wrong)
        raise StateError(
            f"no saved state of {out} can be used:\n{listed}\n"
            f"put a copy of one back, or remove {out / 'state'} to begin anew from step 1"
        )
    return None


def _try_read(folder: Path, accelerator: Any) -> tuple[dict[str, Any], str | None]:
    """(state, error or None); the error is that of the first rank that has one, and the same on every rank."""
    state: dict[str, Any] = {}
    error: str | None = None
    try:
        state = _read(folder)
    except StateError as state_error:
        error = str(state_error)
    errors = gather_all(accelerator, {accelerator.process_index: error})
    error = next((text for _, text in sorted(errors.items()) if text), None)
    if error is None and (damaged := damaged_shards(folder / SHARDS, state.get(SHARDS, {}), accelerator)):
        error = f"{folder / SHARDS} is damaged at {', '.join(damaged[:3])}"
    return state, error


def load_state(
    out: Path,
    state: Mapping[str, Any],
    strategy: Strategy,
    *,
    settings: str,
    global_batch: int,
) -> None:
    """Restores a saved state's weights and optimizers. Raises ConfigError if the state is another run's."""
    check_same_run(out, state["settings"], settings)
    if (saved := state.get("global_batch", global_batch)) != global_batch:
        raise ConfigError(
            f"{out} was saved with {saved} examples a step, now there are {global_batch}; processes x "
            "compute.batch_size x compute.accumulate_steps must stay the same, so that the same examples follow"
        )
    if (saved_as := state.get("strategy", strategy.name)) != strategy.name:
        raise ConfigError(
            f"{out} was saved under {saved_as}, this launch is {strategy.name}; launch it with the accelerate config "
            f"of {saved_as}, or remove {out / 'state'} to begin anew"
        )
    if strategy.state_io.has_shards:
        shards = RunFolder(out).states / f"step_{state['step']:07d}" / SHARDS
        strategy.state_io.load_shards(shards, saved_by=state["num_ranks"])
    elif set(state["weights"]) != set(strategy.trained):
        raise ConfigError(f"{out} holds other parameters than this run trains; remove it to begin anew")
    else:
        strategy.state_io.load_whole_state(state)
