"""The page without a browser: what the model is asked, what is refused and how, and what is kept and deleted."""

from __future__ import annotations

import base64
import copy
import html
import io
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageFile, PngImagePlugin

from demo.app import free_port, private_folder
from demo.chat import (
    MAX_PICTURES,
    ChatPicture,
    ChatTurn,
    Sessions,
    example_of,
    read_pictures,
)
from demo.events import ANY_SEED, DRAWING_PREFIX, Events
from demo.examples import EXAMPLES, draw_examples
from demo.preview import counts_html, preview_html
from mmllm.chat.renderer import Renderer
from mmllm.chat.templates import OWN_TEMPLATE
from mmllm.images import load_image
from mmllm.inference.engine import Engine
from tests.builders.launches import Forked, run_page
from tests.builders.page_driver import wait_until
from tests.builders.tiny import red_picture

ROOT = Path(__file__).parents[2]
GREEDY = (0, 1, 8, ANY_SEED)  # temperature, top-p, longest answer, seed


@pytest.fixture(scope="module")
def engine(tiny_checkpoint):
    return Engine.load(tiny_checkpoint)


@pytest.fixture
def picture(tmp_path):
    return red_picture(tmp_path / "red.png", 48, 32)


@pytest.fixture
def events(engine, tmp_path):
    folder = tmp_path / "served"
    return Events(engine, Sessions(folder / "examples"), draw_examples(folder / "examples"), folder)


def chat_picture(name):
    return ChatPicture(Path(name), Path(name), name)


def tab(key="a tab"):
    return SimpleNamespace(session_hash=key)


def drawing(size=(20, 20)):
    buffer = io.BytesIO()
    Image.new("RGB", size, "blue").save(buffer, "PNG")
    return DRAWING_PREFIX + base64.b64encode(buffer.getvalue()).decode()


# What is refused


def read(path):
    load_image(path, may_shrink=True)
    return chat_picture(path)


def test_a_file_that_is_no_picture_is_named(tmp_path, picture):
    notes, cut = tmp_path / "notes.txt", tmp_path / "cut.png"
    notes.write_text("hello")
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    pictures, kept, problems = read_pictures([str(notes), str(picture), str(cut)], read)
    assert [one.file for one in pictures] == kept == [picture]
    assert problems[0].startswith("notes.txt is not an image")
    assert problems[1].startswith("cut.png is damaged or cut off")
    assert str(tmp_path) not in "".join(problems)


def test_a_picture_with_too_many_pixels_is_refused_by_its_size(tmp_path):
    path = tmp_path / "vast.png"
    Image.new("1", (10_000, 9_000)).save(path)
    _, kept, problems = read_pictures([str(path)], read)
    assert not kept
    assert "vast.png has 10000 x 9000" in problems[0]


def test_a_picture_that_no_browser_shows_is_shown_all_the_same(events, tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="pip install 'mmllm[heif]'")
    path = tmp_path / "IMG_1.HEIC"
    pillow_heif.from_pillow(Image.new("RGB", (3000, 2000), "red")).save(path)
    ask(events, "what is it?", [path])
    (turn,) = events.sessions.of("a tab").turns
    (picture,) = turn.pictures
    assert picture.image.size == (2000, 3000)
    with Image.open(picture.shown) as shown_picture:
        assert (shown_picture.format, shown_picture.size) == ("JPEG", (1280, 853))
    assert turn.answer
    events.leave(tab())
    assert not path.exists()
    assert not picture.shown.exists()


def test_a_picture_is_decoded_once_whatever_is_asked_about_it(events, picture, monkeypatch):
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda one: decoded.append(one) or load(one))
    ask(events, "what is it?", [picture])
    num_asked = len(decoded)
    ask(events, "and what else?")
    events.retry(tab())
    list(events.answer(*GREEDY, tab()))
    assert num_asked == len(decoded)
    assert all(one is decoded[0] for one in decoded)  # Pillow asks one picture twice, and decodes it once


@pytest.mark.parametrize(
    "words", ["say <image> twice", "</s> <|end|> <|im_end|>", "<b>&amp;</b> # 1\n\n```", "\U0001f9ed\u200d\u4f60"]
)
def test_words_that_mean_something_to_a_program_are_text_and_the_chat_goes_on(events, picture, words):
    updates = ask(events, words, [picture])
    ask(events, "hello again")
    turns = events.sessions.of("a tab").turns
    assert [turn.text for turn in turns] == [words, "hello again"]
    assert all(turn.answer and not turn.problem for turn in turns)
    panel = next(seen for _, _, seen, _ in updates if isinstance(seen, str))
    assert panel.count("<mark>") == 1  # the picture; a typed `<image>` is no picture
    assert html.escape(words) in panel


def test_words_that_the_template_cannot_hold_are_refused_and_the_chat_goes_on(events, engine, monkeypatch):
    tokenizer = copy.deepcopy(engine.processor.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("content", "content.lower()")
    own = engine.renderer
    changed = Renderer(tokenizer, OWN_TEMPLATE, image_token_id=own.image_token_id, num_image_tokens=4)
    monkeypatch.setattr(engine, "renderer", changed)
    composer, _, notice = events.send({"text": "\U0010a000", "files": []}, tab())
    assert "This question cannot be asked" in notice
    assert composer["text"] == "\U0010a000"
    ask(events, "hello again")
    (turn,) = events.sessions.of("a tab").turns
    assert turn.answer


def test_too_many_pictures_are_counted(picture):
    _, _, problems = read_pictures([str(picture)] * (MAX_PICTURES + 1), read)
    assert problems == [
        f"{MAX_PICTURES + 1} pictures are attached, one message takes up to {MAX_PICTURES}; remove some"
    ]


def test_a_message_without_a_question_is_not_sent_and_stays_to_be_finished(events, picture):
    composer, chat, notice = events.send({"text": "  ", "files": [str(picture)]}, tab())
    assert composer["files"] == [str(picture)]
    assert chat["__type__"] == "update"
    assert "no question yet" in notice
    assert events.sessions.of("a tab").turns == []


@pytest.mark.parametrize("sent", [None, 7, "", "data:image/png;base64,%%%", DRAWING_PREFIX + "aGVsbG8="])
def test_what_is_no_drawing_is_refused(events, sent):
    _, notice = events.attach_drawing(SimpleNamespace(picture=sent), None, tab())
    assert "The drawing cannot be used" in notice


# What an answer does


def ask(events, text, files=(), settings=GREEDY, key="a tab"):
    events.send({"text": text, "files": [str(file) for file in files]}, tab(key))
    return list(events.answer(*settings, tab(key)))


def test_an_answer_streams_and_the_panel_tells_what_the_model_saw(events, picture):
    updates = ask(events, "what <b>is</b> it?", [picture])
    turn = events.sessions.of("a tab").turns[0]
    assert turn.finish_reason == "length"
    chats = [chat for _, chat, _, _ in updates if isinstance(chat, list)]
    assert chats[-1][-1]["content"].startswith(turn.answer)
    panel = next(seen for _, _, seen, _ in updates if isinstance(seen, str))
    assert "48×32 → 32×32" in panel
    assert "<mark>&lt;image&gt;</mark>\nwhat &lt;b&gt;is&lt;/b&gt; it?" in panel
    assert "<dd>4</dd>" in updates[-1][3]  # image tokens of a 32 px picture in 16 px patches
    assert "<dd>8</dd>" in updates[-1][3]  # new tokens


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(events):
    texts = []
    for seed in (1, 1, 2):
        ask(events, "what is it?", settings=(1.5, 1, 12, seed))
        texts.append(events.sessions.of("a tab").turns[-1].answer)
        events.clear(tab())
    assert texts[0] == texts[1] != texts[2]


def test_a_conversation_that_does_not_fit_says_so_in_the_chat(events, engine):
    updates = ask(events, "word " * 5000)
    problem = events.sessions.of("a tab").turns[0].problem
    assert f"this model takes {engine.max_length_tokens}" in problem
    assert "No answer." in updates[-1][1][-1]["content"]
    ask(events, "and now?")
    assert events.sessions.of("a tab").turns[1].answer


def test_a_picture_that_is_gone_by_now_was_read_when_it_was_sent(events, picture):
    events.send({"text": "what is it?", "files": [str(picture)]}, tab())
    picture.unlink()
    list(events.answer(*GREEDY, tab()))
    assert events.sessions.of("a tab").turns[0].answer


def test_stop_ends_the_computation(events):
    events.send({"text": "what is it?", "files": []}, tab())
    writing = events.answer(0, 1, 2000, ANY_SEED, tab())
    while not events.sessions.of("a tab").turns[0].answer:
        next(writing)
    assert events.engine.num_running == 1
    events.stop(tab())
    updates = list(writing)
    assert "stopped" in updates[-1][1][-1]["content"]
    wait_until(lambda: not events.engine.num_running)


def test_a_page_that_is_no_longer_there_ends_the_computation(events):
    events.send({"text": "what is it?", "files": []}, tab())
    writing = events.answer(0, 1, 2000, ANY_SEED, tab())
    turn = events.sessions.of("a tab").turns[0]
    while not turn.answer:
        next(writing)
    events.leave(tab())
    assert turn.finish_reason == "stopped"
    assert len(list(writing)) < 5
    wait_until(lambda: not events.engine.num_running)


def test_a_new_question_ends_the_answer_before_it(events):
    events.send({"text": "one?", "files": []}, tab())
    writing = events.answer(0, 1, 2000, ANY_SEED, tab())
    while not events.sessions.of("a tab").turns[0].answer:
        next(writing)
    ask(events, "two?")
    assert len(list(writing)) < 5
    one, two = events.sessions.of("a tab").turns
    assert (one.finish_reason, two.finish_reason) == ("stopped", "length")


def test_retry_undo_edit_and_clear(events, picture):
    turns = events.sessions.of("a tab")
    ask(events, "one?", [picture])
    ask(events, "two?")
    events.retry(tab())
    assert [turn.is_open for turn in turns.turns] == [False, True]
    composer, chat, _ = events.undo(tab())
    assert composer == {"text": "two?", "files": []}
    assert len(chat) == 3
    ask(events, "two?")
    events.edit(SimpleNamespace(index=1, value="one more?"), tab())
    (turn,) = turns.turns
    assert (turn.text, turn.pictures[0].file, turn.is_open) == ("one more?", picture, True)
    list(events.answer(*GREEDY, tab()))
    composer, chat, _ = events.undo(tab())
    assert composer == {"text": "one more?", "files": [str(picture)]}
    assert chat == []
    ask(events, "three?")
    assert events.clear(tab())[0] == []
    assert turns.turns == []


def test_an_edit_to_nothing_changes_nothing(events):
    ask(events, "one?")
    _, notice = events.edit(SimpleNamespace(index=0, value=" "), tab())
    assert "The old question stays" in notice
    assert events.sessions.of("a tab").turns[0].text == "one?"


# What is kept


def test_sessions_know_nothing_of_each_other(events, picture):
    ask(events, "mine?", [picture], key="one")
    ask(events, "yours?", key="two")
    assert [turn.text for turn in events.sessions.of("one").turns] == ["mine?"]
    assert example_of(events.sessions.of("two").turns).images == ()


def test_a_closed_tab_leaves_no_picture_behind_but_those_that_others_use(events, tmp_path):
    own, common = tmp_path / "own.png", tmp_path / "common.png"
    for path in (own, common):
        Image.new("RGB", (8, 8)).save(path)
    ask(events, "mine?", [own, common], key="one")
    ask(events, "yours?", [common], key="two")
    events.ask_example(SimpleNamespace(index=0), tab("one"))
    events.attach_drawing(SimpleNamespace(picture=drawing()), None, tab("one"))
    (drawn,) = events.folder.glob("*/drawing.png")
    events.leave(tab("one"))
    assert not own.exists()
    assert not drawn.exists()
    assert common.exists()
    assert events.examples[0].pictures[0].exists()


def test_a_drawing_is_added_to_what_is_being_typed(events, picture):
    composer, notice = events.attach_drawing(
        SimpleNamespace(picture=drawing((30, 20))), {"text": "what is", "files": [str(picture)]}, tab()
    )
    assert not notice
    assert composer["text"] == "what is"
    assert composer["files"][0] == str(picture)
    assert Image.open(composer["files"][1]).size == (30, 20)


def test_the_private_folder_is_private_and_goes_away(monkeypatch):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    with private_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        (folder / "picture.png").write_bytes(b"x")
    assert not folder.exists()
    assert "GRADIO_TEMP_DIR" not in os.environ


# Examples, files, command


def test_examples_are_the_same_every_time_and_have_a_right_answer(tmp_path):
    first, second = draw_examples(tmp_path / "first"), draw_examples(tmp_path / "second")
    assert len(first) == len(EXAMPLES)
    assert {len(example.pictures) for example in first} == {1, 2}
    assert all(example.question and example.answer for example in first)
    for one, other in zip(first, second, strict=True):
        assert (one.question, one.answer) == (other.question, other.answer)
        assert [p.read_bytes() for p in one.pictures] == [p.read_bytes() for p in other.pictures]


def test_an_example_is_asked_with_its_pictures(events):
    events.ask_example(SimpleNamespace(index=len(EXAMPLES) - 1), tab())
    turn = events.sessions.of("a tab").turns[0]
    assert turn.text == events.examples[-1].question
    assert tuple(picture.file for picture in turn.pictures) == events.examples[-1].pictures


def test_counts_are_dashes_until_there_is_a_reply():
    assert counts_html(None).count("<dd>–</dd>") == 4


def test_a_text_alone_has_a_prompt_and_no_picture(engine):
    panel = preview_html(engine, example_of([ChatTurn("hello.")]))
    assert "hello." in panel
    assert "<img" not in panel


@pytest.mark.parametrize("name", ["page.css", "page.js", "pad.html", "pad.js"])
def test_the_page_names_no_other_computer(name):
    text = (ROOT / "demo" / name).read_text(encoding="utf-8")
    assert "//" not in text.replace("// ", "")  # no address, with or without its scheme
    assert "@import" not in text


def test_a_taken_port_leads_to_the_next():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < free_port(port) < port + 100


def test_a_model_that_is_not_there_is_one_readable_error(tmp_path):
    with Forked(run_page, [tmp_path / "nothing"], name="demo") as process:
        done = process.completed()
    assert done.returncode == 1
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr
