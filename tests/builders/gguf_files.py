"""A small Llama as a GGUF file, written with llama.cpp's own package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
ENDS = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def _interleaved(weight: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Query and key rows in llama.cpp's order of rotary pairs."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, folder: Path, *, leaves_out: str = "", architecture: str = "llama") -> Path:
    """The Llama and the tokenizer of a folder in fp16, without the tensors whose name has `leaves_out`."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"] | {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
    special = {one["content"] for one in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if one in special else gguf.TokenType.NORMAL for one in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    for name, value in model.state_dict().items():
        *path_parts, kind = name.removeprefix("model.").split(".")
        if path_parts[0] == "layers":
            target = f"blk.{path_parts[1]}.{NAMES['.'.join(path_parts[2:])]}.{kind}"
        else:
            target = f"{ENDS[path_parts[0]]}.{kind}"
        weight = value.numpy()
        if "attn_q" in target or "attn_k" in target:
            weight = _interleaved(weight, config.num_attention_heads)
        if not leaves_out or leaves_out not in target:
            writer.add_tensor(target, weight.astype(np.float16 if weight.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
