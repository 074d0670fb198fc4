"""Reads folders of LLaVA's own code, https://github.com/haotian-liu/LLaVA: whole models, lone projectors, and LoRA.

The LLM's config has fields named `mm_*`. The projector's weights are `model.mm_projector.*`, and those of a tower that
was trained too are `model.vision_tower.vision_tower.*`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from mmllm.backbone_files.hub import WEIGHTS, check_source, quiet_transformers
from mmllm.config import ConfigError, LanguageConfig, ProjectorConfig, VisionConfig
from mmllm.interop.parts import ModelImportError, ModelParts, main_dtype, read_tensors, read_weights, tiled_layout
from mmllm.model.build import fitting_projector
from mmllm.model.language import find_architecture, fit_vocabulary, load_language, load_tokenizer
from mmllm.model.tower import LayeredTower, VisionTower
from mmllm.model.vision import load_tower

# model type of LLaVA -> model type of its LLM in transformers
LANGUAGE_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
ADAPTER = "adapter_config.json"
PROJECTOR_FILES = ("mm_projector.bin", "non_lora_trainables.bin")
TOWER_PREFIX = "vision_tower.vision_tower."
NEWLINE = "image_newline"


def is_original(config: dict[str, Any]) -> bool:
    """Whether this is the config of a model of LLaVA's own code."""
    return "mm_vision_tower" in config or (config.get("model_type") in LANGUAGE_TYPES and "vision_config" not in config)


def read_original(folder: Path, config: dict[str, Any], *, vision: str | None, base: str | None) -> ModelParts:
    """The parts of a folder, each in its stored precision; an LLM into which a LoRA is merged in float32.

    `vision` overrides the tower that the folder names, and `base` is the LLM of a folder without one. Raises
    ModelImportError where a part is missing or not supported.
    """
    _check(folder, config)
    has_llm = any((folder / name).is_file() for name in WEIGHTS)
    extra = next((folder / name for name in PROJECTOR_FILES if (folder / name).is_file()), None)
    if not has_llm and extra is None:
        raise ModelImportError(f"{folder} has neither an LLM's weights nor {' nor '.join(PROJECTOR_FILES)}")
    if not has_llm and base is None:
        raise ModelImportError(
            f"{folder} holds no LLM, only {extra.name if extra else ''}; give the LLM it was trained on with --base "
            f"(its config names {config.get('_name_or_path') or 'none'})"
        )
    projector_config = _projector_config(config)
    try:
        if has_llm:
            check_source(str(folder), None, setting="SOURCE")
        else:
            find_architecture(LanguageConfig(source=str(base)))
    except ConfigError as error:
        raise ModelImportError(str(error)) from error
    tower = _tower(folder, config, vision)
    if has_llm:
        weights = read_weights(folder)
        language_model, tokenizer = _language(folder, config, weights)
    else:
        assert extra is not None
        weights = read_tensors(extra)
        has_adapter = (folder / ADAPTER).is_file()
        language_model, tokenizer = load_language(
            LanguageConfig(source=str(base), dtype="fp32" if has_adapter else "stored")
        )
        if has_adapter:
            language_model = _merged(language_model, folder)
    prefix = re.compile(rf"^.*{re.escape(TOWER_PREFIX)}(vision_model\.)?")
    tower_weights = {prefix.sub("", key): value for key, value in weights.items() if TOWER_PREFIX in key}
    if tower_weights:
        assert isinstance(tower, LayeredTower)
        tower.to(main_dtype(tower_weights))
        tower.load_encoder_weights(tower_weights)
    projector = fitting_projector(projector_config, tower, language_model.config.hidden_size)
    _fill_projector(projector, weights, folder)
    origin = {
        "vision": f"{folder} (trained)" if tower_weights else tower.spec.source,
        "projector": str(folder),
        "language": str(folder) if has_llm else f"{base}" + (f" + {folder}" if (folder / ADAPTER).is_file() else ""),
    }
    layout = _layout(folder, config, tower)
    newline = next((value for key, value in weights.items() if key.endswith(NEWLINE)), None)
    if layout.image_mode == "anyres" and newline is None:
        raise ModelImportError(f"{folder} cuts pictures into tiles but lacks the weight {NEWLINE}")
    return ModelParts(tower, projector, projector_config, language_model, tokenizer, layout, None, origin, newline)


def _layout(folder: Path, config: dict[str, Any], tower: VisionTower) -> VisionConfig:
    """How the model lays out pictures. LLaVA lists the sizes of tiled pictures as [width, height]."""
    aspect, side = str(config.get("image_aspect_ratio")), tower.spec.image_size_px
    if aspect != "anyres":
        return VisionConfig(source=tower.spec.source, image_mode="pad" if aspect == "pad" else "crop")
    sizes: Any = config.get("image_grid_pinpoints")
    try:
        listed = ast.literal_eval(sizes) if isinstance(sizes, str) else sizes
        pairs = [(int(width), int(height)) for width, height in listed]
    except (TypeError, ValueError, SyntaxError) as error:
        raise ModelImportError(
            f"{folder} has image_grid_pinpoints {sizes!r}, which is not a list of pairs in pixels"
        ) from error
    return tiled_layout(str(folder), [(height, width) for width, height in pairs], side)


def _check(folder: Path, config: dict[str, Any]) -> None:
    """Raises ModelImportError for a setting that mmllm cannot reproduce exactly."""
    wrong = {
        "mm_use_im_start_end": config.get("mm_use_im_start_end", False),
        "image_aspect_ratio": str(config.get("image_aspect_ratio")).startswith("anyres_"),
        "mm_patch_merge_type": config.get("image_aspect_ratio") == "anyres"
        and config.get("mm_patch_merge_type") != "spatial_unpad",
        "mm_vision_select_feature": config.get("mm_vision_select_feature", "patch") != "patch",
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ModelImportError(f"{folder} has {name}: {config.get(name)!r}, which mmllm does not support")
    if (kind := str(config.get("model_type"))) not in LANGUAGE_TYPES:
        allowed = ", ".join(LANGUAGE_TYPES)
        raise ModelImportError(f"{folder} is of type {kind!r}; allowed types of LLaVA's own code: {allowed}")


def _tower(folder: Path, config: dict[str, Any], vision: str | None) -> VisionTower:
    name = vision or f"transformers:{config.get('mm_vision_tower')}"
    layer = int(config.get("mm_vision_select_layer", -2))
    try:
        return load_tower(VisionConfig(source=name, feature_layer=layer))
    except ConfigError as error:
        raise ModelImportError(
            f"{folder} names the vision tower {config.get('mm_vision_tower')!r}: {error}. Give a folder that has it, "
            "with --vision transformers:FOLDER"
        ) from error


def _language(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Any, Any]:
    """(LLM, tokenizer) of a whole model. The LLM's weights are all that belong to neither projector nor tower."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = LANGUAGE_TYPES[str(config["model_type"])]
    skipped = ("model_type", "architectures", "transformers_version", "auto_map")
    fields = {key: value for key, value in config.items() if key not in skipped and not key.startswith("mm_")}
    text_config = AutoConfig.for_model(kind, **fields)
    # old releases of transformers saved inv_freq, which is computed from the config
    other_weights = ("mm_projector", TOWER_PREFIX, NEWLINE, "rotary_emb.inv_freq")
    llm_weights = {key: value for key, value in weights.items() if not any(name in key for name in other_weights)}
    with quiet_transformers():
        language_model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)].from_pretrained(
            None, config=text_config, state_dict=llm_weights, dtype=main_dtype(llm_weights), output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelImportError(f"{folder} lacks {len(missing)} weights of its LLM, such as {missing[0]}")
    if unexpected := sorted(report["unexpected_keys"]):
        raise ModelImportError(f"{folder} has weights that its LLM has no place for, such as {unexpected[0]}")
    tokenizer = load_tokenizer(str(folder))
    fit_vocabulary(language_model, tokenizer)
    return language_model, tokenizer


def _merged(language_model: Any, folder: Path) -> Any:
    """The LLM with the folder's LoRA merged into its float32 weights."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(language_model, str(folder)).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelImportError(f"{folder}: its LoRA does not fit the LLM of --base: {error}") from error


def _projector_config(config: dict[str, Any]) -> ProjectorConfig:
    name = str(config.get("mm_projector_type", "linear"))
    if name == "linear":
        return ProjectorConfig(kind="linear")
    if match := re.fullmatch(r"mlp(\d+)x_gelu", name):
        return ProjectorConfig(kind="mlp", options={"depth": int(match[1])})
    raise ModelImportError(f"mm_projector_type {name!r} cannot be imported; allowed: linear, mlpNx_gelu")


def _fill_projector(projector: Any, weights: dict[str, Tensor], folder: Path) -> None:
    projector_weights = {
        re.sub(r"^.*mm_projector\.", "", key): value for key, value in weights.items() if "mm_projector" in key
    }
    prefix = "layer." if "weight" in projector_weights else "layers."
    projector.to(main_dtype(projector_weights))
    try:
        projector.load_state_dict({prefix + key: value for key, value in projector_weights.items()})
    except RuntimeError as error:
        raise ModelImportError(f"{folder}: its projector does not fit tower and LLM: {error}") from error
