"""LoRA on LLM and tower through peft. Paper: https://arxiv.org/abs/2106.09685"""

from __future__ import annotations

from typing import Any

from torch import nn

from mmllm.checkpoint.adapter import quiet_bitsandbytes, quiet_peft
from mmllm.config import ConfigError, LoraConfig
from mmllm.model.tower import VisionTower
from mmllm.model.vlm import VisionLanguageModel

# Their kernels read these weights without calling the layer that holds them, so an adapter there has no effect, or only
# without the kernels: https://github.com/huggingface/transformers/blob/main/src/transformers/models/mamba/modeling_mamba.py
_BYPASSED = {
    "mamba": ["x_proj", "dt_proj", "out_proj"],
    "falcon_mamba": ["x_proj", "dt_proj", "out_proj"],
    "mamba2": ["out_proj"],
}


def add_lora(model: VisionLanguageModel, config: LoraConfig) -> None:
    """Adds adapters to the LLM's linear layers. In the LLM, only they and the rows of added tokens get gradients.

    Raises ConfigError if peft is not installed or rejects the settings.
    """
    quiet_bitsandbytes()
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
        use_dora=config.dora,
        use_rslora=config.rslora,
    )  # no task_type: peft's wrapper for causal LMs knows some by name, and refuses MPT's embeddings
    try:
        with quiet_peft():
            model.language_model = peft.get_peft_model(model.language_model, settings)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {error}") from error


def move_adapters(model: VisionLanguageModel, language_model: Any, config: LoraConfig) -> None:
    """Moves the trained adapters to `language_model`, the same LLM in full precision, and puts that into the model.

    The model moves to main memory: a GPU that held the quantized LLM may be too small for it.
    """
    import peft

    adapter_state = peft.get_peft_model_state_dict(model.language_model, save_embedding_layers=False)
    model.language_model = language_model
    model.to("cpu")
    add_lora(model, config)
    with quiet_peft():
        report = peft.set_peft_model_state_dict(model.language_model, adapter_state)
    mismatched = [name for name in report.missing_keys if ".lora_" in name] + list(report.unexpected_keys)
    assert not mismatched, mismatched


def add_tower_lora(tower: VisionTower, config: LoraConfig) -> Any:
    """Adds adapters to the tower's linear layers, in place; only they get gradients. `merge_and_unload` merges them.

    The output layer inside nn.MultiheadAttention gets none: attention reads its weight without calling the layer.
    Raises ConfigError if peft is not installed or `target_modules` matches no linear layer.
    """
    quiet_bitsandbytes()
    try:
        import peft
    except ImportError as error:
        raise ConfigError("vision_lora needs the extra `lora`: pip install 'mmllm[lora]'") from error
    attentions = [name for name, module in tower.named_modules() if isinstance(module, nn.MultiheadAttention)]
    linear = {name for name, module in tower.named_modules() if isinstance(module, nn.Linear)}
    names = sorted(name for name in linear if not any(name.startswith(f"{attention}.") for attention in attentions))
    targets = config.target_modules
    if targets != "all-linear":
        suffixes = [targets] if isinstance(targets, str) else targets
        names = [name for name in names if name.rsplit(".", 1)[-1] in suffixes]
    if not names:
        kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear})) or "none"
        raise ConfigError(f"vision_lora.target_modules: {targets} finds no linear layer of the tower; it has {kinds}")
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
        use_dora=config.dora,
        use_rslora=config.rslora,
    )
    with quiet_peft():
        return peft.LoraModel(tower, settings, "default")


def _trained_rows(model: VisionLanguageModel) -> dict[str, list[int]] | None:
    """Ids of added tokens, by the name of the embedding and of an untied head; peft updates a tied head itself."""
    token_ids = getattr(model.config.text_config, "trained_token_ids", None)
    if not token_ids:
        return None
    language_model = model.language_model
    embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    tables = [embedding] if head.weight is embedding.weight else [embedding, head]
    return {
        name: token_ids for name, module in language_model.named_modules() if any(module is table for table in tables)
    }
