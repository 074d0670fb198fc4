"""What a run's settings ask of this machine: packages, a GPU, a compiler. Looked at before anything loads."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import torch

from mmllm.config import BITSANDBYTES_KINDS, ConfigError, RunConfig


def check_machine(config: RunConfig) -> None:
    """Raises ConfigError for what is missing here, with the setting that asks for it and what to do."""
    kind = config.optim.kind
    if kind in BITSANDBYTES_KINDS:
        _need_package("bitsandbytes", "'mmllm[quant]'", f"optim.kind={kind}")
    if kind.startswith("paged_") and not torch.cuda.is_available():
        raise ConfigError(
            f"optim.kind={kind} pages its state between GPU and main memory, and this machine shows no CUDA GPU; use "
            f"optim.kind={kind.removeprefix('paged_')}"
        )
    if config.optim.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ConfigError(
            "optim.compile needs a C++ compiler, and there is neither g++ nor clang++ on the PATH, nor CXX in the "
            "environment; install one (Debian: apt-get install g++), or leave it out"
        )
    if config.optim.liger:
        if not torch.cuda.is_available():
            raise ConfigError("optim.liger: its kernels run on a CUDA GPU, and this machine shows none; leave it out")
        _need_package("liger_kernel", "liger-kernel", "optim.liger")
    lora = getattr(config, "lora", None)
    if lora or getattr(config, "vision_lora", None):
        _need_package("peft", "'mmllm[lora]'", "lora" if lora else "vision_lora")
    if lora and lora.quantise:
        _need_package("bitsandbytes", "'mmllm[quant]'", f"lora.quantise={lora.quantise}")


def _need_package(package: str, install: str, setting: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"{setting} needs the package {package}: pip install {install}, or leave it out")
