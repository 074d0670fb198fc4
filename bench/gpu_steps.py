"""What happens within one optimizer step: waits for the GPU, and matrix products in fp32."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu_losses import NUM_EXAMPLES, stage_settings, write_small

WAITS_SHOWN = 12
# aten's matrix products, convolutions and attentions; a leading `_` stands for every name that begins like it
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_dot_product")
RUNS: dict[str, dict[str, Any]] = {
    "stage 1": {"train": ["projector"], "mix": "captions"},
    "stage 2": {},
    "stage 2, packed": {"packing": "always"},
    "stage 2, LoRA": {"lora": {"rank": 8, "alpha": 16}},
}


class ProductDtypes(TorchDispatchMode):
    """Counts matrix products by the dtype of their first operand, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()  # FLOPs of plain products
        self.wide: Counter[str] = Counter()  # products in fp32, by name and shapes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if any(name == product or (product.startswith("_") and name.startswith(product)) for product in PRODUCTS):
            tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
            operands = tensors[1:] if name in ("addmm", "baddbmm") else tensors
            dtype = str(operands[0].dtype).removeprefix("torch.")
            self.count[dtype] += 1
            if len(operands) == 2 and name != "convolution":
                self.operations[dtype] += 2 * operands[0].numel() * operands[1].shape[-1]
            if dtype == "float32":
                self.wide[f"{name} {' x '.join(str(list(operand.shape)) for operand in operands[:2])}"] += 1
        return func(*args, **(kwargs or {}))


def build_run(config: Any) -> tuple[Any, Iterator[Any]]:
    """(a Run that is ready for `step`, its batches)."""
    from accelerate.state import AcceleratorState

    from mmllm.distributed.ranks import build_accelerator
    from mmllm.stages.registry import build_stage
    from mmllm.training.loop import Run

    AcceleratorState._reset_state(reset_partial_state=True)  # one process makes several runs
    accelerator = build_accelerator(config)
    stage = build_stage(config)
    run = Run(config, stage, accelerator, lambda: build_stage(config))
    return run, run.batches.start(0)


def count_waits(run: Any, step: int, data: Iterator[Any]) -> Counter[str]:
    """The implicit synchronisations of a step with the GPU: how often each file and line waits."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.stepper.step(step, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"
        for warning in caught
        if "synchroniz" in str(warning.message).lower()
    )


def steps(is_smoke: bool) -> None:
    """Prints a row for each kind of run in bf16; then where the host waits, and which products are in fp32."""
    notes = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small(folder, is_smoke)
        print(
            "| run in bf16 | waits of a step | products in bf16 | in fp32 | operations in fp32 |\n|---|---|---|---|---|"
        )
        for title, settings in itertools.islice(RUNS.items(), 1 if is_smoke else None):
            run, data = build_run(stage_settings(folder, "out", **settings, batch_size=NUM_EXAMPLES // 2))
            run.stepper.step(0, data)
            waits = count_waits(run, 1, data) if torch.cuda.is_available() else None
            with ProductDtypes() as products:
                run.stepper.step(2, data)
            num_waits = "not measured: no CUDA" if waits is None else str(sum(waits.values()))
            share = products.operations["float32"] / max(1, sum(products.operations.values()))
            print(
                f"| {title} | {num_waits} | {products.count['bfloat16']} | {products.count['float32']} | {share:.2%} |",
                flush=True,
            )
            if waits:
                places = ", ".join(f"{where} ({times})" for where, times in waits.most_common(WAITS_SHOWN))
                notes.append(f"{title}, the host waits at: {places}")
            if products.wide:
                shapes = ", ".join(f"{what} ({times})" for what, times in products.wide.most_common(WAITS_SHOWN))
                notes.append(f"{title}, in fp32: {shapes}")
    print("\n" + "".join(f"- {note}\n" for note in notes), flush=True)
