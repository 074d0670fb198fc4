"""Trainers that train the same weights on the same data for the same number of steps, each in its own process.

`python -m bench.contenders NAME STAGE FOLDER SIZE BLOCK` prints one JSON line after each block of steps and waits for
a line on its stdin, so that several can take turns. The last line is about the whole run. All use AdamW (0.9, 0.999)
without weight decay, a constant learning rate, gradients clipped at norm 1, bf16 autocast, and no worker processes.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.recorder import Recorder, time_data
from bench.workload import QUICK, SIZES, STAGES, Rows, messages_of
from mmllm.batch import IGNORE_INDEX

NUM_PROBED = 8  # conversations whose loss every contender reports, before and after training


def ours(recorder: Recorder, folder: Path, stage_name: str) -> tuple[float, float]:
    """Our stage and our loop's own step, with default settings."""
    from mmllm.config import StageConfig
    from mmllm.distributed.ranks import build_accelerator
    from mmllm.stages.conversation import ConversationStage
    from mmllm.stages.registry import build_stage
    from mmllm.training.loop import Run

    mix, train, is_cached = STAGES[stage_name]
    size = recorder.size
    values = {
        "stage": stage_name.split()[0],
        "out": str(folder / "out"),
        "train": train,
        "model": {"checkpoint": str(folder / "checkpoint")},
        "data": {"train": [{"path": str(folder / f"{mix}.json")}], "cache_features": is_cached},
        "compute": {"batch_size": size.batch_size, "precision": "bf16"},
        "optim": {
            "learning_rates": dict.fromkeys(train, size.rate), "max_steps": size.steps,
            "warmup_fraction": 0, "decay_fraction": 0,
        },
    }  # fmt: skip
    config = StageConfig.model_validate(values)
    accelerator = build_accelerator(config)
    stage = build_stage(config)
    assert isinstance(stage, ConversationStage)
    if stage.features:
        stage.prepare_features(accelerator.device, rank=0, world_size=1)
    run = Run(config, stage, accelerator, lambda: build_stage(config))
    make = stage.batch

    def probe() -> Tensor:
        batch = make(range(NUM_PROBED))
        loss: Tensor = run.strategy.module(batch) / batch.num_supervised
        return loss

    def recorded(indices: Any) -> Any:
        batch = make(indices)
        recorder.batch(batch.attention_mask, batch.labels, len(indices))
        return batch

    stage.batch = recorded  # type: ignore[method-assign]
    data = run.batches.start(0)
    recorder.loaded()
    before = warm_up(probe, run.strategy.trained.values())
    recorder.ready()
    for step in range(size.steps):
        recorder.step(run.stepper.step(step, data).loss)
    return before, float(probe().detach())


def warm_up(probe: Callable[[], Tensor], parameters: Iterable[Tensor]) -> float:
    """Runs forward and backward once and drops the gradients, so that no timed step pays for one-time work.

    Returns the loss.
    """
    loss = probe()
    loss.backward()
    for parameter in parameters:
        parameter.grad = None
    return float(loss.detach())


def load_llava(folder: Path, train: list[str]) -> tuple[Any, Any]:
    """(model, processor); the parts named in `train` are trainable."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=torch.float32)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if "language" in train:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    model.train()
    model.config.use_cache = False
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoProcessor.from_pretrained(folder / "llava")


def load_rows(folder: Path, stage_name: str) -> Any:
    """The conversations with messages, pictures and lengths: a `datasets.Dataset`, or a list without `datasets`."""
    size = json.loads((folder / "size.json").read_text())
    rows = json.loads((folder / f"{STAGES[stage_name][0]}.json").read_text())
    listed = [
        {
            "messages": messages_of(row),
            "images": [str(folder / row["image"])] if "image" in row else [],
            "length": sum(3 + len(turn["value"].split()) for turn in row["conversations"])
            + ("image" in row) * size["image_tokens"],
        }
        for row in rows
    ]
    if importlib.util.find_spec("datasets") is None:
        return Rows(listed)
    from datasets import Dataset, Image, Sequence

    return Dataset.from_list(listed).cast_column("images", Sequence(Image()))


def collator(processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """A collator that pads to the longest row. Labels are the assistant's words and their end tokens."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        chats = []
        for row in rows:
            pictures = iter(row["images"])
            chats.append(
                [
                    {
                        "role": turn["role"],
                        "content": [
                            {"type": "image", "image": next(pictures)} if part["type"] == "image" else part
                            for part in turn["content"]
                        ],
                    }
                    for turn in row["messages"]
                ]
            )
        batch = processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right"},
        )  # fmt: skip
        is_supervised = batch.pop("assistant_masks").bool() & batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~is_supervised, IGNORE_INDEX)
        return dict(batch)

    return collate


def recorded_collator(recorder: Recorder, collate: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The collator, which also reports each batch to the recorder."""

    def recorded(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        recorder.batch(batch["attention_mask"], batch["labels"], len(rows))
        return batch

    return recorded


def probe_llava(model: Any, collate: Callable[..., dict[str, Any]], rows: Any) -> Callable[[], Tensor]:
    """Loss per supervised token of the first conversations, as transformers computes it."""

    def probe() -> Tensor:
        batch = collate([rows[number] for number in range(NUM_PROBED)])
        with torch.autocast(model.device.type, torch.bfloat16):
            loss: Tensor = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
        return loss

    return probe


def _trainer_options(recorder: Recorder, folder: Path, sampling: str) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out-trainer"), "per_device_train_batch_size": recorder.size.batch_size,
        "max_steps": recorder.size.steps, "learning_rate": recorder.size.rate, "lr_scheduler_type": "constant",
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(), "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "remove_unused_columns": False, "train_sampling_strategy": sampling, "disable_tqdm": True,
        "max_grad_norm": 1.0, "weight_decay": 0.0,
    }  # fmt: skip


def group_as_if_large() -> None:
    """Makes Trainer group by length within 50 batches, as it does for large data, not within a quarter of a pass."""
    from transformers import trainer_pt_utils

    original = trainer_pt_utils.get_length_grouped_indices
    trainer_pt_utils.get_length_grouped_indices = functools.partial(original, mega_batch_mult=50)


def _callback(recorder: Recorder) -> Any:
    from transformers import TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            recorder.ready()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            recorder.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            recorder.losses += [float(logs["loss"])] if "loss" in logs else []

    return Turns()


def hf_trainer(recorder: Recorder, folder: Path, stage_name: str, sampling: str = "random") -> tuple[float, float]:
    """transformers' Trainer on its own Llava."""
    from transformers import Trainer, TrainingArguments

    group_as_if_large()

    model, processor = load_llava(folder, STAGES[stage_name][1])
    rows, collate = load_rows(folder, stage_name), collator(processor)
    args = TrainingArguments(**_trainer_options(recorder, folder, sampling))
    trainer = Trainer(
        model, args, data_collator=recorded_collator(recorder, collate), train_dataset=rows,
        callbacks=[_callback(recorder)],
    )  # fmt: skip
    return _train(recorder, trainer, collate)


def _train(recorder: Recorder, trainer: Any, collate: Callable[..., dict[str, Any]]) -> tuple[float, float]:
    probe = probe_llava(trainer.model, collate, trainer.train_dataset)
    recorder.loaded()
    before = warm_up(probe, trainer.model.parameters())
    trainer.train()
    return before, float(probe().detach())


def hf_trainer_grouped(recorder: Recorder, folder: Path, stage_name: str) -> tuple[float, float]:
    """The same, with examples grouped by length."""
    return hf_trainer(recorder, folder, stage_name, "group_by_length")


def trl_sft(recorder: Recorder, folder: Path, stage_name: str) -> tuple[float, float]:
    """TRL's SFTTrainer with its own collator: labels are the assistant's words, and examples are grouped by length."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    group_as_if_large()

    model, processor = load_llava(folder, STAGES[stage_name][1])
    rows = load_rows(folder, stage_name)
    args = SFTConfig(
        **_trainer_options(recorder, folder, "group_by_length"), assistant_only_loss=True, max_length=None,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=processor, callbacks=[_callback(recorder)])
    collate = trainer.data_collator
    trainer.data_collator = recorded_collator(recorder, collate)
    return _train(recorder, trainer, collate)


def plain_loop(recorder: Recorder, folder: Path, stage_name: str) -> tuple[float, float]:
    """A loop as short as nanoVLM's: shuffled, padded to the longest row, logits at all positions, the whole tower."""
    from torch.nn import functional
    from torch.utils.data import DataLoader

    model, processor = load_llava(folder, STAGES[stage_name][1])
    rows, collate = load_rows(folder, stage_name), collator(processor)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recorder.size.rate, weight_decay=0.0)
    loader: Any = DataLoader(
        rows, batch_size=recorder.size.batch_size, shuffle=True, collate_fn=recorded_collator(recorder, collate),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip

    def loss_of(batch: dict[str, Any]) -> Tensor:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch.pop("labels")
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(**batch).logits
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    def probe() -> Tensor:
        return loss_of(collate([rows[number] for number in range(NUM_PROBED)]))

    recorder.loaded()
    before = warm_up(probe, trained)
    recorder.ready()
    for batch in itertools.islice(loader, recorder.size.steps):
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recorder.step(float(loss.detach()))
    return before, float(probe().detach())


CONTENDERS: dict[str, Callable[[Recorder, Path, str], tuple[float, float]]] = {
    "ours": ours,
    "Trainer": hf_trainer,
    "Trainer grouped": hf_trainer_grouped,
    "TRL grouped": trl_sft,
    "plain loop": plain_loop,
}


def main(name: str, stage_name: str, folder: str, size_name: str, block: str) -> None:
    size = QUICK if size_name == "quick" else SIZES[size_name]
    recorder = Recorder(size, int(block))
    time_data(recorder)
    recorder.end(*CONTENDERS[name](recorder, Path(folder), stage_name))


if __name__ == "__main__":
    main(*sys.argv[1:])
