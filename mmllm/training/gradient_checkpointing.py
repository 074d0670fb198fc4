"""Gradient checkpointing: layers are computed again in the backward pass, so that their activations are not stored.

Paper: https://arxiv.org/abs/1604.06174
"""

from __future__ import annotations

from collections.abc import Collection

from mmllm.config import ConfigError
from mmllm.model.vlm import VisionLanguageModel


def enable_gradient_checkpointing(model: VisionLanguageModel, parts: Collection[str]) -> None:
    """Turns it on for `language`, `vision` or both. Raises ConfigError for an LLM that cannot do it."""
    if "language" in parts:
        if not model.language_model.supports_gradient_checkpointing:
            kind = model.config.text_config.model_type
            raise ConfigError(f"compute.gradient_checkpointing: {kind} cannot recompute its layers; leave it out")
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    if "vision" in parts:
        model.vision_tower.checkpoint_layers()
