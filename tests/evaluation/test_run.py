"""The scorer: one who knows the scene graphs scores 1.0, and no better than guessing when pictures are exchanged."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from mmllm.batch import PICTURE_LABEL, Example
from mmllm.cli import app
from mmllm.evaluation.run import evaluate_model, evaluate_task, score, show, shuffled_pictures
from mmllm.evaluation.scenes import TASKS, ScenesTask, find_task, read_questions, scene_of_picture
from mmllm.evaluation.tasks import Question, TaskError, guess_accuracy, normalise
from mmllm.inference.engine import Reply
from mmllm.inference.sampling import Sampling
from mmllm.scenes.captions import write_caption
from mmllm.scenes.questions import CAPTION_REQUESTS
from mmllm.scenes.small_talk import NO_PICTURE, SMALL_TALK
from mmllm.scenes.wordings import UNKNOWN_ANSWER
from mmllm.scenes.world import Scene
from mmllm.scenes.write import write_scenes
from tests.builders.scene_answers import UnanswerableError, answer, read_caption

SCENES = ScenesTask("scenes", Path("unused"))  # captions are judged by the graph beside each picture


class Oracle:
    """Stands where an Engine does and answers from the scene graph beside each picture, or from the description."""

    def __init__(self) -> None:
        self.renderer = SimpleNamespace(render_example=self.render)
        self.picture_label = PICTURE_LABEL

    def render(self, example: Example) -> Any:
        return SimpleNamespace(input_ids=" ".join(message.text for message in example.messages).split())

    def reply_batch(self, examples: Sequence[Example], sampling: Sampling) -> list[Reply]:
        return [Reply(self.answer(example), "end", 1, 0, 1, 0.0) for example in examples]

    def answer(self, example: Example) -> str:
        opening, _, first = example.messages[0].text.rpartition("\n")
        questions = [first, *(message.text for message in example.messages[2::2])]
        scenes: list[Scene] = [scene_of_picture(str(image)) for image in example.images]
        if not scenes and not opening:
            return self.small_talk(questions[-1])
        if not scenes:
            scenes = [read_caption(opening)]
        if questions[-1] in CAPTION_REQUESTS:
            return write_caption(scenes[0], random.Random(0))
        try:
            return answer(scenes, questions)
        except UnanswerableError:
            return "that is not to be seen"

    def small_talk(self, question: str) -> str:
        words = question.removesuffix("?").split()
        if question.startswith("which is more, "):
            return str(max(int(words[3]), int(words[5])))
        if question.startswith("what number comes after "):
            return str(int(words[-1]) + 1)
        return dict(SMALL_TALK).get(question, NO_PICTURE)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 pictures of val, as `mmllm scenes` writes them."""
    folder = tmp_path_factory.mktemp("pictures")
    write_scenes(folder, {"val": 100}, 5, num_processes=1)
    return folder / "val"


def question(kind: str, asked: str, right: str, *images: str) -> Question:
    return Question(kind, images, (), asked, right)


def test_who_knows_the_scene_is_always_right_and_guesses_with_other_pictures(pictures):
    with Progress(disable=True) as progress:
        result = evaluate_task(Oracle(), str(pictures), max_pictures=None, batch_size=16, progress=progress)
        assert progress.finished, "the bar counts every question that is asked"
    assert result["exact"] == 1.0
    assert set(result["types"].values()) == {1.0}
    assert set(result["types"]) >= {
        "color",
        "count",
        "exists",
        "follow_up",
        "text",
        "chart",
        "two_pictures",
        "text_only",
    }
    assert "caption" not in result["types"]
    assert result["caption_f1"] == 1.0
    shuffled, counts = result["shuffled"], result["shuffled"]["counts"]
    assert "text_only" not in counts, "where there is no picture none can be exchanged"
    guess = sum(result["guess"][kind] * count for kind, count in counts.items()) / sum(counts.values())
    assert shuffled["exact"] < guess + 0.05
    assert shuffled["caption_f1"] < 0.5
    assert result["counts"]["color"] == counts["color"]


def test_all_questions_of_a_row_come_with_just_what_they_need(pictures):
    questions = read_questions(pictures)
    rows = json.loads((pictures / "conversations.json").read_text())
    left_out = sum(kind == "caption" for row in rows if not row.get("image") for kind in row["types"])
    assert len(questions) == sum(len(row["types"]) for row in rows) - left_out
    for one in questions:
        assert bool(one.history) == (one.type == "follow_up") or one.type == "text_only"
        example = one.example()
        assert len(example.images) == len(one.images)
        assert example.messages[-1].role == "user"
        assert example.messages[-1].text.endswith(one.question)
        assert len(example.messages) == 2 * len(one.history) + 1
        assert not any("<image>" in text for turn in one.history for text in turn)


def test_fewer_pictures_are_the_first_ones(pictures):
    questions = read_questions(pictures, 3)
    assert {Path(image).stem for one in questions for image in one.images} == {"000000", "000001", "000002"}
    assert questions == read_questions(pictures)[: len(questions)]


def test_other_pictures_are_shown_and_as_many(pictures):
    questions = [one for one in read_questions(pictures) if one.images]
    shown = shuffled_pictures(questions)
    assert shown == shuffled_pictures(questions)
    for one, other in zip(questions, shown, strict=True):
        assert other != one.images
        assert len(other) == len(one.images)
    assert {one.images for one in questions} == set(shown), "every picture is used"


def test_one_picture_alone_has_no_other():
    assert shuffled_pictures([question("color", "?", "red", "a.png")]) == [("a.png",)]


def test_the_best_guess_is_counted_by_hand():
    questions = [
        question("exists", "is there a cat?", "yes"),
        question("exists", "is there a dog?", "yes"),
        question("exists", "is there a sun?", "no"),
        question("color", "what color is it?", "red"),
        question("color", "what color is that?", "blue"),
        question("color", "the color?", "green"),
    ]
    assert guess_accuracy(questions) == pytest.approx({"exists": 2 / 3, "color": 2 / 3})


def test_scores_are_counted_by_hand(pictures):
    image = str(pictures / "images" / "000000.png")
    questions = [
        question("color", "?", "red", image),
        question("color", "?", "blue", image),
        question("count", "?", "2", image),
        question("caption", "?", "", image),
    ]
    told = write_caption(scene_of_picture(image), random.Random(0))
    result = score(SCENES, questions, ["Red.", "green", " 2", told])
    assert result["exact"] == pytest.approx(2 / 3)
    assert result["types"] == {"color": 0.5, "count": 1.0}
    assert result["counts"] == {"color": 2, "count": 1}
    assert result["caption_f1"] == 1.0
    assert score(SCENES, questions, ["red", "blue", "2", ""])["caption_f1"] == 0.0
    assert "caption_f1" not in score(SCENES, questions[:3], ["red", "blue", "2"])


def test_what_is_refused_is_counted_where_an_answer_is_known():
    questions = [question("color", "?", "red"), question("count", "?", "2"), question("unknown", "?", UNKNOWN_ANSWER)]
    result = score(SCENES, questions, ["red", UNKNOWN_ANSWER.capitalize(), UNKNOWN_ANSWER])
    assert result["refused"] == 0.5
    assert result["types"]["unknown"] == 1.0
    assert "refused" not in score(SCENES, questions[2:], [UNKNOWN_ANSWER])
    without = SimpleNamespace(refusal=None, caption_facts=SCENES.caption_facts)
    assert "refused" not in score(without, questions, ["red", "2", "so"])


@pytest.mark.parametrize(
    ("text", "normal"),
    [("Yes", "yes"), (" top  left.\n", "top left"), ("2", "2"), ("no...", "no"), ("", ""), ("a.b", "a.b")],
)
def test_answers_are_compared_without_case_spaces_and_full_stop(text, normal):
    assert normalise(text) == normal


def test_an_unknown_task_is_told_with_those_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        TaskError, match=r"no task 'vqa'.*allowed: scenes-val, scenes-compositions, scenes-wordings, or a folder"
    ):
        find_task("vqa")
    for name in TASKS:
        with pytest.raises(TaskError, match="write it with `mmllm scenes data/scenes`"):
            find_task(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("{}", "must hold a list"),
        ("[]", "must hold a list"),
        ('[{"id": "7", "conversations": []}]', "row 7 lacks needs, types"),
    ],
)
def test_a_folder_that_is_no_task_is_told(tmp_path, text, said):
    (tmp_path / "conversations.json").write_text(text)
    with pytest.raises(TaskError, match=said):
        find_task(str(tmp_path)).questions()


def test_a_wrong_task_is_told_before_the_model_is_loaded(tmp_path):
    with pytest.raises(TaskError, match="no task 'vqa'"):
        evaluate_model(tmp_path / "no model", ["vqa"])
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "no model"), "vqa"])
    assert done.exit_code != 0
    assert "no task 'vqa'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_table_shows_both_scores_and_the_guess(pictures):
    with Progress(disable=True) as progress:
        result = evaluate_task(Oracle(), str(pictures), max_pictures=10, batch_size=4, progress=progress)
    console = Console(record=True, width=100, file=StringIO())
    show("scenes-val", result, console)
    text = console.export_text()
    for words in ("scenes-val: exact match", "question type", "shuffled", "best guess", "caption F1", "1.000"):
        assert words in text


def test_the_command_asks_a_real_model_and_prints_json(tiny_checkpoint, tiny_scenes, tmp_path):
    task, out = str(tiny_scenes / "val"), tmp_path / "results" / "val.json"
    arguments = ["eval", str(tiny_checkpoint), task, "--max-pictures", "2", "--json", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text())
    assert 0 <= result[task]["exact"] <= 1
    assert set(result[task]["types"]) == set(result[task]["guess"])
    assert result[task]["shuffled"]["counts"].keys() <= result[task]["counts"].keys()
