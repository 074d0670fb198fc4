"""Teaches a small LM early to look things up in a text, by an initialization and by a loss that guides attention.

Without them training spends thousands of steps naming *some* color of the text instead of the one asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmllm.batch import Batch
from mmllm.optimizers.layers import OuterModule
from mmllm.scenes.questions import About

MAX_PARTS = 10  # scene parts of one conversation
REACH = 40  # tokens; beyond this distance the first layer's initial scores fall no further
FADING = 6.0  # tokens over which its attention falls to 1/e


@dataclass(kw_only=True)
class LookupBatch(Batch):
    """A text batch with annotations of where its answers can be read."""

    part_of: Tensor  # [B, T] the scene part that this token describes, or -1
    about: Tensor  # [B, T, 2] bit i: the next token is read from part i, for the first and the last thing named
    named: Tensor  # [B, T] the position in the question of the token that comes next, or -1
    compared: Tensor  # [B, T, 2] ids of the first tokens of the two values that decide the next token, or -1
    grid_ids: Tensor | None = None  # [N, W] what stands in place of the batch's N image tokens, see word_grid.py
    grid_weights: Tensor | None = None  # [N, W]


def guide_bits(about: About) -> tuple[int, int]:
    """Bit masks of the parts that the first and the last thing named by a question mean; mostly the same. 0: none."""
    first, last = (sum(1 << part for part in about[which]) if about else 0 for which in (0, -1))
    return first, last


def guided_attention_sum(attention: Tensor, batch: LookupBatch, reads: Literal["first", "last", "named"]) -> Tensor:
    """Cross entropy between attention [B, H, T, T] and where it should go, averaged over heads, summed over tokens: [].

    It should go to the description of the `first` or the `last` thing that the question names, or to the place in the
    question where the answer itself is `named`. The heads may choose any token of a part. After supervised attention
    in machine translation, https://arxiv.org/abs/1608.04631.
    """
    if reads == "named":
        rows, queries = torch.nonzero(batch.named >= 0, as_tuple=True)
        places = batch.named[rows, queries, None, None].expand(-1, attention.shape[1], 1)
        share = attention[rows, :, queries].float().gather(2, places).clamp(min=1e-6)
        return -share.log().mean(1).sum()
    about = batch.about[..., 0 if reads == "first" else 1]
    rows, queries = torch.nonzero(about, as_tuple=True)
    heads = attention[rows, :, queries].float()  # [Q, H, T]
    is_part = functional.one_hot(batch.part_of + 1, MAX_PARTS + 1)[..., 1:].float()  # [B, T, parts]
    share = torch.einsum("qht,qtp->qhp", heads, is_part[rows]).clamp(min=1e-6)
    is_read = (about[rows, queries, None] >> torch.arange(MAX_PARTS, device=about.device)) & 1  # [Q, parts]
    target = is_read / is_read.sum(-1, keepdim=True)
    return -(target[:, None] * share.log()).sum(-1).mean(1).sum()


class ReadOut(OuterModule):
    """Two linear heads that predict both values of a comparison from a layer's output where the answer is predicted.

    Without them the second value overwrites the first, and the LM never learns whether two colors are the same. They
    are used in training only. After deeply-supervised nets, https://arxiv.org/abs/1409.5185.
    """

    def __init__(self, layer: int, hidden_size: int, vocab_size: int):
        super().__init__()
        self.layer = layer
        self.heads = nn.ModuleList(nn.Linear(hidden_size, vocab_size) for _ in range(2))

    def forward(self, hidden_states: Sequence[Tensor], batch: LookupBatch) -> Tensor:
        """Cross entropy of both values, summed over the comparisons of a batch: [].

        `hidden_states`, each [B, T, hidden_size], are the embeddings and each layer's output, as in transformers.
        """
        hidden = hidden_states[self.layer + 1]
        rows, places = torch.nonzero(batch.compared[..., 0] >= 0, as_tuple=True)
        normed = functional.rms_norm(hidden[rows, places].float(), hidden.shape[-1:], eps=1e-6)
        values = batch.compared[rows, places]
        losses = (
            functional.cross_entropy(head(normed).float(), values[:, which], reduction="sum")
            for which, head in enumerate(self.heads)
        )
        return torch.stack(list(losses)).sum()


def _rotary_bias(width: int, theta: float) -> tuple[Tensor, Tensor]:
    """(query bias, key bias) of one head, [width] each. Its scores fall by 1 per FADING tokens, and not beyond REACH.

    With rotary positions the score of two constant vectors is a sum of cosines and sines of the distance, one pair per
    frequency; least squares fits their weights.
    """
    angles = theta ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    distance = torch.arange(400, dtype=torch.float64)
    target_scores = -distance.clamp(max=REACH) / FADING
    terms = torch.cat(
        [torch.cos(distance[:, None] * angles), torch.sin(distance[:, None] * angles), torch.ones(400, 1)], 1
    )
    weights = 1 / (1 + distance / 30)[:, None]  # short distances matter more
    ridge = 1e-3 * torch.eye(terms.shape[1], dtype=torch.float64)
    coefficients = torch.linalg.solve(
        terms.T @ (weights * terms) + ridge, terms.T @ (weights * target_scores[:, None])
    )[:, 0]
    cosine, sine = (coefficients[:-1] * width**0.5).view(2, -1)
    size, phase = (cosine**2 + sine**2) ** 0.25, torch.atan2(sine, cosine)
    key = torch.cat([size, torch.zeros_like(size)])
    return torch.cat([size * torch.cos(phase), -size * torch.sin(phase)]).float(), key.float()


@torch.no_grad()
def init_for_lookup(model: Any) -> None:
    """Initializes a small Llama-like LM with attention biases so that it soon learns to look things up.

    Embeddings have unit variance. Block outputs are scaled down by the square root of the number of blocks, except that
    of the first attention, which adds to each token a fading mean of the tokens before it, so that a clause and a
    question are each a bag of words. The second attention compares such bags, query against key. After mimetic
    initialization, https://arxiv.org/abs/2305.09828.
    """
    config = model.config
    model.get_input_embeddings().weight.normal_(0, 1)
    model.get_output_embeddings().weight.normal_(0, 0.02)
    layers = model.get_decoder().layers
    for layer in layers:
        layer.self_attn.o_proj.weight.mul_((2 * len(layers)) ** -0.5)
        layer.mlp.down_proj.weight.mul_((2 * len(layers)) ** -0.5)
    first, second = layers[0].self_attn, layers[1].self_attn
    query, key = _rotary_bias(first.head_dim, config.rope_parameters["rope_theta"])
    first.q_proj.bias.copy_(query.repeat(config.num_attention_heads))
    first.k_proj.bias.copy_(key.repeat(config.num_attention_heads))
    first.q_proj.weight.mul_(0.1)
    first.k_proj.weight.mul_(0.1)
    torch.nn.init.orthogonal_(first.v_proj.weight)
    torch.nn.init.orthogonal_(first.o_proj.weight, gain=2.5)  # a mean of several words is smaller than one word
    torch.nn.init.orthogonal_(second.k_proj.weight)
    second.q_proj.weight.copy_(second.k_proj.weight)
