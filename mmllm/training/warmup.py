"""The two warm-ups of the embedded default: a small causal LM that reads descriptions, a small CLIP that sees scenes."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmllm.batch import IMAGE_TOKEN, Batch
from mmllm.config import WarmupLanguageConfig, WarmupVisionConfig
from mmllm.data.chat import OWN_TEMPLATE, Rendered, Renderer
from mmllm.data.collate import collate
from mmllm.scenes.draw import draw
from mmllm.scenes.talk import sample_text
from mmllm.scenes.tell import tell
from mmllm.scenes.world import Scene, Split, near_miss, sample_scene
from mmllm.training.losses import supervised_rows, token_loss_sum

CHUNK = 500
# fmt: off
SPECIAL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", IMAGE_TOKEN)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# fmt: on


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A lower-case byte-level BPE tokenizer in which a word is one token wherever it stands, and each digit is one."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # a leading space before every piece: "red" as an answer is the same token as " red" in a sentence
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Prepend(" ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[a-z]+| ?[0-9]|\s+|[^\sa-z0-9]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = "<|end|>"  # only where special tokens are asked for, as CLIP's text tower does
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token=end, extra_special_tokens=[IMAGE_TOKEN]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _render_chunk(folder: str, seed: int, split: Split, numbers: range, num_turns: int, retell: float) -> list[tuple[Any, list[str]]]:
    """Rendered conversations of these numbers, each with the question type of every answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = Renderer(tokenizer, OWN_TEMPLATE, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), num_image_tokens=1)
    rows = []
    for number in numbers:
        rng = random.Random(f"{seed}/{split}/text/{number}")
        example, conversation = sample_text(rng, split, num_turns, f"{split}-{number}", retell=retell)
        if conversation.turns:
            one = renderer.render_example(example)
            ids = np.array(one.input_ids, np.int32)
            rows.append(((ids, np.array(one.is_answer)), [turn.type for turn in conversation.turns]))
    return rows


def answer_spans(is_answer: Sequence[bool]) -> list[tuple[int, int]]:
    """(first, behind last) of every answer of a rendered conversation."""
    spans, start = [], None
    for position, flag in enumerate([*is_answer, False]):
        if flag and start is None:
            start = position
        if not flag and start is not None:
            spans.append((start, position))
            start = None
    return spans


class _LanguageLoss(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.model.get_decoder()(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state[:, :-1]
        mask, targets = supervised_rows(batch.labels)
        return token_loss_sum(self.model.get_output_embeddings()(hidden[mask]), targets)


class WarmupLanguage:
    """A stock causal LM, from random weights, on descriptions of scenes and questions about them. No pictures."""

    def __init__(self, config: WarmupLanguageConfig):
        from transformers import AutoConfig, AutoModelForCausalLM

        self.config, self.out = config, Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build_tokenizer(self._corpus(4000), config.vocab_size)
        self.tokenizer.save_pretrained(self.out)
        self.rows = self._render("train", config.num_descriptions, 0.5)
        self.val_rows = self._render("val", config.num_val_descriptions, 0.0)
        options = dict(config.language)
        attention = options.pop("attention", "sdpa")
        text_config = AutoConfig.for_model(
            **options, vocab_size=len(self.tokenizer), pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(config.seed)
        self.model = AutoModelForCausalLM.from_config(text_config, attn_implementation=attention)
        self.module: nn.Module = _LanguageLoss(self.model)
        self.parts = {"language": list(self.module.named_parameters())}
        self.num_examples = len(self.rows)
        self.lengths = [len(row[0][0]) for row in self.rows]

    def _corpus(self, count: int) -> list[str]:
        texts = []
        for number in range(count):
            rng = random.Random(f"{self.config.seed}/corpus/{number}")
            example, _ = sample_text(rng, "train", self.config.num_turns, str(number), retell=0.3)
            texts += [message.text for message in example.messages]
        return texts

    def _render(self, split: Split, count: int, retell: float) -> list[Any]:
        rows: list[Any] = []
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            tasks = [
                pool.submit(_render_chunk, str(self.out), self.config.seed, split,
                            range(start, min(start + CHUNK, count)), self.config.num_turns, retell)
                for start in range(0, count, CHUNK)
            ]  # fmt: skip
            for task in tasks:
                rows += task.result()
        return rows

    def _collate(self, rows: Sequence[Any], names: Sequence[str]) -> Batch:
        rendered = [Rendered(ids.tolist(), answers.tolist(), 0) for (ids, answers), _ in rows]
        return collate(rendered, pad_token_id=self.tokenizer.pad_token_id, example_ids=names)

    def batch(self, indices: Sequence[int]) -> Batch:
        return self._collate([self.rows[index] for index in indices], [f"train-{index}" for index in indices])

    def count(self, batch: Batch) -> int:
        return batch.num_supervised

    def num_tokens(self, batch: Batch) -> int:
        return int(batch.attention_mask.sum())

    def names(self, batch: Batch) -> list[str]:
        return list(batch.example_ids)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Perplexity of answers, and the share of answers that greedy decoding gets exactly right, per question type."""
        self.model.eval()
        right: dict[str, list[bool]] = defaultdict(list)
        total, count = 0.0, 0
        for start in range(0, len(self.val_rows), 100):
            rows = self.val_rows[start : start + 100]
            batch = self._collate(rows, [""] * len(rows))
            logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            mask, targets = supervised_rows(batch.labels)
            total += float(token_loss_sum(logits[:, :-1][mask], targets))
            count += len(targets)
            hits = (logits[:, :-1].argmax(-1) == batch.input_ids[:, 1:]).numpy()
            for row, ((_, answers), types) in enumerate(rows):
                for (first, behind), name in zip(answer_spans(answers.tolist()), types, strict=True):
                    right[name].append(bool(hits[row, first - 1 : behind - 1].all()))
        self.model.train()
        # a caption may be worded in several ways, so its exact match says nothing
        exact = {name: sum(hits) / len(hits) for name, hits in sorted(right.items()) if name != "caption"}
        overall = [hit for name, hits in right.items() if name != "caption" for hit in hits]
        return {"val_loss": total / count, "exact": sum(overall) / len(overall), **{f"exact_{k}": v for k, v in exact.items()}}

    def save(self, out: Path, log: list[dict[str, Any]]) -> None:
        """The LM and its tokenizer as transformers writes them, in bf16, with the figures of the last validation."""
        self.model.to(torch.bfloat16).save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        (out / "figures.json").write_text(json.dumps(log[-1], indent=2) + "\n")


NEAR_MISSES = 3  # hard negatives drawn for each scene


def scene_group(seed: int, split: Split, number: int) -> tuple[list[Scene], random.Random]:
    """A scene and near misses of it: pictures that only their details tell apart."""
    rng = random.Random(f"{seed}/{split}/pairs/{number}")
    scenes = [sample_scene(rng, split)]
    for _ in range(NEAR_MISSES):
        scenes.append(near_miss(rng.choice(scenes), rng, split))
    return scenes, rng


def _draw_chunk(seed: int, split: Split, numbers: range, side_px: int, num_captions: int) -> tuple[np.ndarray, list[list[str]]]:
    pictures, captions = [], []
    for number in numbers:
        scenes, rng = scene_group(seed, split, number)
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
        from transformers import AutoTokenizer

        self.config = config
        self.side_px = int(config.clip["vision_cfg"]["image_size"])
        self.mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
        self.std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
        self.tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        self.pixels, self.texts = self._draw("train", config.num_scenes)
        self.val_pixels, self.val_texts = self._draw("val", config.num_val_scenes)
        torch.manual_seed(config.seed)
        self.model: Any = CLIP(**config.clip)
        self.module: nn.Module = _ClipLoss(self.model)
        self.parts = {"vision": list(self.module.named_parameters())}
        self.num_examples = len(self.pixels) // (1 + NEAR_MISSES)
        self.lengths = None
        self._caption = random.Random(config.seed)

    def _draw(self, split: Split, count: int) -> tuple[np.ndarray, Tensor]:
        pictures, captions = [], []
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            tasks = [
                pool.submit(_draw_chunk, self.config.seed, split, range(start, min(start + 100, count)),
                            self.side_px, self.NUM_CAPTIONS)
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
        return np.concatenate(pictures), torch.from_numpy(ids.astype(np.int64)).view(len(captions), self.NUM_CAPTIONS, -1)

    def _tensors(self, pixels: np.ndarray, texts: Tensor, rows: Any, names: Sequence[str], caption: int) -> dict[str, Any]:
        values = torch.from_numpy(pixels[rows]).permute(0, 3, 1, 2).float().div_(255)
        return {"pixels": (values - self.mean) / self.std, "texts": texts[rows, caption], "names": list(names)}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        size = 1 + NEAR_MISSES
        rows = np.concatenate([np.arange(index * size, (index + 1) * size) for index in indices])
        caption = sum(indices) % self.NUM_CAPTIONS  # a function of the batch, so that resuming changes nothing
        return self._tensors(self.pixels, self.texts, rows, [f"train-{index}" for index in indices], caption)

    def count(self, batch: dict[str, Any]) -> int:
        return len(batch["texts"])

    def num_tokens(self, batch: dict[str, Any]) -> int:
        return int((batch["texts"] != 0).sum())

    def names(self, batch: dict[str, Any]) -> list[str]:
        return list(batch["names"])

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Zero-shot retrieval: the share of pictures that find their caption among 200, near misses included."""
        self.model.logit_scale.clamp_(0, np.log(100))
        self.model.eval()
        hits, loss, size = 0, 0.0, 200
        total = len(self.val_pixels) // size * size
        for start in range(0, total, size):
            rows = np.arange(start, start + size)
            batch = self._tensors(self.val_pixels, self.val_texts, rows, [], 0)
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
        (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": clip, "preprocess_cfg": preprocess}, indent=2) + "\n")
        weights = {name: value.to(torch.bfloat16).contiguous() for name, value in self.model.state_dict().items()}
        save_file(weights, str(out / "open_clip_model.safetensors"))
        self.tokenizer.save_pretrained(out)
        (out / "figures.json").write_text(json.dumps(log[-1], indent=2) + "\n")
