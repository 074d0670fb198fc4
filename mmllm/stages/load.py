"""Loads the model that a stage begins with: a checkpoint with its adapter merged, or new parts."""

from __future__ import annotations

from typing import Any

import torch

from mmllm.batch import TEXT_ENCODING
from mmllm.checkpoint.adapter import merge_adapter
from mmllm.checkpoint.folder import read_manifest, stored_dtypes
from mmllm.checkpoint.golden import load_verified
from mmllm.config import StageConfig
from mmllm.model.build import build_model
from mmllm.model.language import DTYPES, check_attention
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel


def load_model(config: StageConfig) -> tuple[VisionLanguageModel, VisionLanguageProcessor, dict[str, Any]]:
    """(model, processor, origin) from a checkpoint with its adapter merged, or from new parts."""
    if not config.model.checkpoint:
        return build_model(config.model)
    is_adapted = "base" in read_manifest(config.model.checkpoint)
    dtypes = _dtypes(config)
    load_dtypes = (
        {**dtypes, "language": torch.float32} if is_adapted else dtypes
    )  # an adapter is merged in full precision
    model, processor, manifest = load_verified(config.model.checkpoint, dtype=load_dtypes)
    if is_adapted:
        merge_adapter(model)
        model.language_model.to(dtypes["language"])
    if config.model.language and config.model.language.attention:
        check_attention(type(model.language_model), model.language_model.config, config.model.language.attention)
        model.language_model.set_attn_implementation(config.model.language.attention)
    if config.model.template:
        processor.template, processor.encoding = config.model.template, TEXT_ENCODING
    if config.model.picture_label is not None:
        processor.picture_label = config.model.picture_label
    return model, processor, {**manifest.get("origin", {}), "started_from": config.model.checkpoint}


def _dtypes(config: StageConfig) -> dict[str, torch.dtype]:
    """The dtype of each part of `model.checkpoint`: fp32 for trained parts, the stored one for the rest.

    `model.language.dtype` overrides it for an LLM that is frozen or has LoRA. fp16 becomes fp32, which is exact: in
    fp16 small gradients vanish.
    """
    assert config.model.checkpoint is not None
    dtypes = stored_dtypes(config.model.checkpoint)
    if (language := config.model.language) and language.dtype != "stored":
        dtypes["language"] = DTYPES[language.dtype]
    is_frozen = {part: part not in config.train or (part == "language" and bool(config.lora)) for part in dtypes}
    return {
        part: dtype if is_frozen[part] and dtype != torch.float16 else torch.float32 for part, dtype in dtypes.items()
    }
