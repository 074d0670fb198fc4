"""The LLM's linear layers in 4 or 8 bits, through bitsandbytes, under adapters that are trained (QLoRA).

Paper: https://arxiv.org/abs/2305.14314. Layers are replaced one by one in the model that was loaded, so that nothing
depends on lists of names: the decoder's linear layers and nothing else. Embeddings, head, experts that are held in
one tensor, projector and tower stay as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from mmllm.checkpoint.adapter import quiet_bitsandbytes
from mmllm.config import ConfigError

# Their kernels read weights past the layer that holds them.
_BYPASSED = ("mamba", "mamba2", "falcon_mamba")


def quantise_language(language_model: Any, kind: str, *, compute_dtype: torch.dtype) -> None:
    """Quantises in place, on the CPU: `nf4` or `int8`. Raises ConfigError where there is nothing to quantise."""
    name = type(language_model).__name__
    if language_model.config.model_type in _BYPASSED:
        raise ConfigError(f"lora.quantise: {name} reads its weights past its layers; leave it out")
    quiet_bitsandbytes()
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # int8 tells of its casts each time
    decoder = language_model.get_decoder()
    found = [(path, module) for path, module in decoder.named_modules() if type(module) is nn.Linear]
    if not found:
        raise ConfigError(f"lora.quantise: {name} has no linear layers that bitsandbytes can hold; leave it out")
    for path, linear in found:
        decoder.set_submodule(path, _quantised(linear, kind, compute_dtype))
    setattr(language_model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)  # what peft asks
    _check(language_model)


def _quantised(linear: nn.Linear, kind: str, compute_dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    weight = linear.weight.detach()
    with torch.device("meta"):
        if kind == "nf4":
            new: Any = Linear4bit(*sizes, bias=has_bias, compute_dtype=compute_dtype, quant_type="nf4")
        else:
            new = Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False)
    new.bias = linear.bias
    if kind == "nf4":
        new.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=new).to(weight.device)
        # On some CPUs a forward in eval mode packs the weights for answering, and no gradient passes them from then on.
        new.support_avx512bf16_for_cpu = False
    else:
        new.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
    return new  # type: ignore[no-any-return]


def _check(language_model: Any) -> None:
    """The weights are what was asked for: small integers in the decoder's layers, and plain ones in the head."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    modules = list(language_model.get_decoder().modules())
    held = [module for module in modules if isinstance(module, Linear4bit | Linear8bitLt)]
    assert held
    assert not [module for module in modules if type(module) is nn.Linear]
    assert {module.weight.dtype for module in held} <= {torch.uint8, torch.int8}
    assert language_model.get_output_embeddings().weight.dtype.is_floating_point
