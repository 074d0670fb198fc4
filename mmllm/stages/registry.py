"""The table of stages: a run's `stage` setting names one of them."""

from __future__ import annotations

from collections.abc import Callable

from mmllm.config import ConfigError, RunConfig, StageConfig, WarmupLanguageConfig, WarmupVisionConfig
from mmllm.runs.requirements import check_machine
from mmllm.stages.conversation import ConversationStage
from mmllm.training.stage import Stage
from mmllm.warmup.language import WarmupLanguage
from mmllm.warmup.vision import WarmupVision


def _conversation(config: RunConfig) -> Stage:
    assert isinstance(config, StageConfig)
    return ConversationStage(config)


def _warmup_language(config: RunConfig) -> Stage:
    assert isinstance(config, WarmupLanguageConfig)
    return WarmupLanguage(config)


def _warmup_vision(config: RunConfig) -> Stage:
    assert isinstance(config, WarmupVisionConfig)
    return WarmupVision(config)


STAGES: dict[str, Callable[[RunConfig], Stage]] = {
    "warmup_vision": _warmup_vision,
    "warmup_language": _warmup_language,
    "stage1": _conversation,
    "stage2": _conversation,
}


def build_stage(config: RunConfig) -> Stage:
    """The stage of a run's settings, with everything loaded and checked.

    Raises ConfigError or DataError.
    """
    if config.stage not in STAGES:
        raise ConfigError(f"stage: {config.stage!r} is not known; allowed: {', '.join(STAGES)}")
    check_machine(config)
    return STAGES[config.stage](config)
