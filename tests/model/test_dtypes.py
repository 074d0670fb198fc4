"""Each part is held in its own dtype: stored, read, trained, merged and exported in it, and changed on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from mmllm.batch import Example, message
from mmllm.checkpoint.folder import load_checkpoint, save_checkpoint, stored_dtypes
from mmllm.checkpoint.generation_settings import write_generation_settings
from mmllm.checkpoint.golden import make_golden, verify_golden
from mmllm.checkpoint.merge import merge_checkpoint
from mmllm.cli import app
from mmllm.config import ConfigError
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.interop.hf_llava import export_hf
from mmllm.model.build import build_model
from mmllm.model.vlm import PARTS
from mmllm.stages.conversation import ConversationStage
from tests.builders.conversations import generate
from tests.builders.sharp import make_sharp_language
from tests.builders.tiny import make_checkpoint, model_config
from tests.builders.tiny_runs import losses_of, settings_of, train_in_process, weights_of

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
MIXED = {"vision": FP32, "projector": FP32, "language": BF16}
ASKED = Example("x", "", (message("user", "is a circle round?"),))
LORA = ("lora.rank=2", "lora.alpha=4")


def save(folder: Path, parts: Path, dtype: str, language: Path | None = None, **vision: Any) -> Path:
    """A checkpoint of fresh parts with its LLM in this dtype, and of another kind of projector than Llava's none."""
    torch.manual_seed(0)
    config = model_config(parts, **vision)
    changes = {"dtype": dtype, "attention": "sdpa", **({"source": str(language)} if language else {})}
    assert config.language
    assert config.projector
    config = config.model_copy(
        update={
            "language": config.language.model_copy(update=changes),
            "projector": config.projector.model_copy(update={"kind": "mlp", "options": {}}),
        }
    )
    model, processor, origin = build_model(config)
    files = make_golden(model.eval(), processor)
    save_checkpoint(folder, model, processor, card="For tests.\n", files=files, origin=origin)
    return folder


@pytest.fixture(scope="module")
def mixed(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose LLM, with sharp attention, is stored in bf16 and whose other parts in fp32."""
    folder = tmp_path_factory.mktemp("dtypes")
    language = make_sharp_language(folder / "language", tiny_parts / "language")
    return save(folder / "mixed", tiny_parts, "bf16", language)


def test_each_part_comes_as_it_is_stored(mixed: Path) -> None:
    assert {v.dtype for name, v in load_file(mixed / "model.safetensors").items() if "language" in name} == {BF16}
    assert stored_dtypes(mixed) == MIXED
    model, processor, _ = load_checkpoint(mixed)
    assert model.part_dtypes() == MIXED
    assert model.dtype == BF16
    assert all(check.holds for check in verify_golden(model, processor, mixed))
    engine = Engine.load(mixed, device="cpu", dtype="stored")
    assert engine.model.part_dtypes() == MIXED
    assert engine.reply(ASKED, Sampling(max_new_tokens=4)).num_new_tokens == 4
    others = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
    for name, dtype in others.items():
        assert set(Engine.load(mixed, device="cpu", dtype=name, verify=False).model.part_dtypes().values()) == {dtype}


def test_transformers_reads_each_part_as_it_is_stored_or_all_in_one_dtype(mixed: Path) -> None:
    assert AutoModelForImageTextToText.from_pretrained(mixed).part_dtypes() == MIXED
    whole = AutoModelForImageTextToText.from_pretrained(mixed, dtype=FP32)
    assert {p.dtype for p in whole.parameters()} == {FP32}


def test_a_checkpoint_of_before_is_read_by_what_its_files_hold(mixed: Path, tmp_path: Path) -> None:
    """It names one dtype, that of its tower."""
    for path in mixed.glob("*"):
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((mixed / "config.json").read_text())
    del config["part_dtypes"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    manifest = json.loads((mixed / "manifest.json").read_text())
    manifest["files"] = {name: "" for name in manifest["files"] if (tmp_path / name).is_file()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert load_checkpoint(tmp_path)[0].part_dtypes() == MIXED


def test_commands_say_and_change_what_runs(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def doctor() -> str:
        output = CliRunner().invoke(app, ["doctor", str(mixed), "--json"]).output
        return next(one["text"] for one in json.loads(output)["findings"] if one["name"] == "loading")

    for multiplies, told in ((True, "language in bfloat16"), (False, "language in float32 (stored in bfloat16)")):
        monkeypatch.setattr("mmllm.kernels.precision._cpu_multiplies_bf16", lambda multiplies=multiplies: multiplies)
        if not torch.cuda.is_available():
            assert doctor().endswith(f"vision in float32, projector in float32, {told}")
    seen: list[Any] = []
    load = Engine.load
    monkeypatch.setattr(Engine, "load", lambda *a, **k: seen.append(load(*a, **{**k, "device": "cpu"})) or seen[-1])
    chat = ["chat", str(mixed), "--prompt", "hello", "--max-new-tokens", "2", "--dtype"]
    assert CliRunner().invoke(app, [*chat, "bf16"]).exit_code == 0
    assert set(seen[0].model.part_dtypes().values()) == {BF16}
    assert CliRunner().invoke(app, [*chat, "int3"]).exit_code == 2


def test_lora_on_a_checkpoint_holds_its_llm_as_stored_or_as_asked(
    mixed: Path, tiny_runs: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "stage2.yaml"
    settings = (tiny_runs / "stage2.yaml").read_text()
    start, end = settings.index("model:"), settings.index("optim:")
    path.write_text(settings[:start] + f"model:\n  checkpoint: {mixed}\n" + settings[end:])
    stored = ConversationStage(settings_of(path, tmp_path / "a", *LORA))
    assert stored.model.part_dtypes() == MIXED
    assert {p.dtype for named in stored.parts.values() for _, p in named} == {FP32}, "what is trained"
    assert any("language bfloat16" in note for note in stored.notes)
    whole = ConversationStage(settings_of(path, tmp_path / "b"))
    assert set(whole.model.part_dtypes().values()) == {FP32}, "an LLM that is trained whole"
    asked = (f"model.checkpoint={tiny_checkpoint}", "model.language.dtype=bf16", "model.language.attention=sdpa")
    other = ConversationStage(settings_of(path, tmp_path / "c", *LORA, *asked))
    assert other.model.part_dtypes() == MIXED
    assert other.model.language_model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="checkpoint already holds language; give either checkpoint or the parts"):
        settings_of(path, tmp_path, "model.language.source=elsewhere")
    with pytest.raises(ConfigError, match="lose small updates of an LLM that is trained whole"):
        settings_of(path, tmp_path, "model.language.dtype=bf16")


def test_a_lora_of_an_llm_in_bf16_is_trained_answered_and_merged(
    tiny_parts: Path, tiny_runs: Path, tmp_path: Path
) -> None:
    mixed = save(tmp_path / "mixed", tiny_parts, "bf16")
    path = tmp_path / "stage2.yaml"
    settings = (tiny_runs / "stage2.yaml").read_text()
    start, end = settings.index("model:"), settings.index("optim:")
    path.write_text(settings[:start] + f"model:\n  checkpoint: {mixed}\n" + settings[end:])
    run = train_in_process(path, tmp_path / "run", *LORA, "optim.max_steps=2", "data.packing=always")
    assert len(losses_of(run)) == 2
    assert stored_dtypes(run) == MIXED
    model, processor, _ = load_checkpoint(run)
    assert model.part_dtypes() == MIXED
    assert all(check.holds for check in verify_golden(model, processor, run))
    merge_checkpoint(run, tmp_path / "merged", device="cpu")
    assert stored_dtypes(tmp_path / "merged")["language"] == FP32, "the small updates of an adapter are kept"


def test_an_export_keeps_dtypes_and_is_compared_without_their_rounding(mixed: Path, tmp_path: Path) -> None:
    verdict = export_hf(mixed, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {v.dtype for name, v in tensors.items() if name.startswith("language_model.")} == {BF16}
    assert {v.dtype for name, v in tensors.items() if not name.startswith("language_model.")} == {FP32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert verdict.max_logit_difference < 1e-2


def test_the_head_of_a_long_prompt_runs_on_its_last_token_alone(tiny_checkpoint: Path) -> None:
    engine = Engine.load(tiny_checkpoint, device="cpu")
    engine.start()  # which runs the head to probe the LLM
    model, rows = engine.model, []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    expected = engine.reply(ASKED, Sampling(max_new_tokens=6))
    assert rows == [1] * expected.num_new_tokens
    rows.clear()
    model.language_inputs -= {"logits_to_keep"}  # an LLM that takes no such argument
    assert engine.reply(ASKED, Sampling(max_new_tokens=6)).text == expected.text
    ids = torch.tensor([engine.renderer.render_example(ASKED).input_ids])
    with torch.no_grad():
        every = model(input_ids=ids).logits
        for inputs in (model.language_inputs, model.language_inputs | {"logits_to_keep"}):
            model.language_inputs = inputs
            torch.testing.assert_close(model(input_ids=ids, logits_to_keep=3).logits, every[:, -3:])


def test_any_of_an_llm_s_end_tokens_ends_an_answer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model, processor, _ = load_checkpoint(tiny_checkpoint)
    engine = Engine(model, processor, name="x")
    first = engine.reply(ASKED, Sampling(max_new_tokens=6))
    said = generate(engine, ASKED, max_new_tokens=3)
    other = int(said[0, 1])
    for ends in ([engine.renderer.end_token_id, other], [other]):
        model.language_model.generation_config.eos_token_id = ends
        engine = Engine(model, processor, name="x")
        reply = engine.reply(ASKED, Sampling(max_new_tokens=6))
        if len(ends) == 2:
            assert (reply.finish_reason, reply.num_new_tokens) == ("end", 1 + list(said[0]).index(other))
            write_generation_settings(engine.model, engine.processor, engine.renderer)
            save_checkpoint(tmp_path / "out", model, processor, card="x")
            assert Engine.load(tmp_path / "out", device="cpu").end_token_ids == ends
            model.generation_config.eos_token_id = engine.renderer.end_token_id
        else:
            assert reply.text == first.text, "the template's own end is none of them: they are of another way to talk"


def test_greedy_is_greedy_whatever_an_llm_s_own_settings_say(tiny_parts: Path, tmp_path: Path) -> None:
    """Instruct LLMs come with a temperature, a top-p and a repetition penalty."""
    import shutil

    plain = Engine.load(make_checkpoint(tmp_path / "plain", tiny_parts), device="cpu")
    parts = tmp_path / "parts"
    shutil.copytree(tiny_parts, parts)
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.5, "repetition_penalty": 5.0, "top_k": 3}
    path = parts / "language" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    chatty = Engine.load(make_checkpoint(tmp_path / "chatty", parts), device="cpu")
    assert chatty.reply(ASKED).text == plain.reply(ASKED).text


def as_numbers(tensors: dict[str, Tensor]) -> set[torch.dtype]:
    return {value.dtype for value in tensors.values()}


def test_weights_of_a_run_that_trains_the_projector_alone_keep_the_llm_in_bf16(tiny_runs: Path, tmp_path: Path) -> None:
    run = train_in_process(
        tiny_runs / "stage1.yaml", tmp_path / "run", "model.language.dtype=bf16", "optim.max_steps=1"
    )
    assert as_numbers({k: v for k, v in weights_of(run).items() if k.startswith(PARTS["language"])}) == {BF16}
    assert load_checkpoint(run)[0].part_dtypes() == MIXED
