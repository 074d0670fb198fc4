"""LoRA runs: the adapter alone is saved, its base is proven to be the one it was trained on, and merging is exact."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmllm.checkpoint import merge
from mmllm.checkpoint.adapter import merge_adapter
from mmllm.checkpoint.folder import CheckpointError, load_checkpoint, read_manifest, verify_files, write_manifest
from mmllm.checkpoint.golden import read_golden
from mmllm.checkpoint.merge import merge_checkpoint
from mmllm.cli import app
from mmllm.config import ConfigError
from mmllm.stages.conversation import ConversationStage
from tests.builders.conversations import ask
from tests.builders.findings import examine
from tests.builders.tiny_runs import settings_of, train_in_process, weights_of

LORA = ("lora.rank=4", "lora.alpha=8", "lora.dropout=0.1")
ADAPTER = Path("adapter") / "adapter_model.safetensors"


def train_on(base: Path, tiny_runs: Path, out: Path, *overrides: str) -> Path:
    """A LoRA run on a checkpoint."""
    settings = yaml.safe_load((tiny_runs / "stage2.yaml").read_text())
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump({**settings, "model": {"checkpoint": str(base)}}))
    return train_in_process(path, out, *LORA, *overrides)


@pytest.fixture(scope="module")
def trained(tiny_runs: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and, trained on it, `run`. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("lora")
    base = Path(shutil.copytree(tiny_checkpoint, folder / "base"))
    train_on(base, tiny_runs, folder / "run")
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """The same, all of it moved; where it was there is nothing, as far as its manifest knows."""
    folder = Path(shutil.copytree(trained, tmp_path / "copy"))
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    manifest["base"]["path"] = str(tmp_path / "gone" / "base")
    (folder / "run" / "manifest.json").write_text(json.dumps(manifest))
    return folder


def invoke(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def test_lora_moves_its_adapters_and_the_projector(tiny_runs: Path, tmp_path: Path) -> None:
    stage = ConversationStage(settings_of(tiny_runs / "stage2.yaml", tmp_path, *LORA))
    assert all("lora_" in name for name, _ in stage.parts["language"])
    assert all(name.startswith("projector.") for name, _ in stage.parts["projector"])
    trained = {name for named in stage.parts.values() for name, _ in named}
    assert trained == {name for name, p in stage.model.named_parameters() if p.requires_grad}


def test_lora_on_layers_that_are_not_there_is_refused(tiny_runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora.target_modules: .*query_layer"):
        ConversationStage(settings_of(tiny_runs / "stage2.yaml", tmp_path, "lora.target_modules=[query_layer]"))


def test_a_run_saves_the_adapter_and_what_is_not_the_base_s(trained: Path) -> None:
    run, base = trained / "run", read_manifest(trained / "run")["base"]
    own = load_file(run / "model.safetensors")
    assert not [name for name in own if name.startswith("language_model.")], "those stay where they are"
    assert {name.split(".")[0] for name in own} == {"vision_tower", "projector"}
    assert (base["kind"], base["source"], base["relative"]) == ("checkpoint", str(trained / "base"), "../base")
    assert base["files"]["model.safetensors"] == read_manifest(trained / "base")["files"]["model.safetensors"]
    assert {"adapter/adapter_model.safetensors", "golden/picture_1.png"} <= set(read_manifest(run)["files"])
    assert verify_files(run) == []
    assert f"mmllm merge {run} NEW_FOLDER" in (run / "README.md").read_text()


def test_peft_alone_loads_the_adapter(trained: Path) -> None:
    import peft

    language = load_checkpoint(trained / "base")[0].language_model
    theirs = peft.PeftModel.from_pretrained(language, trained / "run" / "adapter")
    ours = load_checkpoint(trained / "run")[0].language_model
    ids = torch.arange(5, 25)[None]
    assert torch.equal(theirs(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_the_run_is_chatted_with_and_verified_directly(trained: Path) -> None:
    assert ask(trained / "run") != ""
    status, findings = examine(trained / "run")
    assert status == 0
    assert findings["model", "golden answers"]["state"] == "ok"
    assert f"an adapter on {trained / 'base'}" in findings["model", "manifest"]["text"]


def test_merging_gives_the_same_model_without_base_and_adapter(trained: Path, copy: Path) -> None:
    out, run = copy / "merged", copy / "run"
    status, said = invoke("merge", run, out)
    assert (status, said.startswith(f"{out}: merged; on the golden prompts no logit moved by more than ")) == (0, True)
    merged, base, adapter = weights_of(out), weights_of(trained / "base"), load_file(run / ADAPTER)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    update = 8 / 4 * adapter[first.format("B")] @ adapter[first.format("A")]
    torch.testing.assert_close(merged[name], base[name] + update)
    linear = {
        f"language_model.model.layers.{layer}.{part}_proj.weight"
        for layer in (0, 1)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == linear | {name for name in base if name.startswith("projector.")}
    theirs, ours = read_golden(run), read_golden(out)
    assert theirs is not None
    assert ours is not None
    assert [(a.prompt_ids, a.token_ids) for a in theirs.answers] == [(a.prompt_ids, a.token_ids) for a in ours.answers]
    answer = ask(run)
    shutil.rmtree(run)
    shutil.rmtree(copy / "base")
    assert ask(out) == answer
    assert not any("lora" in part for part, _ in load_checkpoint(out)[0].named_modules())
    assert examine(out)[0] == 0
    assert "merged into its base" in (out / "README.md").read_text()
    assert "nothing to merge" in invoke("merge", out, copy / "again")[1]


def test_a_base_that_has_changed_or_is_gone_is_refused(copy: Path) -> None:
    assert ask(copy / "run") != "", "found beside the run, though not where it was"
    config = (copy / "base" / "config.json").read_text()
    (copy / "base" / "config.json").write_text(config.replace("1e-06", "1e-05") + " ")
    with pytest.raises(CheckpointError) as told:
        load_checkpoint(copy / "run")
    assert f"at {copy / 'base'} config.json is not what it was when the adapter was trained" in str(told.value)
    (copy / "base").rename(copy / "elsewhere")
    with pytest.raises(CheckpointError) as told:
        load_checkpoint(copy / "run")
    places = f"{copy.parent / 'gone' / 'base'} nor {copy / 'base'}"
    assert f"which is not at {places}; put it there" in str(told.value)
    assert examine(copy / "run")[0] == 1


def test_an_adapter_that_does_not_fit_is_refused(copy: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(copy / "run" / ADAPTER)
    name = min(tensors)
    del tensors[name]
    save_file(tensors, copy / "run" / ADAPTER)
    with pytest.raises(CheckpointError, match=r"of the adapter's tensors 1 are missing and 0 are too many: base_model"):
        load_checkpoint(copy / "run")
    (copy / "run" / ADAPTER).write_bytes(b"half")
    with pytest.raises(
        CheckpointError, match=r"adapter_model.safetensors does not match its checksum in the manifest; copy the"
    ):
        load_checkpoint(copy / "run")


def test_an_adapter_without_peft_says_what_to_install(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(CheckpointError, match=r"pip install 'mmllm\[lora\]'"):
        load_checkpoint(trained / "run")


@pytest.mark.parametrize("found", ["bfloat16", "quantised"])
def test_only_a_base_in_full_precision_is_merged_into(trained: Path, found: str) -> None:
    model = load_checkpoint(trained / "run")[0]
    if found == "bfloat16":
        model.to(torch.bfloat16)
    else:
        model.language_model.get_base_model().config.quantization_config = {"quant_method": "torchao"}
    with pytest.raises(
        ConfigError, match=rf"the base of this adapter is loaded (in )?{found}; merging needs full precision"
    ):
        merge_adapter(model)


def test_a_merge_that_cannot_be_trusted_writes_nothing(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = copy / "run", tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(merge, "MERGE_TOLERANCE", 0.0)
        with pytest.raises(
            CheckpointError, match=r"merged is not what it was: a logit moves by .*; nothing was written"
        ):
            merge_checkpoint(run, out)
    assert not out.exists()
    status, said = invoke("merge", run, copy / "base")
    assert (status, f"{copy / 'base'} exists already; give a new folder" in said) == (1, True)
    path = run / "golden.json"
    path.write_text(path.read_text().replace('"logprobs": [-', '"logprobs": [-1'))
    manifest = read_manifest(run)
    write_manifest(run, base=manifest["base"])
    status, said = invoke("merge", run, out)
    assert (status, "does not give its golden answers any more" in said, out.exists()) == (1, True, False)
    path.unlink()
    write_manifest(run, base=manifest["base"])
    assert "has no golden answers, so merged and unmerged cannot be compared" in invoke("merge", run, out)[1]


@pytest.mark.parametrize("is_tied", [False, True], ids=["head apart", "head tied"])
def test_a_run_on_an_llm_whose_vocabulary_grew_keeps_the_rows_that_the_llm_lacks(
    tiny_runs: Path, tiny_parts: Path, tmp_path: Path, is_tied: bool
) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = tmp_path / "language"
    tokenizer = AutoTokenizer.from_pretrained(tiny_parts / "language")
    config = LlamaConfig.from_pretrained(tiny_parts / "language", vocab_size=len(tokenizer) - 2)
    config.tie_word_embeddings = is_tied
    LlamaForCausalLM(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    override = f"model.language.source={source}"
    run = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "run", override, *LORA)
    own = {name for name in load_file(run / "model.safetensors") if name.startswith("language_model.")}
    ends = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    assert own == (ends - {"language_model.lm_head.weight"} if is_tied else ends)
    assert read_manifest(run)["base"]["kind"] == "language"
    merge_checkpoint(run, tmp_path / "merged")
    assert ask(tmp_path / "merged") == ask(run)
    assert load_checkpoint(run)[0].get_input_embeddings().num_embeddings == len(tokenizer)


def test_a_run_on_an_adapter_goes_on_from_the_two_merged(
    trained: Path, tiny_runs: Path, tmp_path: Path, copy: Path
) -> None:
    merge_checkpoint(trained / "run", tmp_path / "merged")
    still = ("optim.learning_rates={projector: 1e-30, language: 1e-30}", "optim.max_steps=1")
    whole = train_on(tmp_path / "merged", tiny_runs, tmp_path / "whole", *still)
    chained = train_on(copy / "run", tiny_runs, tmp_path / "chained", *still)
    assert ask(chained) == ask(whole)
    assert "manifest.json" in read_manifest(chained)["base"]["files"], "which says what it is based on in turn"
    merge_checkpoint(chained, tmp_path / "both")
    ours: dict[str, Any] = weights_of(tmp_path / "both")
    for name, value in weights_of(tmp_path / "merged").items():
        torch.testing.assert_close(ours[name], value)
