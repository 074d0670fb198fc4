"""The device and dtype of a model's weights at inference: one device, or all devices of this machine together."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mmllm.errors import MmllmError
from mmllm.kernels.precision import multiplies_bf16
from mmllm.model.language import DTYPES
from mmllm.model.vlm import VisionLanguageModel

GIB = 2**30


def answer_dtypes(
    stored: Mapping[str, torch.dtype], device: torch.device | None, choice: str | None = None
) -> dict[str, torch.dtype]:
    """The dtype of each part at inference, by its stored dtype.

    `choice` is a key of DTYPES, or `stored` for the stored dtypes; default: `answer_dtype`.
    """
    if choice is None:
        return {part: answer_dtype(device, dtype) for part, dtype in stored.items()}
    return {part: dtype if choice == "stored" else DTYPES[choice] for part, dtype in stored.items()}


def answer_dtype(device: torch.device | None, stored: torch.dtype) -> torch.dtype:
    """The dtype of a part at inference. `device` None means all devices of this machine.

    On a GPU bf16, or fp16 where the GPU has no bf16. On a CPU fp32, except for a part that is stored in bf16 where the
    CPU multiplies in bf16: that takes half the memory and is faster. Other CPUs prefill five times slower in bf16 than
    in fp32, and no CPU is fast in fp16.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return torch.bfloat16 if multiplies_bf16(device) else torch.float16
    return stored if stored == torch.bfloat16 and multiplies_bf16(device) else torch.float32


def find_device(name: str | None) -> torch.device:
    """The device of this name; default: a GPU where there is one. Raises MmllmError for a device that is not here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    num_gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise MmllmError(f"no device {name}: this machine has {num_gpus} CUDA GPUs; leave --device out, or give cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise MmllmError("no device mps: it needs an Apple GPU; leave --device out, or give cpu")
    return device


def free_bytes(device: torch.device) -> int:
    """Memory that caches may take: half of what is free on a GPU, a quarter of what is free on the machine."""
    from accelerate.utils import get_max_memory

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return int(get_max_memory()["cpu"]) // 4


def spread_model(
    model: VisionLanguageModel, *, max_memory: dict[int | str, int | str] | None = None
) -> VisionLanguageModel:
    """The model dispatched by accelerate: GPUs first, then main memory, whose layers move to a GPU when they run.

    `max_memory` limits each device, in bytes or as accelerate writes sizes; default: the free memory. Raises MmllmError
    where all devices together are too small.
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
    skip_keys = sorted(model._skip_keys_device_placement or ())  # KV caches stay on the devices of their layers
    return dispatch_model(model, places, skip_keys=skip_keys)  # type: ignore[no-any-return]
