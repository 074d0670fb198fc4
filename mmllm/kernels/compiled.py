"""Compiles layers with torch.compile, and applies Liger's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mmllm.config import ConfigError


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compiles these layers for training, once for all of them and for every length.

    Generation and validation stay uncompiled: each decoding step has other shapes, and code for all of them would
    evict that of training.
    """
    for layer in layers:
        layer.forward = _compiled(layer, layer.forward)


def _compiled(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, dynamic=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training and torch.is_grad_enabled() else forward)(*args, **kwargs)

    return run


def use_liger(language_model: Any) -> None:
    """Liger's kernels for norm, MLP and rotary embedding: https://arxiv.org/abs/2410.10989. The loss stays ours.

    The LLM then runs on a GPU only. Raises ConfigError for an LLM that Liger has no kernels for.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    base = language_model.get_base_model() if hasattr(language_model, "peft_config") else language_model
    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(f"compute.liger: there are no kernels for {base.config.model_type}; leave it out")
    _apply_liger_kernel_to_instance(model=base, cross_entropy=False, fused_linear_cross_entropy=False)
