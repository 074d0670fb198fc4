"""Where answers are read in descriptions, the loss that guides attention there, and the initialisation for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from mmllm.batch import IMAGE_TOKEN
from mmllm.chat.renderer import OWN_TEMPLATE, Renderer
from mmllm.config import ConfigError, WarmupLanguageConfig
from mmllm.model.language import load_tokenizer
from mmllm.scenes.conversations import about_one, about_two, describe_conversation, sample_text, sample_twin
from mmllm.scenes.questions import QUESTION_TYPES, About
from mmllm.scenes.small_talk import TEXT_ONLY
from mmllm.scenes.world import Split, sample_scene
from mmllm.warmup.attention_guidance import (
    MAX_PARTS,
    LookupBatch,
    ReadOut,
    guide_bits,
    guided_attention_sum,
    init_for_lookup,
)
from mmllm.warmup.language import WarmupLanguage, _render_chunk, _row, answer_spans
from tests.builders.tiny import make_language


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("lookup")
    make_language(folder)
    tokenizer = load_tokenizer(str(folder))
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return Renderer(tokenizer, OWN_TEMPLATE, image_token_id=image_id, num_image_tokens=1)


def clauses_of(row: Any, renderer: Renderer) -> dict[int, str]:
    """part -> the words of the tokens that are said to tell of it"""
    parts = {int(part) for part in row.part_of if part >= 0}
    return {part: renderer.decode(row.input_ids[row.part_of == part].tolist()) for part in parts}


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
            facts = vars(scene.parts[part])
            assert all(str(value) in words for key, value in facts.items() if key in ("color", "place", "value"))
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
        talk = about_two(first, sample_twin(first, rng, "train"), rng, 4)
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
        assert (row.part_of == -1).all()


def test_a_description_is_the_same_text_in_one_piece_and_in_clauses(renderer: Renderer) -> None:
    rng = random.Random(3)
    for _ in range(50):
        example, part_of = describe_conversation(about_one(sample_scene(rng, "train"), rng, 2), rng, "x")
        pieces = example.messages[0].parts
        assert len(part_of) == len(pieces)
        encode = renderer.tokenizer.encode
        ids = [number for piece in pieces for number in encode(str(piece), add_special_tokens=False)]
        assert ids == encode(example.messages[0].text, add_special_tokens=False)


def lookup_batch(
    part_of: list[int], *, about: About = (), named: int = -1, compared: tuple[int, int] | None = None
) -> LookupBatch:
    """One row whose last token is read as said."""
    size = len(part_of)
    bits, places = torch.zeros(1, size, 2, dtype=torch.long), torch.full((1, size), -1)
    bits[0, -1], places[0, -1] = torch.tensor(guide_bits(about)), named
    pair = torch.full_like(bits, -1)
    if compared:
        pair[0, -1] = torch.tensor(compared)
    ids = torch.zeros(1, size, dtype=torch.long)
    return LookupBatch(
        ids, ids, ids, example_ids=["x"], part_of=torch.tensor([part_of]), about=bits, named=places, compared=pair
    )


def test_guided_attention_is_zero_where_it_is_wanted_and_large_where_it_is_not() -> None:
    part_of = [-1, 0, 0, 1, 1, -1]
    two = lookup_batch(part_of, about=((0,), (1,)))
    attention = torch.zeros(1, 2, 6, 6)
    attention[0, :, 5, 3], attention[0, :, 5, 4] = 0.3, 0.7
    assert guided_attention_sum(attention, two, "last").item() == pytest.approx(0, abs=1e-6)
    assert guided_attention_sum(attention, lookup_batch(part_of), "last").item() == 0
    nowhere = -torch.tensor(1e-6).log().item()
    assert guided_attention_sum(attention, two, "first").item() == pytest.approx(nowhere)
    attention[0, 1, 5] = torch.eye(6)[1]
    assert guided_attention_sum(attention, two, "last").item() == pytest.approx(nowhere / 2)
    half = torch.zeros(1, 4, 6, 6)
    half[0, :, 5, 1] = half[0, :, 5, 4] = 0.5
    both = lookup_batch(part_of, about=((0, 1),))
    assert guided_attention_sum(half, both, "last").item() == pytest.approx(-torch.tensor(0.5).log().item())


def test_attention_is_guided_to_the_place_where_the_question_names_the_answer() -> None:
    attention = torch.zeros(1, 2, 4, 4)
    attention[0, 0, 3, 1], attention[0, 1, 3, 1] = 1.0, 0.25
    part_of = [-1] * 4
    quarter = -torch.tensor(0.25).log().item()
    assert guided_attention_sum(attention, lookup_batch(part_of, named=1), "named").item() == pytest.approx(quarter / 2)
    assert guided_attention_sum(attention, lookup_batch(part_of), "named").item() == 0


def test_both_values_of_a_comparison_are_read_out_behind_the_layer() -> None:
    read_out = ReadOut(1, 4, 4)
    for which, head in enumerate(read_out.heads):
        head.weight.data = 20 * torch.eye(4).roll(which, 0)  # of unit k, the first head says k and the second k + 1
        head.bias.data.zero_()
    states = [torch.zeros(1, 3, 4) for _ in range(4)]
    states[2][0, 2, 1] = 0.5
    assert read_out(states, lookup_batch([-1] * 3, compared=(1, 2))).item() == pytest.approx(0, abs=1e-5)
    assert read_out(states, lookup_batch([-1] * 3, compared=(2, 2))).item() == pytest.approx(40, rel=1e-3)
    assert read_out(states, lookup_batch([-1] * 3)).item() == 0


def test_the_values_that_are_compared_stand_at_the_start_of_the_answer(renderer: Renderer) -> None:
    rng = random.Random(5)
    seen = set()
    for _ in range(150):
        scene = sample_scene(rng, "train")
        talk = about_one(scene, rng, 6, ("compare", "color", "relation", "exists"))
        row = _row(renderer, talk, rng, "x")
        for (first, _), turn in zip(answer_spans(row.is_answer.tolist()), talk.turns, strict=True):
            values = row.compared[first - 1]
            if turn.type != "compare":
                assert turn.compared is None
                assert (values == -1).all()
                continue
            assert turn.compared
            spelled = tuple(renderer.decode([token]).strip() for token in values.tolist())
            assert all(value.startswith(start) for value, start in zip(turn.compared, spelled, strict=True))
            if " the same " in turn.question:
                assert (turn.compared[0] == turn.compared[1]) == (turn.answer == "yes")
            elif " more " in turn.question:
                assert (int(turn.compared[0]) > int(turn.compared[1])) == (turn.answer == "yes")
            seen.add(turn.question.split()[0])
    assert seen == {"are", "is", "which"}


def test_an_answer_that_its_question_names_is_found_there_token_by_token(renderer: Renderer) -> None:
    rng = random.Random(4)
    num_named = 0
    while num_named < 60:
        talk = about_one(sample_scene(rng, "train", "objects"), rng, 12, ("compare", "size"))
        row = _row(renderer, talk, rng, "x")
        for (first, behind), turn in zip(answer_spans(row.is_answer.tolist()), talk.turns, strict=True):
            places = row.named[first - 1 : behind - 1]
            if not turn.question.startswith("which is"):
                assert (places == -1).all()
                continue
            num_named += 1
            assert places[-1] == -1, "an answer's end is named nowhere"
            assert row.input_ids[places[:-1]].tolist() == row.input_ids[first : behind - 1].tolist()
            question = renderer.decode(row.input_ids[:first].tolist()).rindex(turn.question)
            assert len(renderer.decode(row.input_ids[: places[0]].tolist())) > question
            assert renderer.decode(row.input_ids[: places[0]].tolist()).endswith(" the")


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


SMALL = {
    "model_type": "llama", "attention": "eager", "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "attention_bias": True,
}  # fmt: skip


def small_config(out: Path, **settings: Any) -> WarmupLanguageConfig:
    tree = {
        "stage": "warmup_language", "out": str(out), "vocab_size": 300, "num_descriptions": 30,
        "num_val_descriptions": 10, "num_turns": 3, "language": SMALL,
        "optim": {"learning_rates": {"language": 1e-3}, "max_steps": 2},
        "compute": {"batch_size": 4},
    }  # fmt: skip
    return WarmupLanguageConfig.model_validate(tree | settings)


def test_a_small_warm_up_runs_with_the_guide_and_without(tmp_path: Path) -> None:
    guides = [{"layer": 1, "heads": [0], "reads": "last"}, {"layer": 2, "heads": [0, 1], "reads": "named"}]
    optim = {"learning_rates": {"language": 1e-3, "read_out": 1e-3}, "max_steps": 2}
    settings = {"guides": guides, "ask_more": {"compare": 4}, "read_out": 1, "optim": optim}
    stage = WarmupLanguage(small_config(tmp_path / "out", **settings))
    batch = stage.batch([0, 1, 2, 3])
    assert batch.about is not None
    assert batch.about.any()
    guided = stage.module(batch).item()
    stage.module.guide_weight = 0.0
    plain = stage.module(batch).item()
    assert guided > plain + 1
    assert stage.can_train("language", batch)
    assert stage.can_train("read_out", batch) == bool((batch.compared >= 0).any())
    stage.save(tmp_path / "out", [{"exact": 0.5}])
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("read_out" in name for name in saved), "what is for training alone is not saved"
    assert 0 <= stage.validate(1)["exact"] <= 1


def test_a_warm_up_goes_on_from_a_trained_model_and_its_tokenizer(tmp_path: Path) -> None:
    first = WarmupLanguage(small_config(tmp_path / "first"))
    first.save(tmp_path / "first", [{"exact": 0.5}])
    source = {"source": str(tmp_path / "first"), "attention": "eager"}
    second = WarmupLanguage(small_config(tmp_path / "second", language=source, vocab_size=400, seed=7))
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert load_tokenizer(str(tmp_path / "second")).get_vocab() == first.tokenizer.get_vocab()
    ours, theirs = second.model.state_dict(), first.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, theirs[name].to(torch.bfloat16).float()), "saved in bf16, and left as it was"


def test_a_new_tokenizer_keeps_what_the_model_knows_of_old_tokens(tmp_path: Path) -> None:
    first = WarmupLanguage(small_config(tmp_path / "first"))
    first.save(tmp_path / "first", [{"exact": 0.5}])
    source = {"source": str(tmp_path / "first"), "attention": "eager"}
    second = WarmupLanguage(small_config(tmp_path / "second", language=source, new_vocab_size=500, reworded=0.5))
    assert len(first.tokenizer) == 300
    assert len(second.tokenizer) == second.model.config.vocab_size == 500
    old, new = first.tokenizer.get_vocab(), second.tokenizer.get_vocab()
    shared = sorted(set(old) & set(new))
    assert {"<|pad|>", "<|end|>", "e", "Ġ"} <= set(shared)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(stage.model, name)().weight.to(torch.bfloat16) for stage in (first, second))
        for token in shared:
            assert torch.equal(after[new[token]], before[old[token]])
        # whole words: a tokenizer puts a space before every text, so the pieces of "ing" would be those of " ing"
        words = [token for token in new if token not in old and token.startswith("Ġ") and token[1:].isalpha()]
        assert any(len(word) > 3 for word in words)
        for word in words:
            pieces = first.tokenizer.encode(word.replace("Ġ", " "), add_special_tokens=False)
            assert len(pieces) > 1
            assert torch.allclose(after[new[word]].float(), before[pieces].float().mean(0), atol=0.01)
    assert 0 <= second.validate(1)["reworded"] <= 1


def test_what_is_to_be_asked_more_often_is(renderer: Renderer, tmp_path: Path) -> None:
    renderer.tokenizer.save_pretrained(tmp_path)

    def num_counts(split: Split, **settings: Any) -> int:
        rows = _render_chunk(str(tmp_path), small_config(tmp_path, **settings), split, range(200))
        return [name for row in rows for name in row.types].count("count")

    assert num_counts("train", ask_more={"count": 20}) > 3 * num_counts("train")
    assert num_counts("val", ask_more={"count": 20}) == num_counts("val"), "what is judged by stays"
    with pytest.raises(ConfigError, match="ask_more: sums is not a question type; allowed: color, shape"):
        WarmupLanguage(small_config(tmp_path, ask_more={"sums": 2}))
