"""Where a model's weights lie while it answers: on one device, or spread over all that this machine has."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mmllm.errors import MmllmError
from mmllm.kernels.precision import multiplies_bf16
from mmllm.model.language import DTYPES
from mmllm.model.vlm import VisionLanguageModel

GIB = 2**30


def answer_dtypes(
    stored: Mapping[str, torch.dtype], device: torch.device | None, wanted: str | None = None
) -> dict[str, torch.dtype]:
    """The dtype to answer in for each part, of those that they are stored in; `wanted` is `stored` or one of DTYPES."""
    if wanted is None:
        return {part: answer_dtype(device, dtype) for part, dtype in stored.items()}
    return {part: dtype if wanted == "stored" else DTYPES[wanted] for part, dtype in stored.items()}


def answer_dtype(device: torch.device | None, stored: torch.dtype) -> torch.dtype:
    """The dtype to answer in for a part that is stored in this one. `device` None is all that this machine has.

    bf16 on a GPU that computes in it, fp16 on an older one. A CPU that multiplies in bf16 keeps it: half the memory,
    and faster. One that does not takes five times as long over a prompt as in fp32, and none is fast in fp16.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return torch.bfloat16 if multiplies_bf16(device) else torch.float16
    return stored if stored == torch.bfloat16 and multiplies_bf16(device) else torch.float32


def find_device(name: str | None) -> torch.device:
    """The device of this name, or a GPU where there is one. Raises MmllmError where this machine has no such device."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    num_gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise MmllmError(f"no device {name}: this machine shows {num_gpus} CUDA GPUs; leave --device out, or give cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MmllmError("no device mps: it needs an Apple GPU; leave --device out, or give cpu")
    return device


def spread_model(
    model: VisionLanguageModel, *, max_memory: dict[int | str, int | str] | None = None
) -> VisionLanguageModel:
    """The model spread by accelerate: first over the GPUs, then main memory, from where layers come when they run.

    Raises MmllmError where both together are too small. `max_memory` is what each may hold; default: what is free.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import compute_module_sizes, get_max_memory

    blocks = {*(model._no_split_modules or ()), type(model.vision_tower).__name__, type(model.projector).__name__}
    model.tie_weights()
    places = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=sorted(blocks))
    if "disk" in places.values():
        room = ", ".join(f"{name}: {int(size) / GIB:.1f}" for name, size in get_max_memory(max_memory).items())
        raise MmllmError(
            f"the model needs {compute_module_sizes(model)[''] / GIB:.1f} GiB, more than this machine has free "
            f"(GiB of each GPU and of memory: {room}); use a machine with more, or a smaller model"
        )
    skip_keys = sorted(model._skip_keys_device_placement or ())  # caches stay where their layers are
    return dispatch_model(model, places, skip_keys=skip_keys)  # type: ignore[no-any-return]
