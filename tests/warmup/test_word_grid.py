"""Grids of words in place of pictures: what a cell holds, and that a small LM learns from them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmllm.batch import IMAGE_TOKEN
from mmllm.config import WarmupLanguageConfig
from mmllm.model.language import load_tokenizer
from mmllm.scenes.world import COLORS, Bar, Line, Scene, Thing, sample_scene
from mmllm.warmup.language import WarmupLanguage, embed
from mmllm.warmup.regions import boxes_of
from mmllm.warmup.vocabulary import unused_tokens
from mmllm.warmup.word_grid import MAX_WORDS, NUM_CELLS, SIDE, grid_tokens, word_grid

WEIGHTS = Path(__file__).resolve().parents[2] / "weights" / "tiny-language"
TOKENIZER = load_tokenizer(str(WEIGHTS))


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


def cells_with(tokens: list[int], scene: Scene, seed: int) -> set[tuple[int, int]]:
    """(row, column) of the cells that hold one of the tokens."""
    ids, weights = word_grid(scene, random.Random(seed), ids_of, len(TOKENIZER))
    found = np.isin(ids, tokens) & (weights > 0)
    return {divmod(int(cell), SIDE) for cell in np.nonzero(found.any(1))[0]}


def test_every_fact_of_a_scene_is_in_a_cell_of_its_part() -> None:
    rng = random.Random(0)
    for number in range(60):
        scene = sample_scene(rng, "train")
        ids, weights = word_grid(scene, random.Random(number), ids_of, len(TOKENIZER))
        assert ids.shape == weights.shape == (NUM_CELLS, MAX_WORDS)
        assert ((weights.sum(1) > 0.49) & (weights.sum(1) < 1.11)).all()
        for part, (left, top, right, bottom) in zip(scene.parts, boxes_of(scene), strict=True):
            values = [v for k, v in vars(part).items() if k in ("color", "shape", "size", "text", "value", "kind")]
            for token in [token for value in values for token in ids_of(f" {value}")]:
                rows, columns = np.divmod(np.nonzero(((ids == token) & (weights > 0)).any(1))[0], SIDE)
                inside = (rows + 1 > SIDE * top) & (rows < SIDE * bottom)
                assert (inside & (columns + 1 > SIDE * left) & (columns < SIDE * right)).any(), (part, token)


def test_a_thing_is_where_its_place_is_and_a_bar_above_its_color() -> None:
    scene = Scene("objects", things=(Thing("star", "red", "small", "bottom left"),))
    chart = Scene("chart", bars=(Bar("red", 5), Bar("blue", 2), Bar("green", 1), Bar("black", 3)))
    for seed in range(30):
        assert any(row >= 2 and column <= 1 for row, column in cells_with(ids_of(" star"), scene, seed))
        for index, bar in enumerate(chart.bars):
            assert any(column == index for _, column in cells_with(ids_of(f" {bar.color}"), chart, seed))


def test_thirty_seven_is_not_seventy_three() -> None:
    scene = Scene("text", lines=(Line("number", "37", "blue"),))
    three, seven = ids_of(" 37")
    for seed in range(30):
        assert any(column <= 1 for _, column in cells_with([three], scene, seed))
        assert any(column >= 2 for _, column in cells_with([seven], scene, seed))


def test_the_same_seed_gives_the_same_grid() -> None:
    scene = sample_scene(random.Random(1), "train")
    first, second, other = (word_grid(scene, random.Random(seed), ids_of, 500) for seed in (3, 3, 4))
    assert all((ours == theirs).all() for ours, theirs in zip(first, second, strict=True))
    assert (first[0] != other[0]).any()


def test_a_token_is_the_mixture_of_its_words_with_the_norm_of_its_weights() -> None:
    embeddings = torch.eye(4) * 3
    ids, weights = torch.tensor([[0, 2, 0]]), torch.tensor([[0.3, 0.4, 0.0]])
    token = grid_tokens(embeddings, ids, weights)
    torch.testing.assert_close(token, torch.tensor([[0.6, 0.0, 0.8, 0.0]]) * 0.7 * 3)


@pytest.fixture(scope="module")
def warmup(tmp_path_factory: pytest.TempPathFactory) -> WarmupLanguage:
    values = {
        "stage": "warmup_language", "out": str(tmp_path_factory.mktemp("grids")), "num_descriptions": 40,
        "num_val_descriptions": 6, "num_turns": 3, "seen": 0.7, "guide_weight": 0.0,
        "language": {"source": str(WEIGHTS)}, "optim": {"learning_rates": {"language": 1e-3}, "max_steps": 1},
        "compute": {"batch_size": 4},
    }  # fmt: skip
    return WarmupLanguage(WarmupLanguageConfig.model_validate(values))


def test_image_tokens_and_nothing_else_become_the_cells_in_their_order(warmup: WarmupLanguage) -> None:
    batch = warmup.batch(range(12))
    is_image = batch.input_ids == warmup.image_token_id
    assert TOKENIZER.convert_tokens_to_ids(IMAGE_TOKEN) == warmup.image_token_id
    assert batch.grid_ids is not None
    assert batch.grid_weights is not None
    assert 0 < len(batch.grid_ids) == int(is_image.sum())
    assert (is_image.sum(1) % NUM_CELLS == 0).all()
    layer: nn.Embedding = warmup.model.get_input_embeddings()
    embeds = embed(warmup.model, batch, warmup.image_token_id)
    torch.testing.assert_close(embeds[~is_image], layer(batch.input_ids[~is_image]))
    torch.testing.assert_close(embeds[is_image], grid_tokens(layer.weight, batch.grid_ids, batch.grid_weights))


def test_a_step_on_grids_trains_and_validation_says_how_well_they_are_read(warmup: WarmupLanguage) -> None:
    loss = warmup.loss(warmup.module, warmup.batch(range(8))).total
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in warmup.model.parameters())
    metrics = warmup.validate(0)
    assert 0 <= metrics["seen"] <= 1
    assert {"exact", "seen"} & {name.split("_")[0] for name in metrics} == {"exact", "seen"}


def test_renamed_colors_keep_everything_else_and_no_text_has_their_names(
    tmp_path: Path, warmup: WarmupLanguage
) -> None:
    rows = [
        WarmupLanguage(warmup.config.model_copy(update={"out": str(tmp_path), "renamed": share})).rows
        for share in (0.0, 1.0)
    ]
    colors, names = [ids_of(f" {color}")[0] for color in COLORS], unused_tokens(TOKENIZER)
    assert len(set(names)) == 26
    assert not set(names) & set(ids_of("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    changed = 0
    for plain, renamed in zip(*rows, strict=True):
        mapping: dict[int, int] = {}
        assert not np.isin(plain.input_ids, names).any()
        befores, afters = ([row.input_ids, *(ids for ids, _ in row.grids)] for row in (plain, renamed))
        for before, after in zip(befores, afters, strict=True):
            for old, new in zip(before.ravel().tolist(), after.ravel().tolist(), strict=True):
                assert mapping.setdefault(old, new) == new, "the same name in texts and grids"
                assert (old in colors) == (new != old)
        given = [new for old, new in mapping.items() if old != new]
        assert set(given) <= set(names)
        assert len(set(given)) == len(given), "no two colors share a name"
        changed += len(given)
        assert (plain.is_answer == renamed.is_answer).all()
        assert plain.types == renamed.types
    assert changed > 50


def test_without_grids_nothing_is_an_image_token(tmp_path: Path, warmup: WarmupLanguage) -> None:
    config = warmup.config.model_copy(update={"out": str(tmp_path), "seen": 0.0})
    rows = WarmupLanguage(config).rows
    assert all((row.input_ids != warmup.image_token_id).all() and row.grids == () for row in rows)
