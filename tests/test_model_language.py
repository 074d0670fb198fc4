"""LLM backbones that were never made for pictures: they get an image token, a padding token and room for both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import make_language
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmllm.batch import IMAGE_TOKEN
from mmllm.config import ConfigError, LanguageConfig
from mmllm.model.language import load_language, load_tokenizer

WORDS = ("<s>", "</s>", "<unk>", "a", "red", "circle")


def make_backbone(folder: Path, *, vocab_size: int = len(WORDS), **tokens: str | None) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **tokens}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_embedding_grows_by_the_image_token_and_the_padding_token(tmp_path: Path) -> None:
    model, tokenizer = load_language(LanguageConfig(source=str(make_backbone(tmp_path))))
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == len(WORDS) + 2
    assert model.get_output_embeddings().out_features == model.config.vocab_size == len(WORDS) + 2
    image, pad = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), tokenizer.pad_token_id
    assert {image, pad} == {len(WORDS), len(WORDS) + 1}
    assert tokenizer.encode(f"a{IMAGE_TOKEN}{IMAGE_TOKEN}red", add_special_tokens=False) == [3, image, image, 4]


def test_an_embedding_with_spare_rows_stays_as_it_is(tmp_path: Path) -> None:
    model, tokenizer = load_language(LanguageConfig(source=str(make_backbone(tmp_path, vocab_size=64))))
    assert model.get_input_embeddings().num_embeddings == 64
    assert len(tokenizer) == len(WORDS) + 2


def test_padding_is_never_the_end_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_backbone(tmp_path, pad_token="</s>")))
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_a_padding_token_of_its_own_is_kept(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(make_backbone(tmp_path, pad_token="<unk>")))
    assert tokenizer.pad_token == "<unk>"


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no end token, so answers could never stop"):
        load_tokenizer(str(make_backbone(tmp_path, eos_token=None)))


def test_a_backbone_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"model.language.source: no tokenizer at {tmp_path}"):
        load_tokenizer(str(tmp_path))
    folder = make_backbone(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"model.language.source: {tmp_path} has a config.json but no weights"):
        load_language(LanguageConfig(source=str(folder)))


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = make_backbone(tmp_path)
    (folder / "config.json").write_text('{"model_type": "never-heard-of"}')
    with pytest.raises(ConfigError, match="never-heard-of"):
        load_language(LanguageConfig(source=str(folder)))


def test_a_tokenizer_of_its_own_beside_a_qwen2_model_keeps_its_rules(tmp_path: Path) -> None:
    """AutoTokenizer takes Qwen2's normaliser there instead: no lower case, no leading space, a token more."""
    make_language(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "qwen2"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.tokenize("Red") == tokenizer.tokenize(" red") == ["Ġred"]
    assert len(tokenizer) == json.loads(path.read_text())["vocab_size"]
