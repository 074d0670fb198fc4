"""Floating-point operations of a training step, and what the device could do at most: model and hardware FLOPs.

A weight of `n` numbers costs `2 n` operations a token in the forward, `2 n` for the gradient of its input where that is
asked for, and `2 n` for its own gradient where it is trained. *Model* FLOPs are those of the tokens that stand in the
text, forward and backward: MFU, https://arxiv.org/abs/2204.02311. *Hardware* FLOPs count padding, rows of the head that
teach nothing, and layers that gradient checkpointing computes again: HFU, https://arxiv.org/abs/2205.05198.
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

LINEAR_ONLY = "its weights alone are counted (6 N T), not what its layers do between tokens"


@dataclass(frozen=True)
class Flops:
    """Operations of one batch, forward and backward; and how many of them are in bf16, the others being in fp32."""

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
    """Operations of the forward and of the backward for one token, or for one view of the tower."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def both(self) -> float:
        return self.forward + self.backward


def _weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, int]]:
    """(name, weight, numbers in it) of all that tokens are multiplied with: no embeddings, norms or biases."""
    for prefix, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            continue
        for name, parameter in part.named_parameters(prefix, recurse=False):
            if parameter.ndim < 2:
                continue
            is_linear = isinstance(part, nn.Linear) and name.endswith(".weight")
            # a quantised weight is packed: its shape says nothing, its layer does
            yield name, parameter, part.in_features * part.out_features if is_linear else parameter.numel()


def _active_share(config: Any) -> float:
    """The share of a mixture's experts that a token is sent to."""
    active = getattr(config, "num_experts_per_tok", None)
    known = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    total = next((count for count in known if count), None)
    return active / total if active and total else 1.0


def _is_of_experts(name: str, parameter: nn.Parameter) -> bool:
    return "experts" in name.split(".") and (parameter.ndim == 3 or name.endswith(".weight"))


def _head_widths(config: Any) -> tuple[float, float] | None:
    """Widths of all heads' keys and of all their values; None where the layers are no attention."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads or not getattr(config, "num_hidden_layers", None):
        return None
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "qk_head_dim", None) or width  # DeepSeek's latent attention has two widths
    return heads * keys, heads * (getattr(config, "v_head_dim", None) or width)


def _windows(config: Any) -> list[int | None]:
    """How far back each attention layer looks; None: to the first token. Empty where a layer is no attention."""
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
    """Tokens of each conversation; of packed rows too, where positions begin again at each."""
    positions = getattr(batch, "position_ids", None)
    if positions is None or positions.ndim != 2:
        return [int(length) for length in batch.attention_mask.sum(1)]
    lengths: list[int] = []
    for row, mask in zip(positions, batch.attention_mask != 0, strict=True):
        starts = torch.nonzero(row[mask] == 0).flatten().tolist()
        lengths += [end - start for start, end in zip(starts, [*starts[1:], int(mask.sum())], strict=True)]
    return lengths


def _computes_in_bf16(module: nn.Module) -> bool:
    """Whether most products of a part are in bf16 without autocast: a frozen LLM computes in what it is held in."""
    numbers = {True: 0, False: 0}
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2 and not isinstance(part, nn.Embedding):
            dtype = weight.dtype if weight.is_floating_point() else getattr(part, "compute_dtype", None)  # quantised
            numbers[dtype == torch.bfloat16] += weight.numel()
    return numbers[True] > numbers[False]


class StepFlops:
    """What a batch costs under a model with its frozen and trained parts as they are now. Build it before DDP wraps.

    `precision` is that of autocast: `bf16` computes all products in it.
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
        in_pictures = tower_trained or any(p.requires_grad for p in model.projector.parameters())
        embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
        reached = in_pictures or embedding.weight.requires_grad  # whether gradients flow through all of the LLM
        self.token, behind = _language_cost(language_model, head, config, reached=reached)
        self.attends_backward = behind
        size = sum(count for _, _, count in _weights(head))
        trained = sum(count for _, weight, count in _weights(head) if weight.requires_grad)
        self.head = _Cost(2 * size, 2 * (size if behind else 0) + 2 * trained)
        self.view = _measured(model.vision_tower, _blank_view(model), False)
        self.view_again = self.view.forward if recomputes_vision and tower_trained else 0.0
        patches = (1, model.vision_tower.num_patches, model.vision_tower.width)
        self.projected = _measured(model.projector, torch.zeros(patches, device="meta"), tower_trained)

    def _attention(self, lengths: Sequence[int], *, windowed: bool) -> float:
        """Forward: every token with every one in reach, scores and sums. Causal halves are counted whole, as usual."""
        if self.widths is None:
            return 0.0
        pairs = 0
        for window in self.windows:
            reach = window if windowed and window else None
            pairs += sum(length * min(length, reach or length) for length in lengths)
        return float(2 * pairs * sum(self.widths))

    def _of_language(self, lengths: Sequence[int], rows: int, *, again: bool, windowed: bool) -> float:
        attention = self._attention(lengths, windowed=windowed)
        passes = 1 + (2 if self.attends_backward else 0) + (1 if again else 0)
        linear = self.token.both + (self.token.forward if again else 0.0)
        return float(linear * sum(lengths) + attention * passes + self.head.both * rows)

    def _num_views(self, batch: Batch) -> float:
        if batch.image_features is not None:
            return len(batch.image_features)
        if batch.pixel_values is None:
            return 0
        if self.layout.kind == "native":  # views of many sizes: as many as their tokens would make
            return float(int((batch.input_ids == self.image_token_id).sum()) / self.layout.num_view_tokens)
        return len(batch.pixel_values)

    def count(self, batch: Batch) -> Flops:
        """Forward and backward of one micro-batch; the optimizer's own work is left out, as is usual."""
        lengths, supervised, positions = row_lengths(batch), batch.num_supervised, batch.input_ids.numel()
        padded = [batch.input_ids.shape[1]] * len(batch.input_ids)
        if len(lengths) != len(padded):  # packed: attention stays within a conversation
            padded = lengths
        views = self._num_views(batch)
        encoded = 0 if batch.image_features is not None else views
        seen, projected = self.view.both * encoded, self.projected.both * views
        again = self.recomputes_language and self.attends_backward
        model = self._of_language(lengths, supervised, again=False, windowed=True)
        rows = supervised if self.plain_head else positions
        hardware = self._of_language(padded, rows, again=again, windowed=False)
        hardware += (positions - sum(padded)) * self.token.both
        costs = ((model, hardware), (seen, seen + self.view_again * encoded), (projected, projected))
        counted = [Flops(*cost, *(cost if in_bf16 else ())) for cost, in_bf16 in zip(costs, self.in_bf16, strict=True)]
        return sum(counted, Flops())


def _language_cost(language_model: Any, head: Any, config: Any, *, reached: bool) -> tuple[_Cost, bool]:
    """Cost of a token in the layers, without head; and whether gradients flow behind the last of them.

    Gradients of a weight's input are made where something before it is trained: with LoRA on the LLM alone, not in
    front of the first adapter.
    """
    share, forward, backward = _active_share(config), 0.0, 0.0
    of_head = {id(parameter) for parameter in head.parameters()}
    for name, weight, count in _weights(language_model):
        if id(weight) in of_head:
            continue
        used = count * (share if _is_of_experts(name, weight) else 1.0)
        forward += 2 * used
        backward += 2 * used * (int(reached) + int(weight.requires_grad))
        reached = reached or weight.requires_grad
    return _Cost(forward, backward), reached


def _blank_view(model: Any) -> Tensor:
    side = model.vision_tower.spec.image_size_px
    return torch.zeros(1, 3, side, side, device="meta")


def _measured(module: nn.Module, given: Tensor, needs_gradient: bool) -> _Cost:
    """What torch's own counter finds in one run of any module, on no memory and in no time: on the meta device."""
    from torch.func import functional_call
    from torch.utils.flop_counter import FlopCounterMode

    def on_meta(values: Any) -> dict[str, Tensor]:
        found = {name: torch.empty_like(value, device="meta") for name, value in values}
        return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}

    weights = on_meta(module.named_parameters())
    for name, parameter in module.named_parameters():
        weights[name].requires_grad_(parameter.requires_grad)
    trained = any(weight.requires_grad for weight in weights.values())
    given = given.requires_grad_(needs_gradient)
    modes = {one: one.training for one in module.modules()}
    module.eval()  # a layer in training may be one that is recomputed, and then without these weights
    # gradients on, for torch's fused inference kernel of a frozen encoder is one that the counter does not know
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        probe = given if trained or needs_gradient else given.detach().requires_grad_()
        output = functional_call(module, {**weights, **on_meta(module.named_buffers())}, (probe,))
        forward = counter.get_total_flops()
        if (trained or needs_gradient) and output.requires_grad:
            output.sum().backward()
    for one, was_training in modes.items():
        one.training = was_training
    return _Cost(float(forward), float(counter.get_total_flops() - forward))


# Dense operations a second in bf16 (fp16 where there is no bf16) with sums in fp32, and in fp32 without tensor cores.
# As in the vendors' data sheets and architecture papers: H100, H200, B200, A100, L40S, L4, A10, RTX 6000, T4, V100:
# https://www.nvidia.com/en-us/data-center/ ; GeForce: https://images.nvidia.com/aem-dam/Solutions/geforce/ada/
# nvidia-ada-gpu-architecture.pdf ; AMD: https://www.amd.com/en/products/accelerators/instinct.html
# The first name that stands in the device's own counts.
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
    """The most operations a second that a device can do."""

    flops_per_second: float
    source: str  # the device's name in PEAKS, or `measured`


def device_peak(device: torch.device, precision: str) -> Peak:
    """From the table for a known GPU; for any other device the most that matrix products reach, `measured`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((key for key in PEAKS if re.search(rf"\b{key}\b", name)), None)  # RTX A1000 is no A100
        if known:
            bf16, fp32 = PEAKS[known]
            if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
                fp32 = max(fp32, bf16 / 2)  # TF32
            return Peak(bf16 if precision == "bf16" else fp32, known)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Peak(measure_peak(device, dtype, torch.get_num_threads()), "measured")


PEAK_SECONDS = 0.2  # of measuring, for each size
_SIDES = {"cuda": (4096, 8192), "cpu": (512, 1024, 2048)}


def measure_peak(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """Operations a second of the fastest matrix product of several sizes, with this many threads."""
    return _measure_products(device, dtype, num_threads)[0]


@functools.cache
@torch.no_grad()
def _measure_products(device: torch.device, dtype: torch.dtype, num_threads: int) -> tuple[float, float]:
    """Operations a second of the fastest product, and of all of them together.

    Each size is tried for a while, since a busy machine makes a single product several times too slow. One that would
    take too long is left out.
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


FEWER_ARE_FASTER = 1.3  # times what all threads do, from which on it is said that one does more


def threads_text(device: torch.device, dtype: torch.dtype) -> str | None:
    """What to say where the threads of this process do less together than one of them alone."""
    num_threads = torch.get_num_threads()
    if device.type != "cpu" or num_threads == 1:
        return None
    alone, together = (_measure_products(device, dtype, count)[1] for count in (1, num_threads))
    if alone < FEWER_ARE_FASTER * together:
        return None
    return (
        f"one thread computes {alone / together:.1f} times as fast as {num_threads} here: other work keeps the cores "
        "busy, and threads wait for each other. compute.num_threads=1 is faster as long as that lasts"
    )
