"""The entry of every training script: settings -> stage -> loop, with one readable block for whatever goes wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mmllm.config import ConfigError, RunConfig
from mmllm.config_file import dump_config, load_config
from mmllm.errors import report_errors

SETTINGS = "config.yaml"


def is_finished(config: RunConfig) -> bool:
    """Whether the run in `out` has ended already. Raises ConfigError where another run stands there."""
    from mmllm.model.checkpoint import MANIFEST, read_manifest
    from mmllm.training.state import check_same_run, saved_steps

    out, here = Path(config.out), dump_config(config)
    if (out / MANIFEST).is_file():
        check_same_run(out, str(read_manifest(out).get("settings", "")), here)
        return True
    if saved_steps(out) and (out / SETTINGS).is_file():
        check_same_run(out, (out / SETTINGS).read_text(), here)
    return False


def run(config: RunConfig) -> None:
    """One run from its settings, or from its newest saved state, to its finished checkpoint."""
    import torch

    from mmllm.training.distributed import build_accelerator
    from mmllm.training.loop import train
    from mmllm.training.stages import build_stage

    out = Path(config.out)
    if is_finished(config):
        print(f"{out} is finished: `mmllm chat {out}`. To train it again, remove it or give another out=FOLDER")
        return
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    out.mkdir(parents=True, exist_ok=True)
    accelerator = build_accelerator(config)
    with accelerator.main_process_first():
        stage = build_stage(config)
    if accelerator.is_main_process:
        (out / SETTINGS).write_text(dump_config(config))
    train(config, stage, accelerator, build_stage)
    accelerator.end_training()


def main(stage: str | None = None, arguments: list[str] | None = None) -> None:
    """`CONFIG [section.key=value ...]`; exits with 2 for wrong usage or settings, 1 for a run that failed."""
    given = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with report_errors():
        if not given or given[0].startswith("-"):
            raise ConfigError(f"usage: {Path(sys.argv[0]).name} CONFIG.yaml [section.key=value ...]")
        config = load_config(given[0], given[1:])
        if stage and config.stage != stage:
            raise ConfigError(
                f"{given[0]} is for {config.stage}, this script runs {stage}: use train/{config.stage}.py"
            )
        run(config)
