"""Trainers that take the same weights and data through the same number of steps, each in a process of its own.

`python -m bench.contenders NAME STAGE FOLDER SIZE BLOCK` prints one JSON line behind each block of steps and waits for
a line on its stdin, so that several can take turns; the last line is about the whole run. All: AdamW (0.9, 0.999), no
weight decay, a constant rate, the norm of gradients clipped at 1, bf16 autocast, no worker processes.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.workload import QUICK, SIZES, STAGES, Rows, Size, messages_of
from mmllm.batch import IGNORE_INDEX

NUM_PROBED = 8  # conversations whose loss every contender tells, before and after
MIB = 2**20


class Recorder:
    """What each step took and saw. A contender tells of its batches as they are made, and of its steps as they end."""

    def __init__(self, size: Size, block: int):
        self.size, self.block = size, block
        self.losses: list[float] = []
        self.blocks: list[dict[str, float]] = []
        self.supervised: list[int] = []  # of each batch
        self.samples = self.slots = self.tokens = self.steps = 0
        self.waited = 0.0
        self.is_counting = False

    def loaded(self) -> None:
        """Weights and data are there. What memory is taken from now on is training's."""
        self.before_mib = self._memory()

    def ready(self) -> None:
        """The next thing is the first step: waits for its turn."""
        self.is_counting = True
        self._turn({"ready": True})

    def _memory(self) -> float:
        """MiB that are resident now, or on the GPU."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / MIB
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / MIB

    def _peak(self) -> float:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / MIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def _turn(self, told: dict[str, Any]) -> None:
        print(f"@{json.dumps(told)}", flush=True)
        sys.stdin.readline()
        self._clock = time.perf_counter(), time.process_time(), self.waited

    def batch(self, attention_mask: Tensor, labels: Tensor, num_samples: int) -> None:
        if not self.is_counting:
            return
        self.samples += num_samples
        self.slots += attention_mask.numel()
        self.tokens += int(attention_mask.sum())
        self.supervised.append(int((labels[:, 1:] != IGNORE_INDEX).sum()))

    def step(self, loss: float | None = None) -> None:
        """The end of a step; `loss` is per supervised token."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.losses += [] if loss is None else [loss]
        self.steps += 1
        if self.steps % self.block:
            return
        began, began_cpu, waited = self._clock
        cpu = 0.0 if torch.cuda.is_available() else time.process_time() - began_cpu
        block = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu, "waited": self.waited - waited}
        self.blocks.append(block)
        if self.steps == self.size.steps:
            self.is_counting = False
            self.peak_mib = self._peak() - self.before_mib
        self._turn({"block": block})

    def end(self, before: float, after: float) -> None:
        named = ("losses", "blocks", "samples", "slots", "tokens", "supervised", "peak_mib", "before_mib")
        print("@" + json.dumps({**{name: getattr(self, name) for name in named}, "before": before, "after": after}))


def time_data(recorder: Recorder) -> None:
    """Counts the seconds for which any of torch's data loaders is waited for."""
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    original = _BaseDataLoaderIter.__next__

    def next_timed(self: Any) -> Any:
        begun = time.perf_counter()
        try:
            return original(self)
        finally:
            recorder.waited += time.perf_counter() - begun

    _BaseDataLoaderIter.__next__ = next_timed  # type: ignore[method-assign]


def ours(recorder: Recorder, folder: Path, stage_name: str) -> tuple[float, float]:
    """The real stage and the loop's own step, with the settings that a user gets who gives none."""
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
        stage.features.fill(accelerator.device)
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
    """One backward whose gradients nobody uses, so that no first step pays for what is made once; gives the loss."""
    loss = probe()
    loss.backward()
    for parameter in parameters:
        parameter.grad = None
    return float(loss.detach())


def load_llava(folder: Path, train: list[str]) -> tuple[Any, Any]:
    """(model, processor), of the model what is trained as `train` says."""
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
    """The conversations as a `datasets.Dataset` of messages and pictures, with their lengths; or a list without it."""
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
    """Pads to the longest; only what the assistant says, and that it ends there, is taught."""

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
        taught = batch.pop("assistant_masks").bool() & batch["attention_mask"].bool()
        batch["labels"] = batch["input_ids"].masked_fill(~taught, IGNORE_INDEX)
        return dict(batch)

    return collate


def recorded_collator(recorder: Recorder, collate: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def recorded(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        recorder.batch(batch["attention_mask"], batch["labels"], len(rows))
        return batch

    return recorded


def probe_llava(model: Any, collate: Callable[..., dict[str, Any]], rows: Any) -> Callable[[], Tensor]:
    """Loss per supervised token of the first conversations, as transformers itself finds it."""

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
    """Like lengths are looked for in 50 batches, as Trainer does with large data, and not in a quarter of a pass."""
    from transformers import trainer_pt_utils

    original = trainer_pt_utils.get_length_grouped_indices
    trainer_pt_utils.get_length_grouped_indices = functools.partial(original, mega_batch_mult=50)


def _callback(recorder: Recorder) -> Any:
    from transformers import TrainerCallback

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *given: Any, **named: Any) -> None:
            recorder.ready()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            recorder.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **named: Any) -> None:
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
    """The same with examples of like length beside each other."""
    return hf_trainer(recorder, folder, stage_name, "group_by_length")


def trl_sft(recorder: Recorder, folder: Path, stage_name: str) -> tuple[float, float]:
    """TRL's SFTTrainer with its own collator; only the assistant's words are taught; like lengths together."""
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
    """A loop as short as nanoVLM's: shuffled, padded to the longest, the logits of all rows, the whole tower."""
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
