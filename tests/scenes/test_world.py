"""The scenes world: a scene's split follows from what it shows, and nothing held out is ever trained on."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import fields

import pytest

from mmllm.scenes.conversations import sample_twin
from mmllm.scenes.world import (
    COLORS,
    MAX_NUMBER,
    MAX_VALUE,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    WORDS,
    Bar,
    Line,
    Scene,
    Thing,
    change_one_attribute,
    is_held_out,
    near_miss,
    sample_any_scene,
    sample_scene,
    split_of,
)

KINDS = ("objects", "text", "chart")
Part = Thing | Line | Bar


def parts(scene: Scene) -> list[Part]:
    return [*scene.things, *scene.lines, *scene.bars]


def some_scenes(num: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_any_scene(rng) for _ in range(num)]


def num_differences(one: Scene, other: Scene) -> int:
    """In how many attributes of how many parts two scenes of one kind differ; a part too many counts as all."""
    gone, new = list(parts(one)), list(parts(other))
    for part in parts(one):
        if part in new:
            gone.remove(part)
            new.remove(part)
    if len(gone) != len(new):
        return 99
    pairs = zip(gone, new, strict=True)
    return sum(getattr(x, field.name) != getattr(y, field.name) for x, y in pairs for field in fields(x))


@pytest.mark.parametrize("split", SPLITS)
def test_a_sampled_scene_belongs_to_its_split(split):
    rng = random.Random(split)
    for kind in (*KINDS, None) * 15:
        scene = sample_scene(rng, split, kind)
        assert split_of(scene) == split
        assert kind in (None, scene.kind)
        assert any(map(is_held_out, parts(scene))) == (split == "compositions")


def test_splits_share_no_scene_however_a_scene_comes_about():
    found: dict[str, set[Scene]] = {split: set() for split in SPLITS}
    for seed, split in enumerate(SPLITS):
        rng = random.Random(seed)
        for _ in range(150):
            scene = sample_scene(rng, split)
            found[split].add(scene)
            found[split].add(near_miss(scene, rng, split))
            if scene.kind == "objects":
                found[split].add(sample_twin(scene, rng, split))
    assert not found["train"] & found["val"]
    assert not (found["train"] | found["val"]) & found["compositions"]
    assert not any(is_held_out(part) for scene in found["train"] | found["val"] for part in parts(scene))


def test_the_split_does_not_change_when_a_scene_is_written_and_read():
    for scene in some_scenes(200):
        again = Scene.from_json(json.loads(json.dumps(scene.to_json())))
        assert again == scene
        assert split_of(again) == split_of(scene)


def test_some_combinations_are_held_out_and_every_attribute_is_still_trained_on():
    things = [Thing(shape, color, "small", place) for shape in SHAPES for color in COLORS for place in PLACES]
    words = [Line("word", text, color) for text in WORDS for color in COLORS]
    numbers = [Line("number", str(number), color) for number in range(MAX_NUMBER + 1) for color in COLORS]
    bars = [Bar(color, value) for color in COLORS for value in range(1, MAX_VALUE + 1)]
    for group, names in (
        (things, ("shape", "color", "place")),
        (words, ("text", "color")),
        (numbers, ("text", "color")),
        (bars, ("color", "value")),
    ):
        held_out = [part for part in group if is_held_out(part)]
        assert 0.07 < len(held_out) / len(group) < 0.3
        shown = [part for part in group if part not in held_out]
        for name in names:
            assert {getattr(part, name) for part in shown} == {getattr(part, name) for part in group}, name
    pairs = {(t.color, t.shape) for t in things if not is_held_out(t)}
    assert len(pairs) == len(COLORS) * len(SHAPES), "every colored shape is trained on in some place"


def test_the_size_of_a_thing_is_not_what_is_held_out():
    for scene in some_scenes(200):
        for thing in scene.things:
            assert len({is_held_out(Thing(thing.shape, thing.color, size, thing.place)) for size in SIZES}) == 1


def test_scenes_are_made_of_what_the_world_has():
    scenes = some_scenes(1500)
    for scene in scenes:
        places = [thing.place for thing in scene.things]
        assert places == [place for place in PLACES if place in places], "reading order, one thing a place"
        assert len({bar.color for bar in scene.bars}) == len(scene.bars)
        assert [bool(scene.things), bool(scene.lines), bool(scene.bars)] == [scene.kind == kind for kind in KINDS]
        assert len({line.kind for line in scene.lines}) == len(scene.lines)
    share = Counter(scene.kind for scene in scenes)
    assert 0.66 < share["objects"] / len(scenes) < 0.74
    assert {len(scene.things) for scene in scenes if scene.things} == {1, 2, 3, 4, 5}
    assert {len(scene.bars) for scene in scenes if scene.bars} == {2, 3, 4}
    assert {bar.value for scene in scenes for bar in scene.bars} == set(range(1, MAX_VALUE + 1))
    assert {thing.color for scene in scenes for thing in scene.things} == set(COLORS)
    assert {thing.shape for scene in scenes for thing in scene.things} == set(SHAPES)


@pytest.mark.parametrize("kind", KINDS)
def test_change_one_changes_one_attribute_and_keeps_the_scene_whole(kind):
    rng = random.Random(kind)
    for _ in range(300):
        scene = sample_any_scene(rng, kind)
        changed = change_one_attribute(scene, rng)
        assert changed.kind == kind
        assert num_differences(scene, changed) == 1
        places = [thing.place for thing in changed.things]
        assert places == [place for place in PLACES if place in places]
        assert len({bar.color for bar in changed.bars}) == len(changed.bars)
        assert all(1 <= bar.value <= MAX_VALUE for bar in changed.bars)
        assert all(0 <= int(line.text) <= MAX_NUMBER for line in changed.lines if line.kind == "number")


@pytest.mark.parametrize("split", SPLITS)
def test_a_near_miss_stays_in_its_split_and_differs_in_one_attribute(split):
    rng = random.Random(split)
    differences = []
    for _ in range(120):
        scene = sample_scene(rng, split)
        other = near_miss(scene, rng, split)
        assert split_of(other) == split
        assert other.kind == scene.kind
        differences.append(num_differences(scene, other))
    assert 0 not in differences
    # where every change leads out of the split it is another scene; one scene in 16 is val, and some have few neighbors
    assert differences.count(1) > (0.6 if split == "val" else 0.9) * len(differences)


@pytest.mark.parametrize(
    "data",
    [[], {}, {"kind": "objects"}, {"kind": "objects", "things": [{"shape": "circle"}], "lines": [], "bars": []}],
)
def test_what_is_no_scene_graph_is_refused(data):
    with pytest.raises(ValueError, match="not a scene graph"):
        Scene.from_json(data)
