"""Stage 1 and stage 2: the trained parts, their data, and the validation during training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.batch import Batch, Example
from mmllm.batching.packed_rows import Packer
from mmllm.batching.sampler import Item, Sampler
from mmllm.chat.renderer import ChatError
from mmllm.checkpoint.adapter import describe_base
from mmllm.checkpoint.card import model_card
from mmllm.checkpoint.folder import save_checkpoint
from mmllm.checkpoint.generation_settings import write_generation_settings
from mmllm.checkpoint.golden import make_golden
from mmllm.checkpoint.reload import check_reload
from mmllm.config import ConfigError, StageConfig
from mmllm.config.file import dump_config
from mmllm.distributed.ranks import broadcast_from_first
from mmllm.feature_cache.cache import FeatureCache, open_cache
from mmllm.feature_cache.encoder import FeatureEncoder
from mmllm.kernels.attention import use_blocked_attention
from mmllm.kernels.compiled import compile_layers, use_liger
from mmllm.model.capabilities import Capabilities, find_capabilities
from mmllm.model.language import decoder_layers
from mmllm.model.positions import position_limit
from mmllm.optimizers.layers import depths
from mmllm.runs.flops import StepFlops
from mmllm.runs.folder import RunFolder
from mmllm.runs.requirements import is_slow_in_bf16
from mmllm.runs.run_log import metric_curves
from mmllm.stages.conversation_batches import BatchMaker
from mmllm.stages.load import load_model
from mmllm.stages.trained_parts import choose_trained
from mmllm.stages.word_start import start_from_words
from mmllm.training.data import TrainingData
from mmllm.training.gradient_checkpointing import enable_gradient_checkpointing
from mmllm.training.lora import move_adapters
from mmllm.training.losses import conversation_loss_sum
from mmllm.training.stage import LossOutput
from mmllm.training.validation import Validation


class _ConversationLoss(nn.Module):
    """The module that DDP wraps: batch -> summed loss, or the loss of each example. Every trained part runs each time.

    `always_runs_tower` is set for ZeRO-3, where ranks wait for each other even at a frozen tower.
    """

    always_runs_tower = False

    def __init__(self, model: Any, capabilities: Capabilities, chunk_tokens: int | None):
        super().__init__()
        self.model, self.chunk_tokens = model, chunk_tokens
        self.plain_head, self.with_mask = capabilities.plain_head, capabilities.needs_mask

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
        self.model, self.processor, self.origin = load_model(config)
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
        trained = choose_trained(self.model, config, may_have_images=self.data.may_have_images)
        self.parts, self.tower_adapters = trained.parts, trained.tower_adapters
        self.features: FeatureCache | None = None
        if config.data.cache_features:
            folder = Path(config.data.cache_folder or Path(config.out).parent / "cache")
            self.features = open_cache(self.model, self.processor, self.examples, folder)
        if config.compute.precision == "bf16" and not config.compute.compile and not torch.accelerator.is_available():
            use_blocked_attention(self.model.language_model)
        self.capabilities = find_capabilities(self.model.language_model)
        self.module: nn.Module = _ConversationLoss(self.model, self.capabilities, config.compute.loss_chunk_tokens)
        data_config = config.data.model_copy(update={"max_length_tokens": self.data.max_length_tokens})
        self.packer = Packer(self.model.language_model, data_config, self.capabilities)
        self.batches = BatchMaker(self.renderer, self.processor, self.packer, self.features)
        enable_gradient_checkpointing(self.model, config.compute.gradient_checkpointing)
        if config.compute.liger:
            use_liger(self.model.language_model)
        if config.compute.compile:
            compile_layers(decoder_layers(self.model.language_model))
        self.depths = depths(self.model) if config.optim.layer_decay != 1.0 else {}
        self._set_modes()
        self.validation = self._validation()
        self.notes = [*self._precisions(), *self.validation.notes]
        self.num_workers = config.data.num_workers

    def _validation(self) -> Validation:
        examples = self.data.validation()
        return Validation(
            self.config, self.model, self.processor, examples=examples,
            text=self.data.text_probe(examples), module=self.module,
            collate=lambda chosen: self.batches.make(chosen, use_features=False),
        )  # fmt: skip

    def _precisions(self) -> list[str]:
        """Notes shown at the start of a run where not all weights are held in fp32."""
        dtypes = {part: str(dtype).removeprefix("torch.") for part, dtype in self.model.part_dtypes().items()}
        lora = self.config.lora
        if lora and lora.quantise:
            dtypes["language"] = f"{lora.quantise} (linear layers) and {dtypes['language']} (embeddings and head)"
        if set(dtypes.values()) == {"float32"}:
            return []
        notes = [f"weights are held in: {', '.join(f'{part} {dtype}' for part, dtype in dtypes.items())}"]
        if "bfloat16" in dtypes.values() and is_slow_in_bf16():
            notes.append(
                "this CPU has no instructions for bf16: weights held in it save memory, but compute several times "
                "slower than in fp32"
            )
        return notes

    def _set_modes(self) -> None:
        """Training mode for all but a frozen tower; a frozen LLM needs it for gradient checkpointing."""
        self.model.train()
        self.model.vision_tower.train("vision" in self.config.train)

    def sampler(self, batch_size: int) -> Sampler:
        return self.data.sampler(batch_size, self._split_step)

    def _split_step(self, items: Sequence[Item], count: int) -> list[Sequence[Item]]:
        return self.packer.split_step(items, count, self.data.size_of)

    def batch(self, indices: Sequence[Item]) -> Batch:
        examples = [item if isinstance(item, Example) else self.examples[item] for item in indices]
        batch = self.batches.make(examples, use_features=True)
        batch.images_per_example = [len(example.images) for example in examples]
        return batch

    def loss(self, module: nn.Module, batch: Batch) -> LossOutput:
        return LossOutput(module(batch), batch.num_supervised)

    def step_flops(self) -> StepFlops:
        return StepFlops(
            self.model, precision=self.config.compute.precision, plain_head=self.capabilities.plain_head,
            recomputes_language=self.config.recomputes_language, recomputes_vision=self.config.recomputes_vision,
        )  # fmt: skip

    def prepare_features(self, device: Any, *, rank: int, world_size: int) -> None:
        if self.features is not None:
            encoder = FeatureEncoder(self.features, self.model.vision_tower, self.processor)
            encoder.fill(device, rank=rank, world_size=world_size)

    def start_projector(self, device: Any) -> None:
        if self.config.word_start:
            note = start_from_words(
                self.model, self.batches, self.examples, self.config.word_start, device, self.config.seed
            )
            broadcast_from_first(self.model.projector.parameters(), device)
            self.notes.append(note)
            self._set_modes()

    def count(self, batch: Batch) -> int:
        return batch.num_supervised

    def num_tokens(self, batch: Batch) -> int:
        return int(batch.attention_mask.sum())

    def can_train(self, part: str, batch: Batch) -> bool:
        return part == "language" or batch.pixel_values is not None or batch.image_features is not None

    def names(self, batch: Batch) -> list[str]:
        return list(batch.example_ids)

    @torch.no_grad()
    def validate(self, step: int, *, writes: bool = True) -> dict[str, float]:
        """The metrics of `Validation`, computed with the model in eval mode."""
        self.model.eval()
        try:
            return self.validation.metrics(step, writes=writes)
        finally:  # also when a signal interrupts it
            self._set_modes()

    @property
    def validates(self) -> bool:
        """Whether there are validation examples, a text probe or tasks."""
        validation = self.validation
        return bool(validation.examples or validation.text or validation.task_names)

    @torch.no_grad()
    def run_largest_validation(self) -> None:
        """Runs the part of a validation that needs most memory, and drops the result."""
        self.model.eval()
        try:
            self.validation.rehearse()
        finally:
            self._set_modes()

    def save(self, out: Path, log: list[dict[str, Any]]) -> None:
        """Writes a checkpoint with its golden answers; for an LLM with LoRA, the adapter without the base's weights.

        Tower adapters are merged in a copy: the tower is small beside the LLM and saved whole. The adapters of a
        quantized LLM are moved to the full-precision LLM, which becomes their base and gives the golden answers.
        """
        tower, language_model = self.model.vision_tower, self.model.language_model
        if self.config.lora and self.config.lora.quantise:
            move_adapters(self.model, load_model(self.config)[0].language_model, self.config.lora)
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
        RunFolder(out).settings.write_text(settings)
        metrics = {"step": log[-1]["step"], **{name: curve[-1][1] for name, curve in metric_curves(log).items()}}
        facts: dict[str, Any] = {
            "origin": self.origin, "settings": settings, "figures": metrics, "capabilities": asdict(self.capabilities),
        }  # fmt: skip
        num_examples = "streamed" if self.num_examples is None else self.num_examples
        summary = f"{self.config.stage}, {metrics['step']} steps on {num_examples} examples"
        card = model_card(out, summary, self.origin, metrics, base=self.base, has_settings=True)
        files = make_golden(self.model, self.processor)
        save_checkpoint(out, self.model, self.processor, card=card, files=files, base=self.base, **facts)
