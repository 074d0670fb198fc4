"""The loss of next-token prediction: a sum over supervised tokens. Labels are shifted here and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.batch import IGNORE_INDEX, Batch
from mmllm.model.vlm import VisionLanguageModel


def token_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy summed over tokens: [K, V], [K] -> []. In float32 whatever the logits are."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def supervised_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the next token is supervised [B, T - 1], and those next tokens [K]."""
    targets = labels[:, 1:]
    mask = targets != IGNORE_INDEX
    return mask, targets[mask]


@torch.no_grad()
def has_plain_head(language_model: Any) -> bool:
    """Whether logits are just the head applied to the decoder's output: no soft cap, no scale.

    Only then may the head run on supervised rows alone. Found by trying, since architectures do not say.
    """
    device = language_model.get_input_embeddings().weight.device
    ids = torch.arange(4, device=device)[None] % language_model.config.vocab_size
    was_training = language_model.training
    language_model.eval()
    hidden = language_model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    own = language_model(input_ids=ids, use_cache=False).logits
    language_model.train(was_training)
    head = language_model.get_output_embeddings()
    return bool(torch.allclose(head(hidden).float(), own.float(), rtol=1e-4, atol=1e-5))


def conversation_loss_sum(model: VisionLanguageModel, batch: Batch, *, plain_head: bool) -> Tensor:
    """The loss of a batch of conversations, summed over its supervised tokens.

    About nineteen in twenty rows of image data are not supervised, so the head runs on those that are.
    """
    embeds = model.embed_batch(batch)
    language_model = model.language_model
    inputs = {"inputs_embeds": embeds, "attention_mask": batch.attention_mask, "use_cache": False}
    mask, targets = supervised_rows(batch.labels)
    if plain_head:
        hidden = language_model.get_decoder()(**inputs).last_hidden_state[:, :-1]
        return token_loss_sum(language_model.get_output_embeddings()(hidden[mask]), targets)
    return token_loss_sum(language_model(**inputs).logits[:, :-1][mask], targets)
