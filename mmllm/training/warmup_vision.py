"""The vision warm-up of the embedded default: a small CLIP that learns to tell drawn scenes apart."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmllm.config import WarmupVisionConfig
from mmllm.model.language import load_tokenizer
from mmllm.scenes.draw import draw
from mmllm.scenes.tell import tell
from mmllm.scenes.world import Limits, Scene, Split, near_miss, sample_scene
from mmllm.training.order import Phases

NEAR_MISSES = 3  # hard negatives drawn for each scene


def scene_group(seed: int, split: Split, number: int, limits: Limits) -> tuple[list[Scene], random.Random]:
    """A scene and near misses of it: pictures that only their details tell apart."""
    rng = random.Random(f"{seed}/{split}/pairs/{number}")
    scenes = [sample_scene(rng, split, None, limits)]
    for _ in range(NEAR_MISSES):
        scenes.append(near_miss(rng.choice(scenes), rng, split))
    return scenes, rng


def _draw_chunk(
    seed: int, split: Split, numbers: range, limits: Limits, side_px: int, num_captions: int
) -> tuple[np.ndarray, list[list[str]]]:
    pictures, captions = [], []
    for number in numbers:
        scenes, rng = scene_group(seed, split, number, limits)
        for scene in scenes:
            picture = draw(scene, rng).resize((side_px, side_px), Image.Resampling.BICUBIC)
            pictures.append(np.asarray(picture))
            captions.append([tell(scene, rng) for _ in range(num_captions)])
    return np.stack(pictures), captions


class _ClipLoss(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        from open_clip.loss import ClipLoss

        self.model, self.loss = model, ClipLoss()

    def forward(self, batch: dict[str, Any]) -> Tensor:
        image, text, scale = self.model(batch["pixels"], batch["texts"])
        return self.loss(image.float(), text.float(), scale.float()) * len(batch["texts"])  # type: ignore[no-any-return]


class WarmupVision:
    """A small CLIP of open_clip's, from random weights, with open_clip's contrastive loss. Batches hold near misses."""

    NUM_CAPTIONS = 2

    def __init__(self, config: WarmupVisionConfig):
        import open_clip
        from open_clip.model import CLIP

        self.config = config
        self.side_px = int(config.clip["vision_cfg"]["image_size"])
        self.mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
        self.std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
        self.tokenizer = load_tokenizer(config.tokenizer)
        self.pools: list[tuple[int, int, None]] = []
        drawn: list[tuple[np.ndarray, Tensor]] = []
        self.val: list[tuple[np.ndarray, Tensor]] = []
        for lesson in config.lessons:
            limits = Limits(max_things=lesson.max_things, kinds=lesson.kinds)
            drawn.append(self._draw("train", lesson.num_scenes, limits))
            self.val.append(self._draw("val", config.num_val_scenes, limits))
            self.pools.append((lesson.steps, lesson.num_scenes, None))
        self.pixels = np.concatenate([pixels for pixels, _ in drawn])
        self.texts = torch.cat([texts for _, texts in drawn])
        torch.manual_seed(config.seed)
        self.model: Any = CLIP(**config.clip)
        self.module: nn.Module = _ClipLoss(self.model)
        self.parts = {"vision": list(self.module.named_parameters())}
        self.num_examples = len(self.pixels) // (1 + NEAR_MISSES)

    def _draw(self, split: Split, count: int, limits: Limits) -> tuple[np.ndarray, Tensor]:
        pictures, captions = [], []
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            tasks = [
                pool.submit(_draw_chunk, self.config.seed, split, range(start, min(start + 100, count)),
                            limits, self.side_px, self.NUM_CAPTIONS)
                for start in range(0, count, 100)
            ]  # fmt: skip
            for task in tasks:
                drawn, told = task.result()
                pictures.append(drawn)
                captions += told
        ids = self.tokenizer(
            [text for texts in captions for text in texts], padding="max_length", truncation=True,
            max_length=self.config.clip["text_cfg"]["context_length"], return_tensors="np",
        )["input_ids"]  # fmt: skip
        return np.concatenate(pictures), torch.from_numpy(ids.astype(np.int64)).view(
            len(captions), self.NUM_CAPTIONS, -1
        )

    def _tensors(
        self, pixels: np.ndarray, texts: Tensor, rows: Any, names: Sequence[str], caption: int
    ) -> dict[str, Any]:
        values = torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2).float().div_(255)
        return {"pixels": (values - self.mean) / self.std, "texts": texts[rows, caption], "names": list(names)}

    def order(self, batch_size: int) -> Phases:
        self.phases = Phases(self.pools, batch_size, self.config.seed)
        return self.phases

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        size = 1 + NEAR_MISSES
        rows = np.concatenate([np.arange(index * size, (index + 1) * size) for index in indices])
        caption = sum(indices) % self.NUM_CAPTIONS  # a function of the batch, so that resuming changes nothing
        return self._tensors(self.pixels, self.texts, rows, [f"train-{index}" for index in indices], caption)

    def count(self, batch: dict[str, Any]) -> int:
        return len(batch["texts"])

    def num_tokens(self, batch: dict[str, Any]) -> int:
        return int((batch["texts"] != 0).sum())

    def reaches(self, part: str, batch: dict[str, Any]) -> bool:
        return True

    def names(self, batch: dict[str, Any]) -> list[str]:
        return list(batch["names"])

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Zero-shot retrieval: the share of pictures that find their caption among 200, near misses included.

        With scenes that training never shows, of the lesson in hand.
        """
        val_pixels, val_texts = self.val[self.phases.phase(step)]
        self.model.logit_scale.clamp_(0, np.log(100))
        self.model.eval()
        hits, loss, size = 0, 0.0, 200
        total = len(val_pixels) // size * size
        for start in range(0, total, size):
            rows = np.arange(start, start + size)
            batch = self._tensors(val_pixels, val_texts, rows, [], 0)
            loss += float(self.module(batch))
            image, text, _ = self.model(batch["pixels"], batch["texts"])
            hits += int(((image @ text.T).argmax(1) == torch.arange(size)).sum())
        self.model.train()
        return {"val_loss": loss / total, "retrieval_at_1_of_200": hits / total}

    def save(self, out: Path, log: list[dict[str, Any]]) -> None:
        """The CLIP as open_clip's `local-dir:` reads it, with its tokenizer and the figures of the last validation."""
        from safetensors.torch import save_file

        clip = {**self.config.clip, "text_cfg": {**self.config.clip["text_cfg"], "hf_tokenizer_name": "."}}
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
        weights = {name: value.to(torch.bfloat16).contiguous() for name, value in self.model.state_dict().items()}
        save_file(weights, str(out / "open_clip_model.safetensors"))
        self.tokenizer.save_pretrained(out)
        (out / "figures.json").write_text(json.dumps(log[-1], indent=2) + "\n")
