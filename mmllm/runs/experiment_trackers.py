"""Experiment trackers, which get a run's metrics besides its log: TensorBoard, wandb and trackio, through accelerate.

A run stays one curve, however often it is stopped. TensorBoard hides the steps that a resumed run writes again. For the
others the run keeps one id in the file `tracker_id`, and sends no value twice (see `RunLog`).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmllm.config import ConfigError

EXTRAS = {"tensorboard": "track", "wandb": "wandb", "trackio": "trackio"}  # tracker -> the extra that installs it
PROJECT = "mmllm"
ID_FILE = "tracker_id"


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError if a tracker's package is not installed. Imports none of them."""
    for name in names:
        if find_spec(name) is None:
            extra = EXTRAS[name]
            raise ConfigError(
                f"log.trackers: {name} is not installed; pip install 'mmllm[{extra}]', or take {name} out of the list"
            )


def open_trackers(names: Sequence[str], out: Path, *, settings: dict[str, Any], first_step: int) -> list[Any]:
    """accelerate's trackers of these names for the run in `out`, which resumes after `first_step` steps; 0: a new run.

    wandb and trackio read their own environment variables, such as WANDB_MODE=offline, WANDB_PROJECT and TRACKIO_DIR.
    Raises ConfigError if a tracker is not installed or cannot be opened.
    """
    check_trackers(names)
    if not names:
        return []
    from accelerate import PartialState

    PartialState()  # accelerate's trackers read from it which process this is
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
                "the metrics in the run's folder"
            ) from error
        opened.append(tracker)
    return opened


def _build(name: str, out: Path, run_id: str, settings: dict[str, Any], first_step: int) -> Any:
    from accelerate import tracking

    if name == "tensorboard":
        return tracking.TensorBoardTracker("tensorboard", out, purge_step=first_step + 1 if first_step else None)
    options: dict[str, Any] = {"config": settings, "resume": "allow"}
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return tracking.WandBTracker(project, **options, name=out.name, id=run_id, dir=str(out))
    options |= {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
    return tracking.TrackioTracker(PROJECT, **options, name=f"{out.name}-{run_id}")  # trackio's run id is the name


def _run_id(out: Path, *, anew: bool) -> str:
    """The id of the run in `out` for trackers: kept when it resumes, a new one when it starts anew."""
    path = out / ID_FILE
    if anew or not path.is_file():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text().strip()


def close_trackers(opened: Sequence[Any]) -> None:
    """Sends pending values and ends the trackers' threads."""
    for tracker in opened:
        tracker.finish()
