"""The stages: what is trained, on what, and how it is judged while it trains."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.batch import Batch, Example, ImageRef
from mmllm.config import ConfigError, RunConfig, StageConfig, WarmupLanguageConfig, WarmupVisionConfig
from mmllm.config_file import dump_config
from mmllm.data.chat import ChatError
from mmllm.data.collate import collate
from mmllm.data.sources import DataError
from mmllm.inference.engine import Engine, load_pixels
from mmllm.inference.golden import load_verified, make_golden
from mmllm.model.adapter import describe_base, merge_adapter
from mmllm.model.build import build_model
from mmllm.model.checkpoint import save_checkpoint
from mmllm.training.card import model_card
from mmllm.training.data import TrainingData
from mmllm.training.features import FeatureCache
from mmllm.training.loop import Stage
from mmllm.training.lora import add_lora, add_tower_lora
from mmllm.training.losses import conversation_loss_sum, has_plain_head
from mmllm.training.order import Item, Orders
from mmllm.training.warmup_language import WarmupLanguage
from mmllm.training.warmup_vision import WarmupVision

_NO_FILE_NAME = re.compile(r"[^\w.-]")  # characters of an id that a file name better does without


class _ConversationLoss(nn.Module):
    """What DDP wraps: batch -> summed loss, so that every trained part takes part in every forward.

    `always_runs_tower` is set where ranks wait for each other's tower, see Strategy.
    """

    always_runs_tower = False

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.plain_head = has_plain_head(model.language_model)

    def forward(self, batch: Batch) -> Tensor:
        batch = batch.to(self.model.get_input_embeddings().weight.device)
        runs = {"plain_head": self.plain_head, "always_runs_tower": self.always_runs_tower}
        return conversation_loss_sum(self.model, batch, **runs)


class ConversationStage:
    """Stage 1 and stage 2: conversations with pictures; the settings say which parts are trained."""

    def __init__(self, config: StageConfig):
        self.config = config
        torch.manual_seed(config.seed)
        if config.model.checkpoint:
            self.model, self.processor, manifest = load_verified(config.model.checkpoint)
            if "base" in manifest:
                merge_adapter(self.model)
            self.origin = {**manifest.get("origin", {}), "started_from": config.model.checkpoint}
            if config.model.template:
                self.processor.template = config.model.template
        else:
            self.model, self.processor, self.origin = build_model(config.model)
        self.base = describe_base(config.model) if config.lora else None
        try:
            self.engine = Engine(self.model, self.processor, name=Path(config.out).name)
        except ChatError as error:
            raise ConfigError(f"model.template: {error}") from error
        self.engine.settle()
        self.data = TrainingData(config, self.engine.renderer)
        self.examples, self.lengths, self.num_examples = self.data.examples, self.data.lengths, self.data.num_examples
        self.val_examples = self.data.validation()
        self._freeze()
        self.features: FeatureCache | None = None
        if config.data.cache_features:
            self.features = FeatureCache(self.engine, self.examples, Path(config.out).parent / "cache")
        self.module: nn.Module = _ConversationLoss(self.model)
        if config.optim.gradient_checkpointing:
            if not self.model.language_model.supports_gradient_checkpointing:
                kind = self.model.config.text_config.model_type
                raise ConfigError(f"optim.gradient_checkpointing: {kind} cannot recompute its layers; leave it out")
            self.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        self.parts = self._parts()
        self._set_modes()

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
                add_lora(self.model, self.config.lora)
            else:
                self.model.language_model.requires_grad_(True)

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

    def _set_modes(self) -> None:
        """Training mode, also for a frozen LLM (only then are gradients checkpointed); not for a frozen tower."""
        self.model.train()
        self.model.vision_tower.train("vision" in self.config.train)

    def _parts(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        prefixes = {
            "vision": "vision_tower.", "projector": ("projector.", "image_newline"), "language": "language_model.",
        }  # fmt: skip
        return {
            part: [(n, p) for n, p in self.model.named_parameters() if p.requires_grad and n.startswith(prefixes[part])]
            for part in self.config.train
        }

    def _collate(self, examples: Sequence[Example], features: FeatureCache | None) -> Batch:
        rendered = [self.engine.renderer.render_example(example) for example in examples]
        images = [image for example in examples for image in example.images]
        tensors: dict[str, Tensor] = {}
        if images:
            tensors = {"image_features": features.get(images)} if features else load_pixels(self.processor, images)
        return collate(
            rendered,
            pad_token_id=int(self.processor.tokenizer.pad_token_id),
            example_ids=[example.id for example in examples],
            **tensors,
        )

    def order(self, batch_size: int) -> Orders:
        return self.data.order(batch_size)

    def batch(self, indices: Sequence[Item]) -> Batch:
        examples = [item if isinstance(item, Example) else self.examples[item] for item in indices]
        return self._collate(examples, self.features)

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
        """Loss per supervised token on the validation data; sample answers go to `samples/`, with their pictures."""
        if not self.val_examples:
            return {}
        self.model.eval()
        total, count, size = 0.0, 0, self.config.optim.batch_size
        for start in range(0, len(self.val_examples), size):
            batch = self._collate(self.val_examples[start : start + size], None)
            total += float(self.module(batch))
            count += batch.num_supervised
        self._write_samples(step, writes=writes)
        self._set_modes()
        return {"val_loss": total / max(1, count)}

    def _write_samples(self, step: int, *, writes: bool) -> None:
        folder = Path(self.config.out) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"# Answers after step {step}\n"]
        for example in self.val_examples[: self.config.log.num_samples]:
            asked = _first_question(example)
            reply = self.engine.reply(asked)
            for number, image in enumerate(asked.images):
                name = f"{_NO_FILE_NAME.sub('_', example.id)[-80:]}-{number}.png"
                if writes and not (folder / name).is_file():
                    self.engine.seen(image).save(folder / name)
                lines.append(f"![what the model saw]({name})\n")
            question = asked.messages[-1].text.strip()
            right = example.messages[_first_answer(example)].text
            lines.append(f"- question: {question}\n- answer: {reply.text}\n- reference: {right}\n")
        if writes:
            (folder / f"step_{step:07d}.md").write_text("\n".join(lines))

    def save(self, out: Path, log: list[dict[str, Any]]) -> None:
        """The finished checkpoint with its golden answers; of an LLM with LoRA the adapter and not the base's weights.

        Adapters of the tower are merged: the tower is small beside the LLM and saved whole.
        """
        self.model.eval()
        if self.config.vision_lora:
            self.tower_adapters.merge_and_unload(safe_merge=True)
        settings = dump_config(self.config)
        (out / "config.yaml").write_text(settings)
        last = {name: value for row in log for name, value in row.items()}
        facts: dict[str, Any] = {"origin": self.origin, "settings": settings, "figures": last}
        num_examples = "streamed" if self.num_examples is None else self.num_examples
        made = f"{self.config.stage}, {self.config.optim.max_steps} steps on {num_examples} examples"
        card = model_card(out, made, self.origin, last, base=self.base, has_settings=True)
        files = make_golden(self.engine)
        save_checkpoint(out, self.model, self.processor, card=card, files=files, base=self.base, **facts)


def _first_answer(example: Example) -> int:
    return next(index for index, message in enumerate(example.messages) if message.role == "assistant")


def _first_question(example: Example) -> Example:
    """The conversation up to its first answer, with the images that stand there."""
    messages = example.messages[: _first_answer(example)]
    num_images = sum(isinstance(part, ImageRef) for message in messages for part in message.parts)
    return Example(example.id, example.source, messages, example.images[:num_images])


def _conversation(config: RunConfig) -> Stage:
    assert isinstance(config, StageConfig)
    return ConversationStage(config)


def _warmup_language(config: RunConfig) -> Stage:
    assert isinstance(config, WarmupLanguageConfig)
    return WarmupLanguage(config)


def _warmup_vision(config: RunConfig) -> Stage:
    assert isinstance(config, WarmupVisionConfig)
    return WarmupVision(config)


STAGES: dict[str, Callable[[RunConfig], Stage]] = {
    "warmup_vision": _warmup_vision,
    "warmup_language": _warmup_language,
    "stage1": _conversation,
    "stage2": _conversation,
}


def build_stage(config: RunConfig) -> Stage:
    """The stage of a run's settings, with everything loaded and checked. Raises ConfigError or DataError."""
    if config.stage not in STAGES:
        raise ConfigError(f"stage: {config.stage!r} is not known; allowed: {', '.join(STAGES)}")
    return STAGES[config.stage](config)
