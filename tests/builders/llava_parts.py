"""Small parts of transformers' classes with random weights, as folders: encoders of CLIP and SigLIP, and LLMs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from mmllm.batch import IMAGE_TOKEN
from tests.builders.tiny import MAX_LENGTH_TOKENS

SIDE_PX = 32
ENCODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
           "patch_size": 8, "image_size": SIDE_PX}  # fmt: skip
LLM = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
       "intermediate_size": 64, "head_dim": 12, "max_position_embeddings": MAX_LENGTH_TOKENS}  # fmt: skip
ENCODERS: dict[str, tuple[str, str]] = {
    "clip": ("CLIPVisionModel", "CLIPImageProcessor"),
    "siglip": ("SiglipVisionModel", "SiglipImageProcessor"),
}
LLMS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
        "gemma": "GemmaForCausalLM"}  # fmt: skip


def _scatter(model: torch.nn.Module) -> None:
    """Weights so large that a mistake shows in the logits."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)


def make_encoder(kind: str, folder: Path) -> Path:
    torch.manual_seed(1)
    model_class, transform = (getattr(transformers, name) for name in ENCODERS[kind])
    encoder = model_class(model_class.config_class(**ENCODER))
    _scatter(encoder)
    encoder.save_pretrained(folder)
    side = {"height": SIDE_PX, "width": SIDE_PX}
    transform(size={"shortest_edge": SIDE_PX} if kind == "clip" else side, crop_size=side).save_pretrained(folder)
    return folder


def make_llm(kind: str, folder: Path, tokenizer: Any, **options: Any) -> Path:
    torch.manual_seed(2)
    model_class = getattr(transformers, LLMS[kind])
    fit = {key: value for key, value in LLM.items() if kind in ("gemma", "mistral", "llama") or key != "head_dim"}
    model = model_class(
        model_class.config_class(
            **fit, **options, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    _scatter(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)]] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
