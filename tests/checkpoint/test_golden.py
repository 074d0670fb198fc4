"""Golden answers: a model that has changed since it was saved is found, and what has changed is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mmllm.chat.conversation import Conversation
from mmllm.checkpoint import golden
from mmllm.checkpoint.folder import CheckpointError, load_checkpoint, save_checkpoint, write_manifest
from mmllm.checkpoint.golden import GOLDEN, Check, make_golden, precision_of, read_golden, verify_golden
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from tests.builders.findings import examine, states
from tests.builders.tiny_runs import train_in_process

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def checks_of(folder: Path) -> dict[str, Check]:
    model, processor, _ = load_checkpoint(folder)
    return {check.part: check for check in verify_golden(model, processor, folder)}


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def flip_a_weight(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(key for key in tensors if key.startswith("projector.") and key.endswith("weight"))
    values = tensors[name].flatten()
    values[values.abs().argmax()] *= -1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_the_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("|>{{ m", "|>: {{ m").replace("<|assistant|>", "<|assistant|>: "))


def shift_the_mean(folder: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["image_processor"]["image_mean"] = [0.48, 0.46, 0.41]

    edit_json(folder / "processor_config.json", change)


def swap_two_tokens(folder: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        vocabulary = tree["model"]["vocab"]
        vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]

    edit_json(folder / "tokenizer.json", change)


def crop_and_not_stretch(folder: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["image_processor"].update(size={"shortest_edge": 32}, do_center_crop=True)

    edit_json(folder / "processor_config.json", change)


def another_size(folder: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        tree["image_processor"]["size"] = {"height": 40, "width": 40}

    edit_json(folder / "processor_config.json", change)


CHANGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a weight": (flip_a_weight, "answers", "weights, precision, or the code that runs them changed"),
    "the chat template": (change_the_template, "prompts", "tokenizer or chat template changed"),
    "image_mean": (shift_the_mean, "pictures", "image transform (size, crop, mean, std) changed"),
    "cropping": (crop_and_not_stretch, "pictures", "image transform (size, crop, mean, std) changed"),
    "the size": (another_size, "pictures", "is [1, 3, 40, 40] and was [1, 3, 32, 32]"),
    "two tokens": (swap_two_tokens, "prompts", "the tokenizer has other tokens, or other ids for them"),
}


def test_an_unchanged_model_gives_its_golden_answers(tiny_checkpoint: Path) -> None:
    found = read_golden(tiny_checkpoint)
    assert found is not None
    assert [(answer.name, len(answer.pictures)) for answer in found.answers] == [
        ("one picture", 1), ("two pictures", 2), ("text only", 0)
    ]  # fmt: skip
    assert all(1 <= len(answer.token_ids) == len(answer.logprobs) <= golden.NUM_TOKENS for answer in found.answers)
    checks = checks_of(tiny_checkpoint)
    assert all(check.holds for check in checks.values())
    assert "3 prompts are the same" in checks["prompts"].text
    assert "in float32, within " in checks["answers"].text


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_found_and_named(copy: Path, change: str) -> None:
    apply, part, text = CHANGES[change]
    apply(copy)
    facts = {"origin": {}}
    write_manifest(copy, **facts)  # one that vouches for the change, so that no hash tells it
    check = checks_of(copy)[part]
    assert not check.holds
    assert text in check.text
    if part != "pictures":  # a tower that sees something else also answers something else
        assert [name for name, other in checks_of(copy).items() if not other.holds] == [part]
    with pytest.raises(
        CheckpointError, match=rf"{copy} does not give its golden answers any more:\n  {part}: "
    ) as told:
        Engine.load(copy, device="cpu")
    assert f"mmllm doctor {copy}" in str(told.value)
    status, findings = examine(copy)
    assert status == 1
    assert states(findings, "model")["files"] == "ok"
    assert states(findings, "model")[f"golden {part}"] == "broken"
    assert text in findings["model", f"golden {part}"]["text"]


def test_a_run_does_not_start_from_a_model_that_has_changed(tiny_runs: Path, copy: Path, tmp_path: Path) -> None:
    flip_a_weight(copy)
    settings = yaml.safe_load((tiny_runs / "stage2.yaml").read_text())
    path = tmp_path / "stage2.yaml"
    path.write_text(yaml.safe_dump({**settings, "model": {"checkpoint": str(copy)}}))
    with pytest.raises(CheckpointError, match="does not give its golden answers any more"):
        train_in_process(path, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lower_precision_is_within_its_own_tolerance(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    model, processor, _ = load_checkpoint(tiny_checkpoint)
    model.to(dtype)
    assert [check.holds for check in verify_golden(model, processor, tiny_checkpoint)] == [True] * 3
    model.to(torch.float32)  # rounded once, and not what was saved any more
    [_, _, answers] = verify_golden(model, processor, tiny_checkpoint)
    assert not answers.holds
    assert "(allowed in float32: 0.001)" in answers.text


def test_weights_that_are_no_numbers_give_no_golden_answer(tiny_checkpoint: Path) -> None:
    model, processor, _ = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        next(model.language_model.parameters()).fill_(float("nan"))
    assert not verify_golden(model, processor, tiny_checkpoint)[2].holds


def test_a_quantised_model_is_held_to_the_tolerance_of_quantised_ones(tiny_checkpoint: Path) -> None:
    model, _, _ = load_checkpoint(tiny_checkpoint)
    assert precision_of(model) == "float32"
    model.language_model.config.quantization_config = {"quant_method": "torchao"}
    assert precision_of(model) == "quantised"


def test_loading_a_large_model_on_a_cpu_leaves_the_answers_to_the_doctor(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_a_weight(copy)
    monkeypatch.setattr(golden, "CHEAP_PARAMETERS", 1000)
    Engine.load(copy, device="cpu")
    assert states(examine(copy)[1], "model")["golden answers"] == "broken"
    shift_the_mean(copy)
    with pytest.raises(CheckpointError, match="  pictures: "):
        Engine.load(copy, device="cpu")


def test_a_prompt_that_the_model_cannot_be_given_is_left_out(tiny_checkpoint: Path) -> None:
    found = read_golden(tiny_checkpoint)
    assert found is not None
    model, processor, _ = load_checkpoint(tiny_checkpoint)
    processor.template = "plain"  # of words nothing is left
    files = make_golden(model, processor)
    assert [answer["name"] for answer in json.loads(files[GOLDEN])["answers"]] == ["one picture", "two pictures"]
    model, processor, _ = load_checkpoint(tiny_checkpoint)
    num_tokens = max(len(answer.prompt_ids) for answer in found.answers)
    model.config.text_config.max_position_embeddings = num_tokens + golden.NUM_TOKENS - 1
    files = make_golden(model, processor)
    assert [answer["name"] for answer in json.loads(files[GOLDEN])["answers"]] == ["one picture", "text only"]


def test_a_template_that_is_given_to_other_programs_alone_is_checked_too(tiny_runs: Path, tmp_path: Path) -> None:
    out = train_in_process(tiny_runs / "stage1.yaml", tmp_path / "out", "model.template=plain", "optim.max_steps=1")
    assert all(check.holds for check in checks_of(out).values())
    path = out / "chat_template.jinja"  # our own renderer takes `plain` by its name
    path.write_text(path.read_text() + "!")
    check = checks_of(out)["prompts"]
    assert not check.holds
    assert "chat_template.jinja renders '<image><image>!'" in check.text.replace("<image>\\n", "<image>")


def test_damaged_golden_answers_are_told(copy: Path) -> None:
    (copy / GOLDEN).write_text('{"vocabulary": 1}')
    with pytest.raises(CheckpointError, match=r"golden.json is damaged at vocabulary: .*; copy the folder again"):
        Engine.load(copy, device="cpu")
    assert states(examine(copy)[1], "model")["golden answers"] == "broken"
    shutil.copy(Path(golden.__file__), copy / "golden" / "picture_1.png")
    (copy / GOLDEN).unlink()
    assert "lacks golden.json" in examine(copy)[1]["model", "manifest"]["text"]


def test_a_checkpoint_saved_without_them_loads(copy: Path) -> None:
    model, processor, _ = load_checkpoint(copy)
    save_checkpoint(copy, model, processor, card="")
    assert verify_golden(model, processor, copy) == []
    Engine.load(copy, device="cpu")


def test_an_answer_never_holds_the_token_that_stands_for_a_picture(tiny_checkpoint: Path) -> None:
    model, processor, _ = load_checkpoint(tiny_checkpoint)
    favoured = torch.nn.Linear(32, model.language_model.config.vocab_size)
    favoured.load_state_dict({"weight": model.language_model.lm_head.weight, "bias": torch.zeros_like(favoured.bias)})
    with torch.no_grad():
        favoured.bias[processor.image_token_id] = 1e4
    model.language_model.lm_head = favoured
    engine = Engine(model, processor, name="favours <image>")
    answers = json.loads(make_golden(engine.model, engine.processor)[GOLDEN])["answers"]
    assert [answer["text"] for answer in answers] == [
        answer.text for answer in (read_golden(tiny_checkpoint) or pytest.fail("none")).answers
    ]
    reply = engine.reply(Conversation().ask(answers[2]["question"]), Sampling(max_new_tokens=golden.NUM_TOKENS))
    assert reply.text == answers[2]["text"]
