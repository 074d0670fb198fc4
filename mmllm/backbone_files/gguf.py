"""LLMs in GGUF files, llama.cpp's format: converted once into a folder in full precision, which transformers reads.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. transformers restores weights, config, tokenizer and
chat template. The folder is named by the file's checksum, so moved and renamed files are converted once.
"""

from __future__ import annotations

import functools
import re
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch

from mmllm.backbone_files.hub import LIBRARY_FAILURES, quiet_transformers
from mmllm.config import ConfigError
from mmllm.disk import file_hash, sync, written_aside
from mmllm.locks import exclusive_path

SUFFIX, MAGIC = ".gguf", b"GGUF"
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def local_source(source: str, revision: str | None = None) -> str:
    """The folder of a `FILE.gguf`, which is converted if it has not been yet; any other source as it is.

    Raises ConfigError where the file is missing, damaged, one part of several, or of an unknown architecture.
    """
    if not source.endswith(SUFFIX):
        return source
    path = _checked(source, revision)
    facts = path.stat()
    return str(_converted(path, _checksum(path.resolve(), facts.st_size, facts.st_mtime_ns)))


def described_source(source: str, revision: str | None = None) -> str:
    """A source as manifests name it: with its revision, or a GGUF file's checksum."""
    if source.endswith(SUFFIX):
        return f"{source} (sha256 {Path(local_source(source)).name})"
    return f"{source}@{revision}" if revision else source


def _checked(source: str, revision: str | None) -> Path:
    setting, path = f"model.language.source: {source}", Path(source)
    if not path.is_file():
        raise ConfigError(f"{setting} is no file here; download it: `hf download ORG/NAME FILE.gguf --local-dir .`")
    if revision:
        raise ConfigError(f"{setting} is a file, which has no revisions; leave out revision {revision}")
    if _PART.search(path.name):
        command = f"llama-gguf-split --merge {path.name} OUT.gguf"
        raise ConfigError(f"{setting} is one part of several; join them with `{command}`")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ConfigError(f"{setting} does not begin as a GGUF file does; download it again")
    return path


@functools.cache
def _checksum(path: Path, size: int, modified: int) -> str:
    """The SHA-256 of a file of this size and time of modification, in hexadecimal; a large file is read once."""
    return file_hash(path)


def _converted(path: Path, checksum: str) -> Path:
    """The folder of the file with this checksum; converted under a lock, whole or not at all."""
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME) / "mmllm" / "gguf" / checksum
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_path(folder.with_suffix(".lock")):
        if not folder.is_dir():
            print(f"{path.name}: converted to full precision, once, into {folder}", flush=True)
            with written_aside(folder) as partial:
                _convert(path, partial)
                for file in partial.iterdir():  # a loss of power must not leave a folder that only looks whole
                    sync(file)
    return folder


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf  # noqa: F401 - transformers needs it
    except ImportError as error:
        raise ConfigError(f"model.language.source: {path} needs the extra `gguf`: pip install 'mmllm[gguf]'") from error
    options: dict[str, Any] = {"gguf_file": f"model{SUFFIX}"}
    # transformers prefers a tokenizer.json beside the file, which may be another model's: in this folder is none
    with tempfile.TemporaryDirectory() as alone:
        try:
            (Path(alone) / options["gguf_file"]).symlink_to(path.resolve())
        except OSError:  # Windows lets not everybody make links
            shutil.copyfile(path, Path(alone) / options["gguf_file"])
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(alone, **options)
                model, report = AutoModelForCausalLM.from_pretrained(
                    alone, dtype=torch.float32, output_loading_info=True, **options
                )
        except (*LIBRARY_FAILURES, struct.error) as error:
            raise ConfigError(f"model.language.source: {path} cannot be read by transformers: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"model.language.source: {path} lacks {', '.join(missing[:5])} ({len(missing)} tensors), which would be "
            "random; download it again"
        )
    model.hf_quantizer = None  # the weights are plain now, but transformers would still refuse to save them
    del model.config.quantization_config
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
