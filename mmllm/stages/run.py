"""The entry point of every training script: settings -> stage -> loop, with errors as one readable block."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from pathlib import Path

from mmllm.config import ConfigError, RunConfig
from mmllm.config.file import dump_config, load_config
from mmllm.errors import report_errors


def saved_run_settings(out: Path) -> tuple[str | None, bool]:
    """(the saved settings of the run in `out`, None if there is no run; whether it has finished)."""
    from mmllm.checkpoint.folder import read_manifest
    from mmllm.runs.folder import RunFolder
    from mmllm.runs.state import saved_steps

    folder = RunFolder(out)
    if folder.is_finished:
        return str(read_manifest(out).get("settings", "")), True
    if saved_steps(out) and folder.settings.is_file():
        return folder.settings.read_text(), False
    return None, False


def _tidy(out: Path) -> None:
    """Removes what a finished run no longer needs; it is left where the run was killed at its very end."""
    from mmllm.checkpoint.folder import read_manifest
    from mmllm.runs.folder import RunFolder

    folder = RunFolder(out)
    shutil.rmtree(folder.states, ignore_errors=True)
    if RunFolder(folder.best).is_finished:
        best, last = (read_manifest(path).get("figures", {}).get("val_loss") for path in (folder.best, out))
        if best is not None and last is not None and last <= best:
            shutil.rmtree(folder.best)


def is_first_process() -> bool:
    """Whether this process has rank 0 or was started without a launcher; works before anything is loaded."""
    return os.environ.get("RANK", "0") == "0"


def run(config: RunConfig) -> None:
    """One run from its settings, or from its newest saved state, to its finished checkpoint.

    Raises LockedError where another run writes into the same folder.
    """
    from mmllm.evaluation.validation_tasks import check_tasks
    from mmllm.runs.experiment_trackers import check_trackers
    from mmllm.runs.lock import exclusive_run

    check_trackers(config.log.trackers)
    check_tasks(config.validation.tasks)
    with exclusive_run(Path(config.out)) if is_first_process() else contextlib.nullcontext():
        _run(config)


def _run(config: RunConfig) -> None:
    from mmllm.distributed.ranks import build_accelerator, set_threads
    from mmllm.runs.folder import RunFolder
    from mmllm.runs.report import write_about, write_report
    from mmllm.runs.requirements import resolve_precision
    from mmllm.runs.state import check_same_run
    from mmllm.stages.registry import build_stage
    from mmllm.training.loop import train
    from mmllm.training.memory import explain_out_of_memory
    from mmllm.training.stage import PreparesFeatures, StartsProjector

    out = Path(config.out)
    begun, is_finished = saved_run_settings(out)
    config = resolve_precision(config, begun)
    if begun is not None:
        check_same_run(out, begun, dump_config(config))
    if is_finished:
        print(f"{out} is finished: `mmllm chat {out}`. To train it again, remove it or give another out=FOLDER")
        if is_first_process():
            _tidy(out)
        return
    set_threads(config)
    accelerator = build_accelerator(config)
    stage = build_stage(config)
    if isinstance(stage, PreparesFeatures):
        rank, world_size = accelerator.process_index, accelerator.num_processes
        stage.prepare_features(accelerator.device, rank=rank, world_size=world_size)
    if isinstance(stage, StartsProjector) and begun is None:
        stage.start_projector(accelerator.device)
    if accelerator.is_main_process:
        RunFolder(out).settings.write_text(dump_config(config))
        write_about(out, stage.notes, f"{accelerator.num_processes} process(es) on {accelerator.device}")
    try:
        with explain_out_of_memory(config):
            train(config, stage, accelerator, lambda: build_stage(config))
    finally:
        if accelerator.is_main_process and RunFolder(out).log.is_file():
            print(f"report: {write_report(out)}")
    accelerator.end_training()


def main(stage: str | None = None, arguments: list[str] | None = None) -> None:
    """`CONFIG [section.key=value ...]`; exits with 2 for wrong usage or settings, 1 for a run that failed."""
    args = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with report_errors():
        if not args or args[0].startswith("-"):
            raise ConfigError(f"usage: {Path(sys.argv[0]).name} CONFIG.yaml [section.key=value ...]")
        config = load_config(args[0], args[1:])
        if stage and config.stage != stage:
            raise ConfigError(f"{args[0]} is for {config.stage}, this script runs {stage}: use train/{config.stage}.py")
        run(config)
