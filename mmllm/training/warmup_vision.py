"""The vision warm-up of the embedded default: a small CLIP that learns to tell drawn scenes apart."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

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
from mmllm.training.regions import MAX_REGIONS, Box, RegionWords, boxes_of, words_of

MAX_WORDS = 5  # tokens that say what a part of a scene is
NEAR_MISSES = 3  # hard negatives drawn for each scene


def scene_group(seed: int, split: Split, number: int, limits: Limits) -> tuple[list[Scene], random.Random]:
    """A scene and near misses of it: pictures that only their details tell apart."""
    rng = random.Random(f"{seed}/{split}/pairs/{number}")
    scenes = [sample_scene(rng, split, None, limits)]
    for _ in range(NEAR_MISSES):
        scenes.append(near_miss(rng.choice(scenes), rng, split))
    return scenes, rng


class Drawn(NamedTuple):
    """A drawn scene, its captions, and box and words of each of its parts."""

    pixels: np.ndarray  # [H, W, 3]
    captions: list[str]
    boxes: list[Box]
    words: list[str]


class Pairs(NamedTuple):
    """Drawn scenes as tensors."""

    pixels: Tensor  # [N, H, W, 3], bytes
    texts: Tensor  # [N, captions, T]
    boxes: Tensor  # [N, MAX_REGIONS, 4], -1 where there is none
    words: Tensor  # [N, MAX_REGIONS, MAX_WORDS], -1 where there is none


def _draw_chunk(
    seed: int, split: Split, numbers: range, limits: Limits, side_px: int, num_captions: int
) -> list[Drawn]:
    drawn = []
    for number in numbers:
        scenes, rng = scene_group(seed, split, number, limits)
        for scene in scenes:
            pixels = np.asarray(draw(scene, rng).resize((side_px, side_px), Image.Resampling.BICUBIC))
            captions = [tell(scene, rng) for _ in range(num_captions)]
            drawn.append(Drawn(pixels, captions, boxes_of(scene), [words_of(part) for part in scene.parts]))
    return drawn


@torch.no_grad()
def init_patches(conv: nn.Conv2d, pixels: Tensor) -> None:
    """Patch embedding [D, C, p, p] that whitens the patches of pictures [N, C, H, W].

    Most of a patch is its mean color. Whitened, edges weigh as much, and shapes are learnt about twice as soon. As
    the first layer of the CIFAR-10 speed records, https://arxiv.org/abs/2404.00498.
    """
    size = conv.kernel_size[0]
    patches = nn.functional.unfold(pixels, size, stride=size).transpose(1, 2).flatten(0, 1)  # [N * P, C * p * p]
    variance, directions = torch.linalg.eigh(torch.cov(patches.double().T))
    largest = slice(-conv.out_channels, None)
    weight = (directions[:, largest] / (variance[largest] + 1e-2 * variance.mean()).sqrt()).T.float()
    conv.weight[: len(weight)] = weight.view(-1, *conv.weight.shape[1:])


class _ClipLoss(nn.Module):
    """The contrastive loss, and that of the words of regions on the layer that language models read."""

    def __init__(self, model: Any, words_weight: float, vocab_size: int):
        super().__init__()
        from open_clip.loss import ClipLoss

        self.model, self.loss, self.words_weight = model, ClipLoss(), words_weight
        block = model.visual.transformer.resblocks[-2]
        self.words = RegionWords(model.visual.conv1.out_channels, vocab_size)
        self._patches: Tensor | None = None
        block.register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: Any, output: Tensor) -> None:
        self._patches = output[:, 1:]

    def forward(self, batch: dict[str, Any]) -> Tensor:
        image, text, scale = self.model(batch["pixels"], batch["texts"])
        loss: Tensor = self.loss(image.float(), text.float(), scale.float())
        patches, self._patches = self._patches, None
        if self.words_weight > 0:
            loss = loss + self.words_weight * self.words(patches, batch["boxes"], batch["words"])
        return loss * len(batch["texts"])


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
        drawn: list[Pairs] = []
        self.val: list[Pairs] = []
        for lesson in config.lessons:
            limits = Limits(max_things=lesson.max_things, kinds=lesson.kinds)
            drawn.append(self._draw("train", lesson.num_scenes, limits))
            self.val.append(self._draw("val", config.num_val_scenes, limits))
            self.pools.append((lesson.steps, lesson.num_scenes, None))
        self.pairs = Pairs(*(torch.cat(column) for column in zip(*drawn, strict=True)))
        torch.manual_seed(config.seed)
        self.model: Any = CLIP(**config.clip)
        sample = self._tensors(self.pairs, np.arange(min(2000, len(self.pairs.pixels))), [], 0)
        init_patches(self.model.visual.conv1, sample["pixels"])
        self.module: nn.Module = _ClipLoss(self.model, config.words_weight, len(self.tokenizer))
        self.parts = {"vision": list(self.module.named_parameters())}
        self.num_examples = len(self.pairs.pixels) // (1 + NEAR_MISSES)

    def _ids(self, texts: list[str], length: int, *, end: bool) -> Tensor:
        ids = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, add_special_tokens=end, return_tensors="np"
        )["input_ids"]
        return torch.from_numpy(ids.astype(np.int64))

    def _draw(self, split: Split, count: int, limits: Limits) -> Pairs:
        drawn: list[Drawn] = []
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            tasks = [
                pool.submit(_draw_chunk, self.config.seed, split, range(start, min(start + 100, count)),
                            limits, self.side_px, self.NUM_CAPTIONS)
                for start in range(0, count, 100)
            ]  # fmt: skip
            for task in tasks:
                drawn += task.result()
        boxes = torch.full((len(drawn), MAX_REGIONS, 4), -1.0)
        words = torch.full((len(drawn), MAX_REGIONS, MAX_WORDS), -1)
        for number, one in enumerate(drawn):
            ids = self._ids(one.words, MAX_WORDS, end=False)
            boxes[number, : len(ids)] = torch.tensor(one.boxes)
            words[number, : len(ids)] = ids.masked_fill(ids == self.tokenizer.pad_token_id, -1)
        length = self.config.clip["text_cfg"]["context_length"]
        texts = self._ids([text for one in drawn for text in one.captions], length, end=True)
        pixels = torch.from_numpy(np.stack([one.pixels for one in drawn]))
        return Pairs(pixels, texts.view(len(drawn), self.NUM_CAPTIONS, -1), boxes, words)

    def _tensors(self, pairs: Pairs, rows: Any, names: Sequence[str], caption: int) -> dict[str, Any]:
        values = pairs.pixels[rows].permute(0, 3, 1, 2).float().div_(255)
        return {
            "pixels": (values - self.mean) / self.std, "texts": pairs.texts[rows, caption],
            "boxes": pairs.boxes[rows], "words": pairs.words[rows], "names": list(names),
        }  # fmt: skip

    def order(self, batch_size: int) -> Phases:
        self.phases = Phases(self.pools, batch_size, self.config.seed)
        return self.phases

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        size = 1 + NEAR_MISSES
        rows = np.concatenate([np.arange(index * size, (index + 1) * size) for index in indices])
        caption = sum(indices) % self.NUM_CAPTIONS  # a function of the batch, so that resuming changes nothing
        return self._tensors(self.pairs, rows, [f"train-{index}" for index in indices], caption)

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
        pairs = self.val[self.phases.phase(step)]
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
