"""Every setting of a run, typed and checked before anything is loaded: a file a section. `file.py` reads the YAML."""

from __future__ import annotations

from mmllm.config.base import ConfigError
from mmllm.config.data import DataConfig, ReplayConfig, SourceConfig
from mmllm.config.model import LanguageConfig, ModelConfig, ProjectorConfig, TowerConfig, VisionConfig
from mmllm.config.run import RunConfig
from mmllm.config.stage import StageConfig
from mmllm.config.training import BITSANDBYTES_KINDS, LanguageLoraConfig, LogConfig, LoraConfig, OptimConfig
from mmllm.config.warmup import GuideConfig, WarmupLanguageConfig, WarmupVisionConfig

CONFIGS: dict[str, type[RunConfig]] = {
    "stage1": StageConfig,
    "stage2": StageConfig,
    "warmup_vision": WarmupVisionConfig,
    "warmup_language": WarmupLanguageConfig,
}

__all__ = [
    "BITSANDBYTES_KINDS",
    "CONFIGS",
    "ConfigError",
    "DataConfig",
    "GuideConfig",
    "LanguageConfig",
    "LanguageLoraConfig",
    "LogConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "ProjectorConfig",
    "ReplayConfig",
    "RunConfig",
    "SourceConfig",
    "StageConfig",
    "TowerConfig",
    "VisionConfig",
    "WarmupLanguageConfig",
    "WarmupVisionConfig",
]
