"""LoRA checkpoints: they hold the adapter and every weight that the base does not have. The base stays where it is.

The manifest's `base` names it: a checkpoint of this project, or an LLM in a folder or on the hub, with the checksum of
every file that decides its weights. The checksums are verified whenever the base is read, so that an adapter is never
attached to weights that it was not trained on. That reads each file once more, which a base owned by others needs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmllm.backbone_files.gguf import SUFFIX, local_source
from mmllm.config import ConfigError, ModelConfig
from mmllm.disk import file_hash
from mmllm.errors import MmllmError
from mmllm.model.vlm import VisionLanguageModel

MANIFEST = "manifest.json"
ADAPTER = "adapter"
CHECKPOINT, LANGUAGE = "checkpoint", "language"  # the kinds of base
_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
_WEIGHT_FILES = (
    "config.json",
    *_SAFETENSORS,
    f"{ADAPTER}/*.safetensors",
    f"{ADAPTER}/*.json",
)
_PEFT_WRAPPERS = re.compile(
    r"\.((token_adapter\.)?base_layer|original_module)\."
)  # peft puts these between a layer's name and its weight
_PICKLES = ("*.bin", "*.bin.index.json")  # transformers reads these only where there is no safetensors file


class CheckpointError(MmllmError):
    """A folder that is not a complete checkpoint of this project, or cannot become one."""


def _checksums(folder: Path, names: list[str]) -> dict[str, str | None]:
    """The checksum of each file, None for a missing one. Hashing releases the GIL, so threads hash in parallel."""
    paths = [folder / name for name in names]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda path: file_hash(path) if path.is_file() else None, paths), strict=True))


def _hub_folder(source: str, revision: str | None) -> Path:
    """The local cache of a hub model, downloaded where the hub may be used. Raises OSError, ValueError."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=[*_WEIGHT_FILES, *_PICKLES]))


def describe_base(config: ModelConfig) -> dict[str, Any]:
    """The manifest's `base` of a LoRA run. Call it when the base is loaded: its files may change later."""
    if config.checkpoint:
        folder = Path(config.checkpoint)
        base: dict[str, Any] = {"kind": CHECKPOINT, "source": config.checkpoint}
    else:
        assert config.language is not None
        source, revision = config.language.source, config.language.revision
        local = Path(local_source(source, revision))
        folder = local if local.is_dir() else _hub_folder(source, revision)
        if folder.parent.name == "snapshots":  # the hub's cache: a commit is fixed, a branch is not
            revision = folder.name
        base = {"kind": LANGUAGE, "source": source, "revision": revision}
    # what is written beside the weights of a converted GGUF file depends on the release of transformers
    patterns = _SAFETENSORS if base["source"].endswith(SUFFIX) else _WEIGHT_FILES
    files = [path for pattern in patterns for path in folder.glob(pattern)]
    if not any(path.suffix == ".safetensors" for path in files):
        files += [path for pattern in _PICKLES for path in folder.glob(pattern)]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    if f"{ADAPTER}/adapter_config.json" in names:
        names.append(MANIFEST)  # the base is a LoRA checkpoint, whose manifest names its own base
    return {
        **base,
        "path": str(folder.resolve()),
        "vocab_size": _vocab_size(folder),
        "files": _checksums(folder, names),
    }


def _vocab_size(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


def find_base(folder: Path, base: dict[str, Any]) -> Path:
    """The folder of the base, its files verified. Raises CheckpointError where it is missing or has changed."""
    places = [Path(base["path"]), Path(os.path.normpath(folder / base["relative"]))]
    place: Path | None = next((place for place in places if place.is_dir()), None)
    name = f"the {base['kind']} {base['source']}" + (f" at revision {base['revision']}" if base.get("revision") else "")
    if place is None and base["source"].endswith(SUFFIX) and Path(base["source"]).is_file():
        try:
            place = Path(local_source(base["source"]))  # its conversion was removed from the cache
        except ConfigError as error:
            raise CheckpointError(f"{folder} holds an adapter of {base['source']}: {error}") from error
    if place is None and base["kind"] == LANGUAGE and not Path(base["source"]).is_absolute():
        try:
            place = _hub_folder(base["source"], base["revision"])
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} holds an adapter of {name}, which is neither at {base['path']} nor on the hub: "
                f"{error}; put it there"
            ) from error
    if place is None:
        shown = " nor ".join(dict.fromkeys(map(str, places)))
        raise CheckpointError(f"{folder} holds an adapter of {name}, which is not at {shown}; put it there")
    checksums = _checksums(place, list(base["files"]))
    if changed := [file for file, digest in base["files"].items() if checksums[file] != digest]:
        raise CheckpointError(
            f"{folder} holds an adapter of {name}, but at {place} {', '.join(changed)} is not what it was when the "
            "adapter was trained; bring the old files back, or train the adapter again"
        )
    return place


def own_tensors(model: VisionLanguageModel, base: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the model that neither the base nor the adapter holds.

    These are the vision tower, the projector, and the LLM's weights that were trained besides the adapter. Where the
    vocabulary grew, the base lacks rows of embedding and head, so both are saved.
    """
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith("language_model.")}
    language: Any = model.language_model.get_base_model()
    is_grown = language.config.vocab_size != base["vocab_size"]
    ends = [end for end in (language.get_input_embeddings(), language.get_output_embeddings()) if end is not None]
    grown = {id(parameter) for end in ends for parameter in end.parameters()} if is_grown else set()
    for name, parameter in language.named_parameters(remove_duplicate=False):
        is_adapter = ".lora_" in name or ".trainable_tokens_" in name
        if not is_adapter and (parameter.requires_grad or id(parameter) in grown):
            kept[f"language_model.{_PEFT_WRAPPERS.sub('.', name)}"] = parameter.detach()
    return kept


def save_adapter(model: VisionLanguageModel, folder: Path, base: dict[str, Any]) -> None:
    """Writes the adapter in peft's format, without peft's model card, an empty form.

    Its config has the task type of a causal LM, which peft's own loaders need; `attach_adapter` does not.
    """
    peft_model: Any = model.language_model
    settings = peft_model.peft_config["default"]
    settings.base_model_name_or_path, settings.task_type = base["source"], "CAUSAL_LM"
    try:
        peft_model.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
    finally:
        settings.task_type = None
    (folder / ADAPTER / "README.md").unlink(missing_ok=True)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Hides peft's warnings: of a name that transformers 6 drops, and of missing tensors, which we refuse ourselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


MISSING_KERNEL = "Failed to load CPU gemm_4bit_forward"  # the start of bitsandbytes' line


def _is_relevant(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(MISSING_KERNEL)


def quiet_bitsandbytes() -> None:
    """Hides one line that bitsandbytes logs when peft imports it: the advice to install a kernel that is not used here.

    The kernel is for inference in 4 bits on a CPU.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_relevant)


def attach_adapter(model: VisionLanguageModel, folder: Path) -> None:
    """Attaches a checkpoint's adapter to the LLM, unmerged. Raises CheckpointError where the two do not fit."""
    quiet_bitsandbytes()
    try:
        import peft
    except ImportError as error:
        raise CheckpointError(
            f"{folder} holds a LoRA adapter, which needs the extra `lora`: pip install 'mmllm[lora]'; `mmllm merge` "
            "makes a checkpoint that does not need it"
        ) from error
    from safetensors.torch import load_file

    saved = set(load_file(folder / ADAPTER / "adapter_model.safetensors"))
    with quiet_peft():
        settings = peft.PeftConfig.from_pretrained(folder / ADAPTER)
        settings.task_type = None  # see `add_lora`
        model.language_model = peft.PeftModel.from_pretrained(model.language_model, folder / ADAPTER, config=settings)
    expected = set(peft.get_peft_model_state_dict(model.language_model, save_embedding_layers=False))
    if wrong := sorted(saved ^ expected):
        raise CheckpointError(
            f"{folder} does not fit its config: of the adapter's tensors {len(expected - saved)} are missing and "
            f"{len(saved - expected)} are too many: {', '.join(wrong[:5])}"
        )


def check_full_precision(language_model: Any) -> None:
    """Raises ConfigError where an adapter would be merged into weights that are not float32.

    Added to rounded weights and rounded again, the adapter's small updates are partly lost.
    """
    quantised = getattr(language_model.get_base_model().config, "quantization_config", None)
    kinds = set()
    for name, parameter in language_model.get_base_model().named_parameters():
        if ".base_layer." in name and ".lora_" not in name:  # a weight under an adapter
            is_plain = type(parameter) is nn.Parameter  # libraries keep quantised weights in their own classes
            kinds.add(str(parameter.dtype).removeprefix("torch.") if is_plain else type(parameter).__name__)
    if quantised or kinds != {"float32"}:
        precision = "quantised" if quantised else f"in {', '.join(sorted(kinds))}"
        raise ConfigError(
            f"the base of this adapter is loaded {precision}; merging needs full precision: load it in float32"
        )


def merge_adapter(model: VisionLanguageModel) -> None:
    """Merges the adapter into the LLM, whose weights get their original names back. Raises ConfigError."""
    check_full_precision(model.language_model)
    model.language_model = model.language_model.merge_and_unload(safe_merge=True)
