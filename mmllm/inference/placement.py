"""Where a model's weights lie while it answers: on one device, or spread over all that this machine has."""

from __future__ import annotations

import torch

from mmllm.model.vlm import VisionLanguageModel

GIB = 2**30


def answer_dtype(device: torch.device | None) -> torch.dtype:
    """bf16 on a GPU that computes in it, fp16 on an older one, fp32 elsewhere. None is all that this machine has."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def spread_model(
    model: VisionLanguageModel, *, max_memory: dict[int | str, int | str] | None = None
) -> VisionLanguageModel:
    """The model spread by accelerate: first over the GPUs, then main memory, from where layers come when they run.

    Raises ValueError where both together are too small. `max_memory` is what each may hold; default: what is free.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import compute_module_sizes, get_max_memory

    blocks = {*(model._no_split_modules or ()), type(model.vision_tower).__name__, type(model.projector).__name__}
    model.tie_weights()
    places = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=sorted(blocks))
    if "disk" in places.values():
        room = ", ".join(f"{name}: {int(size) / GIB:.1f}" for name, size in get_max_memory(max_memory).items())
        raise ValueError(
            f"the model needs {compute_module_sizes(model)[''] / GIB:.1f} GiB, more than this machine has free "
            f"(GiB of each GPU and of memory: {room}); use a machine with more, or a smaller model"
        )
    skip_keys = sorted(model._skip_keys_device_placement or ())  # caches stay where their layers are
    return dispatch_model(model, places, skip_keys=skip_keys)  # type: ignore[no-any-return]
