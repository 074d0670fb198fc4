"""`mmllm doctor`: what is installed, what works here, what is missing and why. Imports nothing that may be missing."""

from __future__ import annotations

import importlib
import json
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

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
    "gguf": {"gguf": "LLMs in GGUF files"},
    "heif": {"pillow-heif": "photos of phones (HEIC)"},
    "lora": {"peft": "LoRA in stage 2"},
    "quant": {"bitsandbytes": "8-bit optimizers, QLoRA"},
    "scale": {"deepspeed": "ZeRO", "ninja": "DeepSpeed's kernels"},
    "bench": {"trl": "side-by-side measurements"},
    "docs": {"mkdocs-material": "the documentation site"},
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
GIB = 2**30
FILE_WIDTH = 140  # of the table where no terminal gives one
# What broken packages, files and models raise; each becomes a line of the report.
FAILURES = (ImportError, OSError, RuntimeError, ValueError, KeyError, AttributeError)

State = Literal["ok", "note", "broken"]  # a note is worth knowing; only what is broken makes the command fail


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    area: str
    name: str
    state: State
    text: str


def examine(model: Path | None, *, as_json: bool) -> bool:
    """Prints all findings, also about a checkpoint if one is given; False where something needed is broken."""
    findings = [*_system(), *_packages(), *_torch(), *_files()]
    if model is not None:
        findings += _model(model)
    works = not any(finding.state == "broken" for finding in findings)
    if as_json:
        print(json.dumps({"works": works, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print(findings, works)
    return works


def _attempt(area: str, name: str, look: Callable[[], str], *, otherwise: State = "broken") -> Finding:
    """What `look` says, or why it could not look."""
    try:
        return Finding(area, name, "ok", look())
    except FAILURES as error:
        return Finding(area, name, otherwise, str(error) or type(error).__name__)


def _system() -> Iterator[Finding]:
    yield Finding("system", "python", "ok", f"{platform.python_version()} at {sys.executable}")
    yield Finding("system", "platform", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("system", "cpu cores", "ok", f"{cores} usable of {os.cpu_count()}")
    yield _attempt("system", "memory", _memory, otherwise="note")
    yield _attempt("system", "free disk", _disk, otherwise="note")


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
    """The versions that this project asks for, by package; none where it is not installed as a package itself."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        wanted = [Requirement(line) for line in metadata.requires("mmllm") or []]
    except ImportError:  # also what metadata raises for a package that is not installed
        return {}
    return {canonicalize_name(one.name): one.specifier for one in wanted}


def package_finding(package: str, purpose: str, bounds: Mapping[str, Any], *, extra: str | None = None) -> Finding:
    """The version of a package, or what it would be for and how to install it."""
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
    yield (found := _attempt("torch", "torch", _describe_torch))
    if found.state != "ok":
        return
    yield _attempt("torch", "torchvision", _use_torchvision)
    yield _attempt("torch", "gpu", _describe_gpu)
    yield _attempt("torch", "bf16", _use_bf16, otherwise="note")


def _describe_torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _use_torchvision() -> str:
    """torch and torchvision are released in pairs; with a wrong partner the compiled operators are not there."""
    import torch

    try:
        importlib.import_module("torchvision.ops")
        torchvision = importlib.import_module("torchvision")
        box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        torchvision.ops.nms(box, torch.ones(1), 0.5)
    except FAILURES as error:
        raise RuntimeError(
            f"does not work with torch {torch.__version__}: {error}; install the two as requirements.txt pairs them"
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
    return (
        f"on the CPU, {seconds[torch.float32] / seconds[torch.bfloat16]:.1f} times as fast as fp32 in a small product"
    )


def _files() -> Iterator[Finding]:
    weights = sorted(path.name for path in WEIGHTS.glob("tiny-*") if path.is_dir())
    text = ", ".join(weights) or f"none in {WEIGHTS}/ here; they are part of the checkout"
    yield Finding("files", "tiny weights", "ok" if weights else "note", text)
    splits = [split for split in ("train", "val", "compositions") if (SCENES / split / "conversations.json").is_file()]
    text = (
        f"{', '.join(splits)} in {SCENES}" if splits else f"none in {SCENES} here; `mmllm scenes {SCENES}` draws them"
    )
    yield Finding("files", "scenes", "ok" if splits else "note", text)


def _model(folder: Path) -> Iterator[Finding]:
    """Manifest, hashes, weights, golden answers and one new answer; what follows from a failure is not tried."""
    steps: tuple[tuple[str, Callable[[Path, dict[str, Any]], str]], ...] = (
        ("manifest", _read_manifest),
        ("files", _verify_files),
        ("loading", _load_engine),
    )
    loaded: dict[str, Any] = {}
    for name, step in steps:
        finding = _attempt("model", name, lambda step=step: step(folder, loaded))  # type: ignore[misc]
        yield finding
        if finding.state == "broken" and name != "files":
            return
    yield from _golden(folder, loaded["engine"])
    yield _attempt("model", "answer", lambda: _answer(loaded["engine"]))


def _read_manifest(folder: Path, loaded: dict[str, Any]) -> str:
    from mmllm.checkpoint.folder import read_manifest

    manifest = read_manifest(folder)
    versions = manifest.get("versions", {})
    based = f"; an adapter on {manifest['base']['source']}" if "base" in manifest else ""
    origin = ", ".join(f"{part}: {source}" for part, source in manifest.get("origin", {}).items()) or "unknown origin"
    written = f"written with transformers {versions.get('transformers', '?')}"
    return f"{folder}: format {manifest['format_version']}; {origin}{based}; {written}"


def _verify_files(folder: Path, loaded: dict[str, Any]) -> str:
    from mmllm.checkpoint.folder import read_manifest, verify_files

    if changed := verify_files(folder):
        raise ValueError(f"changed since they were written: {', '.join(changed)}; copy the folder again")
    return f"{len(read_manifest(folder)['files'])} files are what they were when they were written"


def _load_engine(folder: Path, loaded: dict[str, Any]) -> str:
    import torch

    from mmllm.inference.engine import Engine

    engine = loaded["engine"] = Engine.load(folder, verify=False)
    parameters = dict(engine.model.named_parameters())
    broken = [name for name, value in parameters.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ValueError(
            f"not all numbers are finite in {', '.join(broken[:3])} ({len(broken)} tensors); train it again"
        )
    count = sum(value.numel() for value in parameters.values())
    layout = engine.processor.image_layout
    unit = f"a view ({layout.kind})" if layout.has_newline else "a picture"
    return f"{count / 1e6:,.2f}M parameters, {layout.num_view_tokens} image tokens {unit}; {_dtypes(folder, engine)}"


def _dtypes(folder: Path, engine: Any) -> str:
    """The dtype that each part runs in here, and where it is another one, the dtype that it is stored in."""
    from mmllm.checkpoint.folder import stored_dtypes

    stored, told = stored_dtypes(folder), []
    for part, dtype in engine.model.part_dtypes().items():
        name, kept = (str(one).removeprefix("torch.") for one in (dtype, stored[part]))
        told.append(f"{part} in {name}" + (f" (stored in {kept})" if kept != name else ""))
    return ", ".join(told)


def _golden(folder: Path, engine: Any) -> Iterator[Finding]:
    """Whether prompts, pictures and answers are what they were when the checkpoint was saved, a line for each."""
    from mmllm.checkpoint.golden import verify_golden

    try:
        checks = verify_golden(engine.model, engine.processor, folder)
    except FAILURES as error:
        yield Finding("model", "golden answers", "broken", str(error) or type(error).__name__)
        return
    for check in checks:
        yield Finding("model", f"golden {check.part}", "ok" if check.holds else "broken", check.text)
    if not checks:
        text = "none: it was saved by an older version, so only the hashes of its files tell whether it has changed"
        yield Finding("model", "golden answers", "note", text)


def _answer(engine: Any) -> str:
    """One question about a drawn picture. Whether the answer is right is what `mmllm eval` measures."""
    from mmllm.chat.conversation import Conversation
    from mmllm.inference.engine import Sampling
    from mmllm.scenes.draw import draw
    from mmllm.scenes.questions import ask_attribute
    from mmllm.scenes.world import Scene, Thing

    rng = random.Random(0)
    scene = Scene("objects", things=(Thing("circle", "red", "large", "center"),))
    turn = ask_attribute("color")(scene, rng)[0]
    reply = engine.reply(Conversation().ask(turn.question, [draw(scene, rng)]), Sampling(max_new_tokens=16))
    if not reply.num_new_tokens:
        raise ValueError(f"no token came out for {turn.question!r}")
    speed = reply.num_new_tokens / max(reply.seconds, 1e-9)
    return (
        f"{turn.question!r} about a drawn {scene.things[0].color} circle: {reply.text!r}, "
        f"{speed:.0f} tokens a second; `mmllm eval` says how often a model is right"
    )


def _print(findings: list[Finding], works: bool) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    styles = {"ok": "green", "note": "yellow", "broken": "bold red"}
    table = Table("", "", "", Column(overflow="fold"), show_header=False)
    area = ""
    for finding in findings:
        if finding.area != area:
            table.add_section()
        shown = finding.area if finding.area != area else ""
        area = finding.area
        table.add_row(shown, finding.name, Text(finding.state, styles[finding.state]), finding.text)
    console.print(table)
    console.print("all that is needed works" if works else "something that is needed is broken")
