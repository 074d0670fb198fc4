"""LLM backbones that were never made for pictures: they get an image token, a padding token and room for both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import is_flash_attn_2_available

from mmllm.batch import IMAGE_TOKEN, message
from mmllm.batching.collate import collate
from mmllm.chat.renderer import Renderer
from mmllm.config import ConfigError, LanguageConfig
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.model.build import build_model
from mmllm.model.capabilities import check_backbone
from mmllm.model.language import find_architecture, load_language, load_tokenizer
from tests.builders.conversations import MIXED, inputs_of
from tests.builders.tiny import make_language
from tests.builders.tiny_backbones import make_backbone_parts

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


def test_a_tokenizer_that_is_not_in_the_hubs_cache_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="someone/llm is no folder here and not in the hub's cache, and HF_HUB_OFFL"):
        load_tokenizer("someone/llm")


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


# architecture, its options, what is said of it
REFUSED = {
    "opt": ({"word_embed_proj_dim": 16}, "has embeddings of width 16 for a hidden size of 32"),
    "mamba": ({"use_bias": True}, "is a mamba with use_bias, whose state absorbs the padding before a prompt"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_that_cannot_work_is_refused_before_it_loads(
    kind: str, tiny_parts: Path, tmp_path: Path
) -> None:
    changes, message = REFUSED[kind]
    config = make_backbone_parts(tmp_path, kind, tiny_parts, **changes)
    elsewhere = config.vision.model_copy(update={"source": f"local-dir:{tmp_path / 'no-tower'}"})
    with pytest.raises(ConfigError, match=message):  # also before the tower is looked for
        build_model(config.model_copy(update={"vision": elsewhere}))


def test_an_llm_that_looks_ahead_is_refused_since_it_answers_otherwise_with_its_cache(
    tiny_parts: Path, tmp_path: Path
) -> None:
    config = make_backbone_parts(tmp_path, "gemma3_text", tiny_parts, use_bidirectional_attention=True)
    with pytest.raises(ConfigError, match="Gemma3ForCausalLM answers otherwise with its cache than alone"):
        build_model(config)


def test_padding_that_leaks_is_noticed(tiny_parts: Path, tmp_path: Path) -> None:
    """The bias of such a Mamba stands in what its convolution sees of padding; so `use_bias` is refused."""
    config = make_backbone_parts(tmp_path, "mamba", tiny_parts)
    model = build_model(config)[0]
    mixer = model.language_model.backbone.layers[0].mixer
    mixer.in_proj.bias = torch.nn.Parameter(torch.ones(mixer.in_proj.out_features))
    with pytest.raises(ConfigError, match="MambaForCausalLM answers otherwise in a batch that is padded on the left"):
        check_backbone(model)


ATTENTION = [
    (
        "llama",
        "flash_attention_2",
        "flash_attention_2: needs a CUDA GPU and the package .*: eager, sdpa, flex_attention$",
    ),
    ("gemma2", "sdpa", "sdpa: Gemma2ForCausalLM does not support it; possible here: eager, flex_attention$"),
    ("mamba", "sdpa", "sdpa: MambaForCausalLM does not support it; possible here: eager$"),
    ("mamba", "flash_attention_2", "flash_attention_2: MambaForCausalLM does not support it; possible here: eager$"),
]


@pytest.mark.parametrize(("kind", "attention", "said"), ATTENTION)
def test_an_attention_that_the_llm_or_the_machine_lacks_is_refused_before_it_loads(
    kind: str, attention: str, said: str, tiny_parts: Path, tmp_path: Path
) -> None:
    if attention == "flash_attention_2" and is_flash_attn_2_available():
        pytest.skip("this machine has flash attention")
    language = make_backbone_parts(tmp_path, kind, tiny_parts).language
    with pytest.raises(ConfigError, match=f"^model.language.attention: {said}"):
        find_architecture(language.model_copy(update={"attention": attention}))


@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("llama", "flex_attention"), ("gemma2", None)])
def test_every_attention_gives_the_same_logits(
    kind: str, attention: str | None, tiny_parts: Path, tmp_path: Path
) -> None:
    language = make_backbone_parts(tmp_path, kind, tiny_parts).language
    ids, mask = torch.arange(1, 11).view(2, 5), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    logits = []
    for name in ("eager", attention):
        model, _ = load_language(language.model_copy(update={"attention": name}))
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # flex would compile for a minute
            logits.append(model(ids, attention_mask=mask).logits[mask == 1])
    assert model.config._attn_implementation == (attention or "eager")
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_llm_is_held_in_the_dtype_that_is_asked_for_and_answers_in_it(
    kind: str, name: str, dtype: torch.dtype, tiny_parts: Path, tmp_path: Path
) -> None:
    config = make_backbone_parts(tmp_path, kind, tiny_parts)
    config = config.model_copy(update={"language": config.language.model_copy(update={"dtype": name})})
    model, processor, _ = build_model(config)
    assert {p.dtype for p in model.language_model.parameters()} == {dtype}
    assert {p.dtype for p in model.projector.parameters()} == {torch.float32}
    together = Engine(model.eval(), processor, name="tiny").reply_batch(MIXED, Sampling(max_new_tokens=4))
    assert [reply.num_new_tokens for reply in together] == [4] * len(MIXED)


def test_the_end_token_is_learnt_where_the_tokenizer_pads_with_it(tmp_path: Path) -> None:
    folder = make_backbone(tmp_path, pad_token="</s>", bos_token=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 1, "eos_token_id": 1}))
    model, tokenizer = load_language(LanguageConfig(source=str(folder)))
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    renderer = Renderer(tokenizer, "vicuna_v1", image_token_id=image, num_image_tokens=2)
    talks = [[message("user", "a"), message("assistant", answer)] * 2 for answer in ("red", "red circle a")]
    batch = collate([renderer.render(talk) for talk in talks], pad_token_id=tokenizer.pad_token_id, example_ids="ab")
    assert tokenizer.eos_token_id == renderer.end_token_id == 1 != tokenizer.pad_token_id
    ends = batch.input_ids == 1
    assert ends.sum(1).tolist() == [2, 2]
    assert torch.equal(batch.labels[ends], batch.input_ids[ends])
    assert not (batch.labels == tokenizer.pad_token_id).any()
    assert (batch.input_ids[0, -4:] == tokenizer.pad_token_id).all()
    assert tokenizer.bos_token is None
    assert "<s>" not in tokenizer.decode(batch.input_ids[0])
    model(batch.input_ids, attention_mask=batch.attention_mask).logits[ends].sum().backward()
    assert model.get_input_embeddings().weight.grad[1].any()  # transformers gives a padding row no gradient


def test_tokens_that_are_added_are_special_and_stand_once(tmp_path: Path) -> None:
    source = str(make_backbone(tmp_path))
    added = ("<|im_start|>", "<|im_end|>", "red")
    model, tokenizer = load_language(LanguageConfig(source=source, extra_special_tokens=added))
    ids = [tokenizer.convert_tokens_to_ids(token) for token in added]
    assert ids[2] == WORDS.index("red")
    assert len(set(ids)) == 3
    assert model.config.trained_token_ids == ids
    assert tokenizer.encode("a<|im_start|>a", add_special_tokens=False) == [3, ids[0], 3]
    assert Renderer(tokenizer, "chatml", image_token_id=6, num_image_tokens=1).end_token_id == ids[1]


def test_the_image_token_is_never_said(tiny_parts: Path, tmp_path: Path) -> None:
    config = make_backbone_parts(tmp_path, "llama", tiny_parts)
    model, processor, _ = build_model(config)
    engine = Engine(model.eval(), processor, name="tiny")
    inputs = inputs_of(engine, MIXED[0])
    with torch.no_grad():
        hidden = model.get_decoder()(inputs["input_ids"]).last_hidden_state[0, -1]
        model.get_output_embeddings().weight[processor.image_token_id] = 10 * hidden
        assert model(**inputs).logits[0, -1].argmax() == processor.image_token_id
    for sampling in (Sampling(max_new_tokens=8), Sampling(temperature=2.0, seed=0, max_new_tokens=8)):
        assert len(engine.reply_batch(MIXED, sampling)) == len(MIXED)
