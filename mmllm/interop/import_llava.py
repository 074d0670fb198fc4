"""`mmllm import`: makes checkpoints of transformers' Llava and LlavaNext, of LLaVA's own folders, and of bare pairs.

A bare pair is a vision encoder and an LLM that were never trained together. A folder's config.json says what it is;
nothing is guessed from its name. A model of transformers' classes is compared with transformers itself before the
checkpoint is kept.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmllm.backbone_files.hub import check_source, hub_folder, quiet_transformers
from mmllm.batch import IMAGE_TOKEN, TEXT_ENCODING
from mmllm.chat.renderer import OWN_TEMPLATE, TEMPLATES, ChatError
from mmllm.checkpoint.card import build_card, code_section, origin_section
from mmllm.checkpoint.folder import new_folder, save_checkpoint
from mmllm.checkpoint.generation_settings import write_generation_settings
from mmllm.checkpoint.golden import make_golden, require_golden
from mmllm.checkpoint.reload import check_reload
from mmllm.config import ConfigError, LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from mmllm.inference.engine import Engine
from mmllm.interop import peft_llava
from mmllm.interop.original_llava import is_original, read_original
from mmllm.interop.parity import TransformersComparison, compare_with_transformers
from mmllm.interop.parts import ModelImportError, ModelParts, read_json, tiled_layout
from mmllm.interop.prompts import compare_with_processor
from mmllm.model.build import assemble_model, build_model
from mmllm.model.language import find_architecture, fit_vocabulary, load_tokenizer
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vision_transformers import ENCODERS, TransformersTower, transformers_spec
from mmllm.model.vlm import VisionLanguageModel
from projector import Projector, build_projector

LLAVAS = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
NO_LABEL = ""  # LLaVA writes no label before each of several pictures


@dataclass(frozen=True)
class ImportOptions:
    """What a folder may not say itself."""

    template: str | None = None  # a key of TEMPLATES, or `tokenizer`; default: the folder's own
    vision: str | None = None  # as `model.vision.source`; default: the encoder that the folder names
    base: str | None = None  # the LLM that an adapter or a lone projector belongs to
    projector: str = "mlp"  # the kind of the fresh projector of a bare pair


def import_model(source: str, out: str | Path, options: ImportOptions) -> TransformersComparison | None:
    """Writes the checkpoint; returns its comparison with transformers where transformers can read the source.

    Raises ModelImportError where the source is of an unknown kind, is incomplete or does not fit, and CheckpointError
    where the folder is taken. Then nothing is left behind.
    """
    out = Path(out)
    with new_folder(out) as partial:
        config, adapter = _config(source), None
        if peft_llava.is_adapter(config):
            adapter = Path(source)
            base = peft_llava.base_of(adapter, config, options.base)
            peft_llava.check_adapter(adapter, config)
            source, config = base, _config(base)
        try:
            model, processor, origin = _read(source, config, options, adapter)
            engine = Engine(model.eval(), processor, name=out.name)
        except ChatError as error:
            raise ModelImportError(
                f"{source}: {error}. Name the template it was trained with: --template {' or '.join(TEMPLATES)} "
                "(LLaVA-1.5: vicuna_v1)"
            ) from error
        write_generation_settings(model, processor, engine.renderer)
        check_reload(model, processor)
        card, files = _card(source, out, origin), make_golden(model, processor)
        save_checkpoint(partial, model, processor, card=card, files=files, origin=origin)
        written = Engine.load(partial, device="cpu", dtype="stored", verify=False)
        if config.get("model_type") not in LLAVAS or "vision_config" not in config:
            require_golden(written.model, written.processor, partial, answers=True)
            return None
        adapt = functools.partial(peft_llava.attach_llava_adapter, folder=adapter) if adapter else None
        comparison = compare_with_transformers(written, source, uses_folder_template=False, adapt=adapt)
        return replace(comparison, prompts=str(compare_with_processor(written, source)))


def _config(source: str) -> dict[str, Any]:
    if Path(source).is_dir():
        if (adapter_config := peft_llava.read_adapter_config(Path(source))) is not None:
            return adapter_config
        for name in ("config.json", "adapter_config.json"):
            if (Path(source) / name).is_file():
                return read_json(Path(source) / name)
        raise ModelImportError(f"{source} has no config.json, which says what the model is; copy or download it again")
    try:
        return read_json(hub_folder(source, None, "SOURCE") / "config.json")
    except ConfigError as error:
        raise ModelImportError(str(error)) from error


def _read(
    source: str, config: dict[str, Any], options: ImportOptions, adapter: Path | None
) -> tuple[VisionLanguageModel, VisionLanguageProcessor, dict[str, Any]]:
    kind = config.get("model_type")
    if adapter and (is_original(config) or kind not in LLAVAS):
        raise ModelImportError(
            f"{adapter} is an adapter of {source}, which is of type {kind!r} and not transformers' Llava. Merge it "
            "with peft, and import the merged model"
        )
    if is_original(config):
        _check_template(None, options.template)
        parts = read_original(Path(source), config, vision=options.vision, base=options.base)
    elif kind in LLAVAS:
        parts = _read_transformers(source, kind, options.template, adapter)
    elif options.vision:
        return _pair(source, options)
    else:
        raise ModelImportError(
            f"{source} is of type {kind!r} and not a LLaVA. Give a folder of transformers' Llava or of LLaVA's own "
            "code, or an LLM, and with --vision the encoder to pair it with"
        )
    template = options.template or parts.template
    assert template is not None
    model, processor = assemble_model(
        parts.tower, parts.projector, parts.language_model, parts.tokenizer, kind=parts.projector_config,
        vision=parts.vision, template=template, image_newline=parts.image_newline, picture_label=NO_LABEL,
    )  # fmt: skip
    return model, processor, parts.origin


def _pair(source: str, options: ImportOptions) -> tuple[VisionLanguageModel, VisionLanguageProcessor, dict[str, Any]]:
    """An encoder and an LLM with a fresh projector between them, for stage 1 to train."""
    assert options.vision is not None
    language = LanguageConfig(source=source)
    find_architecture(language)
    _check_template(load_tokenizer(source), options.template)
    return build_model(
        ModelConfig(
            vision=VisionConfig(source=options.vision),
            projector=ProjectorConfig(kind=options.projector),
            language=LanguageConfig(source=source, dtype="stored"),
            template=options.template or OWN_TEMPLATE,
        )
    )


def _check_template(tokenizer: Any, template: str | None) -> None:
    """Raises ChatError, before weights are read, where there is no chat template or one that cannot be rendered."""
    if template is None and (tokenizer is None or not tokenizer.chat_template):
        raise ChatError("its files hold no chat template")
    if tokenizer is not None:
        from transformers import CLIPImageProcessor

        template_name = template or OWN_TEMPLATE
        VisionLanguageProcessor(
            CLIPImageProcessor(), tokenizer, template=template_name, num_image_tokens=1, encoding=TEXT_ENCODING
        ).build_renderer()


def _read_transformers(source: str, kind: str, template: str | None, adapter: Path | None) -> ModelParts:
    """The parts of a model of LLAVAS, in their stored precision; in float32 where an adapter is merged into them."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

    try:
        with quiet_transformers():
            check_source(source, None, setting="SOURCE")
            config = AutoConfig.from_pretrained(source)
            theirs = AutoProcessor.from_pretrained(source)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ModelImportError(f"{source} cannot be loaded: {error}") from error
    _check_parts(config, source)
    layout = _layout(config, theirs.image_processor, source)
    tokenizer = load_tokenizer(source)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id:
        raise ModelImportError(
            f"{source} marks pictures with token {config.image_token_id}, "
            f"{theirs.tokenizer.convert_ids_to_tokens(config.image_token_id)!r}; here it must be {IMAGE_TOKEN}"
        )
    tokenizer.chat_template = theirs.chat_template or tokenizer.chat_template
    _check_template(tokenizer, template)
    options: dict[str, Any] = {"dtype": torch.float32} if adapter else {}
    try:
        with quiet_transformers():
            llava, report = getattr(transformers, LLAVAS[kind]).from_pretrained(
                source, output_loading_info=True, **options
            )
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ModelImportError(f"{source} cannot be loaded: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelImportError(f"{source} lacks {len(missing)} weights, such as {missing[0]}; download it again")
    if adapter:
        llava = peft_llava.merge(llava, adapter)
    tower = _tower(llava, theirs.image_processor, source)
    projector, projector_config = _projector(
        llava.model.multi_modal_projector, config.projector_hidden_act, tower.width
    )
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(config.text_config)
    setattr(language_model, language_model.base_model_prefix, llava.model.language_model)
    language_model.set_output_embeddings(llava.lm_head)
    fit_vocabulary(language_model, tokenizer)
    origin = dict.fromkeys(("vision", "projector", "language"), f"{source} + {adapter}" if adapter else source)
    newline = getattr(llava.model, "image_newline", None)
    return ModelParts(
        tower, projector, projector_config, language_model, tokenizer, layout, OWN_TEMPLATE, origin, newline
    )  # fmt: skip


def _check_parts(config: Any, source: str) -> None:
    """Raises ModelImportError, from config.json alone, for parts of a Llava that mmllm does not support."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    vision, text = config.vision_config, config.text_config
    if vision.model_type not in ENCODERS:
        raise ModelImportError(
            f"{source}: its vision tower, {vision.model_type}, cannot be read; allowed: {', '.join(ENCODERS)}"
        )
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelImportError(f"{source}: its LLM, {text.model_type}, cannot be read by AutoModelForCausalLM")
    has_cls = vision.model_type == "clip_vision_model"
    if has_cls != (config.vision_feature_select_strategy == "default"):
        raise ModelImportError(
            f"{source} reads {config.vision_feature_select_strategy!r} features of a {vision.model_type}: they hold "
            "the CLS token, or lack a patch; mmllm reads exactly all patches"
        )
    activation, has_bias = config.projector_hidden_act, config.multimodal_projector_bias
    if activation not in ("gelu", "linear") or not has_bias:
        raise ModelImportError(f"projector: two layers with {activation}, biases {has_bias}; allowed: GELU and biases")


def _tower(llava: Any, transform: Any, source: str) -> TransformersTower:
    config, encoder = llava.config, llava.model.vision_tower
    vision = config.vision_config
    num_layers = vision.num_hidden_layers
    feature_layer = config.vision_feature_layer
    layers = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    layers = [layer if layer < 0 else layer - num_layers - 1 for layer in layers]  # 0 is the embedding
    try:
        tower = TransformersTower(
            transformers_spec(
                vision, transform, layer=layers[0] if len(layers) == 1 else tuple(layers),
                image_size_px=int(vision.image_size), source=f"transformers:{source}",
            )
        )  # fmt: skip
    except (ConfigError, KeyError) as error:
        raise ModelImportError(f"{source}: its vision tower, {vision.model_type}, cannot be read: {error}") from error
    tower.to(next(encoder.parameters()).dtype)
    tower.load_encoder_weights(encoder.state_dict())
    return tower


def _layout(config: Any, transform: Any, source: str) -> VisionConfig:
    """How the image transform cuts a picture into tiles, or makes it square."""
    if config.model_type == "llava_next":
        sizes = [list(pair) for pair in config.image_grid_pinpoints]
        if sizes != (others := [list(pair) for pair in transform.image_grid_pinpoints]):
            raise ModelImportError(
                f"{source}: its model cuts pictures to sizes of {sizes}, its image processor of {others}"
            )
        return tiled_layout(source, sizes, int(config.vision_config.image_size))
    if getattr(transform, "do_pad", False):
        return VisionConfig(source=source, image_mode="pad")
    return VisionConfig(source=source, image_mode="crop" if getattr(transform, "do_center_crop", False) else "stretch")


def _projector(theirs: Any, activation: str, width: int) -> tuple[Projector, ProjectorConfig]:
    first, second = theirs.linear_1, theirs.linear_2
    is_linear = activation == "linear" and bool(
        (second.weight == torch.eye(len(second.weight)).to(second.weight)).all()
    )
    if first.bias is None or (activation != "gelu" and not is_linear):
        raise ModelImportError(
            f"projector: two layers with {activation}, biases {first.bias is not None}; allowed: GELU and biases"
        )
    kind = "linear" if is_linear and not bool(second.bias.any()) else "mlp"
    projector = build_projector(kind, vision_dim=width, llm_dim=first.out_features).to(first.weight.dtype)
    layers = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    for layer, their_layer in zip(layers, (first, second), strict=False):
        layer.load_state_dict(their_layer.state_dict())
    return projector, ProjectorConfig(kind=kind)


def _card(source: str, out: Path, origin: dict[str, Any]) -> str:
    return build_card(
        out.name,
        [
            f"Imported from {source} with `mmllm import`.",
            origin_section(origin),
            code_section(
                f"mmllm chat {out} --image PICTURE.png",
                f"mmllm caption {out} FOLDER_OF_PICTURES --out captions.jsonl",
                f"mmllm export hf {out} NEW_FOLDER",
            ),
            f"To train it further, copy a config of configs/ and set `model: {{checkpoint: {out}}}`.",
        ],
    )
