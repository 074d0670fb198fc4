"""What a run needs to go on exactly where it stopped: trained weights and optimizers. Written whole or not at all.

No random generator is kept: order, dropout and all else that is random follow from the seed, step and rank. Of streamed
data the position is.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from pydantic import ValidationError

from mmllm.config import CONFIGS, ConfigError
from mmllm.training.strategy import Strategy

STATE_FILE = "state.pt"
SHARDS = "shards"  # of strategies whose ranks hold a part each

# What may change between two starts of one run, since it decides nothing about the weights. The global batch may not,
# but how it is divided into ranks and micro-steps may.
_FREE = ("out", "num_threads", "log", "data.num_workers", "optim.batch_size", "optim.accumulate_steps")


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
    tree: Any = OmegaConf.to_container(OmegaConf.create(text))
    if not isinstance(tree, dict) or tree.get("stage") not in CONFIGS:
        return tree
    try:
        return CONFIGS[tree["stage"]].model_validate(tree).model_dump(mode="json")
    except ValidationError:
        return tree


def settings_differences(there: str, here: str) -> list[str]:
    """What tells two dumped settings apart as far as it decides the weights, a line for each key."""
    old, new = (_leaves(_completed(text)) for text in (there, here))
    keys = [key for key in {**old, **new} if not any(f"{key}.".startswith(f"{free}.") for free in _FREE)]
    values = [(key, old.get(key, "nothing"), new.get(key, "nothing")) for key in keys]
    return [f"{key}: {before} there, {now} here" for key, before, now in values if before != now]


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def saved_steps(out: Path) -> list[Path]:
    """Complete states of a run, oldest first."""
    found = [path for path in (out / "state").glob("step_*") if (path / STATE_FILE).is_file()]
    return sorted((path for path in found if path.name[5:].isdigit()), key=_step_of)


def save_state(
    out: Path,
    step: int,
    strategy: Strategy,
    *,
    settings: str,
    global_batch: int,
    position: Mapping[int, Any],
    keep: int,
) -> None:
    """The state after `step` steps, by all ranks. Older ones go once the new one is complete; `keep` stay.

    Raises OSError.
    """
    accelerator = strategy.accelerator
    target = out / "state" / f"step_{step:07d}"
    partial = target.with_name(f"part_{step:07d}")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if strategy.has_shards:
        strategy.save_shards(partial / SHARDS)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    state = {
        "step": step,
        "strategy": strategy.name,
        "num_ranks": accelerator.num_processes,
        **({} if strategy.has_shards else strategy.whole_state()),
        "settings": settings,
        "global_batch": global_batch,
        "position": dict(position),
    }
    try:
        with (partial / STATE_FILE).open("wb") as file:  # opened here, so that a full disk is an OSError
            torch.save(state, file)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # what cannot be used shall not fill the disk
        raise
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in saved_steps(out)[:-keep]:
        shutil.rmtree(old)


def check_same_run(out: Path, there: str, here: str) -> None:
    """Raises ConfigError where the settings of what stands in `out` are not those given now."""
    if differences := settings_differences(there, here):
        listed = "\n".join(f"  {line}" for line in differences)
        raise ConfigError(
            f"{out} holds a run with other settings:\n{listed}\n"
            f"give another out=FOLDER, remove {out} to begin anew, or go on with {out / 'config.yaml'}"
        )


def load_state(
    folder: Path,
    strategy: Strategy,
    *,
    settings: str,
    global_batch: int,
) -> tuple[int, dict[int, Any]]:
    """Puts a saved state back: (its step, the position of its order). Raises ConfigError where it is another run's."""
    state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    check_same_run(folder.parent.parent, state["settings"], settings)
    if (saved := state.get("global_batch", global_batch)) != global_batch:
        raise ConfigError(
            f"{folder} was saved with {saved} examples a step, now there are {global_batch}; processes x "
            "optim.batch_size x optim.accumulate_steps must stay the same, so that the same examples follow"
        )
    if (saved_as := state.get("strategy", strategy.name)) != strategy.name:
        raise ConfigError(
            f"{folder} was saved under {saved_as}, this launch is {strategy.name}; launch with the accelerate config "
            f"of {saved_as}, or remove {folder.parent} to begin anew"
        )
    if strategy.has_shards:
        strategy.load_shards(folder / SHARDS, saved_by=state["num_ranks"])
    elif set(state["weights"]) != set(strategy.trained):
        raise ConfigError(f"{folder} holds other parameters than this run trains; remove it to begin anew")
    else:
        strategy.load_whole_state(state)
    return int(state["step"]), state.get("position", {})
