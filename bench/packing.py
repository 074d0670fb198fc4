"""Training steps with `data.packing` never, always and auto, each with and without grouping by length.

`python -m bench packing`: our stage with the embedded vision tower (16 image tokens) and a fresh LLM (3M parameters,
256 wide), on the conversations of bench/workload.py and pictures of noise. Times are CPU seconds of one thread.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.workload import NUM_PICTURES, write_rows

ROUNDS, STEPS = 3, 2
BATCH, ACCUMULATE = 8, 4
NUM_ROWS = 512
LLM = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
MIXES = ("instructions", "captions")
PACKINGS = ("never", "auto", "always")


def _write_language(folder: Path, attention: str) -> None:
    """Writes a Llama with random weights and the embedded tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained("weights/tiny-language")
    ids = {"bos_token_id": None, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), attn_implementation=attention, **LLM, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_data(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    for mix in MIXES:
        (folder / f"{mix}.json").write_text(json.dumps(list(write_rows(mix, NUM_ROWS))))


def _stage(folder: Path, mix: str, attention: str) -> Any:
    """A stage that trains projector and LLM on instructions, or the projector on captions."""
    from mmllm.config import StageConfig
    from mmllm.stages.conversation import ConversationStage

    train = ["projector", "language"] if mix == "instructions" else ["projector"]
    values = {
        "stage": "stage2" if mix == "instructions" else "stage1",
        "out": str(folder / "out"),
        "train": train,
        "model": {
            "vision": {"source": "local-dir:weights/tiny-vision", "feature_layer": -2, "image_mode": "stretch"},
            "projector": {"kind": "mlp"},
            "language": {"source": str(folder / attention), "attention": attention},
            "template": "tokenizer",
        },
        "data": {"train": [{"path": str(folder / f"{mix}.json")}], "cache_features": True},
        "optim": {
            "learning_rates": dict.fromkeys(train, 1e-3),
            "max_steps": 1,
        },
        "compute": {"batch_size": BATCH, "precision": "bf16"},
    }
    stage = ConversationStage(StageConfig.model_validate(values))
    assert stage.features
    stage.prepare_features(stage.model.device, rank=0, world_size=1)
    return stage


class _Way:
    """One setting of packing and grouping, and what was measured with it."""

    def __init__(self, stage: Any, packing: str, *, is_grouped: bool):
        from mmllm.batching.packed_rows import Packer

        self.stage = stage
        data = stage.config.data.model_copy(update={"packing": packing})
        self.packer = Packer(stage.model.language_model, data, stage.capabilities)
        lengths = stage.data.report.lengths if is_grouped else None
        self.lengths, self.examples, self.seconds = lengths, BATCH * ACCUMULATE, []  # type: ignore[var-annotated]
        self.slots = self.tokens = self.rows = 0

    def _order(self) -> Any:
        self.stage.packer, self.stage.data.lengths = self.packer, self.lengths
        return self.stage.sampler(self.examples)

    def run(self, first: int) -> None:
        """Times STEPS steps with their data, forward and backward, but without updates."""
        import torch

        order = self._order()
        begun = time.process_time()
        for step in range(first, first + STEPS):
            for items in order.split_step(order.rank_items(step, 0, 1), ACCUMULATE):
                batch = self.stage.batch(items)
                self.slots += batch.input_ids.numel()
                self.tokens += int(batch.attention_mask.sum())
                self.rows += len(batch.input_ids)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = self.stage.module(batch)
                loss.backward()
            self.stage.model.zero_grad()
        self.seconds.append(time.process_time() - begun)

    def metrics(self) -> dict[str, float]:
        steps = STEPS * len(self.seconds)
        return {
            "samples a second": self.examples * STEPS / statistics.median(self.seconds),
            "padding": 1 - self.tokens / self.slots,
            "rows a step": self.rows / steps,
        }


def packing() -> dict[str, float]:
    """Samples a second of each setting, as a ratio to `never` with grouping by length, the default without packing."""
    import torch

    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_data(folder)
        for attention in ("eager", "sdpa"):
            _write_language(folder / attention, attention)
            for mix in MIXES:
                stage = _stage(folder, mix, attention)
                ways = {
                    (packing, grouped): _Way(stage, packing, is_grouped=grouped)
                    for grouped in (True, False)
                    for packing in PACKINGS
                }
                for way in ways.values():
                    way.run(0)
                    way.seconds.clear()
                    way.slots = way.tokens = way.rows = 0
                for number in range(ROUNDS):
                    for way in ways.values():
                        way.run(number * STEPS)
                base = ways["never", True].metrics()["samples a second"]
                for (packing, grouped), way in ways.items():
                    metrics = way.metrics()
                    what = f"{attention} {mix} {'grouped' if grouped else 'shuffled'} {packing}"
                    ratios[f"{what} ratio"] = metrics["samples a second"] / base
                    shown = "  ".join(f"{key} {value:.2f}" for key, value in metrics.items())
                    print(f"{what}: {shown}  ratio {ratios[f'{what} ratio']:.2f}", flush=True)
    return ratios
