"""A small LLM with the trouble of a real one: sharp attention over many layers, which makes rounding large."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmllm.batching.packing import packed_position_ids
from mmllm.model.probing import relative_difference

LENGTHS = (7, 5, 6)  # of the examples of a packed row, in tokens
FACTORS = {"q_proj": 2, "k_proj": 2, "o_proj": 4}


def sharp_llama(*, vocab_size: int = 400, attention: str = "sdpa", **ids: Any) -> Any:
    """In bf16 its logits of a text alone, and of the same text beside others, differ by a third of the largest."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=16, num_attention_heads=4,
        initializer_range=0.3, tie_word_embeddings=False, attn_implementation=attention, **ids,
    )  # fmt: skip
    torch.manual_seed(6)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for name, factor in FACTORS.items():
                getattr(layer.self_attn, name).weight.mul_(factor)
    return model


@torch.no_grad()
def rounding(model: Any) -> float:
    """How far a packed row's logits are from those of its examples alone."""
    embeds = model.get_input_embeddings().weight[: sum(LENGTHS)][None]
    packed = model(
        inputs_embeds=embeds, position_ids=packed_position_ids([LENGTHS], sum(LENGTHS)), use_cache=False
    ).logits
    alone = [model(inputs_embeds=part, use_cache=False).logits for part in embeds.split(LENGTHS, 1)]
    return relative_difference(torch.cat(alone, 1), packed)


def make_sharp_language(folder: Path, language: Path) -> Path:
    """A folder of this LLM in fp32, with the tokenizer of another one."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(language)
    ids = {"bos_token_id": None, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sharp_llama(vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    for path in language.glob("*"):
        if "token" in path.name or "template" in path.name:
            shutil.copy(path, folder)
    return folder
