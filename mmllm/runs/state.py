"""What a run needs to go on exactly where it stopped: trained weights and optimizers. Written whole or not at all.

A state is written aside, brought to the disk, and then gets its name; each carries checksums, and one that is not what
was written gives way to the one before it.

No random generator is kept: order, dropout and all else that is random follow from the seed, step and rank. Of streamed
data the position is.
"""

from __future__ import annotations

import os
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
from mmllm.distributed.ranks import gather_all
from mmllm.distributed.shards import damaged_shards, shard_sums
from mmllm.distributed.strategy import Strategy
from mmllm.errors import MmllmError
from mmllm.fault_points import reached
from mmllm.runs.folder import RunFolder

STATE_FILE = "state.pt"
STATE_OF_WEIGHTS = 3  # a state is at most so many times the trained weights: AdamW keeps two numbers for each
SHARDS = "shards"  # of strategies whose ranks hold a part each


class StateError(MmllmError):
    """A saved state that cannot be used; the message says which and what is wrong with it."""


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in _leaves(value, f"{path}.{key}" if path else str(key)).items()
    }


def _completed(text: str) -> Any:
    """Dumped settings with the defaults of settings that did not exist yet when they were dumped."""
    tree = saved_settings(text)
    if not isinstance(tree, dict) or tree.get("stage") not in CONFIGS:
        return tree
    try:
        return CONFIGS[tree["stage"]].model_validate(tree).model_dump(mode="json")
    except ValidationError:
        return tree


def settings_differences(there: str, here: str) -> list[str]:
    """What tells two dumped settings apart as far as it decides the weights, a line for each key.

    The mark RESUMABLE of a field says that it may change. The global batch may not, but how it is divided may, and what
    is computed again to save memory.
    """
    old, new = (_leaves(_completed(text)) for text in (there, here))
    free = resumable_paths()
    keys = [key for key in {**old, **new} if not any(f"{key}.".startswith(f"{path}.") for path in free)]
    values = [(key, old.get(key, "nothing"), new.get(key, "nothing")) for key in keys]
    return [f"{key}: {before} there, {now} here" for key, before, now in values if before != now]


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def saved_steps(out: Path) -> list[Path]:
    """States of a run that were written to their end, oldest first."""
    found = [path for path in RunFolder(out).states.glob("step_*") if (path / STATE_FILE).is_file()]
    return sorted((path for path in found if path.name[5:].isdigit()), key=_step_of)


def sync(path: Path) -> None:
    """Has the disk hold what was written to this file or folder, so that a loss of power takes nothing.

    Windows opens no folder, and writes out no file that is open for reading.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial(folder: Path) -> Path:
    return folder.with_name(f"part_{folder.name.removeprefix('step_')}")


def _begin(folder: Path) -> None:
    """An empty folder beside the one that is to be, for its files."""
    for left in folder.parent.glob("part_*"):  # by a process that was killed; its room is needed
        shutil.rmtree(left)
    _partial(folder).mkdir(parents=True)


def _commit(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes the state; the folder has its name once all is on disk. Raises OSError, and leaves nothing then."""
    partial = _partial(folder)
    try:
        with (partial / STATE_FILE).open("wb") as file:  # opened here, so that a full disk is an OSError
            torch.save(dict(state), file)
        reached(f"{folder.name}: before sync")
        for path in (*partial.rglob("*"), partial):
            sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # what cannot be used shall not fill the disk
        raise
    shutil.rmtree(folder, ignore_errors=True)
    reached(f"{folder.name}: before rename")
    partial.rename(folder)
    sync(folder.parent)


def _read(folder: Path) -> dict[str, Any]:
    """A saved state. Raises StateError where it is not what was written, by the checksums in torch's zip file."""
    path = folder / STATE_FILE
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise StateError(f"{path} is damaged at {damaged}")
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise StateError(f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if not isinstance(state, dict) or {"step", "settings"} - set(state):
        raise StateError(f"{path} is no state of a run")
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
    """The state after `step` steps, by all ranks. Once it is whole, only it and the `keep - 1` before it stay.

    Raises OSError.
    """
    accelerator = strategy.accelerator
    target = RunFolder(out).states / f"step_{step:07d}"
    if accelerator.is_main_process:
        _begin(target)
    accelerator.wait_for_everyone()
    sums = _save_shards(strategy, _partial(target)) if strategy.has_shards else {}
    if not accelerator.is_main_process:
        return
    state = {
        "step": step,
        "strategy": strategy.name,
        "num_ranks": accelerator.num_processes,
        **({SHARDS: sums} if strategy.has_shards else strategy.whole_state()),
        "settings": settings,
        "global_batch": global_batch,
        "position": dict(position),
        "best": best,
    }
    _commit(target, state)
    reached(f"{target.name}: before older states are removed")
    kept = [path for path in saved_steps(out) if _step_of(path) <= step][-keep:]
    for other in RunFolder(out).states.iterdir():  # later ones could not be read, or this run would stand behind them
        if other not in kept:
            shutil.rmtree(other)


def _save_shards(strategy: Strategy, folder: Path) -> dict[str, str]:
    """Has every rank write its share of the state; gives the sums of the files."""
    strategy.save_shards(folder / SHARDS)
    strategy.accelerator.wait_for_everyone()
    return shard_sums(folder / SHARDS, strategy.accelerator)


def check_room(out: Path, trained_bytes: int, num_states: int) -> None:
    """Raises StateError where so many states, and one more while it is written, find no room beside those there."""
    size = STATE_OF_WEIGHTS * trained_bytes
    needed = size * max(1, num_states + 1 - len(saved_steps(out)))
    if (free := shutil.disk_usage(out).free) < needed:
        raise StateError(
            f"a saved state takes up to {size / 1e9:.3g} GB, and {needed / 1e9:.3g} GB are needed for them in {out}, "
            f"but {free / 1e9:.3g} GB are free: make room, lower log.keep_checkpoints, or give another out=FOLDER"
        )


def verify_saving(out: Path, strategy: Strategy, settings: str) -> str:
    """Saves the weights as a state is saved, reads them back, compares and removes them; says what it took.

    Every rank has to call it. Raises StateError where they come back as others, OSError where they cannot be written.
    """
    accelerator, folder, begun = strategy.accelerator, RunFolder(out).states / "rehearsal", time.monotonic()
    if accelerator.is_main_process:
        _begin(folder)
    accelerator.wait_for_everyone()
    state: dict[str, Any] = {"step": 0, "settings": settings}
    if strategy.has_shards:
        state[SHARDS] = _save_shards(strategy, _partial(folder))
    else:
        state |= {"weights": strategy.whole_state()["weights"], "optimizers": []}
    if accelerator.is_main_process:
        _commit(folder, state)
    accelerator.wait_for_everyone()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    wrong: list[str] = []
    reached(f"{folder.name}: before it is read back")
    try:
        if strategy.has_shards or accelerator.is_main_process:
            before = strategy.own_weights()
            back = strategy.reread(folder / SHARDS) if strategy.has_shards else _read(folder)["weights"]
            wrong = [name for name, value in before.items() if not same_bits(back.get(name), value)]
        found = gather_all(accelerator, {accelerator.process_index: wrong[:1]})
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(folder)
    if names := [name for one in found.values() for name in one]:
        raise StateError(f"{out} does not give back what was saved there, first {names[0]}: is the disk sound?")
    return f"rehearsed saving: {size / 1e6:.1f} MB written, read back and compared in {time.monotonic() - begun:.1f} s"


def same_bits(one: Tensor | None, other: Tensor) -> bool:
    """Whether two tensors are the same, where they are not numbers too."""
    if one is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(value.cpu().contiguous().flatten().view(torch.uint8) for value in (one, other)))


def check_same_run(out: Path, there: str, here: str) -> None:
    """Raises ConfigError where the settings of what stands in `out` are not those given now."""
    if differences := settings_differences(there, here):
        listed = "\n".join(f"  {line}" for line in differences)
        raise ConfigError(
            f"{out} holds a run with other settings:\n{listed}\n"
            f"give another out=FOLDER, remove {out} to begin anew, or go on with {RunFolder(out).settings}"
        )


def read_newest(out: Path, say: Callable[[str], None], accelerator: Any) -> dict[str, Any] | None:
    """The newest state that all ranks can read; each one passed over is told. None where none was saved.

    Raises StateError where there are states and none can be read: a run never begins anew by itself.
    """
    folders, rank = saved_steps(out), accelerator.process_index
    if len({tuple(names) for names in gather_all(accelerator, {rank: [one.name for one in folders]}).values()}) > 1:
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
    """(a state, what is wrong with it for some rank): the same answer on every rank."""
    state: dict[str, Any] = {}
    error: str | None = None
    try:
        state = _read(folder)
    except StateError as found:
        error = str(found)
    errors = gather_all(accelerator, {accelerator.process_index: error})
    error = next((one for _, one in sorted(errors.items()) if one), None)
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
    """Puts a saved state's weights and optimizers back. Raises ConfigError where it is another run's."""
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
    if strategy.has_shards:
        shards = RunFolder(out).states / f"step_{state['step']:07d}" / SHARDS
        strategy.load_shards(shards, saved_by=state["num_ranks"])
    elif set(state["weights"]) != set(strategy.trained):
        raise ConfigError(f"{out} holds other parameters than this run trains; remove it to begin anew")
    else:
        strategy.load_whole_state(state)
