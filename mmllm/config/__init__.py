"""Every setting of a run, typed and checked before anything is loaded: a file a section. `file.py` reads the YAML."""

from __future__ import annotations

from mmllm.config.base import ConfigError
from mmllm.config.compute import ComputeConfig
from mmllm.config.data import DataConfig, ReplayConfig, SourceConfig
from mmllm.config.log import LogConfig
from mmllm.config.lora import LanguageLoraConfig, LoraConfig
from mmllm.config.model import LanguageConfig, ModelConfig, ProjectorConfig, TowerConfig, VisionConfig
from mmllm.config.optim import BITSANDBYTES_KINDS, OptimConfig
from mmllm.config.run import RunConfig
from mmllm.config.stage import StageConfig, WordStartConfig
from mmllm.config.validation import AlarmsConfig, ValidationConfig
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
    "AlarmsConfig",
    "ComputeConfig",
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
    "ValidationConfig",
    "VisionConfig",
    "WarmupLanguageConfig",
    "WarmupVisionConfig",
    "WordStartConfig",
]
