"""Checkpoint folders: written whole or not at all, and read strictly.

`manifest.json` is written last, so a folder that has one is complete. It says what the checkpoint is: nothing is
guessed from a folder's name. A manifest with a `base` belongs to a LoRA checkpoint, see mmllm/checkpoint/adapter.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mmllm.backbone_files.hub import quiet_transformers
from mmllm.checkpoint.adapter import (
    ADAPTER,
    CHECKPOINT,
    MANIFEST,
    CheckpointError,
    attach_adapter,
    find_base,
    merge_adapter,
    own_tensors,
    save_adapter,
)
from mmllm.disk import file_hash, written_aside
from mmllm.fault_points import fault_point
from mmllm.locks import exclusive_path
from mmllm.model.model_config import VisionLanguageConfig
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import PARTS, VisionLanguageModel

FORMAT_VERSION = 1
KIND = "vision-language-model"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors names them


def library_versions() -> dict[str, str]:
    """The versions of the packages that a checkpoint's numbers depend on."""
    versions = {}
    for name in ("mmllm", "torch", "transformers", "open_clip_torch", "tokenizers", "peft", "pillow"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _files(folder: Path) -> Iterator[str]:
    yield from sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_manifest(folder: Path, **facts: Any) -> None:
    """Writes the manifest of all files in the folder and below it, as the last file."""
    files = {name: file_hash(folder / name) for name in _files(folder) if name != MANIFEST}
    manifest = {"kind": KIND, "format_version": FORMAT_VERSION, **facts, "versions": library_versions(), "files": files}
    partial = folder / (MANIFEST + ".part")
    partial.write_text(json.dumps(manifest, indent=2) + "\n")
    partial.replace(folder / MANIFEST)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint. Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no model at {folder}: there is no such folder; `make demo` trains runs/tiny/stage2")
    path = folder / MANIFEST
    if not path.is_file():
        state = (
            " A run was begun there and not finished; start it again to continue it."
            if (folder / "state").is_dir()
            else ""
        )
        raise CheckpointError(f"{folder} is not a finished checkpoint: it has no {MANIFEST}.{state}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise CheckpointError(f"{path} does not describe a {KIND}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has checkpoint format {manifest.get('format_version')}, this version reads {FORMAT_VERSION}"
        )
    if not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path} lists no files; copy the folder again")
    if missing := [name for name in manifest["files"] if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which its manifest lists; copy the folder again")
    return manifest


def verify_files(folder: str | Path) -> list[str]:
    """Names of files that do not match their checksums in the manifest."""
    manifest = read_manifest(folder)
    return [name for name, digest in manifest["files"].items() if file_hash(Path(folder) / name) != digest]


def check_new(folder: Path) -> None:
    """Raises CheckpointError where the path of a new folder is taken; an empty folder is allowed."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already; give a new folder")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """`written_aside` for a new folder. Raises CheckpointError before the block where the path is taken."""
    check_new(folder)
    with written_aside(folder) as partial:
        yield partial


def save_checkpoint(
    folder: str | Path,
    model: VisionLanguageModel,
    processor: VisionLanguageProcessor,
    *,
    card: str,
    files: Mapping[str, bytes] | None = None,
    base: dict[str, Any] | None = None,
    **facts: Any,
) -> None:
    """Writes a checkpoint to a temporary folder, then moves its entries into place, the manifest last.

    If the process is killed, the folder holds the old checkpoint, the new one, or an incomplete one without a manifest.
    Of two processes that save into one folder, the second waits for the first.

    Args:
        card: the text of README.md.
        files: more files to save, by their paths inside the folder.
        base: of a model with an adapter, the result of `describe_base`; the base's weights are not saved again.
        facts: more entries of the manifest.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial, lock = folder / "checkpoint.part", folder / "checkpoint.lock"
    with exclusive_path(lock):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            fault_point(f"checkpoint {folder.name}: before it is written")
            _write(partial, model, processor, base)
            for name, content in {"README.md": card.encode(), **(files or {})}.items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_bytes(content)
            if base is not None:
                facts["base"] = {**base, "relative": os.path.relpath(base["path"], folder.resolve())}
            write_manifest(partial, **facts)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # an incomplete checkpoint must not fill the disk
            raise
        fault_point(f"checkpoint {folder.name}: before it is moved in")
        _move_in(partial, folder)
        lock.unlink(missing_ok=True)  # removed while held: a process that waits for it then takes a new lock


def _write(folder: Path, model: VisionLanguageModel, processor: VisionLanguageProcessor, base: Any) -> None:
    with quiet_transformers():
        if base is None:
            model.save_pretrained(folder)
        else:
            model.save_pretrained(folder, state_dict=own_tensors(model, base))
            save_adapter(model, folder, base)
    processor.save_pretrained(folder)


def _move_in(partial: Path, folder: Path) -> None:
    """Replaces the checkpoint in the folder by the one in `partial`; removes all files of the old one."""
    try:
        old = {folder / Path(name).parts[0] for name in read_manifest(folder)["files"]}
    except CheckpointError:
        old = set()
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in old | {folder / path.name for path in partial.iterdir()}:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for num_moved, path in enumerate(sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST)):
        fault_point(f"checkpoint {folder.name}: {num_moved} of its files in place")
        path.replace(folder / path.name)
    partial.rmdir()


def load_checkpoint(
    folder: str | Path, *, dtype: torch.dtype | Mapping[str, torch.dtype] | None = None
) -> tuple[VisionLanguageModel, VisionLanguageProcessor, dict[str, Any]]:
    """(model in evaluation mode, processor, manifest).

    Each part is loaded in its stored dtype, see `stored_dtypes`; `dtype` overrides that for all parts, or for some by
    name. The adapter of a LoRA checkpoint is attached unmerged to the base that the manifest names. Raises
    CheckpointError, also for a tensor that is missing, unexpected or of another shape.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    base = manifest.get("base")
    dtypes = stored_dtypes(folder)
    dtypes |= dict.fromkeys(PARTS, dtype) if isinstance(dtype, torch.dtype) else dtype or {}
    base_tensors = None if base is None else _base_tensors(find_base(folder, base), base, dtypes["language"])
    with _readers_errors(folder), quiet_transformers():
        model, report = _build(folder, base_tensors, dtypes)
        processor = VisionLanguageProcessor.from_pretrained(folder)
    _check_report(folder, report)
    if base is not None:
        with _readers_errors(folder):
            attach_adapter(model, folder)
    return model.eval(), processor, manifest


def stored_dtypes(folder: str | Path) -> dict[str, torch.dtype]:
    """The dtype of most numbers of each part of PARTS, from the headers of the weight files.

    For the LLM of a LoRA checkpoint, whose weights are elsewhere, it is the dtype in which it was trained. Raises
    CheckpointError.
    """
    folder = Path(folder)
    read_manifest(folder)
    with _readers_errors(folder):
        return _stored_dtypes(folder)


def _stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    config = VisionLanguageConfig.from_pretrained(folder)
    named = {part: _named_dtype((config.part_dtypes or {}).get(part, config.dtype)) for part in PARTS}
    if (folder / ADAPTER).is_dir():
        return named
    sizes: dict[str, Counter[str]] = {name: Counter() for name in PARTS.values()}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if (name := key.partition(".")[0]) in sizes and (values := file.get_slice(key)).get_dtype() in _DTYPES:
                    sizes[name][values.get_dtype()] += math.prod(values.get_shape())
    largest = {part: sizes[name].most_common(1) for part, name in PARTS.items()}
    return {part: _DTYPES[counts[0][0]] if counts else named[part] for part, counts in largest.items()}


def _named_dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


@contextlib.contextmanager
def _readers_errors(folder: Path) -> Iterator[None]:
    """Turns the errors that other packages raise for a damaged file into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if damaged := verify_files(folder):
            raise CheckpointError(
                f"{folder} is damaged: {', '.join(damaged)} does not match its checksum in the manifest; "
                "copy the folder again"
            ) from error
        if isinstance(error, OSError | RuntimeError | ValueError | KeyError):
            raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
        raise


def _build(
    folder: Path, base_tensors: dict[str, Tensor] | None, dtypes: Mapping[str, torch.dtype]
) -> tuple[VisionLanguageModel, dict[str, Any]]:
    """(model, transformers' loading report) of a whole checkpoint, or of a LoRA checkpoint and its base's tensors."""
    config = VisionLanguageConfig.from_pretrained(folder)
    config.part_dtypes = {part: str(dtype).removeprefix("torch.") for part, dtype in dtypes.items()}
    options = {"config": config, "dtype": dtypes["language"], "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True
    if base_tensors is None:
        return VisionLanguageModel.from_pretrained(folder, use_safetensors=True, **options)  # type: ignore[no-any-return]
    from safetensors.torch import load_file
    from transformers import GenerationConfig

    saved = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    # a tied tensor has two names: where the folder replaces one, the base's other one is outdated too
    replaced = {base_tensors[name].data_ptr() for name in saved if name in base_tensors}
    tensors = {name: value for name, value in base_tensors.items() if value.data_ptr() not in replaced} | saved
    model, report = VisionLanguageModel.from_pretrained(None, state_dict=tensors, **options)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, report


def _base_tensors(place: Path, base: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a base's LLM, under their names in the whole model."""
    if base["kind"] == CHECKPOINT:
        is_adapted = "base" in read_manifest(place)
        model, _, _ = load_checkpoint(place, dtype={"language": torch.float32 if is_adapted else dtype})
        if is_adapted:
            merge_adapter(model)
            model.language_model.to(dtype)
        language = model.language_model
    else:
        from transformers import AutoModelForCausalLM

        with quiet_transformers():
            language = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    return {f"language_model.{name}": value for name, value in language.state_dict().items()}


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    sizes = [f"{name} {list(saved)} for {list(built)}" for name, saved, built in report["mismatched_keys"]]
    for what, keys in {**report, "mismatched_keys": sizes}.items():
        if names := sorted(map(str, keys)):
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(f"{folder} does not fit its config, {what.replace('_', ' ')}: {shown}")


__all__ = [
    "MANIFEST",
    "CheckpointError",
    "check_new",
    "library_versions",
    "load_checkpoint",
    "new_folder",
    "read_manifest",
    "save_checkpoint",
    "stored_dtypes",
    "verify_files",
    "write_manifest",
]
