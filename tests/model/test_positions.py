"""The positions of an LLM: which architectures end where, and that check, plan and training judge a long row alike."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from mmllm.batch import Example, message
from mmllm.diagnose.check import check_data
from mmllm.diagnose.explain import explain
from mmllm.inference.engine import Engine
from mmllm.model.positions import position_limit, position_limit_of
from mmllm.stages.plan import make_plan
from mmllm.stages.registry import build_stage
from tests.builders.tiny_backbones import make_backbone_parts
from tests.builders.tiny_runs import make_data, settings_of, train_in_process, write_settings

NUM_POSITIONS = 24
_N = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": NUM_POSITIONS}
_LAYERS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
_ATTENTION = {**_LAYERS, "max_position_embeddings": NUM_POSITIONS}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": _N,
    "gpt_bigcode": _N,
    "openai-gpt": _N,
    "gptj": {**_N, "rotary_dim": 8},
    "codegen": {**_N, "n_head": 4, "rotary_dim": 8},
    "ctrl": {**_N, "dff": 32},
    "gpt_neo": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]],
                "max_position_embeddings": NUM_POSITIONS},
    "opt": {**_ATTENTION, "word_embed_proj_dim": 32, "ffn_dim": 32},
    "biogpt": _ATTENTION,
    "roberta": {**_ATTENTION, "max_position_embeddings": NUM_POSITIONS + 2, "is_decoder": True},
    "bart": {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32,
             "max_position_embeddings": NUM_POSITIONS},
    "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": NUM_POSITIONS},
    "xglm": {"d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 32,
             "max_position_embeddings": NUM_POSITIONS},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
    "falcon": {key: value for key, value in _ATTENTION.items() if key != "intermediate_size"},
    "llama": _ATTENTION,
    "gpt_neox": _ATTENTION,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
}  # fmt: skip
ENDLESS = {"xglm", "bloom", "falcon", "llama", "gpt_neox", "mamba"}


@pytest.mark.parametrize("kind", SHAPES)
def test_the_limit_is_the_longest_row_that_the_llm_computes(kind: str) -> None:
    config = AutoConfig.for_model(kind, vocab_size=32, bos_token_id=0, eos_token_id=2, pad_token_id=1, **SHAPES[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    limit = position_limit(model)
    assert limit == position_limit_of(config) == (None if kind in ENDLESS else NUM_POSITIONS)
    longest = torch.randn(1, limit or 3 * NUM_POSITIONS, 32)
    with torch.no_grad():
        assert model(inputs_embeds=longest, use_cache=False).logits.isfinite().all()
        too_long = torch.cat([longest, longest[:, :1]], 1)
        expects = contextlib.nullcontext() if limit is None else pytest.raises((IndexError, RuntimeError))
        with expects:
            model(inputs_embeds=too_long, use_cache=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_parts: Path) -> Path:
    """The settings of a stage 2 on a GPT-2 of 40 positions; four of the rows, and no others, are longer than that."""
    folder = tmp_path_factory.mktemp("positions")
    data = make_data(folder / "data")
    once = json.loads((data / "train.json").read_text())[:4]
    rows = [*once, *json.loads(json.dumps(once))]
    for number, row in enumerate(rows):
        row["id"] = f"row-{number}"
        row["conversations"] = row["conversations"][:2]
        row["conversations"][1]["value"] = "a red circle" if number % 2 == 0 else "a small circle " * 20
    (data / "train.json").write_text(json.dumps(rows))
    path = write_settings(folder / "run.yaml", tiny_parts, data, train=("projector", "language"))
    values = yaml.safe_load(path.read_text())
    parts = make_backbone_parts(folder / "parts", "gpt2", tiny_parts, n_positions=40)
    values["model"] = parts.model_dump(mode="json", exclude_none=True)
    values["optim"]["max_steps"] = 2
    path.write_text(yaml.safe_dump(values))
    return path


def test_rows_longer_than_the_llm_are_left_out_by_check_plan_and_training_alike(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "are more than the 40 positions of the LLM"
    note = "data.max_length_tokens = 512 is more than the 40 positions of the LLM"
    assert not check_data(run, [f"out={tmp_path / 'check'}"], as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert [(bad["row"], reason in bad["reason"]) for bad in report["train"]["bad"]] == [
        (n, True) for n in (1, 3, 5, 7)
    ]
    assert any(note in text for text in report["notes"])
    for judged_by in (build_stage, make_plan):
        with pytest.raises(ValueError, match=f"4 of 8 rows cannot be used.*(?s:.*){reason}"):
            judged_by(settings_of(run, tmp_path / "out"))
    with pytest.raises(ValueError, match=f"would leave out row-1: .*{reason}"):
        explain(run, [], sample="row-1")
    allowed = "data.max_bad_fraction=0.5"
    capsys.readouterr()
    assert make_plan(settings_of(run, tmp_path / "out", allowed)).longest == "4 x 16 tokens"
    told = capsys.readouterr()
    assert note in told.err
    assert told.out == ""  # which `--json` leaves to the plan
    out = train_in_process(run, tmp_path / "out", allowed)
    engine = Engine.load(out, device="cpu")
    assert engine.max_length_tokens == 40
    question = message("user", "what is it? " * 40, 0)
    with pytest.raises(ValueError, match=r"tokens long .* but this model takes 40"):
        engine.reply(Example("long", "", (question,), ()))


def test_streamed_rows_and_packed_ones_keep_within_the_positions(run: Path, tmp_path: Path) -> None:
    rows = json.loads(Path(settings_of(run, tmp_path).data.train[0].path).read_text())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = Path(settings_of(run, tmp_path).data.train[0].path).parent
    streamed = f"data.train=[{{path: {tmp_path / 'rows.jsonl'}, images: {images}, streaming: true}}]"
    for how in ((), ("data.packing=always",)):
        stage: Any = build_stage(settings_of(run, tmp_path / "out", streamed, "data.max_bad_fraction=0.5", *how))
        batch = stage.batch(list(stage.sampler(4).rank_items(0, 0, 1)))
        assert batch.input_ids.shape[1] <= 40
        assert batch.num_supervised > 0
