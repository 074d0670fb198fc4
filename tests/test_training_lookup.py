"""Where answers are read in descriptions, the loss that guides attention there, and the initialisation for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_language
from transformers import LlamaConfig, LlamaForCausalLM

from mmllm.batch import IMAGE_TOKEN
from mmllm.config import WarmupLanguageConfig
from mmllm.data.chat import OWN_TEMPLATE, Renderer
from mmllm.model.language import load_tokenizer
from mmllm.scenes.ask import QUESTION_TYPES
from mmllm.scenes.small_talk import TEXT_ONLY
from mmllm.scenes.talk import about_one, about_two, describe, sample_text, twin_of
from mmllm.scenes.world import sample_scene
from mmllm.training.lookup import MAX_PARTS, guide_bits, guided_attention_sum, init_for_lookup
from mmllm.training.warmup_language import WarmupLanguage, _row, answer_spans


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("lookup")
    make_language(folder)
    tokenizer = load_tokenizer(str(folder))
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return Renderer(tokenizer, OWN_TEMPLATE, image_token_id=image_id, num_image_tokens=1)


def clauses_of(row: Any, renderer: Renderer) -> dict[int, str]:
    """part -> the words of the tokens that are said to tell of it"""
    parts = {int(part) for part in row.told if part >= 0}
    return {part: renderer.decode(row.input_ids[row.told == part].tolist()) for part in parts}


@pytest.mark.parametrize("name", [name for name in QUESTION_TYPES if name != "caption"])
def test_an_answer_stands_in_the_clauses_it_is_said_to_be_read_from(renderer: Renderer, name: str) -> None:
    rng = random.Random(name)
    num_guided = 0
    while num_guided < 40:
        scene = sample_scene(rng, "train")
        turns = QUESTION_TYPES[name](scene, rng)
        if not turns or not turns[-1].about:
            continue
        num_guided += 1
        talk = about_one(scene, rng, 1)
        row = _row(renderer, type(talk)((scene,), tuple(turns)), rng, "x")
        clauses = clauses_of(row, renderer)
        assert sorted(clauses) == list(range(len(scene.parts)))
        for part, words in clauses.items():
            told = scene.parts[part]
            assert all(str(value) in words for key, value in vars(told).items() if key in ("color", "place", "value"))
        turn = turns[-1]
        read = " ".join(clauses[part] for group in turn.about for part in group)
        if turn.answer not in ("yes", "no") and name not in ("count", "compare", "relation"):
            assert turn.answer in read
        first, behind = answer_spans(row.is_answer.tolist())[-1]
        assert row.about[first - 1 : behind - 2].tolist() == [list(guide_bits(turn.about))] * (behind - 1 - first)
        assert not row.about[behind - 2].any(), "an answer's end is read nowhere"


def test_the_parts_of_a_second_scene_are_counted_on(renderer: Renderer) -> None:
    rng = random.Random(1)
    num_second = 0
    for _ in range(60):
        first = sample_scene(rng, "train", "objects")
        talk = about_two(first, twin_of(first, rng, "train"), rng, 4)
        row = _row(renderer, talk, rng, "x")
        clauses = clauses_of(row, renderer)
        assert len(clauses) == sum(len(scene.parts) for scene in talk.scenes) <= MAX_PARTS
        for turn in talk.turns:
            if turn.about:
                value = turn.question.removesuffix("?").removesuffix(" object").split()[-1]
                assert all(value in clauses[part] for part in turn.about[0])
                num_second += min(turn.about[0]) >= len(first.parts)
    assert num_second > 10


def test_without_pictures_nothing_is_read_anywhere(renderer: Renderer) -> None:
    rng = random.Random(2)
    talks = [sample_text(rng, "train", 6, retell=0.0) for _ in range(200)]
    talks = [talk for talk in talks if not talk.scenes and talk.turns]
    assert len(talks) > 2
    for talk in talks:
        row = _row(renderer, talk, rng, "x")
        assert set(row.types) == {TEXT_ONLY}
        assert not row.about.any()
        assert (row.told == -1).all()


def test_a_description_is_the_same_text_in_one_piece_and_in_clauses(renderer: Renderer) -> None:
    rng = random.Random(3)
    for _ in range(50):
        example, told = describe(about_one(sample_scene(rng, "train"), rng, 2), rng, "x")
        pieces = example.messages[0].parts
        assert len(told) == len(pieces)
        assert [i for piece in pieces for i in renderer.encode(str(piece))] == list(
            renderer.encode(example.messages[0].text)
        )


def test_guided_attention_is_zero_where_it_is_wanted_and_large_where_it_is_not() -> None:
    told = torch.tensor([[-1, 0, 0, 1, 1, -1]])
    nothing = torch.zeros(1, 6, dtype=torch.long)
    first, last = nothing.clone(), nothing.clone()
    first[0, 5], last[0, 5] = guide_bits(((0,), (1,)))
    attention = torch.zeros(1, 4, 6, 6)
    attention[0, :2, 5, 3], attention[0, :2, 5, 4] = 0.3, 0.7
    attention[0, 2:, 5, 1] = 1.0  # the other half of the heads is free
    assert guided_attention_sum(attention, told, last).item() == pytest.approx(0, abs=1e-6)
    assert guided_attention_sum(attention, told, nothing).item() == 0
    nowhere = -torch.tensor(1e-6).log().item()
    assert guided_attention_sum(attention, told, first).item() == pytest.approx(nowhere)
    attention[0, 1, 5] = torch.eye(6)[1]
    assert guided_attention_sum(attention, told, last).item() == pytest.approx(nowhere / 2)
    half = torch.zeros(1, 4, 6, 6)
    half[0, :, 5, 1] = half[0, :, 5, 4] = 0.5
    assert guided_attention_sum(half, told, first | last).item() == pytest.approx(-torch.tensor(0.5).log().item())


def test_after_the_initialisation_a_token_is_the_fading_mean_of_those_before_it_and_finds_its_like() -> None:
    torch.manual_seed(0)
    options = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(
        **options, vocab_size=64, attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 1000.0}
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    init_for_lookup(model)
    clause, other = torch.arange(8), torch.arange(20, 28)
    ids = torch.cat([clause, other, torch.arange(40, 60), clause])[None]
    first, second, _ = model(input_ids=ids, output_attentions=True).attentions
    row = first[0].mean(0)[-1]
    assert row[-6:].sum() > 3 * row[-18:-12].sum() > 9 * row[:6].sum()
    assert row[:6].sum() < 0.02
    looks = second[0].mean(0)[-1]
    assert looks[7] > 2 * looks[15], "the end of the clause with the same words, not the end of the other"


def test_a_small_warm_up_runs_with_the_guide_and_without(tmp_path: Path) -> None:
    tree = {
        "stage": "warmup_language", "out": str(tmp_path / "out"), "vocab_size": 300, "num_descriptions": 30,
        "num_val_descriptions": 10, "num_turns": 3,
        "language": {
            "model_type": "llama", "attention": "eager", "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "attention_bias": True,
        },
        "optim": {"learning_rates": {"language": 1e-3}, "max_steps": 2, "batch_size": 4},
    }  # fmt: skip
    stage = WarmupLanguage(WarmupLanguageConfig.model_validate(tree))
    batch = stage.batch([0, 1, 2, 3])
    assert batch.about is not None
    assert batch.about.any()
    guided = stage.module(batch).item()
    stage.module.guide_weight = 0.0
    plain = stage.module(batch).item()
    assert guided > plain + 1
    assert 0 <= stage.validate(1)["exact"] <= 1
