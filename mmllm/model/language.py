"""The LLM backbone and its tokenizer: any AutoModelForCausalLM, with `<image>` as a real token of the vocabulary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from mmllm.batch import IMAGE_TOKEN
from mmllm.config import ConfigError, LanguageConfig

PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")  # all there is to them is in tokenizer.json


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars, which would tear ours, and without its reports: what is wrong we say."""
    was_on, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if was_on:
            transformers_logging.enable_progress_bar()


def load_tokenizer(source: str, *, revision: str | None = None) -> Any:
    """The tokenizer, with `<image>` added where it is missing and a padding token that is not the end token."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        declared = get_tokenizer_config(source, revision=revision).get("tokenizer_class")
        # AutoTokenizer replaces a plain tokenizer.json beside a Qwen2 model by Qwen2's own rules, without a word
        loader: Any = PreTrainedTokenizerFast if declared in PLAIN_TOKENIZERS else AutoTokenizer
        tokenizer = loader.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.language.source: no tokenizer at {source}: {error}") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {source} has no end token, so answers could never stop; give it one")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def load_language(config: LanguageConfig) -> tuple[Any, Any]:
    """(causal LM in fp32, tokenizer); its embedding grows where the tokenizer has more tokens than it has rows."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(config.source, revision=config.revision)
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                config.source, revision=config.revision, attn_implementation=config.attention, dtype=torch.float32
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.language: cannot load {config.source}: {error}") from error
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer
