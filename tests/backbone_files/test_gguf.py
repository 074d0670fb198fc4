"""LLMs in GGUF files: a real one that others made, and small ones that show what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from mmllm.backbone_files.gguf import described_source, local_source
from mmllm.checkpoint.folder import load_checkpoint, read_manifest
from mmllm.config import ConfigError, LanguageConfig, ModelConfig, ProjectorConfig
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.model.build import build_model
from mmllm.model.capabilities import has_plain_head, needs_mask, why_not_packed
from mmllm.model.language import load_language
from tests.builders.conversations import MIXED
from tests.builders.gguf_files import write_gguf
from tests.builders.launches import Forked
from tests.builders.real_parts import SMOLLM2
from tests.builders.sharp import rounding
from tests.builders.tiny import model_config
from tests.builders.tiny_runs import make_data, train_in_process, write_settings

SHORT = Sampling(max_new_tokens=4)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for conversions."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "mmllm" / "gguf"


@pytest.fixture
def tiny_gguf(tiny_parts: Path, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_parts / "language")


def with_gguf(parts: Path, source: Path) -> ModelConfig:
    language = LanguageConfig(source=str(source), attention="eager")
    return model_config(parts).model_copy(update={"language": language, "projector": ProjectorConfig()})


@pytest.mark.timeout(600)
def test_a_real_llm_that_others_quantised_answers_and_is_packed_in_bf16(cache: Path, tiny_parts: Path) -> None:
    model, processor, origin = build_model(with_gguf(tiny_parts, SMOLLM2))
    assert origin["language"] == f"{SMOLLM2} (sha256 {next(cache.glob('*/')).name})"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    engine = Engine(model.eval(), processor, name="smollm2")
    reply = engine.ask("What is the capital of France?", [], Sampling(max_new_tokens=16))
    assert reply.text == "The capital of France is Paris."
    assert reply.finish_reason == "end"
    language_model = model.language_model.to(torch.bfloat16)
    assert rounding(language_model) > 0.01
    assert why_not_packed(language_model) is None
    assert has_plain_head(language_model)
    assert not needs_mask(language_model)


def test_weights_and_tokens_are_those_of_the_file(cache: Path, tiny_gguf: Path, tiny_parts: Path) -> None:
    (tiny_gguf.parent / "tokenizer.json").write_text("{}")  # another model's, which transformers would take
    model, tokenizer = load_language(LanguageConfig(source=str(tiny_gguf), attention="eager"))
    original = LlamaForCausalLM.from_pretrained(tiny_parts / "language")
    for parameter in original.parameters():
        parameter.data = parameter.half().float()
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        logits = [llm(input_ids=ids).logits[..., : original.config.vocab_size] for llm in (model, original)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    assert tokenizer.chat_template == (tiny_parts / "language" / "chat_template.jinja").read_text()
    assert tokenizer.eos_token_id == original.config.eos_token_id


def test_a_moved_file_is_not_converted_again_and_a_changed_one_is(
    cache: Path, tiny_gguf: Path, tiny_parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = local_source(str(tiny_gguf))
    assert "tiny.gguf: converted to full precision, once" in capsys.readouterr().out
    moved = shutil.move(tiny_gguf, tiny_gguf.with_name("moved.gguf"))
    assert local_source(str(moved)) == first
    assert capsys.readouterr().out == ""
    assert described_source(str(moved)) == f"{moved} (sha256 {Path(first).name})"
    torch.manual_seed(1)
    data = bytearray(moved.read_bytes())
    data[-1] ^= 1
    moved.write_bytes(data)
    assert local_source(str(moved)) != first
    assert {path.suffix for path in cache.iterdir()} == {"", ".lock"}, "nothing half written is left"


def _convert(home: str, source: str) -> None:
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HOME = home
    print(local_source(source))


def test_two_at_once_convert_once(tiny_gguf: Path, tmp_path: Path) -> None:
    home = str(tmp_path / "shared")
    with Forked(_convert, given=(home, str(tiny_gguf))) as one, Forked(_convert, given=(home, str(tiny_gguf))) as other:
        texts = [process.completed().stdout for process in (one, other)]
    assert sum("converted to full precision" in text for text in texts) == 1
    assert len({text.splitlines()[-1] for text in texts}) == 1


@pytest.mark.timeout(600)
def test_an_adapter_on_a_file_is_trained_and_finds_its_base_again(
    cache: Path, tiny_gguf: Path, tiny_parts: Path, tmp_path: Path
) -> None:
    data = make_data(tmp_path / "data")
    settings = write_settings(tmp_path / "run.yaml", tiny_parts, data, train=("projector", "language"))
    out = train_in_process(
        settings, tmp_path / "out", "lora={rank: 2, alpha: 4}", "optim.max_steps=2",
        f"model.language.source={tiny_gguf}",
    )  # fmt: skip
    assert "sha256" in read_manifest(out)["origin"]["language"]
    texts = [reply.text for reply in Engine.load(out, device="cpu").reply_batch(MIXED, SHORT)]
    shutil.rmtree(cache)  # whoever tidies caches
    assert [reply.text for reply in Engine.load(out, device="cpu").reply_batch(MIXED, SHORT)] == texts
    load_checkpoint(out)


def test_what_is_no_whole_gguf_file_is_refused(cache: Path, tiny_gguf: Path, tiny_parts: Path, tmp_path: Path) -> None:
    def refused(source: Path, **language: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_language(LanguageConfig(source=str(source), **language))
        return str(caught.value)

    assert "is no file here; download it: `hf download" in refused(tmp_path / "none.gguf")
    assert "is a file, which has no revisions; leave out revision abc" in refused(tiny_gguf, revision="abc")
    other = tmp_path / "text.gguf"
    other.write_text("version https://git-lfs.github.com/spec/v1")
    assert "does not begin as a GGUF file does" in refused(other)
    part = shutil.copy(tiny_gguf, tmp_path / "big-00001-of-00003.gguf")
    assert "is one part of several; join them with `llama-gguf-split --merge" in refused(part)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:-3000])
    assert "cannot be read by transformers" in refused(cut)
    (tmp_path / "head.gguf").write_bytes(tiny_gguf.read_bytes()[:20])
    assert "cannot be read by transformers" in refused(tmp_path / "head.gguf")
    unknown = write_gguf(tmp_path / "unknown.gguf", tiny_parts / "language", architecture="unheard")
    assert "cannot be read by transformers: GGUF model with architecture unheard" in refused(unknown)
    lacking = write_gguf(tmp_path / "lacking.gguf", tiny_parts / "language", leaves_out="ffn_up")
    assert "lacks model.layers.0.mlp.up_proj.weight" in refused(lacking)
    assert not any(path.suffix == "" for path in cache.glob("*")), "nothing is left"
