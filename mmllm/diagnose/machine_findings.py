"""What `mmllm doctor` says of this machine: system, packages, torch, and the files of a checkout.

Nothing that may be missing is imported at the top.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mmllm.diagnose.finding import FAILURES, GIB, Finding, State, attempt

CORE = {
    "accelerate": "training on one or many devices",
    "datasets": "readers of data sets",
    "filelock": "one save at a time",
    "fsspec": "data on other file systems",
    "huggingface_hub": "models of the hub",
    "jinja2": "chat templates",
    "matplotlib": "loss curves, and the fonts of drawn text",
    "numpy": "arrays",
    "omegaconf": "settings",
    "open_clip_torch": "vision towers",
    "packaging": "versions of packages",
    "pillow": "pictures",
    "protobuf": "tokenizer.model files",
    "pyarrow": "parquet and arrow files",
    "pydantic": "checks of settings",
    "pyyaml": "settings",
    "rich": "progress and tables",
    "safetensors": "weights",
    "sentencepiece": "tokenizer.model files",
    "timm": "vision towers of open_clip",
    "tokenizers": "tokenizers",
    "torch": "everything that computes",
    "torchvision": "image transforms",
    "transformers": "language models",
    "typer": "the command",
}
EXTRAS = {
    "demo": {"gradio": "the chat page"},
    "captions": {"imagehash": "pictures that look the same, in captioning jobs"},
    "gguf": {"gguf": "LLMs in GGUF files"},
    "heif": {"pillow-heif": "photos of phones (HEIC)"},
    "lora": {"peft": "LoRA in stage 2"},
    "quant": {"bitsandbytes": "8-bit optimizers, QLoRA"},
    "scale": {"deepspeed": "ZeRO", "ninja": "DeepSpeed's kernels"},
    "bench": {"trl": "side-by-side measurements"},
    "docs": {"mkdocs-material": "the documentation site"},
    "structured": {"llguidance": "answers by a JSON schema or regular expression"},
    "tars": {"webdataset": "tar files of examples"},
    "track": {"tensorboard": "curves in TensorBoard"},
    "trackio": {"trackio": "curves in trackio"},
    "wandb": {"wandb": "curves in Weights & Biases"},
    "dev": {
        "hatchling": "tests of the wheel",
        "hypothesis": "property tests",
        "mypy": "type checks",
        "playwright": "tests of the page",
        "pre-commit": "checks before a commit",
        "pytest": "tests",
        "pytest-timeout": "tests",
        "pytest-xdist": "tests side by side",
        "ruff": "format and lint",
        "types-PyYAML": "type checks",
    },
}
SCENES = Path("data/scenes")
WEIGHTS = Path("weights")


def examine_machine() -> Iterator[Finding]:
    """Findings on everything but a model."""
    yield from _system()
    yield from _packages()
    yield from _torch()
    yield from _files()


def _system() -> Iterator[Finding]:
    yield Finding("system", "python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield Finding("system", "platform", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("system", "cpu cores", "ok", f"{cores} usable of {os.cpu_count()}")
    yield attempt("system", "memory", _memory, otherwise="note")
    yield attempt("system", "free disk", _disk, otherwise="note")


def _memory() -> str:
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.1f} GiB"


def _disk() -> str:
    return f"{shutil.disk_usage(Path.cwd()).free / GIB:.1f} GiB in {Path.cwd()}"


def _packages() -> Iterator[Finding]:
    bounds = _bounds()
    for package, purpose in CORE.items():
        yield package_finding(package, purpose, bounds)
    for extra, packages in EXTRAS.items():
        for package, purpose in packages.items():
            yield package_finding(package, purpose, bounds, extra=extra)


def _bounds() -> dict[str, Any]:
    """The versions that this project needs, by package; empty where the project itself is not installed."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        requirements = [Requirement(line) for line in metadata.requires("mmllm") or []]
    except ImportError:  # also what metadata raises for a package that is not installed
        return {}
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in requirements}


def package_finding(package: str, purpose: str, bounds: Mapping[str, Any], *, extra: str | None = None) -> Finding:
    """The version of a package; for a missing or wrong one, what the package is for and how to install it."""
    area = f"[{extra}]" if extra else "packages"
    missing: State = "note" if extra else "broken"
    install = f'pip install "mmllm[{extra}]"' if extra else "pip install mmllm"
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return Finding(area, package, missing, f"missing: {purpose}; {install}, or `make` in a checkout")
    bound = bounds.get(package.lower().replace("_", "-"))
    if bound is not None and version not in bound:
        return Finding(area, package, missing, f"{version}, but {bound} is needed: {purpose}; {install}")
    return Finding(area, package, "ok", version)


def _torch() -> Iterator[Finding]:
    yield (finding := attempt("torch", "torch", _describe_torch))
    if finding.state != "ok":
        return
    yield attempt("torch", "torchvision", _use_torchvision)
    yield attempt("torch", "gpu", _describe_gpu)
    yield attempt("torch", "bf16", _use_bf16, otherwise="note")


def _describe_torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _use_torchvision() -> str:
    """torch and torchvision are released in pairs; in a wrong pair, torchvision's compiled operators are missing."""
    import torch

    try:
        importlib.import_module("torchvision.ops")
        torchvision = importlib.import_module("torchvision")
        box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        torchvision.ops.nms(box, torch.ones(1), 0.5)
    except FAILURES as error:
        raise RuntimeError(
            f"does not work with torch {torch.__version__}: {error}; install the two versions of requirements.txt"
        ) from error
    return f"{torchvision.__version__} fits torch {torch.__version__}"


def _describe_gpu() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        gpus = ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in names)
        return f"CUDA {torch.version.cuda}: {gpus}"
    if torch.backends.mps.is_available():
        return "MPS"
    built = (
        f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch is built for CPUs"
    )
    return f"none; {built}. Everything works on the CPU"


def _use_bf16() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{'native' if torch.cuda.is_bf16_supported(including_emulation=False) else 'emulated'} on the GPU"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(512, 512, dtype=dtype)
        begun = time.perf_counter()
        for _ in range(3):
            matrix @ matrix
        seconds[dtype] = time.perf_counter() - begun
    speed = seconds[torch.float32] / seconds[torch.bfloat16]
    return f"on the CPU, {speed:.2g} times as fast as fp32 in a small product"


def _files() -> Iterator[Finding]:
    weights = sorted(path.name for path in WEIGHTS.glob("tiny-*") if path.is_dir())
    text = ", ".join(weights) or f"none in {WEIGHTS}/ here; they are part of the checkout"
    yield Finding("files", "tiny weights", "ok" if weights else "note", text)
    splits = [
        split
        for split in ("train", "val", "compositions", "wordings")
        if (SCENES / split / "conversations.json").is_file()
    ]
    text = (
        f"{', '.join(splits)} in {SCENES}" if splits else f"none in {SCENES} here; `mmllm scenes {SCENES}` draws them"
    )
    yield Finding("files", "scenes", "ok" if splits else "note", text)
