"""`mmllm export hf`: writes a checkpoint as transformers' Llava, for programs that do not know mmllm.

A model that cuts pictures into tiles becomes a LlavaNextForConditionalGeneration, others LlavaForConditionalGeneration.
Weights get Llava's classic names (`vision_tower.vision_model.*`, `language_model.model.*`), which transformers, vLLM
and llama.cpp's converter read; vLLM refuses the names that transformers itself writes today. The written folder is
loaded again with transformers alone. It is kept only if it gives the same tokens, pixels, logits and answers.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.backbone_files.hub import quiet_transformers
from mmllm.batch import Message
from mmllm.checkpoint.adapter import merge_adapter
from mmllm.checkpoint.card import build_card, code_section
from mmllm.checkpoint.folder import new_folder, read_manifest
from mmllm.inference.engine import Engine
from mmllm.interop.parity import TransformersComparison, compare_with_transformers
from mmllm.interop.towers import ExportError, TransformersEncoder, encoder_in_transformers
from mmllm.model.image_tokens import Native, Tiles
from projector import PROJECTORS, Projector

MAX_SHARD_SIZE = "5GB"
PROCESSORS = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}


def export_hf(model: str | Path, out: str | Path) -> TransformersComparison:
    """Writes the folder and returns its comparison with the checkpoint.

    Raises ExportError where a part has no counterpart in Llava or where the written model gives other outputs, and
    CheckpointError where the folder is taken; then nothing is left behind.
    """
    out = Path(out)
    with new_folder(out) as partial:
        engine = Engine.load(model, device="cpu", dtype="stored")
        if "base" in read_manifest(model):  # a LoRA checkpoint: Llava has no adapters
            merge_adapter(engine.model)
        layout = engine.model.layout
        if isinstance(layout, Native):
            raise ExportError(
                "pictures: this model sees them in their own aspect ratio (image_mode: native), which neither Llava "
                "nor LlavaNext does"
            )
        encoder = encoder_in_transformers(engine.model.vision_tower)
        projector, activation = projector_in_llava(engine.model.projector)
        config = _llava_config(engine, encoder, activation)
        weights = {
            **{f"vision_tower.vision_model.{name}": value for name, value in encoder.weights.items()},
            **{f"multi_modal_projector.{name}": value for name, value in projector.items()},
            **_language_weights(engine.model.language_model),
        }
        if engine.model.image_newline is not None:
            weights["image_newline"] = engine.model.image_newline.detach()
        _write(partial, engine, config, weights, encoder)
        comparison = compare_with_transformers(engine, partial)
        (partial / "README.md").write_text(_card(engine, out, config["architectures"][0], comparison))
    return comparison


def projector_in_llava(projector: Projector) -> tuple[dict[str, Tensor], str]:
    """(weights of Llava's two linear layers, the activation between them).

    A single linear layer is followed by an identity layer. Raises ExportError for other projectors.
    """
    layers: list[Any] = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    kind = next((name for name, cls in PROJECTORS.items() if type(projector) is cls), type(projector).__name__)
    if kind not in ("linear", "mlp") or len(layers) > 2:
        depth = f" of depth {len(layers)}" if kind == "mlp" else ""
        raise ExportError(f"projector: Llava's is two linear layers with GELU between them, this one is {kind}{depth}")
    pairs = [(layer.weight.detach(), layer.bias.detach()) for layer in layers]
    if len(layers) == 1:
        width, dtype = layers[0].out_features, layers[0].weight.dtype
        pairs.append((torch.eye(width, dtype=dtype), torch.zeros(width, dtype=dtype)))
    weights = {
        f"linear_{number}.{name}": value
        for number, pair in enumerate(pairs, 1)
        for name, value in zip(("weight", "bias"), pair, strict=True)
    }
    return weights, "gelu" if len(layers) == 2 else "linear"


def _language_weights(language_model: Any) -> dict[str, Tensor]:
    """The LLM's weights, prefixed with `language_model.`; a tied head is left out, as transformers does."""
    kind = type(language_model).__name__
    state = language_model.state_dict()
    head = language_model.get_output_embeddings()
    if language_model.base_model_prefix != "model" or head is not getattr(language_model, "lm_head", None):
        raise ExportError(f"LLM: Llava's classic names do not cover the weights of {kind}")
    if getattr(language_model.config, "final_logit_softcapping", None):
        raise ExportError(f"LLM: {kind} caps its logits (final_logit_softcapping), which Llava does not")
    is_tied = language_model.lm_head.weight.data_ptr() == language_model.get_input_embeddings().weight.data_ptr()
    return {f"language_model.{k}": v.detach() for k, v in state.items() if not (is_tied and k == "lm_head.weight")}


def _llava_config(engine: Engine, encoder: TransformersEncoder, activation: str) -> dict[str, Any]:
    model = engine.model
    text = model.language_model.config.to_diff_dict()
    text.pop("transformers_version", None)
    text |= {
        "model_type": model.language_model.config.model_type,
        "architectures": [type(model.language_model).__name__],  # llama.cpp's converter needs it
        "tie_word_embeddings": model.language_model.config.tie_word_embeddings,
    }
    if isinstance(model.layout, Tiles):
        kind = {
            "model_type": "llava_next",
            "architectures": ["LlavaNextForConditionalGeneration"],
            "image_grid_pinpoints": model.layout.pinpoints,
        }
    else:
        kind = {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "image_seq_length": model.config.num_image_tokens,
        }
    return {
        **kind,
        "vision_config": encoder.config,
        "text_config": text,
        "image_token_index": model.config.image_token_id,
        "projector_hidden_act": activation,
        "vision_feature_layer": encoder.layer,
        "vision_feature_select_strategy": "default" if encoder.has_cls else "full",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "dtype": str(next(model.language_model.parameters()).dtype).removeprefix("torch."),
        "eos_token_id": engine.renderer.end_token_id,
        "pad_token_id": int(engine.processor.tokenizer.pad_token_id),
    }


def _tokenizer_without_special_tokens(engine: Engine) -> Any:
    """The tokenizer, set to add no special tokens: the chat template writes them all.

    A tokenizer that adds only the begin token with which the template starts is unchanged: transformers does not repeat
    that token.
    """
    tokenizer = engine.processor.tokenizer
    ids = {flag: tokenizer.encode("a", add_special_tokens=flag) for flag in (True, False)}
    text = engine.renderer.text([Message("user", ("a",))])
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    if ids[True] == ids[False] or (has_bos and ids[True] == [tokenizer.bos_token_id, *ids[False]]):
        return tokenizer
    from tokenizers.processors import Sequence

    bare = copy.deepcopy(tokenizer)
    for option in ("add_bos_token", "add_eos_token"):
        if getattr(bare, option, False):
            setattr(bare, option, False)
    bare.backend_tokenizer.post_processor = Sequence([])
    return bare


def _write(
    folder: Path, engine: Engine, config: dict[str, Any], weights: dict[str, Tensor], encoder: TransformersEncoder
) -> None:
    import transformers
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(
        {name: value.contiguous() for name, value in weights.items()}, folder, max_shard_size=MAX_SHARD_SIZE
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with quiet_transformers():
        getattr(transformers, PROCESSORS[config["model_type"]])(
            engine.processor.image_processor,
            _tokenizer_without_special_tokens(engine),
            patch_size=encoder.config["patch_size"],
            vision_feature_select_strategy=config["vision_feature_select_strategy"],
            chat_template=engine.renderer.saved_template(engine.picture_label),
            num_additional_image_tokens=int(encoder.has_cls),
        ).save_pretrained(folder)
        engine.model.generation_config.save_pretrained(folder)


def _card(engine: Engine, out: Path, architecture: str, comparison: TransformersComparison) -> str:
    return build_card(
        f"{engine.name} as {architecture}",
        [
            "Written by `mmllm export hf`. Loaded again with transformers alone, it gave the checkpoint's "
            f"tokens and pixels, logits\nthat differ by at most {comparison.max_logit_difference:.1e}, and the same "
            "greedy answers.",
            code_section(
                "from transformers import pipeline",
                f'chat = pipeline("image-text-to-text", "{out.name}")',
                'picture = {"type": "image", "url": "picture.png"}',
                'question = {"type": "text", "text": "\\nWhat is in the picture?"}',
                'print(chat(text=[{"role": "user", "content": [picture, question]}], max_new_tokens=64))',
            ),
            code_section(f"transformers serve {out.name}", f"vllm serve {out.name}"),
        ],
        library="transformers",
    )
