"""The LLM backbone and its tokenizer: any AutoModelForCausalLM, with `<image>` as a real token of the vocabulary.

The folder or repository, the architecture and its attention are checked before any weights are loaded.
`check_backbone` of capabilities.py tests the rest on the built model.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import __version__ as transformers_version

from mmllm.backbone_files.gguf import local_source
from mmllm.backbone_files.hub import LIBRARY_FAILURES, check_source, quiet_transformers
from mmllm.batch import IMAGE_TOKEN
from mmllm.config import ConfigError, LanguageConfig
from mmllm.kernels.attention import caps_scores, replace_capped_sdpa

PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")  # tokenizer.json describes them completely
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _read_tokenizer(source: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    source = local_source(source, revision)
    if not Path(source).is_dir():
        check_source(source, revision, setting="model.language.source")
    try:
        declared = get_tokenizer_config(source, revision=revision).get("tokenizer_class")
        # AutoTokenizer silently replaces a plain tokenizer.json beside a Qwen2 model by Qwen2's own rules
        loader: Any = PreTrainedTokenizerFast if declared in PLAIN_TOKENIZERS else AutoTokenizer
        return loader.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.language.source: no tokenizer at {source}: {error}") from error


def load_tokenizer(source: str, *, revision: str | None = None, extra_special_tokens: Sequence[str] = ()) -> Any:
    """The tokenizer with `<image>`, these special tokens, and a padding token that is not the end token.

    Raises ConfigError where there is no tokenizer or it has no end token.
    """
    tokenizer = _read_tokenizer(source, revision)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.add_tokens(list(extra_special_tokens), special_tokens=True)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {source} has no end token, so answers could never stop; give it one")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


def find_architecture(config: LanguageConfig) -> type:
    """The class of the LLM, from its config alone. Raises ConfigError for an LLM that cannot be used here."""
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    place = f"model.language.source: {config.source}"
    source = local_source(config.source, config.revision)
    check_source(source, config.revision, setting="model.language.source")
    try:
        values, _ = PretrainedConfig.get_config_dict(source, revision=config.revision)
        kind = values.get("model_type")
        if kind not in CONFIG_MAPPING:
            code_note = "brings code of its own, which is never run: " if "auto_map" in values else ""
            raise ConfigError(
                f"{place} {code_note}its architecture {kind!r} is unknown to transformers {transformers_version}; "
                "choose another LLM, or a release of transformers that knows it"
            )
        llm_config = AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=False)
    except (OSError, *LIBRARY_FAILURES) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{place} has a config.json that cannot be used: {error}") from error
    if type(llm_config) not in MODEL_FOR_CAUSAL_LM_MAPPING or llm_config.get_text_config() is not llm_config:
        raise ConfigError(f"{place} is a {kind}, which is not a plain causal LM; give one of AutoModelForCausalLM")
    hidden_size = getattr(llm_config, "hidden_size", None)
    width = getattr(llm_config, "word_embed_proj_dim", hidden_size)  # OPT-350M
    if hidden_size is None or width != hidden_size:
        raise ConfigError(
            f"{place} has embeddings of width {width} for a hidden size of {hidden_size}, which the projector cannot "
            "be built for; choose another LLM"
        )
    if kind in ("mamba", "mamba2", "falcon_mamba") and llm_config.use_bias:
        raise ConfigError(
            f"{place} is a {kind} with use_bias, whose state absorbs the padding before a prompt, so its answers "
            "would change in a batch; choose one without use_bias"
        )
    architecture: type = MODEL_FOR_CAUSAL_LM_MAPPING[type(llm_config)]
    check_attention(architecture, llm_config, config.attention)
    return architecture


def check_attention(architecture: Any, text_config: Any, attention: str | None) -> None:
    """Raises ConfigError for an attention that the architecture or this machine does not support."""
    from transformers.utils import is_flash_attn_2_available

    has_flash_here = is_flash_attn_2_available()
    supported = {
        "eager": True,
        "sdpa": architecture._supports_sdpa and not caps_scores(text_config),
        "flex_attention": architecture._supports_flex_attn,
        "flash_attention_2": architecture._supports_flash_attn,
    }
    if attention is None or (supported[attention] and (attention != "flash_attention_2" or has_flash_here)):
        return
    why = f"{architecture.__name__} does not support it"
    if supported[attention]:
        why = "needs a CUDA GPU and the package flash-attn, and this machine lacks one of them"
    possible = [name for name, has in supported.items() if has and (name != "flash_attention_2" or has_flash_here)]
    raise ConfigError(f"model.language.attention: {attention}: {why}; possible here: {', '.join(possible)}")


def grow_vocabulary(model: Any, num_tokens: int, new_ids: Sequence[int], multiple: int) -> None:
    """Grows the embeddings to `num_tokens` rows, rounded up to `multiple`. Old rows keep every bit.

    New rows are the mean of the old, which leaves the probabilities of old tokens nearly unchanged:
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    """
    num_old = model.get_input_embeddings().num_embeddings
    num_rows = -(-max(num_tokens, num_old) // multiple) * multiple
    if num_rows > num_old:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    new = sorted({*range(num_old, num_rows), *new_ids})  # a new token may use a spare row of the old table
    old = sorted(set(range(num_old)) - set(new))
    head = model.get_output_embeddings()
    tables = [model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    with torch.no_grad():
        for table in tables:
            if new and table is not None:
                table[new] = table[old].float().mean(0).to(table.dtype)


def load_language(config: LanguageConfig) -> tuple[Any, Any]:
    """(causal LM in `config.dtype` on the CPU, tokenizer), with an embedding row for every token. Raises ConfigError.

    `model.config.trained_token_ids` are those of `extra_special_tokens`, the only embedding rows that LoRA trains.
    """
    architecture: Any = find_architecture(config)
    stored_ids = set(_read_tokenizer(config.source, config.revision).get_vocab().values())
    tokenizer = load_tokenizer(
        config.source, revision=config.revision, extra_special_tokens=config.extra_special_tokens
    )
    try:
        with quiet_transformers():
            model, report = architecture.from_pretrained(
                local_source(config.source, config.revision),
                revision=config.revision,
                attn_implementation=config.attention,
                dtype="auto" if config.dtype == "stored" else DTYPES[config.dtype],
                output_loading_info=True,
            )
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"model.language: {config.source} has a pickle that holds more than tensors, or is damaged. Code in it is "
            "never run: convert it to safetensors where you trust it, or choose another LLM"
        ) from error
    except (OSError, EOFError, *LIBRARY_FAILURES) as error:
        raise ConfigError(f"model.language: cannot load {config.source}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ConfigError(
            f"model.language: the weights of {config.source} lack {shown}, which would be random; download them again"
        )
    replace_capped_sdpa(model)
    new_ids = sorted(set(tokenizer.get_vocab().values()) - stored_ids)
    fit_vocabulary(model, tokenizer, new_ids=new_ids, multiple=config.vocab_multiple)
    model.config.trained_token_ids = [tokenizer.convert_tokens_to_ids(token) for token in config.extra_special_tokens]
    return model, tokenizer


def fit_vocabulary(model: Any, tokenizer: Any, *, new_ids: Sequence[int] = (), multiple: int = 1) -> None:
    """Gives an LLM an embedding row for every token of its tokenizer, and the tokenizer's padding token."""
    grow_vocabulary(model, len(tokenizer), new_ids, multiple)
    _set_padding(model, int(tokenizer.pad_token_id))


def _set_padding(model: Any, pad_token_id: int) -> None:
    """Sets the padding row, which gets no gradient; in many configs it is the end token's row, which needs one."""
    model.config.pad_token_id = pad_token_id
    embedding = model.get_input_embeddings()
    if embedding.padding_idx is not None:
        embedding.padding_idx = pad_token_id


def decoder_layers(language_model: Any) -> list[nn.Module]:
    """The LLM's layers in the order in which they run. Raises ConfigError where the decoder has no such list."""
    num_layers = language_model.config.num_hidden_layers
    for module in language_model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return list(module)
    raise ConfigError(f"model.language: found no list of {num_layers} layers in {type(language_model).__name__}")
