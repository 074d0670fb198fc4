"""LoRA on the LLM through peft. Paper: https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

from pathlib import Path

import torch

from mmllm.config import ConfigError, LoraConfig
from mmllm.model.vlm import VisionLanguageModel

# Their kernels read these weights past the layer that holds them, so an adapter there does nothing, or only without
# the kernels: https://github.com/huggingface/transformers/blob/main/src/transformers/models/mamba/modeling_mamba.py
_BYPASSED = {
    "mamba": ["x_proj", "dt_proj", "out_proj"],
    "falcon_mamba": ["x_proj", "dt_proj", "out_proj"],
    "mamba2": ["out_proj"],
}


def add_lora(model: VisionLanguageModel, config: LoraConfig) -> None:
    """Puts adapters into the LLM's linear layers; they and the rows of added tokens alone get gradients there."""
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
        exclude_modules=_BYPASSED.get(model.config.text_config.model_type),
        trainable_token_indices=_trained_rows(model),
        task_type="CAUSAL_LM",
    )
    try:
        model.language_model = peft.get_peft_model(model.language_model, settings)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}") from error


def _trained_rows(model: VisionLanguageModel) -> dict[str, list[int]] | None:
    """The rows of added tokens by the names of the embedding and of a head of its own; peft lets a tied head follow."""
    rows = getattr(model.config.text_config, "trained_token_ids", None)
    if not rows:
        return None
    language_model = model.language_model
    embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    tables = [embedding] if head.weight is embedding.weight else [embedding, head]
    return {name: rows for name, module in language_model.named_modules() if any(module is table for table in tables)}


def merge_lora(model: VisionLanguageModel, adapter: Path) -> None:
    """Saves the adapter for itself, then merges it into the LLM in fp32, whose own names come back."""
    model.language_model.save_pretrained(adapter)
    model.language_model = model.language_model.to(torch.float32).merge_and_unload()
