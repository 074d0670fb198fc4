"""Whether CUDA gives the losses of the CPU, in each precision, attention, with compiled layers and packed rows."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.workload import QUICK, write_checkpoint, write_language, write_parts

NUM_EXAMPLES = 8
BF16_LIMIT, FP32_LIMIT = (
    0.02,
    1e-4,
)  # relative, of the loss and of its gradient norm; in fp32 only the order of additions differs
SHAPES = dataclasses.replace(
    QUICK, width=256, layers=4, heads=4, vocab_size=2048
)  # heads of 64, which the kernels need
SMOKE = dataclasses.replace(QUICK, width=64, heads=1, tower_width=64, tower_layers=2, side_px=32, vocab_size=1024)

# name: (settings, whether only torch's flash kernel may compute attention)
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "fp32, eager": ({"attention": "eager", "precision": "fp32"}, False),
    "fp32": ({"precision": "fp32"}, False),
    "fp32, packed": ({"precision": "fp32", "packing": "always"}, False),
    "bf16, eager": ({"attention": "eager"}, False),
    "bf16": ({}, False),
    "bf16, packed": ({"packing": "always"}, False),
    "bf16, torch's flash kernel": ({}, True),
    "bf16, recomputed layers": ({"gradient_checkpointing": True}, False),
    "bf16, flash_attention_2": ({"attention": "flash_attention_2"}, False),
    "bf16, flash_attention_2, packed": ({"attention": "flash_attention_2", "packing": "always"}, False),
    "bf16, compiled": ({"compile": True}, False),
    "fp32, flex_attention": ({"attention": "flex_attention", "precision": "fp32"}, False),
    "bf16, flex_attention, packed": ({"attention": "flex_attention", "packing": "always"}, False),
}
SLOW_ON_CPU = ("compile", "flex_attention")  # these compile for minutes on a CPU
IN_SMOKE = ("fp32, packed", "bf16, torch's flash kernel", "bf16, flash_attention_2", "bf16, compiled")


def write_small(folder: Path, is_smoke: bool) -> None:
    """Writes a small tower, a small LLM and conversations, of which each run here takes the first."""
    size = SMOKE if is_smoke else SHAPES
    torch.manual_seed(0)
    write_parts(folder, size, num_rows=4 * NUM_EXAMPLES)
    write_language(folder / "language", size)


def stage_settings(folder: Path, out: str, **changes: Any) -> Any:
    """The config of stage 2 on the workload in this folder. The LLM is trained whole unless `changes` has `lora`."""
    from mmllm.config import StageConfig

    train = changes.get("train", ["projector", "language"])
    language = {"source": str(folder / "language")}
    language |= {name: changes[name] for name in ("attention", "dtype") if name in changes}
    optim = {
        "learning_rates": dict.fromkeys(train, 2e-5), "max_steps": changes.get("steps", 4),
        "warmup_fraction": 0, "decay_fraction": 0,
    }  # fmt: skip
    compute = {"batch_size": changes.get("batch_size", NUM_EXAMPLES), "precision": "bf16"}
    compute |= {name: changes[name] for name in ("precision", "compile", "gradient_checkpointing") if name in changes}
    values = {
        "stage": changes.get("stage", "stage2"),
        "out": str(folder / out),
        "train": train,
        "model": {
            "vision": {"source": f"local-dir:{folder / 'vision'}", "feature_layer": -2, "image_mode": "stretch"},
            "projector": {"kind": "mlp"}, "language": language, "template": "tokenizer",
        },
        "data": {
            "train": [{"path": str(folder / f"{changes.get('mix', 'instructions')}.json")}],
            "packing": changes.get("packing", "never"),
        },
        "compute": compute, "optim": optim,
        **({"lora": changes["lora"]} if "lora" in changes else {}),
    }  # fmt: skip
    return StageConfig.model_validate(values)


@contextlib.contextmanager
def _kernel(*, flash_only: bool) -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]) if flash_only else contextlib.nullcontext():
        yield


def loss_and_norm(config: Any, device: str, *, flash_only: bool = False) -> tuple[float, float]:
    """(loss per supervised token of the first examples, norm of its gradient), without an update."""
    from mmllm.stages.registry import build_stage

    stage: Any = build_stage(config)
    stage.model.to(device)
    batch = stage.batch(list(range(NUM_EXAMPLES)))
    is_bf16 = config.compute.precision == "bf16"
    with torch.autocast(device, torch.bfloat16, enabled=is_bf16), _kernel(flash_only=flash_only):
        loss = stage.module(batch) / batch.num_supervised
        loss.backward()
    gradients = [parameter.grad for parameter in stage.model.parameters() if parameter.grad is not None]
    return float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients))


def reason_to_skip(settings: dict[str, Any], device: str) -> str | None:
    """Why a variant cannot run on this machine; None where it can."""
    from transformers.utils import is_flash_attn_2_available

    if settings.get("attention") == "flash_attention_2" and not is_flash_attn_2_available():
        return "flash-attn is not installed"
    if device == "cpu" and any(word in {*settings, *settings.values()} for word in SLOW_ON_CPU):
        return "compiles for minutes on a CPU"
    return None


def losses(is_smoke: bool) -> None:
    """Prints a row for each variant; then checks the golden answers, which were given on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_small(folder, is_smoke)
        write_checkpoint(folder)
        true_loss, true_norm = loss_and_norm(stage_settings(folder, "out", precision="fp32"), "cpu")
        print(f"CPU, fp32, padded: loss {true_loss:.6f}, norm of the gradient {true_norm:.6f}.\n")
        print("| variant | loss | off by | norm off by | allowed | verdict | seconds |\n|---|---|---|---|---|---|---|")
        for variant, (settings, flash_only) in VARIANTS.items():
            if is_smoke and variant not in IN_SMOKE:
                continue
            if reason := reason_to_skip(settings, device):
                print(f"| {variant} | left out: {reason} | | | | | |", flush=True)
                continue
            begun = time.perf_counter()
            config = stage_settings(folder, "out", **settings)
            loss, norm = loss_and_norm(config, device, flash_only=flash_only)
            apart, norm_apart = abs(loss / true_loss - 1), abs(norm / true_norm - 1)
            allowed = FP32_LIMIT if config.compute.precision == "fp32" else BF16_LIMIT
            verdict = "same" if max(apart, norm_apart) <= allowed else "DIFFERS"
            print(
                f"| {variant} | {loss:.6f} | {apart:.1e} | {norm_apart:.1e} | {allowed:.0e} | {verdict} "
                f"| {time.perf_counter() - begun:.0f} |", flush=True,
            )  # fmt: skip
        golden(folder / "checkpoint", device)


def golden(folder: Path, device: str) -> None:
    """Checks a checkpoint whose golden answers were given on the CPU in fp32, as `mmllm doctor` does."""
    from mmllm.checkpoint.folder import load_checkpoint
    from mmllm.checkpoint.golden import verify_golden

    print("\n| golden answers in | verdict | what was found |\n|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        model, processor, _ = load_checkpoint(folder)
        model.eval().to(device, dtype)
        for check in verify_golden(model, processor, folder):
            if check.part == "answers":
                verdict = "same" if check.holds else "DIFFERS"
                print(f"| {str(dtype).removeprefix('torch.')} | {verdict} | {check.text} |")
    print(flush=True)
