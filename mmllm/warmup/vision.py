"""The vision warm-up of the embedded default model: a small CLIP learns to tell drawn scenes apart."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmllm.batching.sampler import IndexedSampler
from mmllm.config import WarmupVisionConfig
from mmllm.model.language import load_tokenizer
from mmllm.model.vision_open_clip import LOCAL_DIR, read_model_cfg
from mmllm.processes import map_in_processes
from mmllm.scenes.captions import write_caption
from mmllm.scenes.draw import draw
from mmllm.scenes.world import Kind, Scene, Split, near_miss, sample_kind, sample_scene
from mmllm.training.stage import LossOutput
from mmllm.warmup.regions import MAX_REGIONS, Box, RegionWords, regions_of

MAX_WORDS = 5  # tokens that describe a part of a scene
NEAR_MISSES = 3  # hard negatives drawn for each scene


def scene_group(
    seed: int, split: Split, number: int, shown: Mapping[Kind, int]
) -> tuple[list[Scene], random.Random]:  # fmt: skip
    """(a scene and near misses of it, which differ only in details; the random generator to draw them with)."""
    rng = random.Random(f"{seed}/{split}/pairs/{number}")
    scenes = [sample_scene(rng, split, sample_kind(rng, shown))]
    for _ in range(NEAR_MISSES):
        scenes.append(near_miss(rng.choice(scenes), rng, split))
    return scenes, rng


class DrawnScene(NamedTuple):
    """A drawn scene, its captions, and its regions, each a box and its words."""

    pixels: np.ndarray  # [H, W, 3]
    captions: list[str]
    regions: list[tuple[Box, str]]


class Pairs(NamedTuple):
    """Drawn scenes as tensors."""

    pixels: Tensor  # [N, H, W, 3], bytes
    texts: Tensor  # [N, captions, T]
    boxes: Tensor  # [N, MAX_REGIONS, 4], padding: -1
    words: Tensor  # [N, MAX_REGIONS, MAX_WORDS] token ids, padding: -1


def _draw_chunk(
    config: WarmupVisionConfig, split: Split, numbers: range, side_px: int, num_captions: int
) -> list[DrawnScene]:
    drawn = []
    for number in numbers:
        scenes, rng = scene_group(config.seed, split, number, config.shown)
        for scene in scenes:
            pixels = np.asarray(draw(scene, rng).resize((side_px, side_px), Image.Resampling.BICUBIC))
            captions = [write_caption(scene, rng) for _ in range(num_captions)]
            drawn.append(DrawnScene(pixels, captions, regions_of(scene)))
    return drawn


class _ClipLoss(nn.Module):
    """The contrastive loss, plus the loss on region words at the last but one layer, which language models read."""

    def __init__(self, model: Any, words_weight: float, vocab_size: int, side_px: int):
        super().__init__()
        from open_clip.loss import ClipLoss

        self.model, self.loss, self.words_weight = model, ClipLoss(), words_weight
        with torch.no_grad():
            blank = model.eval().visual.forward_intermediates(torch.zeros(1, 3, side_px, side_px), indices=2)
        model.train()
        self.words = RegionWords(blank["image_intermediates"][0].shape[1], vocab_size)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        outputs = self.model.forward_intermediates(batch["pixels"], batch["texts"], image_indices=2)
        scale = self.model.logit_scale.exp().float()
        loss: Tensor = self.loss(outputs["image_features"].float(), outputs["text_features"].float(), scale)
        if self.words_weight > 0:
            last_but_one = outputs["image_intermediates"][0]
            loss = loss + self.words_weight * self.words(last_but_one, batch["boxes"], batch["words"])
        return loss * len(batch["texts"])


class WarmupVision:
    """Trains a small CLIP of open_clip from random weights with its contrastive loss. Batches contain near misses."""

    NUM_CAPTIONS = 2

    def __init__(self, config: WarmupVisionConfig):
        import open_clip
        from open_clip.model import CLIP

        self.config = config
        self.clip: dict[str, Any] = config.clip or read_model_cfg(f"{LOCAL_DIR}{config.source}")
        self.side_px = int(self.clip["vision_cfg"]["image_size"])
        self.mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
        self.std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
        self.tokenizer = load_tokenizer(config.tokenizer_folder)
        self.pairs = self._draw("train", config.num_scenes)
        self.val_pairs = self._draw("val", config.num_val_scenes)
        torch.manual_seed(config.seed)
        self.model: Any = CLIP(**self.clip) if config.clip else open_clip.create_model(f"{LOCAL_DIR}{config.source}")
        self.module: nn.Module = _ClipLoss(self.model, config.words_weight, len(self.tokenizer), self.side_px)
        self.parts = {"vision": list(self.module.named_parameters())}
        self.depths: dict[str, int] = {}
        self.notes: list[str] = []
        self.num_workers = 0
        self.num_examples = config.num_scenes

    def _ids(self, texts: list[str], length: int, *, end: bool) -> Tensor:
        ids = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, add_special_tokens=end, return_tensors="np"
        )["input_ids"]
        return torch.from_numpy(ids.astype(np.int64))

    def _draw(self, split: Split, count: int) -> Pairs:
        drawn: list[DrawnScene] = []
        tasks = [
            (self.config, split, range(start, min(start + 100, count)), self.side_px, self.NUM_CAPTIONS)
            for start in range(0, count, 100)
        ]
        for chunk in map_in_processes(_draw_chunk, tasks):
            drawn += chunk
        boxes = torch.full((len(drawn), MAX_REGIONS, 4), -1.0)
        words = torch.full((len(drawn), MAX_REGIONS, MAX_WORDS), -1)
        for number, scene in enumerate(drawn):
            ids = self._ids([text for _, text in scene.regions], MAX_WORDS, end=False)
            boxes[number, : len(ids)] = torch.tensor([box for box, _ in scene.regions])
            words[number, : len(ids)] = ids.masked_fill(ids == self.tokenizer.pad_token_id, -1)
        length = self.clip["text_cfg"]["context_length"]
        texts = self._ids([text for scene in drawn for text in scene.captions], length, end=True)
        pixels = torch.from_numpy(np.stack([scene.pixels for scene in drawn]))
        return Pairs(pixels, texts.view(len(drawn), self.NUM_CAPTIONS, -1), boxes, words)

    def _tensors(self, pairs: Pairs, rows: Any, names: Sequence[str], caption: int) -> dict[str, Any]:
        values = pairs.pixels[rows].permute(0, 3, 1, 2).float().div_(255)
        return {
            "pixels": (values - self.mean) / self.std, "texts": pairs.texts[rows, caption],
            "boxes": pairs.boxes[rows], "words": pairs.words[rows], "names": list(names),
        }  # fmt: skip

    def sampler(self, batch_size: int) -> IndexedSampler:
        return IndexedSampler(self.config.num_scenes, batch_size, self.config.seed)

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        size = 1 + NEAR_MISSES
        rows = np.concatenate([np.arange(index * size, (index + 1) * size) for index in indices])
        caption = sum(indices) % self.NUM_CAPTIONS  # depends on the batch alone, so that resuming changes nothing
        return self._tensors(self.pairs, rows, [f"train-{index}" for index in indices], caption)

    def loss(self, module: nn.Module, batch: dict[str, Any]) -> LossOutput:
        return LossOutput(module(batch), self.count(batch))

    def count(self, batch: dict[str, Any]) -> int:
        return len(batch["texts"])

    def num_tokens(self, batch: dict[str, Any]) -> int:
        return int((batch["texts"] != 0).sum())

    def can_train(self, part: str, batch: dict[str, Any]) -> bool:
        return True

    def names(self, batch: dict[str, Any]) -> list[str]:
        return list(batch["names"])

    @torch.no_grad()
    def validate(self, step: int, *, writes: bool = True) -> dict[str, float]:
        """Loss and zero-shot retrieval on scenes that training never shows.

        Retrieval is the share of pictures whose own caption scores highest among 200, near misses included.
        """
        pairs = self.val_pairs
        self.model.logit_scale.clamp_(0, np.log(100))
        self.model.eval()
        hits, loss, size = 0, 0.0, 200
        total = len(pairs.pixels) // size * size
        for start in range(0, total, size):
            rows = np.arange(start, start + size)
            batch = self._tensors(pairs, rows, [], 0)
            loss += float(self.module(batch))
            image, text, _ = self.model(batch["pixels"], batch["texts"])
            hits += int(((image @ text.T).argmax(1) == torch.arange(size)).sum())
        self.model.train()
        return {"val_loss": loss / total, "retrieval_at_1_of_200": hits / total}

    def save(self, out: Path, log: list[dict[str, Any]]) -> None:
        """Saves the CLIP for open_clip's `local-dir:`, its tokenizer, and the log's last row as `metrics.json`."""
        from safetensors.torch import save_file

        clip = {**self.clip, "text_cfg": {**self.clip["text_cfg"], "hf_tokenizer_name": "."}}
        preprocess = {
            "size": self.side_px,
            "mode": "RGB",
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "interpolation": "bicubic",
            "resize_mode": "squash",
        }
        preprocess = {k: [round(x, 8) for x in v] if isinstance(v, list) else v for k, v in preprocess.items()}
        (out / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": clip, "preprocess_cfg": preprocess}, indent=2) + "\n"
        )
        state = self.model.state_dict()
        weights = {k: v.to(torch.bfloat16 if v.is_floating_point() else v.dtype).contiguous() for k, v in state.items()}
        save_file(weights, str(out / "open_clip_model.safetensors"))
        # read anew: one that was used keeps how it padded
        load_tokenizer(self.config.tokenizer_folder).save_pretrained(out)
        (out / "metrics.json").write_text(json.dumps(log[-1], indent=2) + "\n")
