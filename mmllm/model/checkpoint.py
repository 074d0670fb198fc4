"""Checkpoint directories: written whole or not at all, and read strictly.

`manifest.json` is written last: a directory that has one is complete. It says what the checkpoint is, so nothing is
ever guessed from a folder's name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmllm.model.language import quiet_transformers
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
KIND = "vision-language-model"


class CheckpointError(ValueError):
    """A directory that is not a complete checkpoint of this project."""


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_versions() -> dict[str, str]:
    """The versions of what a checkpoint's numbers depend on."""
    found = {}
    for name in ("mmllm", "torch", "transformers", "open_clip_torch", "tokenizers", "peft", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_manifest(folder: Path, **facts: Any) -> None:
    """The manifest of all files now in the folder, written as the last of them."""
    files = {
        path.name: file_hash(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST
    }
    manifest = {"kind": KIND, "format_version": FORMAT_VERSION, **facts, "versions": library_versions(), "files": files}
    partial = folder / (MANIFEST + ".part")
    partial.write_text(json.dumps(manifest, indent=2) + "\n")
    partial.replace(folder / MANIFEST)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint. Raises CheckpointError that says what is wrong and what to do."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no model at {folder}: there is no such folder; `make demo` trains runs/tiny/stage2")
    path = folder / MANIFEST
    if not path.is_file():
        state = (
            " A run was begun there and not finished; start it again and it goes on."
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
    """Names of files whose content is not what the manifest says."""
    manifest = read_manifest(folder)
    return [name for name, digest in manifest["files"].items() if file_hash(Path(folder) / name) != digest]


def save_checkpoint(
    folder: str | Path, model: VisionLanguageModel, processor: VisionLanguageProcessor, *, card: str, **facts: Any
) -> None:
    """Writes a checkpoint beside its place first and moves it there file by file, the manifest last."""
    folder = Path(folder)
    partial = folder / "checkpoint.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with quiet_transformers():
            model.save_pretrained(partial)
        processor.save_pretrained(partial)
        (partial / "README.md").write_text(card)
        write_manifest(partial, **facts)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # what cannot be used shall not fill the disk
        raise
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == MANIFEST):
        path.replace(folder / path.name)
    partial.rmdir()


def load_checkpoint(folder: str | Path) -> tuple[VisionLanguageModel, VisionLanguageProcessor, dict[str, Any]]:
    """(model in evaluation mode, processor, manifest). A tensor missing, unexpected or misshapen is an error."""
    manifest = read_manifest(folder)
    try:
        with quiet_transformers():
            model, report = VisionLanguageModel.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True
            )
        processor = VisionLanguageProcessor.from_pretrained(folder)
    except Exception as error:  # readers of other packages fail with whatever they like on a damaged file
        if damaged := verify_files(folder):
            raise CheckpointError(
                f"{folder} is damaged: {', '.join(damaged)} is not what its manifest says; copy the folder again"
            ) from error
        if isinstance(error, OSError | RuntimeError | ValueError | KeyError):
            raise CheckpointError(f"{folder} cannot be loaded: {error}") from error
        raise
    sizes = [f"{name} {list(saved)} for {list(own)}" for name, saved, own in report["mismatched_keys"]]
    for what, keys in {**report, "mismatched_keys": sizes}.items():
        if names := sorted(map(str, keys)):
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(f"{folder} does not fit its config, {what.replace('_', ' ')}: {shown}")
    return model.eval(), processor, manifest
