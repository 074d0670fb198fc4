"""The language warm-up of the embedded default: a small causal LM that learns to look things up in descriptions."""

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
from torch import Tensor, nn

from mmllm.batch import IMAGE_TOKEN, Batch
from mmllm.config import LessonConfig, WarmupLanguageConfig
from mmllm.data.chat import OWN_TEMPLATE, Rendered, Renderer
from mmllm.data.collate import collate
from mmllm.scenes.talk import Lesson, sample_text
from mmllm.scenes.world import Limits, Split
from mmllm.training.losses import supervised_rows, token_loss_sum
from mmllm.training.order import Phases

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
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(" "),
        ]
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
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token=end, extra_special_tokens=[IMAGE_TOKEN]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _render_chunk(
    folder: str, seed: int, split: Split, numbers: range, num_turns: int, lesson: Lesson
) -> list[tuple[Any, list[str]]]:
    """Rendered conversations of these numbers, each with the question type of every answer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    renderer = Renderer(
        tokenizer, OWN_TEMPLATE, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), num_image_tokens=1
    )
    rows = []
    for number in numbers:
        rng = random.Random(f"{seed}/{split}/text/{number}")
        example, conversation = sample_text(rng, split, num_turns, f"{split}-{number}", lesson)
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


def _lesson(config: LessonConfig, *, retell: float) -> Lesson:
    limits = Limits(config.num_shapes, config.num_colors, config.max_things, config.kinds)
    return Lesson(limits, config.types, retell)


@torch.no_grad()
def init_for_lookup(model: Any) -> None:
    """An initialisation in which looking things up is learnt soon, for small Qwen2-like models.

    Embeddings are as large as what blocks add to them, blocks add little at first, and the heads of the first layer
    start out looking 1, 2, 3, ... tokens back, by their query and key biases. After the idea of mimetic
    initialisation, https://arxiv.org/abs/2305.09828. Without it training stays at guessing for thousands of steps.
    """
    config = model.config
    model.get_input_embeddings().weight.normal_(0, 1)
    model.get_output_embeddings().weight.normal_(0, 0.02)
    layers = model.get_decoder().layers
    for layer in layers:
        layer.self_attn.o_proj.weight.mul_((2 * len(layers)) ** -0.5)
        layer.mlp.down_proj.weight.mul_((2 * len(layers)) ** -0.5)
    width = config.hidden_size // config.num_attention_heads
    half = width // 2
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(half) * 2 / width)
    sharpness = 3.5
    attention = layers[0].self_attn
    for head in range(config.num_attention_heads):
        start, offset = head * width, head + 1
        attention.k_proj.bias[start : start + half] = sharpness
        attention.k_proj.bias[start + half : start + width] = 0
        attention.q_proj.bias[start : start + half] = sharpness * torch.cos(offset * angles)
        attention.q_proj.bias[start + half : start + width] = -sharpness * torch.sin(offset * angles)


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
        self.rows: list[Any] = []
        self.pools: list[tuple[int, int, list[int]]] = []
        self.val_pools: list[list[Any]] = []
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            for lesson in config.lessons:
                rows = self._render(pool, "train", lesson.num_descriptions, _lesson(lesson, retell=lesson.retell))
                self.pools.append((lesson.steps, len(rows), [len(row[0][0]) for row in rows]))
                self.rows += rows
                asked = _lesson(lesson, retell=0.0)
                self.val_pools.append(self._render(pool, "val", config.num_val_descriptions, asked))
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
        init_for_lookup(self.model)
        self.num_examples = len(self.rows)

    def _corpus(self, count: int) -> list[str]:
        texts = []
        for number in range(count):
            rng = random.Random(f"{self.config.seed}/corpus/{number}")
            example, _ = sample_text(rng, "train", self.config.num_turns, str(number), Lesson(retell=0.3))
            texts += [message.text for message in example.messages]
        return texts

    def _render(self, pool: ProcessPoolExecutor, split: Split, count: int, lesson: Lesson) -> list[Any]:
        chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        settings = str(self.out), self.config.seed, split
        tasks = [pool.submit(_render_chunk, *settings, chunk, self.config.num_turns, lesson) for chunk in chunks]
        return [row for task in tasks for row in task.result()]

    def _collate(self, rows: Sequence[Any], names: Sequence[str]) -> Batch:
        rendered = [Rendered(ids.tolist(), answers.tolist(), 0) for (ids, answers), _ in rows]
        return collate(rendered, pad_token_id=self.tokenizer.pad_token_id, example_ids=names)

    def order(self, batch_size: int) -> Phases:
        self.phases = Phases(self.pools, batch_size, self.config.seed)
        return self.phases

    def batch(self, indices: Sequence[int]) -> Batch:
        return self._collate([self.rows[index] for index in indices], [f"train-{index}" for index in indices])

    def count(self, batch: Batch) -> int:
        return batch.num_supervised

    def num_tokens(self, batch: Batch) -> int:
        return int(batch.attention_mask.sum())

    def reaches(self, part: str, batch: Batch) -> bool:
        return True

    def names(self, batch: Batch) -> list[str]:
        return list(batch.example_ids)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Loss on answers, and the share of answers that greedy decoding gets exactly right, per question type.

        Asked about descriptions that training never shows, of the lesson in hand.
        """
        self.model.eval()
        val_rows = self.val_pools[self.phases.phase(step)]
        right: dict[str, list[bool]] = defaultdict(list)
        total, count = 0.0, 0
        for start in range(0, len(val_rows), 100):
            rows = val_rows[start : start + 100]
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
        return {
            "val_loss": total / count,
            "exact": sum(overall) / len(overall),
            **{f"exact_{k}": v for k, v in exact.items()},
        }

    def save(self, out: Path, log: list[dict[str, Any]]) -> None:
        """The LM and its tokenizer as transformers writes them, in bf16, with the figures of the last validation."""
        self.model.to(torch.bfloat16).save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        (out / "figures.json").write_text(json.dumps(log[-1], indent=2) + "\n")
