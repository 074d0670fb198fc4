"""How many positions an LLM has: a longer row would end a run with an index out of range.

Rotary embeddings, most ALiBi and state-space models have no such limit. There `max_position_embeddings` is the length
that the LLM was trained on, not the longest that it can compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mmllm.backbone_files.hub import LIBRARY_FAILURES, quiet_transformers


def _table_sizes(language_model: Any, num_positions: int) -> Iterator[int]:
    """The number of usable rows of each position table."""
    token_embedding = language_model.get_input_embeddings()
    for module in language_model.modules():
        if not isinstance(module, nn.Embedding) or module is token_embedding:
            continue
        offset = getattr(module, "offset", 0)  # OPT's and BART's tables begin with two unused rows
        if module.num_embeddings - offset == num_positions:
            # RoBERTa's positions begin after the padding row
            yield num_positions if offset or module.padding_idx is None else num_positions - module.padding_idx - 1
    for buffer in language_model.buffers():  # GPT-J's sines, CTRL's table, GPT-Neo's mask
        if buffer.ndim >= 2 and num_positions in buffer.shape:
            yield num_positions


def position_limit(language_model: Any) -> int | None:
    """The longest row in tokens that an LLM can compute; None where only memory limits it."""
    config = language_model.config.get_text_config()
    if config.model_type == "mpt":  # its ALiBi is a table too, rebuilt in every forward
        return int(config.max_seq_len)
    num_positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(num_positions, int):
        return None
    return min(_table_sizes(language_model, num_positions), default=None)


def position_limit_of(config: Any) -> int | None:
    """The `position_limit` of the LLM with this config, built without weights; None where it cannot be built so."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            return position_limit(AutoModelForCausalLM.from_config(config))
    except LIBRARY_FAILURES:  # it cannot be built on the meta device; no such LLM has a table of positions
        return None


def max_length_tokens(model: Any) -> int:
    """The longest prompt plus answer, in tokens, that a vision-language model was trained for and can compute."""
    trained_length = getattr(model.config.text_config, "max_position_embeddings", 0) or 2**31
    return min(int(trained_length), position_limit(model.language_model) or 2**31)
