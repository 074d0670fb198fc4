"""What a run needs to go on exactly where it stopped: trained weights, optimizers, generators. Written atomically."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

STATE_FILE = "state.pt"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def saved_steps(out: Path) -> list[Path]:
    """Complete states of a run, oldest first."""
    found = [path for path in (out / "state").glob("step_*") if (path / STATE_FILE).is_file()]
    return sorted((path for path in found if path.name[5:].isdigit()), key=_step_of)


def save_state(
    out: Path,
    step: int,
    trained: Mapping[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    settings: str,
    keep: int,
) -> Path:
    """The state after `step` steps. Older ones go once the new one is complete; `keep` stay."""
    target = out / "state" / f"step_{step:07d}"
    partial = target.with_name(f"part_{step:07d}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = {
        "step": step,
        "weights": {name: parameter.detach() for name, parameter in trained.items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "generator": torch.get_rng_state(),
        "cuda_generators": torch.cuda.get_rng_state_all(),
        "settings": settings,
    }
    torch.save(state, partial / STATE_FILE)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in saved_steps(out)[:-keep]:
        shutil.rmtree(old)
    return target


def load_state(
    folder: Path, trained: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer], *, settings: str
) -> int:
    """Puts a saved state back and returns its step. Raises ValueError where it is another run's."""
    state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    if state["settings"] != settings:
        raise ValueError(
            f"{folder} is the state of a run with other settings; remove {folder.parent.parent} to begin anew, "
            "or give the settings of that run (its config.yaml)"
        )
    if set(state["weights"]) != set(trained):
        raise ValueError(f"{folder} holds other parameters than this run trains")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["weights"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["generator"])
    if state["cuda_generators"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_generators"])
    return int(state["step"])
