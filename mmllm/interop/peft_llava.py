"""Adapters that peft trained on transformers' Llava or LlavaNext: attached to the base, under any release's names.

transformers before 4.52 kept the LLM's head inside `language_model`. Adapters of that time name a module
`language_model.model.layers.0 ...` that is `model.language_model.layers.0 ...` today.
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
_OF_ADAPTER = (".lora_", ".trainable_tokens_")  # all other tensors in the file are weights that were trained whole
_RENAMED = (  # prefix of a name in an older release -> today's
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
    """The source of an adapter's base: `base`, or the folder that its config names. Raises ModelImportError."""
    if base is not None:
        return base
    name = config.get("base_model_name_or_path")
    if name and (Path(name).is_dir() or (folder / name).is_dir()):
        return str(name if Path(name).is_dir() else folder / name)
    raise ModelImportError(
        f"{folder} holds an adapter of {name or 'a model that it does not name'}, which is not a folder here; give the "
        "model that it was trained on with --base"
    )


def check_adapter(folder: Path, config: dict[str, Any]) -> None:
    """Raises ModelImportError for an adapter whose config says that it cannot be merged."""
    if (kind := config.get("peft_type")) != "LORA":
        raise ModelImportError(f"{folder} holds an adapter of type {kind}; only LORA can be merged into its base")
    _weights_file(folder)


def _weights_file(folder: Path) -> Path:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ModelImportError(f"{folder} has neither {' nor '.join(WEIGHTS)}; download it again")
    return file


def _current_name(name: str, names: set[str], folder: Path) -> str:
    """Which of `names`, those of this release, an adapter's `name` means. Raises ModelImportError."""
    for old, new in (("", ""), *_RENAMED):
        if name.startswith(old) and (current := new + name.removeprefix(old)) in names:
            return current
    raise ModelImportError(f"{folder} changes {name}, which its base does not have; give the right base with --base")


def _split(name: str) -> tuple[str, str]:
    """(name of the module, rest of the name): what belongs to the adapter is in the rest."""
    mark = next(mark for mark in _OF_ADAPTER if mark in name)
    module = name.partition(mark)[0].removesuffix(".token_adapter")
    return module, name[len(module) :]


def attach_llava_adapter(llava: Any, folder: Path) -> Any:
    """`llava` inside peft's model, with the adapter attached and the weights that were trained whole replaced.

    Raises ModelImportError where the two do not fit.
    """
    import peft

    modules = {name for name, _ in llava.named_modules()}
    parameters = dict(llava.named_parameters(remove_duplicate=False))
    adapter: dict[str, Tensor] = {}
    targets = set()
    for key, value in read_tensors(_weights_file(folder)).items():
        name = key.removeprefix(_WRAPPER)
        if any(mark in name for mark in _OF_ADAPTER):
            module, rest = _split(name)
            current = _current_name(module, modules, folder)
            if ".lora_" in rest:
                targets.add(current)
            adapter[f"{_WRAPPER}{current}{rest}"] = value
        else:
            _replace(parameters[_current_name(name, set(parameters), folder)], value, name, folder)
    settings: Any = peft.PeftConfig.from_pretrained(str(folder))
    # exactly the modules in the file: the config's lists and patterns use the names of another release
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
    expected = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    if wrong := sorted(expected ^ set(adapter)):
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
    """The base, whose weights are in float32, with the adapter merged into them."""
    return attach_llava_adapter(llava, folder).merge_and_unload(safe_merge=True)


def read_adapter_config(folder: Path) -> dict[str, Any] | None:
    """The config of a peft adapter; None where the folder holds a whole model."""
    if (folder / "config.json").is_file() or not (folder / ADAPTER).is_file():
        return None
    return read_json(folder / ADAPTER)
