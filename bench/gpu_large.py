"""Speed and memory at the shapes of LLaVA-1.5-7B, beside the forecast of `mmllm plan`; and a small model beside others.

The 7B LLM has a config and a tokenizer but no weights on disk: random ones are made on the device, in seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from bench.gpu_losses import SMOKE, stage_settings
from bench.gpu_steps import build_run
from bench.training import OURS, differences, measure, metrics_of, show
from bench.workload import QUICK, SIZES, Size, write_language_config, write_parts, write_workload

STEPS = 3  # timed, after one that is not
GIB = 2**30
BYTES_WHOLE = 16  # of a trained parameter in fp32: the weight, its gradient, AdamW's two moments
ACTIVATION_SHARE = 0.12  # of the GPU's memory, for recomputed layers and logits
BESIDE = ("ours", "Trainer", "plain loop")
LORA = {"lora": {"rank": 64, "alpha": 128}, "dtype": "bf16", "batch_size": 8}
WHOLE = {"gradient_checkpointing": True, "batch_size": 4}
STAGE1 = {"stage": "stage1", "train": ["projector"], "mix": "captions", "dtype": "bf16", "batch_size": 16}
RUNS: dict[str, dict[str, Any]] = {
    "stage1": STAGE1,
    "stage1-packed": {**STAGE1, "packing": "always"},
    "lora": LORA,
    "lora-packed": {**LORA, "packing": "always"},
    "whole": WHOLE,
    "whole-packed": {**WHOLE, "packing": "always"},
}
COLUMNS = ("run", "LLM's layers", "tokens/s", "samples/s", "MFU", "padding", "peak GiB", "plan said", "build s")


def fitting_layers(size: Size, memory_bytes: float) -> int:
    """The number of LLM layers that can be trained whole, in fp32 with AdamW, on a device with this memory."""
    layer_parameters = 4 * size.width**2 + 3 * size.width * size.llm["intermediate_size"]
    embedding = size.vocab_size * size.width
    left = memory_bytes * (1 - ACTIVATION_SHARE) - BYTES_WHOLE * embedding - 2 * GIB  # the tower, in fp32
    return max(1, min(size.layers, int(left / (BYTES_WHOLE * layer_parameters))))


@contextlib.contextmanager
def _random_weights_on(device: str) -> Iterator[None]:
    """LlamaForCausalLM.from_pretrained reads the config alone and makes random weights on the device."""
    from transformers import LlamaForCausalLM

    def draw(folder: str, *, dtype: torch.dtype, attn_implementation: str | None = None, **named: Any) -> Any:
        config = LlamaForCausalLM.config_class.from_pretrained(folder)
        with torch.device(device):
            model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        return (model, {"missing_keys": set()}) if named.get("output_loading_info") else model

    with patch.object(LlamaForCausalLM, "from_pretrained", draw):
        yield


def _release() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _timed(config: Any) -> tuple[dict[str, float], float, float]:
    """(throughput as the run counts it, peak bytes, seconds until the first step had ended)."""
    begun = time.perf_counter()
    run, data = build_run(config)
    run.stepper.step(0, data)
    built = time.perf_counter() - begun
    _synchronize()
    run.throughput.metrics()
    for step in range(1, STEPS + 1):
        run.stepper.step(step, data)
    _synchronize()
    throughput = run.throughput.metrics()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return throughput, float(peak), built


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def large(name: str, is_smoke: bool) -> None:
    """One run: the forecast of `mmllm plan`, then the measured steps."""
    from mmllm.stages.plan import make_plan

    settings = RUNS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SMOKE if is_smoke else SIZES["7b"]
    if settings.get("gradient_checkpointing"):
        memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 100 * GIB
        size = dataclasses.replace(size, layers=fitting_layers(size, memory))
    settings = {**settings, "steps": STEPS + 1, **({"batch_size": 2, "precision": "fp32"} if is_smoke else {})}
    with tempfile.TemporaryDirectory() as place, _random_weights_on(device):
        folder = Path(place)
        torch.manual_seed(0)
        write_parts(folder, size, num_rows=settings["batch_size"] * (STEPS + 2))
        write_language_config(folder / "language", size)
        save_file(
            {"drawn": torch.zeros(1)}, str(folder / "language" / "model.safetensors")
        )  # the folder must hold a weight file
        config = stage_settings(folder, "out", **settings)
        _release()
        plan = make_plan(config)
        _release()
        throughput, peak, built = _timed(config)
        _release()
    forecast = f"{plan.memory.total / GIB:.3g}" if plan.memory else "does not fit"
    measured = f"{peak / GIB:.3g}" if peak else "not measured: no CUDA"
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    print(
        f"| {name} | {size.layers} of {(SMOKE if is_smoke else SIZES['7b']).layers} "
        f"| {throughput['tokens_per_second']:.0f} | {throughput['samples_per_second']:.2f} "
        f"| {throughput.get('mfu', 0):.1%} | {throughput['padding']:.1%} | {measured} | {forecast} "
        f"| {built:.0f} |\n", flush=True,
    )  # fmt: skip


def beside_others(is_smoke: bool) -> None:
    """Stage 2 at the shapes of SmolLM2-135M and CLIP-L: ours, transformers' Trainer, a plain loop."""
    name = "quick" if is_smoke else "smollm"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_workload(folder, QUICK if is_smoke else SIZES[name])
        names = BESIDE[:1] if is_smoke else BESIDE
        results = measure(folder, name, "stage2", names=names)
    metrics = {contender: metrics_of(result) for contender, result in results.items()}
    show(f"stage2, {name}", metrics)
    if not differences(metrics) and len(metrics) > 1:
        best = max(values["samples/s"] for contender, values in metrics.items() if contender != OURS)
        print(f"\nOurs makes {metrics[OURS]['samples/s'] / best:.2f} times the samples of the best of the others.\n")
