"""Checks, before anything loads, that this machine has what a run's settings need, and resolves the precision."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import torch

from mmllm.config import BITSANDBYTES_KINDS, ConfigError, RunConfig
from mmllm.config.file import saved_settings
from mmllm.kernels.precision import multiplies_bf16


def check_machine(config: RunConfig) -> None:
    """Raises ConfigError if this machine lacks something; the error names the setting that needs it and the remedy."""
    kind = config.optim.kind
    if kind in BITSANDBYTES_KINDS:
        _need_package("bitsandbytes", "'mmllm[quant]'", f"optim.kind={kind}")
    if kind.startswith("paged_") and not torch.cuda.is_available():
        raise ConfigError(
            f"optim.kind={kind} pages its state between GPU and main memory, and this machine shows no CUDA GPU; use "
            f"optim.kind={kind.removeprefix('paged_')}"
        )
    if config.compute.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ConfigError(
            "compute.compile needs a C++ compiler, and there is neither g++ nor clang++ on the PATH, nor CXX in the "
            "environment; install one (Debian: apt-get install g++), or leave it out"
        )
    if config.compute.liger:
        if not torch.cuda.is_available():
            raise ConfigError("compute.liger: its kernels run on a CUDA GPU, and this machine shows none; leave it out")
        _need_package("liger_kernel", "liger-kernel", "compute.liger")
    lora = getattr(config, "lora", None)
    if lora or getattr(config, "vision_lora", None):
        _need_package("peft", "'mmllm[lora]'", "lora" if lora else "vision_lora")
    if lora and lora.quantise:
        _need_package("bitsandbytes", "'mmllm[quant]'", f"lora.quantise={lora.quantise}")


def resolve_precision(config: RunConfig, begun: str | None = None) -> RunConfig:
    """The settings with `compute.precision: auto` resolved: bf16 if this machine multiplies in bf16, else fp32.

    `begun` holds the dumped settings of a run to resume, which keeps the precision that it began with.
    """
    if config.compute.precision != "auto":
        return config
    precision = "bf16" if multiplies_bf16(_device()) else "fp32"
    if begun is not None:
        precision = str(saved_settings(begun).get("compute", {}).get("precision", precision))
    return config.model_copy(update={"compute": config.compute.model_copy(update={"precision": precision})})


def is_slow_in_bf16(device: torch.device | None = None) -> bool:
    """Whether a device is a CPU without bf16 instructions; default: the device that a run gets on this machine."""
    device = device or _device()
    return device.type == "cpu" and not multiplies_bf16(device)


def slow_precision_text(config: RunConfig, device: torch.device) -> str | None:
    """The warning if `compute.precision` is bf16 but the device is slower in bf16 than in fp32; otherwise None."""
    if config.compute.precision != "bf16" or not is_slow_in_bf16(device):
        return None
    return (
        "compute.precision=bf16: this CPU has no instructions for bf16, so a step takes several times as long as in "
        "fp32; compute.precision=auto takes the faster one"
    )


def _device() -> torch.device:
    """The device that accelerate will put the model on."""
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _need_package(package: str, install: str, setting: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"{setting} needs the package {package}: pip install {install}, or leave it out")
