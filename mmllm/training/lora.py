"""LoRA on the LLM through peft. Paper: https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

from pathlib import Path

from mmllm.config import ConfigError, LoraConfig
from mmllm.model.vlm import VisionLanguageModel


def add_lora(model: VisionLanguageModel, config: LoraConfig) -> None:
    """Puts adapters into the LLM's linear layers; they alone get gradients there."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("lora needs the extra `lora`: pip install 'mmllm[lora]'") from error
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        model.language_model = peft.get_peft_model(model.language_model, settings)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}") from error


def merge_lora(model: VisionLanguageModel, adapter: Path) -> None:
    """Saves the adapter for itself, then merges it into the LLM, whose own names come back."""
    model.language_model.save_pretrained(adapter)
    model.language_model = model.language_model.merge_and_unload()
