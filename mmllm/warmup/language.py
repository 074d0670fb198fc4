"""The language warm-up of the embedded default model: a small causal LM learns to look things up in descriptions."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmllm.batch import IMAGE_TOKEN, Batch, Example, Message, message, picture_marks
from mmllm.batching.collate import collate
from mmllm.batching.sampler import IndexedSampler
from mmllm.chat.renderer import OWN_TEMPLATE, RenderedConversation, Renderer
from mmllm.config import ConfigError, LanguageConfig, WarmupLanguageConfig
from mmllm.model.language import load_language, load_tokenizer
from mmllm.processes import map_in_processes
from mmllm.scenes.conversations import SceneConversation, describe_conversation, sample_text, text_example
from mmllm.scenes.questions import QUESTION_TYPES
from mmllm.scenes.wordings import Wordings
from mmllm.scenes.world import COLORS, Split
from mmllm.training.losses import supervised_rows, token_loss_sum
from mmllm.training.stage import LossOutput
from mmllm.warmup.attention_guidance import LookupBatch, ReadOut, guide_bits, guided_attention_sum, init_for_lookup
from mmllm.warmup.vocabulary import build_tokenizer, change_vocabulary, unused_tokens
from mmllm.warmup.word_grid import NUM_CELLS, Ids, grid_tokens, word_grid

CHUNK = 500


@dataclass(frozen=True)
class TextRow:
    """A rendered conversation, `LookupBatch`'s annotations of its tokens, and the question type of each answer."""

    input_ids: np.ndarray
    is_answer: np.ndarray
    part_of: np.ndarray
    about: np.ndarray
    named: np.ndarray
    compared: np.ndarray
    types: tuple[str, ...]
    group: str = "exact"  # validated apart: `reworded` has wordings that training never shows, `seen` grids of words
    grids: tuple[tuple[np.ndarray, np.ndarray], ...] = ()  # of `word_grid`, one for each picture


def _unannotated_row(rendered: RenderedConversation, conversation: SceneConversation) -> TextRow:
    ids, flags = np.array(rendered.input_ids, np.int32), np.array(rendered.is_answer)
    return TextRow(
        ids, flags, part_of=np.full(len(ids), -1, np.int8), about=np.zeros((len(ids), 2), np.int16),
        named=np.full(len(ids), -1, np.int16), compared=np.full((len(ids), 2), -1, np.int16),
        types=tuple(turn.type for turn in conversation.turns),
    )  # fmt: skip


def _seen_row(
    renderer: Renderer, conversation: SceneConversation, rng: random.Random, name: str, ids_of: Ids
) -> TextRow:  # fmt: skip
    """The conversation with a grid of words in place of each picture."""
    opening = picture_marks(len(conversation.scenes))
    messages: list[Message] = []
    for number, turn in enumerate(conversation.turns):
        messages.append(message("user", turn.question if number else opening + turn.question))
        messages.append(message("assistant", turn.answer))
    example = Example(name, "grids", tuple(messages), ("",) * len(conversation.scenes))
    grids = tuple(word_grid(scene, rng, ids_of, len(renderer.tokenizer)) for scene in conversation.scenes)
    return replace(_unannotated_row(renderer.render_example(example), conversation), group="seen", grids=grids)


def _row(renderer: Renderer, conversation: SceneConversation, rng: random.Random, name: str) -> TextRow:
    example, parts = describe_conversation(conversation, rng, name)
    rendered = renderer.render_example(example)
    row, article = _unannotated_row(rendered, conversation), _ids(renderer, " the")
    ends = np.cumsum([len(text) for text in rendered.texts])  # of tokens, in characters
    offset = "".join(rendered.texts).index(example.messages[0].text)
    for text, part in zip(example.messages[0].parts, parts, strict=True):
        start, offset = offset, offset + len(str(text))
        row.part_of[(start < ends) & (ends <= offset)] = -1 if part is None else part
    question = int((ends <= start).sum())  # where the first turn's question starts: the last part of its message
    for (first, stop), turn in zip(answer_spans(rendered.is_answer), conversation.turns, strict=True):
        predicting = slice(first - 1, stop - 2)  # the positions that predict the answer's words, without its end
        row.about[predicting] = guide_bits(turn.about)
        if f"the {turn.answer}" in turn.question.lower():
            answer = rendered.input_ids[first : stop - 1]
            name_start = index_of_tokens((*article, *answer), rendered.input_ids, question) + len(article)
            row.named[predicting] = np.arange(name_start, name_start + len(answer))
        if turn.compared:
            row.compared[first - 1] = [_ids(renderer, f" {value}")[0] for value in turn.compared]
        question = stop
    return row


def _ids(renderer: Renderer, text: str) -> list[int]:
    ids: list[int] = renderer.tokenizer.encode(text, add_special_tokens=False)
    return ids


def index_of_tokens(phrase: Sequence[int], tokens: Sequence[int], start: int) -> int:
    """The first index from `start` on at which `phrase` occurs in `tokens`. Raises ValueError if there is none."""
    for index in range(start, len(tokens) - len(phrase) + 1):
        if list(tokens[index : index + len(phrase)]) == list(phrase):
            return index
    raise ValueError(f"tokens {list(phrase)} do not occur in {list(tokens[start:])}")


def _render_chunk(folder: str, config: WarmupLanguageConfig, split: Split, numbers: range) -> list[TextRow]:
    """The rendered conversations with these numbers. Training asks the question types in `ask_more` more often."""
    tokenizer = load_tokenizer(folder)
    renderer = Renderer(
        tokenizer, OWN_TEMPLATE, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), num_image_tokens=NUM_CELLS
    )
    ids_of = functools.cache(functools.partial(_ids, renderer))
    colors, names = [token for color in COLORS for token in ids_of(f" {color}")], unused_tokens(tokenizer)
    rows = []
    types = (*QUESTION_TYPES, *(name for name, times in config.ask_more.items() for _ in range(times)))
    for number in numbers:
        rng = random.Random(f"{config.seed}/{split}/text/{number}")
        if split == "train":
            conversation = sample_text(rng, split, config.num_turns, retell=config.retell, two=0.16, types=types)
            wordings = Wordings(config.reworded)
        else:
            conversation = sample_text(rng, split, config.num_turns, retell=0.0)
            wordings = Wordings(float(config.reworded > 0 and number % 2), held_out=True)
        if not conversation.turns:
            continue
        conversation = wordings.apply(conversation, rng)
        if config.seen and conversation.scenes and rng.random() < config.seen:
            rows.append(_seen_row(renderer, conversation, rng, f"{split}-{number}", ids_of))
        else:
            row = _row(renderer, conversation, rng, f"{split}-{number}")
            is_reworded = wordings.held_out and wordings.fraction > 0
            rows.append(replace(row, group="reworded") if is_reworded else row)
        if split == "train" and rng.random() < config.renamed:
            new_ids = np.arange(len(tokenizer), dtype=np.int32)
            new_ids[colors] = rng.sample(names, len(colors))
            rows[-1] = rename_tokens(rows[-1], new_ids)
    return rows


def rename_tokens(row: TextRow, new_ids: np.ndarray) -> TextRow:
    """The row with the token `new_ids[i]` for each token i, in the texts and in the grids."""
    grids = tuple((new_ids[ids], weights) for ids, weights in row.grids)
    return replace(row, input_ids=new_ids[row.input_ids], grids=grids)


def answer_spans(is_answer: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, stop) of every answer of a rendered conversation; `stop` is the index after its last token."""
    spans, start = [], None
    for position, flag in enumerate([*is_answer, False]):
        if flag and start is None:
            start = position
        if not flag and start is not None:
            spans.append((start, position))
            start = None
    return spans


def embed(model: Any, batch: LookupBatch, image_token_id: int) -> Tensor:
    """The embeddings of a batch's tokens, [B, T, D], with its grids of words in place of the image tokens."""
    layer = model.get_input_embeddings()
    embeds: Tensor = layer(batch.input_ids)
    if batch.grid_ids is None or batch.grid_weights is None:
        return embeds
    cells = grid_tokens(layer.weight.detach(), batch.grid_ids, batch.grid_weights)
    return embeds.masked_scatter((batch.input_ids == image_token_id)[..., None], cells.to(embeds.dtype))


class _LanguageLoss(nn.Module):
    def __init__(self, model: Any, config: WarmupLanguageConfig, image_token_id: int):
        super().__init__()
        self.image_token_id = image_token_id
        self.model, self.guides, self.guide_weight = model, config.guides, config.guide_weight
        self.read_out = None
        if config.read_out is not None:
            self.read_out = ReadOut(config.read_out, model.config.hidden_size, model.config.vocab_size)

    def forward(self, batch: LookupBatch) -> Tensor:
        out = self.model.get_decoder()(
            inputs_embeds=embed(self.model, batch, self.image_token_id), attention_mask=batch.attention_mask,
            use_cache=False, output_attentions=self.guide_weight > 0,
            output_hidden_states=self.read_out is not None,
        )  # fmt: skip
        mask, targets = supervised_rows(batch.labels)
        loss = token_loss_sum(self.model.get_output_embeddings()(out.last_hidden_state[:, :-1][mask]), targets)
        if self.guide_weight == 0:
            return loss
        for guide in self.guides:
            attention = out.attentions[guide.layer][:, guide.heads]
            loss = loss + self.guide_weight * guided_attention_sum(attention, batch, guide.reads)
        if self.read_out is not None:
            loss = loss + self.guide_weight * self.read_out(out.hidden_states, batch)
        return loss


class WarmupLanguage:
    """Trains a stock causal LM, new or loaded, on descriptions of scenes and questions about them. No pictures."""

    def __init__(self, config: WarmupLanguageConfig):
        if unknown := sorted(set(config.ask_more) - set(QUESTION_TYPES)):
            raise ConfigError(
                f"ask_more: {', '.join(unknown)} is not a question type; allowed: {', '.join(QUESTION_TYPES)}"
            )
        self.config, self.out = config, Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        if isinstance(config.language, LanguageConfig):
            self.model, self.tokenizer = load_language(config.language)
            if config.new_vocab_size:
                old, self.tokenizer = self.tokenizer, build_tokenizer(self._corpus(4000), config.new_vocab_size)
                change_vocabulary(self.model, old, self.tokenizer)
        else:
            self.tokenizer = build_tokenizer(self._corpus(4000), config.vocab_size)
            self.model = self._new_model(config.language)
        self.tokenizer.save_pretrained(self.out)
        self.rows = self._render("train", config.num_descriptions)
        self.val_rows = self._render("val", config.num_val_descriptions)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.module: nn.Module = _LanguageLoss(self.model, config, self.image_token_id)
        self.parts = {"language": list(self.model.named_parameters())}
        self.depths: dict[str, int] = {}
        if self.module.read_out is not None:
            self.parts["read_out"] = list(self.module.read_out.named_parameters("read_out"))
        self.notes: list[str] = []
        self.num_workers = 0
        self.num_examples = len(self.rows)

    def _new_model(self, language: dict[str, Any]) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        options = dict(language)
        attention = options.pop("attention", "sdpa")
        text_config = AutoConfig.for_model(
            **options, vocab_size=len(self.tokenizer), pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(self.config.seed)
        model = AutoModelForCausalLM.from_config(text_config, attn_implementation=attention)
        init_for_lookup(model)
        return model

    def _corpus(self, count: int) -> list[str]:
        texts = []
        for number in range(count):
            rng = random.Random(f"{self.config.seed}/corpus/{number}")
            conversation = sample_text(rng, "train", self.config.num_turns, retell=0.3)
            example = text_example(Wordings(self.config.reworded).apply(conversation, rng), rng, str(number))
            texts += [message.text for message in example.messages]
        return texts

    def _render(self, split: Split, count: int) -> list[TextRow]:
        chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        rendered = map_in_processes(_render_chunk, [(str(self.out), self.config, split, chunk) for chunk in chunks])
        return [row for rows in rendered for row in rows]

    def _collate(self, rows: Sequence[TextRow], names: Sequence[str]) -> LookupBatch:
        rendered = [RenderedConversation(row.input_ids.tolist(), row.is_answer.tolist(), 0) for row in rows]
        batch = collate(rendered, pad_token_id=self.tokenizer.pad_token_id, example_ids=names)
        part_of, named = torch.full_like(batch.input_ids, -1), torch.full_like(batch.input_ids, -1)
        about = torch.zeros(*batch.input_ids.shape, 2, dtype=torch.long)
        compared = torch.full_like(about, -1)
        grids = [grid for row in rows for grid in row.grids]
        for number, row in enumerate(rows):
            part_of[number, : len(row.part_of)] = torch.from_numpy(row.part_of)
            about[number, : len(row.about)] = torch.from_numpy(row.about)
            named[number, : len(row.named)] = torch.from_numpy(row.named)
            compared[number, : len(row.compared)] = torch.from_numpy(row.compared)
        return LookupBatch(
            batch.input_ids,
            batch.attention_mask,
            batch.labels,
            example_ids=names,
            part_of=part_of,
            about=about,
            named=named,
            compared=compared,
            grid_ids=torch.from_numpy(np.concatenate([ids for ids, _ in grids])).long() if grids else None,
            grid_weights=torch.from_numpy(np.concatenate([weights for _, weights in grids])) if grids else None,
        )

    def sampler(self, batch_size: int) -> IndexedSampler:
        return IndexedSampler(len(self.rows), batch_size, self.config.seed, [len(row.input_ids) for row in self.rows])

    def batch(self, indices: Sequence[int]) -> LookupBatch:
        return self._collate([self.rows[index] for index in indices], [f"train-{index}" for index in indices])

    def loss(self, module: nn.Module, batch: Batch) -> LossOutput:
        return LossOutput(module(batch), self.count(batch))

    def count(self, batch: Batch) -> int:
        return batch.num_supervised

    def num_tokens(self, batch: Batch) -> int:
        return int(batch.attention_mask.sum())

    def can_train(self, part: str, batch: Batch) -> bool:
        return part != "read_out" or (isinstance(batch, LookupBatch) and bool((batch.compared >= 0).any()))

    def names(self, batch: Batch) -> list[str]:
        return list(batch.example_ids)

    @torch.no_grad()
    def validate(self, step: int, *, writes: bool = True) -> dict[str, float]:
        """Loss on answers in nats per token, and the share that greedy decoding gets exactly right, by question type.

        The questions are about scenes that training never shows; `reworded` in wordings that it never shows, `seen`
        about grids of words.
        """
        self.model.eval()
        right: dict[str, list[bool]] = defaultdict(list)
        total, count = 0.0, 0
        for start in range(0, len(self.val_rows), 100):
            rows = self.val_rows[start : start + 100]
            batch = self._collate(rows, [""] * len(rows))
            embeds = embed(self.model, batch, self.image_token_id)
            logits = self.model(inputs_embeds=embeds, attention_mask=batch.attention_mask, use_cache=False).logits
            mask, targets = supervised_rows(batch.labels)
            total += float(token_loss_sum(logits[:, :-1][mask], targets))
            count += len(targets)
            hits = (logits[:, :-1].argmax(-1) == batch.input_ids[:, 1:]).numpy()
            for number, row in enumerate(rows):
                for (first, stop), name in zip(answer_spans(row.is_answer.tolist()), row.types, strict=True):
                    if name != "caption":  # may be worded in several ways, so its exact match says nothing
                        hit = bool(hits[number, first - 1 : stop - 1].all())
                        right[row.group].append(hit)
                        right[f"{row.group}_{name}"].append(hit)
        self.model.train()
        return {"val_loss": total / count, **{key: sum(found) / len(found) for key, found in sorted(right.items())}}

    def save(self, out: Path, log: list[dict[str, Any]]) -> None:
        """Saves the LM in bf16 and its tokenizer in transformers' format, and the log's last row as `metrics.json`."""
        copy.deepcopy(self.model).to(torch.bfloat16).save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        (out / "metrics.json").write_text(json.dumps(log[-1], indent=2) + "\n")
