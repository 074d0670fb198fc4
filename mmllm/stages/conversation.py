"""The stages: what is trained, on what, and how it is judged while it trains."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.batch import TEXT_ENCODING, Batch, Example
from mmllm.batching.collate import collate
from mmllm.batching.packed_rows import Packer
from mmllm.batching.sampler import Item, Orders
from mmllm.chat.renderer import ChatError
from mmllm.checkpoint.adapter import describe_base, merge_adapter
from mmllm.checkpoint.card import model_card
from mmllm.checkpoint.folder import read_manifest, save_checkpoint, stored_dtypes
from mmllm.checkpoint.generation_settings import write_generation_settings
from mmllm.checkpoint.golden import load_verified, make_golden
from mmllm.checkpoint.reload import check_reload
from mmllm.config import (
    ConfigError,
    LanguageLoraConfig,
    StageConfig,
)
from mmllm.config.file import dump_config
from mmllm.data.sources import DataError
from mmllm.kernels.attention import use_blocked_attention
from mmllm.kernels.compiled import compile_layers, use_liger
from mmllm.model.build import build_model
from mmllm.model.language import DTYPES, check_attention, decoder_layers
from mmllm.model.positions import position_limit
from mmllm.model.processor import VisionLanguageProcessor
from mmllm.model.vlm import VisionLanguageModel
from mmllm.optimizers.layers import depths
from mmllm.optimizers.optim import match
from mmllm.runs.requirements import is_slow_in_bf16
from mmllm.runs.run_log import figures_of
from mmllm.training.data import TrainingData
from mmllm.training.features import FeatureCache
from mmllm.training.lora import add_lora, add_tower_lora, move_adapters
from mmllm.training.losses import conversation_loss_sum, has_plain_head, needs_mask
from mmllm.training.quantised_base import quantise_language
from mmllm.training.validation import Validation


class _ConversationLoss(nn.Module):
    """What DDP wraps: batch -> summed loss, or that of each example; every trained part takes part in every forward.

    `always_runs_tower` is set where ranks wait for each other's tower although it is frozen: ZeRO-3.
    """

    always_runs_tower = False

    def __init__(self, model: Any, chunk_tokens: int | None):
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.plain_head = has_plain_head(model.language_model)
        self.with_mask = needs_mask(model.language_model)

    def forward(self, batch: Batch, *, per_example: bool = False) -> Tensor:
        batch = batch.to(self.model.get_input_embeddings().weight.device)
        return conversation_loss_sum(
            self.model, batch, plain_head=self.plain_head, with_mask=self.with_mask, chunk_tokens=self.chunk_tokens,
            always_runs_tower=self.always_runs_tower, per_example=per_example,
        )  # fmt: skip


class ConversationStage:
    """Stage 1 and stage 2: conversations with pictures; the settings say which parts are trained."""

    def __init__(self, config: StageConfig):
        self.config = config
        torch.manual_seed(config.seed)
        self.model, self.processor, self.origin = _load_model(config)
        self.base = describe_base(config.model) if config.lora else None
        try:
            self.renderer = self.processor.build_renderer()
            self.renderer.require_end()
        except ChatError as error:
            raise ConfigError(f"model.template: {error}") from error
        write_generation_settings(self.model, self.processor, self.renderer)
        check_reload(self.model, self.processor)
        self.data = TrainingData(config, self.renderer, max_positions=position_limit(self.model.language_model))
        self.examples, self.lengths, self.num_examples = self.data.examples, self.data.lengths, self.data.num_examples
        self._freeze()
        self.features: FeatureCache | None = None
        if config.data.cache_features:
            folder = Path(config.data.cache_folder or Path(config.out).parent / "cache")
            self.features = FeatureCache(self.model, self.processor, self.examples, folder)
        self.module: nn.Module = _ConversationLoss(self.model, config.compute.loss_chunk_tokens)
        if config.compute.precision == "bf16" and not config.compute.compile and not torch.accelerator.is_available():
            use_blocked_attention(self.model.language_model)
        limited = config.data.model_copy(update={"max_length_tokens": self.data.max_length_tokens})
        self.packer = Packer(self.model.language_model, limited)
        self._recompute_layers()
        if config.compute.liger:
            use_liger(self.model.language_model)
        if config.compute.compile:
            compile_layers(decoder_layers(self.model.language_model))
        self.parts = self._parts()
        self.depths = depths(self.model) if config.optim.layer_decay != 1.0 else {}
        self._set_modes()
        self.validation = self._validation()
        self.notes = [*self._precisions(), *self.validation.notes]

    def _validation(self) -> Validation:
        examples = self.data.validation()
        return Validation(
            self.config, self.model, self.processor, examples=examples,
            text=self.data.text_probe(examples), module=self.module,
            collate=lambda some: self._collate(some, None),
        )  # fmt: skip

    def _freeze(self) -> None:
        """Only the listed parts get gradients. With LoRA, of the LLM or the tower only the adapters do."""
        train = self.config.train
        in_pictures = {"vision", "projector"} & set(train)
        if in_pictures and not self.data.may_have_images:
            raise DataError(
                f"train lists {' and '.join(sorted(in_pictures))}, but no example of data.train has an image"
            )
        self.model.requires_grad_(False)
        if "vision" in train:
            self._unfreeze_tower(self.config.vision_last_layers)
        if "projector" in train:
            self.model.projector.requires_grad_(True)
            if self.model.image_newline is not None:
                self.model.image_newline.requires_grad_(True)
        if "language" in train:
            if self.config.lora:
                self._quantise(self.config.lora)
                add_lora(self.model, self.config.lora)
            else:
                self.model.language_model.requires_grad_(True)
        self._freeze_named()

    def _quantise(self, lora: LanguageLoraConfig) -> None:
        if lora.quantise:
            computes_in = torch.bfloat16 if self.config.compute.precision == "bf16" else torch.float32
            quantise_language(self.model.language_model, lora.quantise, compute_dtype=computes_in)

    def _precisions(self) -> list[str]:
        """What the head of the run says where not all weights are held in fp32."""
        held = {part: str(dtype).removeprefix("torch.") for part, dtype in self.model.part_dtypes().items()}
        lora = self.config.lora
        if lora and lora.quantise:
            held["language"] = f"{lora.quantise} (linear layers) and {held['language']} (embeddings and head)"
        if set(held.values()) == {"float32"}:
            return []
        notes = [f"weights are held in: {', '.join(f'{part} {dtype}' for part, dtype in held.items())}"]
        if "bfloat16" in held.values() and is_slow_in_bf16():
            notes.append(
                "this CPU has no instructions for bf16: weights held in it save memory, and take several times as long "
                "as in fp32"
            )
        return notes

    def _freeze_named(self) -> None:
        """What `freeze` matches gets no gradient."""
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        for name in match(self.config.freeze, list(trained), setting="freeze"):
            trained[name].requires_grad_(False)

    def _unfreeze_tower(self, last_layers: int | None) -> None:
        tower = self.model.vision_tower
        if not any(True for _ in tower.parameters()):
            raise ConfigError(f"train lists vision, but {tower.spec.source} has no encoder to train")
        if self.config.vision_lora:
            self.tower_adapters = add_tower_lora(tower, self.config.vision_lora)
            return
        blocks = tower.blocks()
        if last_layers and last_layers > len(blocks):
            raise ConfigError(f"vision_last_layers: {last_layers}, but the tower runs {len(blocks)} layers")
        for module in blocks[-last_layers:] if last_layers else [tower]:
            module.requires_grad_(True)

    def _recompute_layers(self) -> None:
        wanted, language_model = self.config.compute.gradient_checkpointing, self.model.language_model
        if "language" in wanted:
            if not language_model.supports_gradient_checkpointing:
                kind = self.model.config.text_config.model_type
                raise ConfigError(f"compute.gradient_checkpointing: {kind} cannot recompute its layers; leave it out")
            language_model.gradient_checkpointing_enable({"use_reentrant": False})
        if "vision" in wanted:
            self.model.vision_tower.checkpoint_layers()

    def _set_modes(self) -> None:
        """Training mode, also for a frozen LLM (only then are gradients checkpointed); not for a frozen tower."""
        self.model.train()
        self.model.vision_tower.train("vision" in self.config.train)

    def _parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        prefixes = {
            "vision": "vision_tower.", "projector": ("projector.", "image_newline"), "language": "language_model.",
        }  # fmt: skip
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        parts: dict[str, list[tuple[str, nn.Parameter]]] = {}
        parts |= {part: [(n, p) for n, p in trained if n.startswith(prefixes[part])] for part in self.config.train}
        if empty := [part for part, named in parts.items() if not named]:
            raise ConfigError(f"freeze leaves nothing of {' and '.join(empty)} to train; take the part out of train")
        return parts

    def _collate(self, examples: Sequence[Example], features: FeatureCache | None) -> Batch:
        rendered = [self.renderer.render_example(example) for example in examples]
        rows = self.packer.rows([len(one.input_ids) for one in rendered])
        if rows:  # pictures follow their examples
            numbers = [number for row in rows for number in row]
            examples, rendered = [examples[number] for number in numbers], [rendered[number] for number in numbers]
        images = [image for example in examples for image in example.images]
        tensors: dict[str, Tensor] = {}
        if images:
            tensors = {"image_features": features.get(images)} if features else self.processor.load_pixels(images)
        return collate(
            rendered,
            pad_token_id=int(self.processor.tokenizer.pad_token_id),
            example_ids=[example.id for example in examples],
            per_row=[len(row) for row in rows] if rows else None,
            **tensors,
        )

    def order(self, batch_size: int) -> Orders:
        return self.data.order(batch_size, self._divide)

    def _divide(self, items: Sequence[Item], count: int) -> list[Sequence[Item]]:
        return self.packer.divide(items, count, self.data.size_of)

    def batch(self, indices: Sequence[Item]) -> Batch:
        examples = [item if isinstance(item, Example) else self.examples[item] for item in indices]
        batch = self._collate(examples, self.features)
        batch.images_per_example = [len(example.images) for example in examples]
        return batch

    def count(self, batch: Batch) -> int:
        return batch.num_supervised

    def num_tokens(self, batch: Batch) -> int:
        return int(batch.attention_mask.sum())

    def reaches(self, part: str, batch: Batch) -> bool:
        return part == "language" or batch.pixel_values is not None or batch.image_features is not None

    def names(self, batch: Batch) -> list[str]:
        return list(batch.example_ids)

    @torch.no_grad()
    def validate(self, step: int, *, writes: bool = True) -> dict[str, float]:
        """What `Validation` finds, with the model in eval mode while it looks."""
        self.model.eval()
        try:
            return self.validation.figures(step, writes=writes)
        finally:  # also where a signal breaks it off
            self._set_modes()

    @property
    def validates(self) -> bool:
        """Whether a validation has anything to look at."""
        validation = self.validation
        return bool(validation.examples or validation.text or validation.task_names)

    @torch.no_grad()
    def rehearse_validation(self) -> None:
        """What needs most memory in a validation; nothing is kept of it."""
        self.model.eval()
        try:
            self.validation.rehearse()
        finally:
            self._set_modes()

    def save(self, out: Path, log: list[dict[str, Any]]) -> None:
        """A checkpoint with its golden answers; of an LLM with LoRA the adapter and not the base's weights.

        Adapters of the tower are merged, in a copy: the tower is small beside the LLM and saved whole. Those of a
        quantised LLM are laid on the one in full precision, which is their base then and gives the golden answers.
        """
        tower, language_model = self.model.vision_tower, self.model.language_model
        if self.config.lora and self.config.lora.quantise:
            move_adapters(self.model, _load_model(self.config)[0].language_model, self.config.lora)
        self.model.eval()
        if self.config.vision_lora:
            self.model.vision_tower = copy.deepcopy(self.tower_adapters).merge_and_unload(safe_merge=True)
        try:
            self._save(out, log)
        finally:
            self.model.vision_tower, self.model.language_model = tower, language_model
            self._set_modes()

    def _save(self, out: Path, log: list[dict[str, Any]]) -> None:
        settings = dump_config(self.config)
        (out / "config.yaml").write_text(settings)
        last = {"step": log[-1]["step"], **{name: curve[-1][1] for name, curve in figures_of(log).items()}}
        facts: dict[str, Any] = {"origin": self.origin, "settings": settings, "figures": last}
        num_examples = "streamed" if self.num_examples is None else self.num_examples
        made = f"{self.config.stage}, {last['step']} steps on {num_examples} examples"
        card = model_card(out, made, self.origin, last, base=self.base, has_settings=True)
        files = make_golden(self.model, self.processor)
        save_checkpoint(out, self.model, self.processor, card=card, files=files, base=self.base, **facts)


def _load_model(config: StageConfig) -> tuple[VisionLanguageModel, VisionLanguageProcessor, dict[str, Any]]:
    """(model, processor, where it came from): a checkpoint, an adapter of its own merged, or new parts."""
    if not config.model.checkpoint:
        return build_model(config.model)
    is_adapted = "base" in read_manifest(config.model.checkpoint)
    dtypes = _dtypes(config)
    first = {**dtypes, "language": torch.float32} if is_adapted else dtypes  # an adapter is merged in full precision
    model, processor, manifest = load_verified(config.model.checkpoint, dtype=first)
    if is_adapted:
        merge_adapter(model)
        model.language_model.to(dtypes["language"])
    if config.model.language and config.model.language.attention:
        check_attention(type(model.language_model), model.language_model.config, config.model.language.attention)
        model.language_model.set_attn_implementation(config.model.language.attention)
    if config.model.template:
        processor.template, processor.encoding = config.model.template, TEXT_ENCODING
    if config.model.picture_label is not None:
        processor.picture_label = config.model.picture_label
    return model, processor, {**manifest.get("origin", {}), "started_from": config.model.checkpoint}


def _dtypes(config: StageConfig) -> dict[str, torch.dtype]:
    """In which dtype each part of `model.checkpoint` is held: what is trained in fp32, the rest as it is stored.

    `model.language.dtype` is another one for an LLM that is frozen or has LoRA. One in fp16, in which small gradients
    vanish, is held in fp32, which is exact.
    """
    assert config.model.checkpoint is not None
    dtypes = stored_dtypes(config.model.checkpoint)
    if (language := config.model.language) and language.dtype != "stored":
        dtypes["language"] = DTYPES[language.dtype]
    is_frozen = {part: part not in config.train or (part == "language" and bool(config.lora)) for part in dtypes}
    return {
        part: dtype if is_frozen[part] and dtype != torch.float16 else torch.float32 for part, dtype in dtypes.items()
    }
