"""Quantizes the LLM's frozen linear layers to 4 or 8 bits with bitsandbytes, under trained adapters (QLoRA).

Paper: https://arxiv.org/abs/2305.14314. Each nn.Linear of the loaded decoder is replaced, without any list of names.
Embeddings, head, experts stored as one tensor, projector and tower keep their precision.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from mmllm.checkpoint.adapter import quiet_bitsandbytes
from mmllm.config import ConfigError

# Their kernels read weights without calling the layer that holds them.
_BYPASSED = ("mamba", "mamba2", "falcon_mamba")


def quantise_language(language_model: Any, kind: str, *, compute_dtype: torch.dtype) -> None:
    """Quantizes in place to `nf4` or `int8`. Raises ConfigError for an LLM without layers that can be quantized."""
    name = type(language_model).__name__
    if language_model.config.model_type in _BYPASSED:
        raise ConfigError(f"lora.quantise: {name} reads its weights past its layers; leave it out")
    quiet_bitsandbytes()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # int8 logs every cast
    decoder = language_model.get_decoder()
    linears = [(path, module) for path, module in decoder.named_modules() if type(module) is nn.Linear]
    if not linears:
        raise ConfigError(f"lora.quantise: {name} has no linear layers that bitsandbytes can hold; leave it out")
    for path, linear in linears:
        decoder.set_submodule(path, _quantised(linear, kind, compute_dtype))
    setattr(language_model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)  # peft reads it
    _check(language_model)


def _quantised(linear: nn.Linear, kind: str, compute_dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    features, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.detach()
    with torch.device("meta"):
        if kind == "nf4":
            quantised: Any = Linear4bit(*features, bias=has_bias, compute_dtype=compute_dtype, quant_type="nf4")
        else:
            quantised = Linear8bitLt(*features, bias=has_bias, has_fp16_weights=False)
    quantised.bias = linear.bias
    if kind == "nf4":
        quantised.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantised).to(weight.device)
        # On some CPUs a forward in eval mode repacks the weights for inference, which stops gradients from then on.
        quantised.support_avx512bf16_for_cpu = False
    else:
        quantised.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
    return quantised  # type: ignore[no-any-return]


def _check(language_model: Any) -> None:
    """Asserts that the decoder's linear layers hold 8-bit integers, and the head floating-point weights."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    modules = list(language_model.get_decoder().modules())
    quantised_layers = [module for module in modules if isinstance(module, Linear4bit | Linear8bitLt)]
    assert quantised_layers
    assert not [module for module in modules if type(module) is nn.Linear]
    assert {module.weight.dtype for module in quantised_layers} <= {torch.uint8, torch.int8}
    assert language_model.get_output_embeddings().weight.dtype.is_floating_point
