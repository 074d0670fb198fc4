"""What runs the model for the scheduler: rows that join and leave at any step, or whole batches through `generate`.

Shapes: `B` running rows, `W` columns of the KV cache, `S` columns of a prefill, `V` vocabulary, `D` LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from mmllm.inference.kv_cache import KVCache, StoredRow, next_logits, pad_prompts
from mmllm.inference.picture_features import PictureFeatures
from mmllm.inference.prefix_cache import Prefix, PrefixCache
from mmllm.inference.requests import Request, choose_tokens
from mmllm.model.vlm import VisionLanguageModel


class Decoder(Protocol):
    """Prefills requests, then advances all of them by one token a step."""

    requests: list[Request]  # the running ones

    def prefill(self, requests: Sequence[Request]) -> None:
        """Writes the first token of each, and takes in those that are not finished then."""

    def decode(self) -> None:
        """Writes the next token of each running request."""

    def drop_finished(self) -> None:
        """Frees the rows of finished requests."""

    def clear(self) -> None:
        """Forgets all running requests."""


def _weights_version(model: VisionLanguageModel) -> int:
    """Another number once weights were replaced or changed in place: what was computed with the old ones is void."""
    return hash(
        tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in model.parameters())
    )


class RowDecoder:
    """Runs requests as rows of one KV cache: they join after their prefill, and leave when they are finished."""

    def __init__(self, model: VisionLanguageModel, features: PictureFeatures, prefixes: PrefixCache, pad_token_id: int):
        self.model, self.features, self.prefixes, self.pad_token_id = model, features, prefixes, pad_token_id
        self.requests: list[Request] = []
        self.cache: KVCache | None = None
        self._weights = _weights_version(model)

    def prefill(self, requests: Sequence[Request]) -> None:
        if (weights := _weights_version(self.model)) != self._weights:
            self._weights = weights
            self.features.cache.clear()
            self.prefixes.clear()
        known: list[tuple[Request, StoredRow | None, int]] = [
            (request, *self.prefixes.find(self._prefix(request, request.prompt_ids))) for request in requests
        ]
        # apart from each other: one long prompt without a prefix would make the others compute theirs again
        for has_prefix in (False, True):
            group = [one for one in known if (one[1] is not None) is has_prefix]
            if not group:
                continue
            cache, logits = self._prefill(group)
            choose_tokens([request for request, _, _ in group], logits)
            if self.cache is None:
                self.cache = cache
            else:
                self.cache.join(cache)
            self.requests += [request for request, _, _ in group]
        self.drop_finished()

    def _prefill(self, group: Sequence[tuple[Request, StoredRow | None, int]]) -> tuple[KVCache, Tensor]:
        """The cache of these prompts, and the logits [B, V] after them. All rows compute the same number of tokens."""
        totals = [len(request.prompt_ids) for request, _, _ in group]
        num_new = max(total - num_known for total, (_, _, num_known) in zip(totals, group, strict=True))
        used = [max(0, total - num_new) for total in totals]
        cache = KVCache.of_rows([row for _, row, _ in group], used) if any(used) else KVCache([0] * len(group))
        for (request, _, _), num_used in zip(group, used, strict=True):
            request.num_cached_tokens = num_used
        embeds = self._embed([request for request, _, _ in group], used)
        logits = self._logits(cache, totals, inputs_embeds=embeds)
        return cache, logits

    def _embed(self, requests: Sequence[Request], used: Sequence[int]) -> Tensor:
        """Embeddings [B, S, D] of each prompt without its first `used` tokens, padded on the left."""
        image_token_id = self.model.config.image_token_id
        new = [request.prompt_ids[num_used:] for request, num_used in zip(requests, used, strict=True)]
        ids = pad_prompts(new, self.pad_token_id)[0].to(self.model.device)
        pictures, cuts = [], []  # those with a slot here, and how many of their first tokens are used already
        for request, num_used in zip(requests, used, strict=True):
            num_skipped = request.prompt_ids[:num_used].count(image_token_id)
            starts = accumulate((picture.num_tokens for picture in request.pictures), initial=0)
            for picture, start in zip(request.pictures, starts, strict=False):
                if start + picture.num_tokens > num_skipped:
                    pictures.append(picture)
                    cuts.append(max(0, num_skipped - start))
        if not pictures:
            return self.model.embed(ids, None)
        tokens = [tokens[cut:] for tokens, cut in zip(self.features.of(pictures), cuts, strict=True)]
        return self.model.fill_slots(ids, torch.cat(tokens))

    def decode(self) -> None:
        assert self.cache is not None
        ids = torch.tensor([[request.new_ids[-1]] for request in self.requests], device=self.model.device)
        lengths = [length + 1 for length in self.cache.lengths]
        choose_tokens(self.requests, self._logits(self.cache, lengths, input_ids=ids))
        self.drop_finished()

    def _logits(self, cache: KVCache, lengths: list[int], **inputs: Tensor) -> Tensor:
        logits = next_logits(self.model, cache, lengths, **inputs)
        logits[:, self.model.config.image_token_id] = -torch.inf  # its slot would have no picture
        return logits

    def drop_finished(self) -> None:
        rows = [row for row, request in enumerate(self.requests) if not request.is_finished]
        if len(rows) == len(self.requests):
            return
        assert self.cache is not None
        if self.prefixes.is_on:
            for row, request in enumerate(self.requests):
                if request.is_finished and request.error is None:
                    ids = [*request.prompt_ids, *request.new_ids][: self.cache.lengths[row]]
                    self.prefixes.put(self._prefix(request, ids), self.cache.row(row, len(ids)))
        self.requests = [self.requests[row] for row in rows]
        if rows:
            self.cache.keep(rows)
        else:
            self.cache = None

    def clear(self) -> None:
        """Forgets all running requests."""
        self.requests, self.cache = [], None

    def _prefix(self, request: Request, ids: Sequence[int]) -> Prefix:
        return Prefix.of(ids, request.pictures, self.model.config.image_token_id)


class GenerateDecoder:
    """Runs a batch to its end through transformers' `generate`: for an LLM whose cache rows cannot join."""

    def __init__(self, model: VisionLanguageModel, pad_token_id: int, max_length_tokens: int):
        self.model, self.pad_token_id, self.max_length_tokens = model, pad_token_id, max_length_tokens
        self.requests: list[Request] = []  # empty between batches

    def prefill(self, requests: Sequence[Request]) -> None:
        """Writes the whole answers. Rows of finished requests are computed on, but ignored."""
        device, lengths = self.model.device, [len(request.prompt_ids) for request in requests]
        for request in requests:  # padding takes positions too
            request.max_new_tokens = min(request.max_new_tokens, self.max_length_tokens - max(lengths))
        ids, mask = pad_prompts([request.prompt_ids for request in requests], self.pad_token_id)
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        prepared = [picture.prepared.inputs for request in requests for picture in request.pictures]
        if prepared:
            inputs |= {name: value.to(device) for name, value in self.model.layout.join(prepared).items()}

        def choose(ids: Tensor, logits: Tensor) -> Tensor:  # [B, T], [B, V] -> [B, V]
            for request in requests:
                request.end_if_stopped()
            choose_tokens(requests, logits)
            chosen = [request.new_ids[-1] if request.new_ids else self.pad_token_id for request in requests]
            tokens = torch.tensor(chosen, device=logits.device)[:, None]
            return torch.full_like(logits, -torch.inf).scatter(1, tokens, 0.0)

        def is_finished(ids: Tensor, logits: Any, **kwargs: Any) -> Tensor:
            return torch.tensor([request.is_finished for request in requests], device=ids.device)

        self.requests = list(requests)
        try:
            self._generate(inputs, choose, is_finished)
        finally:
            self.requests = []

    def _generate(
        self, inputs: dict[str, Tensor], choose: Callable[..., Tensor], is_finished: Callable[..., Tensor]
    ) -> None:
        self.model.generate(
            **inputs,
            do_sample=False,
            logits_processor=[choose],
            stopping_criteria=[is_finished],
            max_new_tokens=max(request.max_new_tokens for request in self.requests),
            eos_token_id=sorted(self.requests[0].end_token_ids),
            pad_token_id=self.pad_token_id,
        )

    def decode(self) -> None:
        """Nothing runs between batches."""

    def drop_finished(self) -> None:
        """Nothing is held between batches."""

    def clear(self) -> None:
        """Nothing is held between batches."""
