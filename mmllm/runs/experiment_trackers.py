"""Where else a run's figures go besides its log: TensorBoard, wandb and trackio, through accelerate's trackers.

The curves of one run are one curve, however often it was stopped: TensorBoard hides what a resumed run writes anew, and
for the others the run keeps one id, in `tracker_id`, and nothing that they have is sent again (see `Tracker`).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmllm.config import ConfigError

EXTRAS = {"tensorboard": "track", "wandb": "wandb", "trackio": "trackio"}  # tracker: the extra that installs it
PROJECT = "mmllm"
ID_FILE = "tracker_id"


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError where a tracker's package is not installed. Loads none of them."""
    for name in names:
        if find_spec(name) is None:
            extra = EXTRAS[name]
            raise ConfigError(
                f"log.trackers: {name} is not installed; pip install 'mmllm[{extra}]', or take {name} out of the list"
            )


def open_trackers(names: Sequence[str], out: Path, *, settings: dict[str, Any], first_step: int) -> list[Any]:
    """accelerate's trackers of these names for the run in `out`, which goes on from `first_step`.

    wandb and trackio take their own environment variables, such as WANDB_MODE=offline, WANDB_PROJECT and TRACKIO_DIR.
    Raises ConfigError where a tracker cannot be opened.
    """
    check_trackers(names)
    if not names:
        return []
    from accelerate import PartialState

    PartialState()  # accelerate's trackers ask it which process this is
    run_id = _run_id(out, anew=not first_step)
    opened: list[Any] = []
    for name in names:
        tracker = _build(name, out, run_id, settings, first_step)
        try:
            tracker.start()
        except (OSError, ValueError, RuntimeError) as error:
            close_trackers(opened)
            raise ConfigError(f"log.trackers: {name} cannot be opened: {error}") from error
        except Exception as error:
            close_trackers(opened)
            if not type(error).__module__.startswith("wandb."):
                raise
            raise ConfigError(
                f"log.trackers: wandb cannot be opened: {error}; run `wandb login`, or set WANDB_MODE=offline to keep "
                "the figures in the run's folder"
            ) from error
        opened.append(tracker)
    return opened


def _build(name: str, out: Path, run_id: str, settings: dict[str, Any], first_step: int) -> Any:
    from accelerate import tracking

    if name == "tensorboard":
        return tracking.TensorBoardTracker("tensorboard", out, purge_step=first_step + 1 if first_step else None)
    own: dict[str, Any] = {"config": settings, "resume": "allow"}
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return tracking.WandBTracker(project, **own, name=out.name, id=run_id, dir=str(out))
    own |= {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
    return tracking.TrackioTracker(PROJECT, **own, name=f"{out.name}-{run_id}")  # which it knows runs by


def _run_id(out: Path, *, anew: bool) -> str:
    """What the run in `out` is called elsewhere: the same after each stop, another one where it begins anew."""
    path = out / ID_FILE
    if anew or not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text().strip()


def close_trackers(opened: Sequence[Any]) -> None:
    """Sends what is left and ends the trackers' own threads."""
    for tracker in opened:
        tracker.finish()
