"""Every private name and hook of other libraries that this project relies on.

A release may change them without notice. The test of this file looks each one up in the installed version, so that a
new release fails the test and not a run. A private name that is used but not listed here fails it too.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PrivateName:
    """One name: `module:attribute.attribute`.

    Attributes:
        name: its path.
        parameters: the parameter names that it must accept; None if it is not called.
        used_for: what would break without it.
        package: the optional package that has to be installed for it.
    """

    name: str
    used_for: str
    parameters: tuple[str, ...] | None = None
    package: str | None = None


_GENERATE = "transformers:GenerationMixin."
_CLASS = "transformers:PreTrainedModel."
PRIVATE_NAMES: tuple[PrivateName, ...] = (
    # generation hooks that the model overrides
    PrivateName(f"{_GENERATE}_prepare_cache_for_generation", "Mamba's state is passed under its own name",
                ("generation_config", "model_kwargs")),
    PrivateName(f"{_GENERATE}_get_logits_processor", "an answer never holds the image token", ()),
    PrivateName(f"{_GENERATE}_expand_inputs_for_generation", "each beam gets its row's pictures",
                ("expand_size", "is_encoder_decoder", "input_ids")),
    PrivateName(f"{_GENERATE}prepare_inputs_for_generation", "pictures are passed at prefill only", ("input_ids",)),
    # class attributes
    PrivateName(f"{_CLASS}_supports_sdpa", "which attention can be chosen"),
    PrivateName(f"{_CLASS}_supports_flash_attn", "which attention can be chosen"),
    PrivateName(f"{_CLASS}_supports_flex_attn", "which attention can be chosen"),
    PrivateName(f"{_CLASS}_no_split_modules", "what stays on one device when a model is split"),
    PrivateName(f"{_CLASS}_skip_keys_device_placement", "caches stay where their layers are"),
    PrivateName("transformers:PreTrainedConfig._attn_implementation", "which attention an LLM runs"),
    PrivateName("transformers:ProcessorMixin._process_images", "the layout gives the inputs", ("images",)),
    PrivateName("transformers:ProcessorMixin.replace_image_token", "one `<image>` becomes as many as the layout needs",
                ("image_inputs", "image_idx")),
    PrivateName("torch:Tensor._version", "what the engine keeps is void once a weight is changed in place"),
    # attention in blocks
    PrivateName("transformers.integrations.sdpa_attention:sdpa_attention_forward", "attention where blocks do not pay",
                ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal")),
    PrivateName("transformers.integrations.sdpa_attention:repeat_kv", "grouped queries", ("hidden_states", "n_rep")),
    PrivateName("transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS.register", "a mask for attention in blocks",
                ("key", "value")),
    PrivateName("transformers.masking_utils:sdpa_mask", "a mask for attention in blocks", ()),
    PrivateName("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS.register", "attention in blocks",
                ("key", "value")),
    PrivateName("torch:_softmax_backward_data", "the backward of attention in blocks"),
    PrivateName("torch.nn:MultiheadAttention.in_proj_weight", "one product for queries, keys and values"),
    # layouts of LLaVA-NeXT and SigLIP 2
    PrivateName("transformers.image_processing_utils:select_best_resolution", "tiles of LLaVA-NeXT",
                ("original_size", "possible_resolutions")),
    PrivateName("transformers.image_processing_utils:get_patch_output_size", "tiles of LLaVA-NeXT",
                ("image", "target_resolution", "input_data_format")),
    PrivateName("transformers.models.llava_next.modeling_llava_next:unpad_image", "tiles of LLaVA-NeXT",
                ("tensor", "original_size")),
    PrivateName("transformers.models.siglip2.image_processing_siglip2:get_image_size_for_max_num_patches",
                "native aspect ratios", ("image_height", "image_width", "patch_size", "max_num_patches")),
    # the vision towers of open_clip
    PrivateName("open_clip.model:_build_vision_tower", "a tower without its text half",
                ("embed_dim", "vision_cfg", "quick_gelu")),
    # torch's modules
    PrivateName("torch.nn:Module._buffers", "tables that no weights file holds"),
    PrivateName("torch.nn:Module._non_persistent_buffers_set", "tables that no weights file holds"),
    PrivateName("torch.nn:Module._forward_hooks", "a head with hooks is not replaced by its weight"),
    PrivateName("torch.nn:Module._forward_pre_hooks", "a head with hooks is not replaced by its weight"),
    PrivateName("torch.nn:MultiheadAttention._qkv_same_embed_dim", "one product for queries, keys and values"),
    PrivateName("torch.nn.modules.batchnorm:_BatchNorm", "batch norms of a frozen tower stay in evaluation mode"),
    # others
    PrivateName("PIL.Image:Image._new", "a view of a large picture without a copy", ("im",)),
    PrivateName("sys:_current_frames", "what each thread does when a run stalls", ()),
    PrivateName("liger_kernel.transformers:_apply_liger_kernel_to_instance", "compute.liger", ("model",),
                "liger_kernel"),
    PrivateName("deepspeed.runtime.engine:DeepSpeedEngine._config", "a ZeRO state for another number of ranks",
                package="deepspeed"),
)  # fmt: skip
_INSTANCES = {  # attributes that `__init__` sets: looked up on an instance
    "transformers:PreTrainedConfig": lambda cls: cls(),
    "torch.nn:Module": lambda cls: cls(),
    "torch.nn:MultiheadAttention": lambda cls: cls(2, 1),
}


def resolve(entry: PrivateName) -> Any:
    """The object of this name; None for an attribute that only instances have. Raises AttributeError or ImportError."""
    module, _, path = entry.name.partition(":")
    value: Any = importlib.import_module(module)
    for depth, part in enumerate(names := path.split(".")):
        owner = f"{module}:{'.'.join(names[:depth])}"
        if not hasattr(value, part) and owner in _INSTANCES:
            value = _INSTANCES[owner](value)
        if not hasattr(value, part) and inspect.isclass(value) and f"self.{part}" in inspect.getsource(value):
            return None  # only instances have it, and they are costly to build
        value = getattr(value, part)
    return value


def explain_mismatch(entry: PrivateName) -> str | None:
    """How the installed version differs from this entry; None where it does not."""
    try:
        value = resolve(entry)
    except (AttributeError, ImportError) as error:
        return f"{entry.name} is not there ({error}); it is used for: {entry.used_for}"
    if entry.parameters is None:
        return None
    parameters = inspect.signature(value).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    missing = [name for name in entry.parameters if name not in parameters and not takes_any]
    if missing:
        return f"{entry.name} does not take {', '.join(missing)} any more; it is used for: {entry.used_for}"
    return None
