"""LLaVA-1.5's recipe on a real SentencePiece tokenizer, from `tokenizer.model` to transformers' pipeline and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline
from typer.testing import CliRunner

from mmllm.batch import IMAGE_TOKEN, Example, message
from mmllm.cli import app
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from tests.builders.llava_parts import SIDE_PX, make_encoder
from tests.builders.real_parts import sentencepiece_folder

QUESTION, ANSWER = "What color is the circle?", "Two red circles"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def run(*arguments: object) -> None:
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, two steps each, by the public command: `plain` first and then `vicuna_v1`."""
    folder = tmp_path_factory.mktemp("llava")
    make_encoder("clip", folder / "encoder")
    sentencepiece_folder("mistral v1", folder / "llm")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32000, max_position_embeddings=512, initializer_range=0.3))
    model.save_pretrained(folder / "llm")
    rows = []
    for number in range(4):
        Image.new("RGB", (SIDE_PX, 20), (60 * number, 90, 20)).save(folder / f"{number}.png")
        spoken = [("human", f"{IMAGE_TOKEN}\n{QUESTION}"), ("gpt", ANSWER), ("human", "Sure?"), ("gpt", "Yes, 3.")]
        turns = [{"from": who, "value": text} for who, text in spoken]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    settings = {
        "stage": "stage1",
        "out": str(folder / "stage1"),
        "model": {
            "vision": {"source": f"transformers:{folder}/encoder", "feature_layer": -2, "image_mode": "pad"},
            "projector": {"kind": "mlp"},
            "language": {"source": str(folder / "llm")},
            "template": "plain",
            "picture_label": "",
        },
        "data": {"train": [{"path": str(folder / "rows.json")}], "max_length_tokens": 512},
        "train": ["projector"],
        "optim": {"learning_rates": {"projector": 0.01}, "max_steps": 2},
        "compute": {"batch_size": 2},
        "validation": {"num_samples": 0},
        "log": {"every_steps": 1},
    }
    (folder / "stage1.yaml").write_text(yaml.safe_dump(settings))
    second = {**settings, "stage": "stage2", "out": str(folder / "stage2"), "train": ["projector", "language"]}
    second["model"] = {"checkpoint": str(folder / "stage1"), "template": "vicuna_v1"}
    second["optim"] = {**settings["optim"], "learning_rates": {"projector": 0.01, "language": 0.01}}  # type: ignore[dict-item]
    (folder / "stage2.yaml").write_text(yaml.safe_dump(second))
    run("train", folder / "stage1.yaml")
    run("train", folder / "stage2.yaml")
    run("export", "hf", folder / "stage2", folder / "hf")
    return folder


def test_a_prompt_is_that_of_llava_and_the_beginning_of_what_was_trained(folder: Path) -> None:
    words = AutoTokenizer.from_pretrained(sentencepiece_folder("mistral v1", folder / "words"))
    renderer = Engine.load(folder / "stage2", device="cpu").renderer
    asked = f"{VICUNA} USER: {QUESTION} ASSISTANT:"
    prompt = [words.bos_token_id, *words.encode(asked, add_special_tokens=False)]
    whole = [words.bos_token_id, *words.encode(f"{asked} {ANSWER}", add_special_tokens=False), words.eos_token_id]
    assert whole[: len(prompt)] == prompt
    assert renderer.render([message("user", QUESTION)]).input_ids == prompt
    rendered = renderer.render([message("user", QUESTION), message("assistant", ANSWER)])
    assert rendered.input_ids == whole
    assert rendered.is_answer == [False] * len(prompt) + [True] * (len(whole) - len(prompt))


def test_transformers_pipeline_gives_the_same_ids_and_answers(folder: Path) -> None:
    engine = Engine.load(folder / "stage2", device="cpu")
    picture = folder / "1.png"
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "url": str(picture)}, {"type": "text", "text": QUESTION}],
        }
    ]
    theirs = AutoProcessor.from_pretrained(folder / "hf").apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    example = Example("x", "", (message("user", f"{IMAGE_TOKEN}\n{QUESTION}"),), (str(picture),))
    assert list(theirs) == engine.renderer.render_example(example).input_ids
    answer = pipeline("image-text-to-text", str(folder / "hf"))(text=chat, max_new_tokens=8, do_sample=False)
    ours = engine.reply(example, Sampling(max_new_tokens=8)).text
    assert answer[0]["generated_text"][-1]["content"].strip() == ours


def test_what_was_exported_is_imported_without_a_word_about_its_template(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["import", str(folder / "hf"), str(tmp_path / "back")])
    assert result.exit_code == 0, result.output
    assert "4 prompts of its own processor match ours, token by token" in result.output
    example = Example("x", "", (message("user", f"{IMAGE_TOKEN}\n{QUESTION}"),), (str(folder / "2.png"),))
    before, after = (Engine.load(path, device="cpu") for path in (folder / "stage2", tmp_path / "back"))
    assert after.renderer.render_example(example).input_ids == before.renderer.render_example(example).input_ids
    assert (
        after.reply(example, Sampling(max_new_tokens=8)).text == before.reply(example, Sampling(max_new_tokens=8)).text
    )
