"""One tab's conversation without a page: what the model is asked about it, and what is shown of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.chat import (
    ChatPicture,
    ChatTurn,
    answer_markdown,
    chatbot_messages,
    example_of,
    pictures_html,
    turn_of_message,
    typed_html,
    typed_text,
    user_message,
)
from mmllm.batch import ImageRef, Message, message, picture_marks


def chat_picture(name):
    return ChatPicture(Path(name), Path(name), name)


# What the model is asked


@pytest.mark.parametrize("num_pictures", [0, 1, 2, 3])
def test_a_question_is_written_as_in_the_training_data(num_pictures):
    in_data = message("user", picture_marks(num_pictures) + "what is it?", first_image=4)
    assert user_message("what is it?", num_pictures, first_image=4) == in_data


def test_an_image_mark_that_a_person_types_stays_words():
    asked = user_message("what does <image> mean?", 1, 0)
    assert asked.parts == (ImageRef(0), "\nwhat does <image> mean?")


def test_pictures_of_earlier_turns_stay_where_they_stand():
    a, b, c = chat_picture("a.png"), chat_picture("b.png"), chat_picture("c.png")
    turns = [ChatTurn("one?", (a,), "yes", "end"), ChatTurn("two?", (), "no", "end"), ChatTurn("three?", (b, c))]
    example = example_of(turns)
    assert example.images == ("a.png", "b.png", "c.png")
    assert [m.role for m in example.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [[p.index for p in m.parts if isinstance(p, ImageRef)] for m in example.messages] == [
        [0],
        [],
        [],
        [],
        [1, 2],
    ]
    assert example.messages[-1].text == "Picture 1: \nPicture 2: \nthree?"


def test_a_turn_that_failed_is_left_out_of_the_next_prompt():
    turns = [ChatTurn("too long?", (chat_picture("a.png"),), problem="it does not fit"), ChatTurn("short?")]
    assert example_of(turns).messages == (Message("user", ("short?",)),)
    assert example_of(turns).images == ()


def test_the_pictures_of_a_turn_stopped_before_its_first_word_go_over_to_the_next():
    turns = [
        ChatTurn("what is it?", (chat_picture("a.png"),), finish_reason="stopped"),
        ChatTurn("what color?", (chat_picture("b.png"),)),
    ]
    example = example_of(turns)
    assert example.images == ("a.png", "b.png")
    assert example.messages == (message("user", "Picture 1: <image>\nPicture 2: <image>\nwhat color?"),)


def test_an_answer_that_was_stopped_in_the_middle_is_part_of_the_next_prompt():
    turns = [ChatTurn("what is it?", (), "a red", "stopped"), ChatTurn("go on")]
    assert [m.text for m in example_of(turns).messages] == ["what is it?", "a red", "go on"]


# What is shown


def test_a_place_in_the_chat_leads_back_to_its_turn():
    turns = [
        ChatTurn("one?", (chat_picture("a.png"),), "yes", "end"),
        ChatTurn("two?", (), "no", "end"),
        ChatTurn("three?"),
    ]
    assert [m["role"] for m in chatbot_messages(turns)] == [
        "user",
        "user",
        "assistant",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert [turn_of_message(turns, index) for index in range(7)] == [0, 0, 0, 1, 1, 2, 2]


def test_names_of_files_and_errors_are_text_and_never_markup():
    assert "<b>" not in pictures_html([chat_picture('x"><b>.png')])
    assert "<b>" not in answer_markdown(ChatTurn("?", problem="the file <b> is missing"))


def test_a_chat_shows_that_it_waits_or_thinks_until_the_first_word():
    assert "waiting" in answer_markdown(ChatTurn("?"))
    assert "thinking" in answer_markdown(ChatTurn("?", is_queued=False))
    assert answer_markdown(ChatTurn("?", answer="a", is_queued=False)) == "a"
    assert "stopped" in answer_markdown(ChatTurn("?", finish_reason="stopped"))


def test_a_chat_says_when_an_answer_was_stopped_or_cut_off():
    assert "stopped" in answer_markdown(ChatTurn("?", answer="a red", finish_reason="stopped"))
    assert "cut off" in answer_markdown(ChatTurn("?", answer="a red", finish_reason="length"))
    assert answer_markdown(ChatTurn("?", answer="a red", finish_reason="end")) == "a red"


@pytest.mark.parametrize(("answer", "end"), [
    ("```python\nprint(", "\n```"),
    ("so:\n\n~~~~\n```\nx", "\n~~~~"),
    ("- do\n\n  ```sh\n  ls", "\n  ```"),
    ("1. ```\n   ls", "\n   ```"),
    ("> ```\n> ls", "\n> ```"),
    ("```\nx\n```", ""),
    ("```` \n```\n````", ""),
    ("say ```x``` and", ""),
    ("```x``` and", ""),
    ("plain", ""),
])  # fmt: skip
def test_the_note_of_an_answer_that_was_cut_off_in_code_is_no_code(answer, end):
    shown_answer = answer_markdown(ChatTurn("?", answer=answer, finish_reason="length"))
    assert shown_answer.startswith(f'{answer}{end}\n\n<div class="note">cut off')


@pytest.mark.parametrize(
    "text", ["# *a* <b>b</b>\n\n    - `c` $x$ &amp; <image>", "a", "  two  spaces\n\nand <br>", "a\ttab", "</div>"]
)
def test_a_question_is_shown_as_it_was_typed(text):
    html_line = typed_html(text)
    assert not {"\n", "\t"} & set(html_line)  # Markdown begins anew at the first and makes spaces of the second
    assert "<b>" not in html_line
    assert typed_text(html_line) == text
    assert typed_text(text) == text
