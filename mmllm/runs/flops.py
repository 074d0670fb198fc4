"""Floating-point operations (FLOPs) of a training step, and the peak FLOPs per second of the device.

A weight with `n` elements costs `2 n` FLOPs per token in the forward pass, `2 n` for the gradient of its input where
that is needed, and `2 n` for its own gradient where it is trained. *Model* FLOPs are those of the tokens without
padding, forward and backward: MFU, https://arxiv.org/abs/2204.02311. *Hardware* FLOPs also count padding, rows of the
head without a target, and layers that gradient checkpointing recomputes: HFU, https://arxiv.org/abs/2205.05198.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.batch import Batch

LINEAR_ONLY = "only its weights are counted (6 N T), not the operations between tokens"


@dataclass(frozen=True)
class Flops:
    """FLOPs of one batch, forward and backward. `*_bf16` are those computed in bf16; the others are in fp32."""

    model: float = 0.0
    hardware: float = 0.0
    model_bf16: float = 0.0
    hardware_bf16: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.model + other.model, self.hardware + other.hardware,
            self.model_bf16 + other.model_bf16, self.hardware_bf16 + other.hardware_bf16,
        )  # fmt: skip


@dataclass(frozen=True)
class _Cost:
    """FLOPs of the forward and of the backward pass, for one token or for one view of the tower."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def both(self) -> float:
        return self.forward + self.backward


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, int]]:
    """(name, weight, number of elements) of each matrix that multiplies tokens: no embeddings, norms or biases."""
    for prefix, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            continue
        for name, parameter in part.named_parameters(prefix, recurse=False):
            if parameter.ndim < 2:
                continue
            is_linear = isinstance(part, nn.Linear) and name.endswith(".weight")
            # a quantized weight is packed, so the layer gives its size
            yield name, parameter, part.in_features * part.out_features if is_linear else parameter.numel()


def _active_share(config: Any) -> float:
    """The share of a mixture's experts that a token is routed to; 1 without experts."""
    active = getattr(config, "num_experts_per_tok", None)
    known = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    total = next((count for count in known if count), None)
    return active / total if active and total else 1.0


def _is_of_experts(name: str, parameter: nn.Parameter) -> bool:
    return "experts" in name.split(".") and (parameter.ndim == 3 or name.endswith(".weight"))


def _head_widths(config: Any) -> tuple[float, float] | None:
    """(total width of all heads' keys, total width of their values); None if the layers are not attention."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads or not getattr(config, "num_hidden_layers", None):
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "qk_head_dim", None) or width  # DeepSeek's latent attention has two widths
    return heads * keys, heads * (getattr(config, "v_head_dim", None) or width)


def _windows(config: Any) -> list[int | None]:
    """The window of each attention layer in tokens; None: full attention. Empty if any layer is not attention."""
    if _head_widths(config) is None:
        return []
    num_layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window if getattr(config, "use_sliding_window", True) else None] * num_layers
    if set(kinds) - {"full_attention", "sliding_attention"}:
        return []
    return [window if kind == "sliding_attention" else None for kind in kinds]


def row_lengths(batch: Batch) -> list[int]:
    """Number of tokens of each conversation. In packed rows, positions restart at 0 with each conversation."""
    positions = getattr(batch, "position_ids", None)
    if positions is None or positions.ndim != 2:
        return [int(length) for length in batch.attention_mask.sum(1)]
    lengths: list[int] = []
    for row, mask in zip(positions, batch.attention_mask != 0, strict=True):
        starts = torch.nonzero(row[mask] == 0).flatten().tolist()
        lengths += [end - start for start, end in zip(starts, [*starts[1:], int(mask.sum())], strict=True)]
    return lengths


def _computes_in_bf16(module: nn.Module) -> bool:
    """Whether most of a part's weights multiply in bf16 without autocast: a frozen LLM computes in its own dtype."""
    num_weights = {True: 0, False: 0}
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2 and not isinstance(part, nn.Embedding):
            dtype = weight.dtype if weight.is_floating_point() else getattr(part, "compute_dtype", None)  # quantized
            num_weights[dtype == torch.bfloat16] += weight.numel()
    return num_weights[True] > num_weights[False]


class StepFlops:
    """Counts the FLOPs of batches for a model with its current frozen and trained parts. Build it before DDP wraps it.

    `precision` is that of autocast: `bf16` computes all products in bf16. With `plain_head` the head computes only rows
    with a target. `recomputes_*` says whether gradient checkpointing recomputes the layers.
    """

    def __init__(self, model: Any, *, precision: str = "fp32", plain_head: bool = True,
                 recomputes_language: bool = False, recomputes_vision: bool = False):  # fmt: skip
        parts = (model.language_model, model.vision_tower, model.projector)
        self.in_bf16 = [precision == "bf16" or _computes_in_bf16(part) for part in parts]
        language_model, config = model.language_model, model.language_model.config
        self.plain_head, self.recomputes_language = plain_head, recomputes_language
        self.image_token_id, self.layout = model.config.image_token_id, model.layout
        self.windows, self.widths = _windows(config), _head_widths(config)
        self.note = None if self.windows else f"{config.model_type}: {LINEAR_ONLY}"
        tower_trained = any(p.requires_grad for p in model.vision_tower.parameters())
        trains_pictures = tower_trained or any(p.requires_grad for p in model.projector.parameters())
        embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
        inputs_need_gradient = trains_pictures or embedding.weight.requires_grad  # the inputs of the first LLM layer
        self.token, head_needs_gradient = _language_cost(
            language_model, head, config, inputs_need_gradient=inputs_need_gradient
        )
        self.attends_backward = head_needs_gradient
        size = sum(count for _, _, count in _weights(head))
        trained = sum(count for _, weight, count in _weights(head) if weight.requires_grad)
        self.head = _Cost(2 * size, 2 * (size if head_needs_gradient else 0) + 2 * trained)
        self.view = _measured(model.vision_tower, _blank_view(model), False)
        self.view_again = self.view.forward if recomputes_vision and tower_trained else 0.0
        patches = (1, model.vision_tower.num_patches, model.vision_tower.width)
        self.projected = _measured(model.projector, torch.zeros(patches, device="meta"), tower_trained)

    def _attention(self, lengths: Sequence[int], *, windowed: bool) -> float:
        """Forward FLOPs of attention scores and weighted sums. Causal attention is counted as full, as is usual."""
        if self.widths is None:
            return 0.0
        pairs = 0
        for window in self.windows:
            limit = window if windowed and window else None
            pairs += sum(length * min(length, limit or length) for length in lengths)
        return float(2 * pairs * sum(self.widths))

    def _language_flops(self, lengths: Sequence[int], rows: int, *, again: bool, windowed: bool) -> float:
        attention = self._attention(lengths, windowed=windowed)
        passes = 1 + (2 if self.attends_backward else 0) + (1 if again else 0)
        linear = self.token.both + (self.token.forward if again else 0.0)
        return float(linear * sum(lengths) + attention * passes + self.head.both * rows)

    def _num_views(self, batch: Batch) -> float:
        if batch.image_features is not None:
            return len(batch.image_features)
        if batch.pixel_values is None:
            return 0
        if self.layout.kind == "native":  # views differ in size: their tokens as a number of views
            return float(int((batch.input_ids == self.image_token_id).sum()) / self.layout.num_view_tokens)
        return len(batch.pixel_values)

    def count(self, batch: Batch) -> Flops:
        """FLOPs of one micro-batch, forward and backward; the optimizer's are left out, as is usual."""
        lengths, supervised, positions = row_lengths(batch), batch.num_supervised, batch.input_ids.numel()
        padded = [batch.input_ids.shape[1]] * len(batch.input_ids)
        if len(lengths) != len(padded):  # packed: attention stays within a conversation
            padded = lengths
        num_views = self._num_views(batch)
        num_encoded = 0 if batch.image_features is not None else num_views
        tower, projector = self.view.both * num_encoded, self.projected.both * num_views
        again = self.recomputes_language and self.attends_backward
        model = self._language_flops(lengths, supervised, again=False, windowed=True)
        rows = supervised if self.plain_head else positions
        hardware = self._language_flops(padded, rows, again=again, windowed=False)
        hardware += (positions - sum(padded)) * self.token.both
        costs = ((model, hardware), (tower, tower + self.view_again * num_encoded), (projector, projector))
        counted = [Flops(*cost, *(cost if in_bf16 else ())) for cost, in_bf16 in zip(costs, self.in_bf16, strict=True)]
        return sum(counted, Flops())


def _language_cost(language_model: Any, head: Any, config: Any, *, inputs_need_gradient: bool) -> tuple[_Cost, bool]:
    """(cost of a token in the layers without the head, whether the head's input needs a gradient).

    The gradient of a weight's input is computed only if something before the weight is trained: with LoRA on the LLM
    alone, not before the first adapter.
    """
    share, forward, backward = _active_share(config), 0.0, 0.0
    head_ids = {id(parameter) for parameter in head.parameters()}
    for name, weight, count in _weights(language_model):
        if id(weight) in head_ids:
            continue
        used = count * (share if _is_of_experts(name, weight) else 1.0)
        forward += 2 * used
        backward += 2 * used * (int(inputs_need_gradient) + int(weight.requires_grad))
        inputs_need_gradient = inputs_need_gradient or weight.requires_grad
    return _Cost(forward, backward), inputs_need_gradient


def _blank_view(model: Any) -> Tensor:
    side = model.vision_tower.spec.image_size_px
    return torch.zeros(1, 3, side, side, device="meta")


def _measured(module: nn.Module, inputs: Tensor, needs_gradient: bool) -> _Cost:
    """The cost of one run of any module by torch's FLOP counter, on the meta device: no memory, no computation."""
    from torch.func import functional_call
    from torch.utils.flop_counter import FlopCounterMode

    def on_meta(values: Any) -> dict[str, Tensor]:
        copies = {name: torch.empty_like(value, device="meta") for name, value in values}
        return {name: value.float() if value.is_floating_point() else value for name, value in copies.items()}

    weights = on_meta(module.named_parameters())
    for name, parameter in module.named_parameters():
        weights[name].requires_grad_(parameter.requires_grad)
    trained = any(weight.requires_grad for weight in weights.values())
    inputs = inputs.requires_grad_(needs_gradient)
    modes = {part: part.training for part in module.modules()}
    module.eval()  # in training mode, gradient checkpointing would recompute layers without these weights
    # with gradients, since the counter does not know torch's fused inference kernel for a frozen encoder
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        probe = inputs if trained or needs_gradient else inputs.detach().requires_grad_()
        output = functional_call(module, {**weights, **on_meta(module.named_buffers())}, (probe,))
        forward = counter.get_total_flops()
        if (trained or needs_gradient) and output.requires_grad:
            output.sum().backward()
    for part, was_training in modes.items():
        part.training = was_training
    return _Cost(float(forward), float(counter.get_total_flops() - forward))


# Dense FLOPs per second in bf16 (fp16 on devices without bf16) with fp32 sums, and in fp32 without tensor cores.
# From the vendors' data sheets and architecture papers: H100, H200, B200, A100, L40S, L4, A10, RTX 6000, T4, V100:
# https://www.nvidia.com/en-us/data-center/ ; GeForce: https://images.nvidia.com/aem-dam/Solutions/geforce/ada/
# nvidia-ada-gpu-architecture.pdf ; AMD: https://www.amd.com/en/products/accelerators/instinct.html
# The first key that occurs in the device's name is used.
PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250e12, 75e12),
    "H200": (989e12, 67e12),
    "GH200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 31.2e12),
    "RTX 6000 Ada": (364e12, 91.1e12),
    "RTX A6000": (154.8e12, 38.7e12),
    "RTX 5090": (209.5e12, 104.8e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
    "MI300X": (1307e12, 163.4e12),
    "MI250X": (383e12, 47.9e12),
}


@dataclass(frozen=True)
class Peak:
    """The most FLOPs per second that a device can do."""

    flops_per_second: float
    source: str  # the device's name in PEAKS, or `measured`


def device_peak(device: torch.device, precision: str) -> Peak:
    """The table's peak for a known GPU; for any other device that of the fastest matrix product, `measured`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((key for key in PEAKS if re.search(rf"\b{key}\b", name)), None)  # RTX A1000 is not an A100
        if known:
            bf16, fp32 = PEAKS[known]
            if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
                fp32 = max(fp32, bf16 / 2)  # TF32
            return Peak(bf16 if precision == "bf16" else fp32, known)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Peak(measure_peak(device, dtype, torch.get_num_threads()), "measured")


PEAK_SECONDS = 0.2  # that each matrix size is measured for
_SIDES = {"cuda": (4096, 8192), "cpu": (512, 1024, 2048)}


def measure_peak(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """FLOPs per second of the fastest of several sizes of matrix product, with this many threads."""
    return _measure_products(device, dtype, num_threads)[0]


@functools.cache
@torch.no_grad()
def _measure_products(device: torch.device, dtype: torch.dtype, num_threads: int) -> tuple[float, float]:
    """(FLOPs per second of the fastest product, of all products together).

    Each size is measured for PEAK_SECONDS, since a busy machine can make a single product several times slower. Sizes
    whose product alone would take longer are left out.
    """
    best, operations, seconds, before = 0.0, 0.0, 0.0, torch.get_num_threads()
    torch.set_num_threads(num_threads)
    for side in _SIDES.get(device.type, _SIDES["cpu"]):
        count = 2 * side**3
        if best and count / best > PEAK_SECONDS:
            break
        values = torch.ones(side, side, device=device, dtype=dtype)
        product = values @ values
        begun = now = time.perf_counter()
        while now - begun < PEAK_SECONDS:
            torch.mm(values, values, out=product)
            float(product[0, 0])  # waits for the device
            best = max(best, count / (time.perf_counter() - now))
            operations += count
            now = time.perf_counter()
        seconds += now - begun
    torch.set_num_threads(before)
    return best, operations / seconds


THREADS_WARNING_SPEEDUP = 1.3  # times the speed of all threads that one thread must reach for a warning


def threads_text(device: torch.device, dtype: torch.dtype) -> str | None:
    """The warning if one thread alone is faster than all threads of this process together; otherwise None."""
    num_threads = torch.get_num_threads()
    if device.type != "cpu" or num_threads == 1:
        return None
    alone, together = (_measure_products(device, dtype, count)[1] for count in (1, num_threads))
    if alone < THREADS_WARNING_SPEEDUP * together:
        return None
    return (
        f"one thread computes {alone / together:.1f} times as fast as {num_threads} here: other work keeps the cores "
        "busy, and threads wait for each other. compute.num_threads=1 is faster as long as that lasts"
    )
