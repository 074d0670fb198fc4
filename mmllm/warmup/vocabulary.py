"""The tokenizer of the embedded default's LLM, and how a trained LM changes to another one."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch

from mmllm.batch import IMAGE_TOKEN

# fmt: off
SPECIAL_TOKENS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", IMAGE_TOKEN)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# fmt: on


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """A lower-case byte-level BPE tokenizer. A word has the same tokens at every position; each digit is one token."""
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
    end = "<|end|>"  # added only with add_special_tokens=True, as CLIP's text tower needs it
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token=end, extra_special_tokens=[IMAGE_TOKEN]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@torch.no_grad()
def change_vocabulary(model: Any, old: Any, new: Any) -> None:
    """Gives the model the embeddings, in and out, of another byte-level BPE tokenizer.

    A token of both keeps its row; a new one gets the mean of the rows of the pieces that the old tokenizer makes of it.
    """
    bpe, ids = old.backend_tokenizer.model, old.get_vocab()
    by_id = sorted(new.get_vocab(), key=new.get_vocab().__getitem__)
    pieces = [[ids[token]] if token in ids else [piece.id for piece in bpe.tokenize(token)] for token in by_id]
    tables = [layer.weight.clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    model.resize_token_embeddings(len(by_id), mean_resizing=False)
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = new.eos_token_id, new.pad_token_id
    for layer, table in zip((model.get_input_embeddings(), model.get_output_embeddings()), tables, strict=True):
        layer.weight.copy_(torch.stack([table[rows].mean(0) for rows in pieces]))


def unused_tokens(tokenizer: Any) -> list[int]:
    """The ids of tokens that no text becomes: upper-case letters, where the tokenizer makes all text lower-case."""
    return [int(tokenizer.convert_tokens_to_ids(letter)) for letter in string.ascii_uppercase]
