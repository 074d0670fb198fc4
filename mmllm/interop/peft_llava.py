"""Adapters that peft made on transformers' Llava or LlavaNext: laid on the base, whatever release named the modules.

transformers before 4.52 kept the LLM's head inside `language_model`; adapters of that time are named after it:
`language_model.model.layers.0 ...` where it is `model.language_model.layers.0 ...` today.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm.checkpoint.adapter import quiet_peft
from mmllm.interop.parts import ModelImportError, read_json, read_tensors

ADAPTER = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_WRAPPER = "base_model.model."
_OF_ADAPTER = (".lora_", ".trainable_tokens_")  # all else in the file are weights of the model that were trained whole
_RENAMED = (  # a name's beginning in an older release -> today's
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
)


def is_adapter(config: dict[str, Any]) -> bool:
    return "peft_type" in config


def base_of(folder: Path, config: dict[str, Any], base: str | None) -> str:
    """Where the model is that an adapter belongs to. Raises ModelImportError."""
    if base is not None:
        return base
    named = config.get("base_model_name_or_path")
    if named and (Path(named).is_dir() or (folder / named).is_dir()):
        return str(named if Path(named).is_dir() else folder / named)
    raise ModelImportError(
        f"{folder} holds an adapter of {named or 'a model that it does not name'}, which is no folder here; give the "
        "model that it was trained on with --base"
    )


def check_adapter(folder: Path, config: dict[str, Any]) -> None:
    """Raises ModelImportError for an adapter that cannot be merged, by what its config says."""
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelImportError(f"{folder} holds an adapter of type {kind}; only LORA can be merged into its base")
    _weights_file(folder)


def _weights_file(folder: Path) -> Path:
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise ModelImportError(f"{folder} has neither {' nor '.join(WEIGHTS)}; download it again")
    return found


def _place(name: str, names: set[str], folder: Path) -> str:
    """The name in this release of what an adapter calls `name`. Raises ModelImportError."""
    for old, new in (("", ""), *_RENAMED):
        if name.startswith(old) and (today := new + name.removeprefix(old)) in names:
            return today
    raise ModelImportError(f"{folder} changes {name}, which its base does not have; give the right one with --base")


def _split(name: str) -> tuple[str, str]:
    """(module, what the adapter holds of it)."""
    mark = next(mark for mark in _OF_ADAPTER if mark in name)
    module = name.partition(mark)[0].removesuffix(".token_adapter")
    return module, name[len(module) :]


def lay_adapter(llava: Any, folder: Path) -> Any:
    """peft's model around `llava`, whose weights that were trained whole are replaced by the adapter's.

    Raises ModelImportError where the two do not fit.
    """
    import peft

    modules = {name for name, _ in llava.named_modules()}
    own = dict(llava.named_parameters(remove_duplicate=False))
    adapter: dict[str, Tensor] = {}
    targets = set()
    for key, value in read_tensors(_weights_file(folder)).items():
        name = key.removeprefix(_WRAPPER)
        if any(mark in name for mark in _OF_ADAPTER):
            module, rest = _split(name)
            place = _place(module, modules, folder)
            if ".lora_" in rest:
                targets.add(place)
            adapter[f"{_WRAPPER}{place}{rest}"] = value
        else:
            _replace(own[_place(name, set(own), folder)], value, name, folder)
    settings: Any = peft.PeftConfig.from_pretrained(str(folder))
    # exactly the modules that the file holds: lists and patterns speak of the names of their own release
    settings.target_modules, settings.exclude_modules, settings.modules_to_save = sorted(targets), None, None
    settings.layers_to_transform = settings.layers_pattern = settings.task_type = None
    settings.bias, settings.inference_mode = "none", True
    for pattern in ("rank_pattern", "alpha_pattern"):
        values = getattr(settings, pattern)
        setattr(settings, pattern, {_renamed_pattern(key): value for key, value in values.items()})
    try:
        with quiet_peft():
            model = peft.PeftModel(llava, settings)
            peft.set_peft_model_state_dict(model, adapter)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelImportError(f"{folder}: its LoRA does not fit its base: {error}") from error
    there = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    if wrong := sorted(there ^ set(adapter)):
        raise ModelImportError(f"{folder}: its LoRA does not fit its base, first at {wrong[0]}")
    return model.eval()


def _renamed_pattern(pattern: str) -> str:
    for old, new in _RENAMED:
        if pattern.startswith(old):
            return new + pattern.removeprefix(old)
    return pattern


@torch.no_grad()
def _replace(parameter: Tensor, value: Tensor, name: str, folder: Path) -> None:
    if parameter.shape != value.shape:
        raise ModelImportError(
            f"{folder} holds {name} of {list(value.shape)}, its base one of {list(parameter.shape)}; give the base "
            "with the same vocabulary and sizes"
        )
    parameter.copy_(value)


def merge(llava: Any, folder: Path) -> Any:
    """The base with the adapter's updates in its weights, which are in float32."""
    return lay_adapter(llava, folder).merge_and_unload(safe_merge=True)


def read_adapter_config(folder: Path) -> dict[str, Any] | None:
    """The config of an adapter of peft; None where the folder holds a whole model."""
    if (folder / "config.json").is_file() or not (folder / ADAPTER).is_file():
        return None
    return read_json(folder / ADAPTER)
