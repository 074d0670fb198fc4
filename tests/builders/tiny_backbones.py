"""A tiny LLM of every architecture that the pipeline is proven on: the real classes, random weights, a few layers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mmllm.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig

_SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}  # shorter than the prompts
_GEMMA = {**_SHAPE, **_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8}
_STATE_SPACE = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3}

# model_type -> what its config class takes, beside vocabulary and special tokens
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": _SHAPE,
    "mistral": {**_SHAPE, "sliding_window": 8},
    "qwen2": _SHAPE,
    "qwen3": {**_SHAPE, "head_dim": 8},
    "gemma2": {**_GEMMA, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": _GEMMA,
    "phi3": _SHAPE,
    "smollm3": {**_SHAPE, "no_rope_layers": [1, 0]},
    "opt": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        "max_position_embeddings": 512, "init_std": 0.3, "dropout": 0.0,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {**_SHAPE, "num_key_value_heads": 4},
    "mixtral": {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 512,
            "initializer_range": 0.3},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3,
               "new_decoder_architecture": True, "num_kv_heads": 2},
    "mamba": _STATE_SPACE,
    "mamba2": {**_STATE_SPACE, "expand": 2, "head_dim": 16, "num_heads": 4, "n_groups": 2, "chunk_size": 8},
}  # fmt: skip
STATE_SPACE = ("mamba", "mamba2")


def backbone_config(kind: str, tokenizer: Any, **changes: Any) -> Any:
    """The transformers config of a tiny LLM for this tokenizer."""
    ids = {"bos_token_id": None, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return AutoConfig.for_model(kind, **{**BACKBONES[kind], "vocab_size": len(tokenizer), **ids, **changes})


def make_backbone_parts(folder: Path, kind: str, tiny_parts: Path, **changes: Any) -> ModelConfig:
    """The settings of a model of the tiny CLIP and this LLM, with the tiny LLM's tokenizer, in `folder`."""
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_parts / "language")
    model = AutoModelForCausalLM.from_config(backbone_config(kind, tokenizer, **changes))
    language = folder / "language"
    model.save_pretrained(language)
    for path in (tiny_parts / "language").glob("*"):
        if "token" in path.name or "template" in path.name:
            shutil.copy(path, language)
    return ModelConfig(
        vision=VisionConfig(source=f"local-dir:{tiny_parts / 'vision'}", feature_layer=-1, image_mode="stretch"),
        projector=ProjectorConfig(kind="downsample", options={"factor": 2}),
        language=LanguageConfig(source=str(language), attention="eager"),
        template="tokenizer",
    )


HAS_NOT = [("gemma2", "sdpa"), ("gpt2", "flex_attention"), ("falcon", "flex_attention")]
HAS_NOT += [(kind, attention) for kind in ("mpt", "bloom") for attention in ("sdpa", "flex_attention")]
HAS_NOT += [(kind, attention) for kind in STATE_SPACE for attention in ("sdpa", "flex_attention")]
# OPT takes positions, but builds no mask from them; MPT, Bloom and Falcon do not know of packed rows.
SEES_ITS_NEIGHBOURS = (*STATE_SPACE, "opt", "mpt", "bloom", "falcon")


def backbone(kind: str, attention: str) -> Any:
    """A tiny LLM with this attention; the test is skipped where the architecture has none."""
    config = AutoConfig.for_model(
        kind, **{**BACKBONES[kind], "vocab_size": 64, "bos_token_id": None, "pad_token_id": 0, "eos_token_id": 1}
    )
    torch.manual_seed(0)
    if (kind, attention) in HAS_NOT:
        pytest.skip(f"{kind} has no {attention}")
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
