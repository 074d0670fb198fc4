"""LoRA checkpoints: they hold the adapter and all that is not the base's. The base's weights stay where they are.

The manifest's `base` names them: a checkpoint of this project, or an LLM in a folder or on the hub, with the hash of
every file that decides its weights. The hashes are checked whenever the base is read, so that an adapter is never
laid on weights that it was not trained on. Hashing reads the files once more: the price for a base that others own.
"""

from __future__ import annotations

import contextlib
import hashlib
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

from mmllm.config import ConfigError, ModelConfig
from mmllm.errors import MmllmError
from mmllm.model.vlm import VisionLanguageModel

MANIFEST = "manifest.json"
ADAPTER = "adapter"
CHECKPOINT, LANGUAGE = "checkpoint", "language"  # the kinds of base
_DECIDE = ("config.json", "*.safetensors", "*.safetensors.index.json", f"{ADAPTER}/*.safetensors", f"{ADAPTER}/*.json")
_PEFT_WRAPPERS = re.compile(
    r"\.((token_adapter\.)?base_layer|original_module)\."
)  # between a layer's name and its weight
_PICKLES = ("*.bin", "*.bin.index.json")  # read by transformers only where there is no safetensors file


class CheckpointError(MmllmError):
    """A directory that is not a complete checkpoint of this project."""


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hashes(folder: Path, names: list[str]) -> dict[str, str | None]:
    """None for a file that is not there. Hashing is done outside Python's lock, so files are read side by side."""
    paths = [folder / name for name in names]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda path: file_hash(path) if path.is_file() else None, paths), strict=True))


def _hub_folder(source: str, revision: str | None) -> Path:
    """The hub's files of an LLM in the local cache, fetched where the hub may be used. Raises OSError, ValueError."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, revision=revision, allow_patterns=[*_DECIDE, *_PICKLES]))


def describe_base(config: ModelConfig) -> dict[str, Any]:
    """What the manifest of a LoRA run says about its base. Called when the base is loaded, for it may change later."""
    if config.checkpoint:
        folder = Path(config.checkpoint)
        base: dict[str, Any] = {"kind": CHECKPOINT, "source": config.checkpoint}
    else:
        assert config.language is not None
        source, revision = config.language.source, config.language.revision
        folder = Path(source) if Path(source).is_dir() else _hub_folder(source, revision)
        if folder.parent.name == "snapshots":  # the hub's cache: the commit pins what a branch name does not
            revision = folder.name
        base = {"kind": LANGUAGE, "source": source, "revision": revision}
    found = [path for pattern in _DECIDE for path in folder.glob(pattern)]
    if not any(path.suffix == ".safetensors" for path in found):
        found += [path for pattern in _PICKLES for path in folder.glob(pattern)]
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    if f"{ADAPTER}/adapter_config.json" in names:
        names.append(MANIFEST)  # it says what this base is based on
    return {**base, "path": str(folder.resolve()), "vocab_size": _vocab_size(folder), "files": _hashes(folder, names)}


def _vocab_size(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


def find_base(folder: Path, base: dict[str, Any]) -> Path:
    """Where the base is, its files proven to be those of the training. Raises CheckpointError."""
    places = [Path(base["path"]), Path(os.path.normpath(folder / base["relative"]))]
    place: Path | None = next((place for place in places if place.is_dir()), None)
    name = f"the {base['kind']} {base['source']}" + (f" at revision {base['revision']}" if base.get("revision") else "")
    if place is None and base["kind"] == LANGUAGE and not Path(base["source"]).is_absolute():
        try:
            place = _hub_folder(base["source"], base["revision"])
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} holds an adapter of {name}, which is neither at {base['path']} nor to be had from the hub: "
                f"{error}; put it there"
            ) from error
    if place is None:
        shown = " nor ".join(dict.fromkeys(map(str, places)))
        raise CheckpointError(f"{folder} holds an adapter of {name}, which is not at {shown}; put it there")
    there = _hashes(place, list(base["files"]))
    if changed := [file for file, digest in base["files"].items() if there[file] != digest]:
        raise CheckpointError(
            f"{folder} holds an adapter of {name}, but at {place} {', '.join(changed)} is not what it was when the "
            "adapter was trained; bring the old files back, or train the adapter again"
        )
    return place


def own_tensors(model: VisionLanguageModel, base: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the model that neither the base nor the adapter holds.

    These are tower and projector, and of the LLM what was trained besides the adapter. A vocabulary that grew has
    rows the base knows nothing of, so embedding and head are kept then.
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
    """The adapter in peft's own format, without peft's card, which would be a form nobody filled in.

    Its config says that it belongs to a causal LM: peft's own loaders ask for that, and `attach_adapter` does not.
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
    """Without peft's warnings: of a name that transformers 6 will not have, and of tensors, which we refuse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


MISSING_KERNEL = "Failed to load CPU gemm_4bit_forward"  # what bitsandbytes' line begins with


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(MISSING_KERNEL)


def quiet_bitsandbytes() -> None:
    """Without one line that bitsandbytes logs where it is imported: to install a kernel that nothing here would use.

    It answers from 4 bits on a CPU; here layers in 4 bits are trained. peft imports bitsandbytes where it is installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_worth_saying)


def attach_adapter(model: VisionLanguageModel, folder: Path) -> None:
    """Lays a checkpoint's adapter on the LLM, unmerged. Raises CheckpointError where the two do not fit."""
    quiet_bitsandbytes()
    try:
        import peft
    except ImportError as error:
        raise CheckpointError(
            f"{folder} holds a LoRA adapter, which needs the extra `lora`: pip install 'mmllm[lora]'; `mmllm merge` "
            "makes a checkpoint that does without"
        ) from error
    from safetensors.torch import load_file

    saved = set(load_file(folder / ADAPTER / "adapter_model.safetensors"))
    with quiet_peft():
        settings = peft.PeftConfig.from_pretrained(folder / ADAPTER)
        settings.task_type = None  # see `add_lora`
        model.language_model = peft.PeftModel.from_pretrained(model.language_model, folder / ADAPTER, config=settings)
    own = set(peft.get_peft_model_state_dict(model.language_model, save_embedding_layers=False))
    if wrong := sorted(saved ^ own):
        raise CheckpointError(
            f"{folder} does not fit its config: of the adapter's tensors {len(own - saved)} are missing and "
            f"{len(saved - own)} are too many: {', '.join(wrong[:5])}"
        )


def check_full_precision(language_model: Any) -> None:
    """Raises ConfigError where adapters would be merged into weights that have lost something already.

    An adapter is trained to correct the weights that it lies on. Added to rounded ones and rounded again, its small
    updates are partly gone.
    """
    quantised = getattr(language_model.get_base_model().config, "quantization_config", None)
    kinds = set()
    for name, parameter in language_model.get_base_model().named_parameters():
        if ".base_layer." in name and ".lora_" not in name:  # what an adapter lies on
            is_plain = type(parameter) is nn.Parameter  # libraries keep quantised weights in classes of their own
            kinds.add(str(parameter.dtype).removeprefix("torch.") if is_plain else type(parameter).__name__)
    if quantised or kinds != {"float32"}:
        found = "quantised" if quantised else f"in {', '.join(sorted(kinds))}"
        raise ConfigError(
            f"the base of this adapter is loaded {found}; merging needs its full precision, float32: load it so"
        )


def merge_adapter(model: VisionLanguageModel) -> None:
    """Adds the adapter's updates to the LLM's weights, whose own names come back. Raises ConfigError."""
    check_full_precision(model.language_model)
    model.language_model = model.language_model.merge_and_unload(safe_merge=True)
