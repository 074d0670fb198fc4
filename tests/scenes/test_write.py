"""`mmllm scenes`: the same bytes from any number of processes, in LLaVA's format, whole or not there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmllm.batch import ImageRef, picture_marks
from mmllm.cli import app
from mmllm.config import SourceConfig
from mmllm.data.sources import read_source
from mmllm.scenes import write
from mmllm.scenes.absent import ABSENT
from mmllm.scenes.captions import facts_in, facts_of
from mmllm.scenes.pair_questions import TWO_PICTURES
from mmllm.scenes.questions import QUESTION_TYPES
from mmllm.scenes.small_talk import NO_PICTURE, SMALL_TALK, TEXT_ONLY
from mmllm.scenes.wordings import UNKNOWN, UNKNOWN_ANSWER
from mmllm.scenes.world import Scene, split_of
from mmllm.scenes.write import scene_of, write_scenes

COUNTS = {"train": 24, "val": 8}


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def graph_of(picture: str) -> Scene:
    return Scene.from_json(json.loads(Path(picture).with_suffix(".json").read_text()))


def test_two_processes_write_the_bytes_of_one(tiny_scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "PICTURES_PER_CHUNK", 5)
    drawn: list[int] = []
    write_scenes(tmp_path / "again", COUNTS, 0, num_processes=2, advance=drawn.append)
    assert contents(tmp_path / "again") == contents(tiny_scenes)
    assert sum(drawn) == sum(COUNTS.values())


def test_another_seed_and_another_split_give_other_scenes():
    scenes = [[scene_of(seed, split, number) for number in range(6)] for seed in (0, 1) for split in ("train", "val")]
    assert len({tuple(row) for row in scenes}) == 4


def test_training_shows_more_words_than_the_pictures_that_judge():
    shares = {}
    for split in ("train", "val"):
        kinds = [scene_of(0, split, number).kind for number in range(300)]
        shares[split] = kinds.count("text") / len(kinds)
    assert shares["train"] > 0.3 > 0.2 > shares["val"] > 0.05


def test_training_asks_more_often_what_is_hard(tmp_path):
    write_scenes(tmp_path / "scenes", {"train": 60, "val": 60}, 0, num_processes=1)
    shares = {}
    for split in ("train", "val"):
        rows = json.loads((tmp_path / "scenes" / split / "conversations.json").read_text())
        types = [name for row in rows for name in row["types"] if name in ("compare", "color")]
        shares[split] = types.count("compare") / types.count("color")
    assert shares["train"] > 1.5 * shares["val"] > 0


def test_wordings_are_those_pictures_and_answers_in_words_that_training_never_shows(tmp_path):
    write_scenes(tmp_path, {"train": 32, "val": 32, "wordings": 32}, 0, reworded=0.7, num_processes=1)
    val, wordings, train = (
        json.loads((tmp_path / split / "conversations.json").read_text()) for split in ("val", "wordings", "train")
    )
    assert (tmp_path / "val/images/000005.png").read_bytes() == (tmp_path / "wordings/images/000005.png").read_bytes()
    for row, other in zip(val, wordings, strict=True):
        if "image" not in row:
            continue
        kept = [number for number, name in enumerate(other["types"]) if name not in ("unknown", "text_only", "absent")]
        answers, others = ([turn["value"] for turn in one["conversations"][1::2]] for one in (row, other))
        assert [others[number] for number in kept] == answers
        assert [other["needs"][number] for number in kept] == row["needs"]
        opening = picture_marks(2 if isinstance(row["image"], list) else 1)
        plain = [turn["value"].removeprefix(opening) for turn in row["conversations"][::2]]
        assert [other["plain"][number] for number in kept] == plain
        unknown = [others[number] == UNKNOWN_ANSWER for number, name in enumerate(other["types"]) if name == "unknown"]
        assert all(unknown)
    asked = {turn["value"] for row in val for turn in row["conversations"][::2] if "image" in row}
    reworded = [turn["value"] for row in wordings for turn in row["conversations"][::2] if "image" in row]
    assert sum(question in asked for question in reworded) < 0.02 * len(reworded)
    for rows in (wordings, train):
        types = [name for row in rows for name in row["types"]]
        assert 0.05 < types.count("unknown") / len(types) < 0.2
        assert 0.02 < types.count("absent") / len(types) < 0.1


@pytest.mark.parametrize("split", COUNTS)
@pytest.mark.parametrize("name", ["captions.json", "conversations.json"])
def test_the_reader_of_everyones_data_reads_all_rows(tiny_scenes, split, name):
    source = read_source(SourceConfig(path=str(tiny_scenes / split / name)))
    assert source.bad == []
    with_one = [example for example in source.examples if len(example.images) == 1]
    assert len({example.images for example in with_one}) == COUNTS[split]
    for example in source.examples:
        shown = [part.index for message in example.messages for part in message.parts if isinstance(part, ImageRef)]
        assert shown == list(range(len(example.images)))
        for image in example.images:
            Image.open(image).load()
    if name == "captions.json":
        assert len(source.examples) == COUNTS[split]
        for example in source.examples:
            assert facts_in(example.messages[-1].text) == facts_of(graph_of(example.images[0]))


def test_conversations_are_about_one_two_and_no_pictures(tiny_scenes):
    rows = json.loads((tiny_scenes / "train" / "conversations.json").read_text())
    numbers = [len(row.get("image", [])) if isinstance(row.get("image", []), list) else 1 for row in rows]
    assert {count: numbers.count(count) for count in (0, 1, 2)} == {0: 2, 1: 24, 2: 3}
    for row in rows:
        assert 2 * len(row["types"]) == 2 * len(row["needs"]) == len(row["conversations"]) > 0
        assert set(row["types"]) <= {*QUESTION_TYPES, TWO_PICTURES, TEXT_ONLY, UNKNOWN, ABSENT}
    for row in rows:
        if not row.get("image"):
            assert set(row["types"]) <= {"text_only", "caption", "unknown"}


def test_without_small_talk_the_same_pictures_have_rows_about_pictures_and_descriptions(tiny_scenes, tmp_path):
    write_scenes(tmp_path, COUNTS, 0, small_talk=False, num_processes=1)
    for split in COUNTS:
        for picture in sorted((tiny_scenes / split / "images").iterdir()):
            assert picture.read_bytes() == (tmp_path / split / "images" / picture.name).read_bytes()
        rows = json.loads((tmp_path / split / "conversations.json").read_text())
        talked = {answer for _, answer in SMALL_TALK if answer.endswith((".", "!"))} | {NO_PICTURE}
        assert not talked & {turn["value"] for row in rows for turn in row["conversations"]}
        assert [row for row in rows if "image" not in row], "descriptions are still read"


@pytest.mark.parametrize("split", COUNTS)
def test_the_scene_graph_stands_beside_each_picture(tiny_scenes, split):
    pictures = sorted((tiny_scenes / split / "images").glob("*.png"))
    assert len(pictures) == COUNTS[split]
    for number, picture in enumerate(pictures):
        scene = graph_of(str(picture))
        assert scene == scene_of(0, split, number)
        assert split_of(scene) == split


def test_an_interrupted_start_leaves_no_conversations_and_the_next_one_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "PICTURES_PER_CHUNK", 2)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "conversations.json").write_text("an earlier one")
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path, {"val": 4}, 0, num_processes=1, advance=stop)
    assert not list(tmp_path.rglob("conversations.json")), "a split is complete where conversations.json stands"
    assert not list(tmp_path.rglob("captions.json"))
    stray = tmp_path / "val" / "images" / "999999.png"
    stray.touch()
    write_scenes(tmp_path, {"val": 4}, 0, num_processes=1)
    assert not stray.exists()
    assert len(json.loads((tmp_path / "val" / "conversations.json").read_text())) == 5, "four pictures and a text"


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"holds thesis\.txt: give an empty or new folder"):
        write_scenes(tmp_path, {"val": 1}, 0)
    assert contents(tmp_path) == {"thesis.txt": hashlib.sha256(b"mine").hexdigest()}


def scenes(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["scenes", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_says_what_it_wrote(tmp_path):
    code, out, _ = scenes(tmp_path / "new", "--train", 0, "--val", 1, "--compositions", 2, "--num-processes", 1)
    assert code == 0
    assert "0 train, 1 val, 2 compositions, 1 wordings" in out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["compositions", "val", "wordings"]
    for number in range(2):
        graph = tmp_path / "new" / "compositions" / "images" / f"{number:06d}.json"
        assert split_of(Scene.from_json(json.loads(graph.read_text()))) == "compositions"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing argument"),
        (["new", "--train", "-1"], "--train"),
        (["new", "--val", "many"], "--val"),
        (["new", "--num-processes", "0"], "--num-processes"),
        (["new", "--trian", "5"], "--trian"),
    ],
)
def test_wrong_usage_is_told_and_nothing_is_written(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = scenes(*arguments)
    assert code == 2
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_a_strange_folder_is_a_failed_command_and_not_a_traceback(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    code, _, err = scenes(tmp_path, "--train", 1)
    assert code == 1
    assert "error: " in err
    assert "thesis.txt" in err
    assert "Traceback" not in err


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = scenes(tmp_path / "file", "--train", 1, "--num-processes", 1)
    assert code == 1
    assert "error: " in err
    assert str(tmp_path / "file") in err
    assert (tmp_path / "file").read_text() == "mine"
