"""`mmllm chat`: what is asked, what is printed, and what a conversation survives."""

from __future__ import annotations

import json
import os
import select
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmllm.batch import ImageRef
from mmllm.chat.conversation import Conversation, user_message
from mmllm.cli import app
from mmllm.config import SourceConfig
from mmllm.data.sources import read_source
from mmllm.inference.engine import Engine, Reply
from mmllm.inference.sampling import Sampling
from mmllm.inference.terminal_chat import Terminal, printable
from tests.builders.launches import command, commanded, default_interrupts, pseudo_terminal
from tests.builders.tiny import red_picture

SHORT = Sampling(max_new_tokens=4)
WAIT_SECONDS = 100


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine.load(tiny_checkpoint)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return red_picture(tmp_path / "a picture.png", 40, 30)


def run(*arguments: object, lines: str = "") -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command."""
    done = CliRunner().invoke(app, ["chat", *map(str, arguments)], input=lines)
    return done.exit_code, done.stdout, done.stderr


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_conversation_is_worded_as_in_the_training_data(tiny_scenes: Path) -> None:
    found = read_source(SourceConfig(path=str(tiny_scenes / "train" / "conversations.json")))
    assert {len(example.images) for example in found.examples} == {0, 1, 2}
    for example in found.examples:
        conversation = Conversation()
        for number, (question, answer) in enumerate(zip(example.messages[::2], example.messages[1::2], strict=True)):
            # the words behind the marks; what the marks look like is what is tested
            words = question.parts[-1].removeprefix("\n") if number == 0 and example.images else question.text
            pictures = example.images if number == 0 else ()
            asked = conversation.ask(words, pictures)
            assert asked.messages == example.messages[: 2 * number + 1]
            assert asked.images == example.images
            conversation.add(words, pictures, answer.text)


def test_pictures_of_later_questions_are_numbered_on() -> None:
    conversation = Conversation()
    conversation.add("what is it?", ["a.png"], "a cat")
    asked = conversation.ask("and these?", ["b.png", "c.png"])
    assert asked.images == ("a.png", "b.png", "c.png")
    assert [p.index for m in asked.messages for p in m.parts if isinstance(p, ImageRef)] == [0, 1, 2]


def test_a_mark_that_is_typed_is_no_picture(engine: Engine) -> None:
    assert user_message("what is <image>?", 1).parts[1:] == ("\nwhat is <image>?",)
    assert engine.reply(Conversation().ask("what is <image>?"), SHORT).num_image_tokens == 0
    with pytest.raises(ValueError, match="the question is empty"):
        Conversation().ask("  ")


def test_one_question_gives_one_json_object(tiny_checkpoint: Path, picture: Path) -> None:
    arguments = ("--image", picture, "--image", picture, "--prompt", "same?", "--json", "--max-new-tokens", 3)
    done = commanded("chat", tiny_checkpoint, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    counts = {"num_prompt_tokens", "num_image_tokens", "num_new_tokens", "num_cached_tokens"}
    times = {"seconds", "seconds_to_first_token"}
    assert answer.keys() == {"text", "finish", "pictures", "model"} | counts | times
    assert [seen["num_tokens"] for seen in answer["pictures"]] == [answer["num_image_tokens"] // 2] * 2
    assert (answer["finish"], answer["num_new_tokens"], answer["model"]) == ("length", 3, "checkpoint")
    assert answer["num_image_tokens"] == 8 < answer["num_prompt_tokens"]


def test_one_question_prints_the_answer_alone(engine: Engine, tiny_checkpoint: Path, picture: Path) -> None:
    status, out, err = run(tiny_checkpoint, "--image", picture, "--prompt", "color?", "--max-new-tokens", 4)
    expected = engine.reply(Conversation().ask("color?", [str(picture)]), SHORT).text
    assert (status, out.strip("\n")) == (0, printable(expected))
    assert "cut off: --max-new-tokens" in err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--json"], 2, "give the question with --prompt"),
        (["--prompt", " "], 1, "the question is empty"),
        (["--prompt", "what?", "--image", "gone.png"], 1, "no image file at gone.png"),
        (["--image", "gone.png"], 1, "no image file at gone.png"),
        (["--prompt", "what?", "--temperature", "-1"], 1, "temperature must be 0"),
        (["--prompt", "what? " * 3000], 1, "begin a new one"),
        (["--prompt", "what?", "--device", "cuda:99"], 1, "no device cuda:99: this machine has"),
    ],
)
def test_wrong_use_is_one_line_and_a_status(
    tiny_checkpoint: Path, arguments: list[str], status: int, message: str
) -> None:
    got, out, err = run(tiny_checkpoint, *arguments)
    assert (got, out) == (status, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_wrong_picture_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    status, _, err = run(tmp_path / "no-model", "--image", tmp_path / "gone.png")
    assert status == 1
    assert "gone.png" in err


def test_lines_of_a_pipe_are_questions_and_commands(tiny_checkpoint: Path, picture: Path, engine: Engine) -> None:
    lines = f"/image {picture}\n\nwhat color?\nand now?\n/quit\nnever asked\n"
    status, out, err = run(tiny_checkpoint, "--max-new-tokens", 4, lines=lines)
    conversation = Conversation()
    first = engine.reply(conversation.ask("what color?", [str(picture)]), SHORT).text
    conversation.add("what color?", [str(picture)], first)
    second = engine.reply(conversation.ask("and now?"), SHORT).text
    assert (status, out) == (0, printable(f"{first}\n{second}\n"))
    assert "(40 x 30); now ask about it" in err


def test_a_mistake_is_one_line_and_the_chat_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    lines = [
        "/image", f"/image {tmp_path}/gone.png", f"/image {tmp_path}/notes.png", "/imagine", f"/image '{tmp_path}",
        "what " * 3000, "what?",
    ]  # fmt: skip
    status, out, err = run(tiny_checkpoint, "--max-new-tokens", 4, lines="\n".join(lines))
    assert (status, len(out.splitlines())) == (0, 1)
    told = errors(err)
    assert len(told) == len(lines) - 1
    expected = ["needs the path", "gone.png", "notes.png is not an image", "no command /imagine", "no image file at '"]
    for text, line in zip([*expected, "begin a new one"], told, strict=True):
        assert text in line


@pytest.fixture
def terminal(engine: Engine) -> Terminal:
    return Terminal(engine, SHORT, [])


def test_pictures_belong_to_the_next_question(terminal: Terminal, picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(other)
    assert terminal.take(f"/image {picture}")  # a path with a space, not quoted
    assert terminal.take(f"/image '{picture}' {other}")
    terminal.take("which are the same?")
    terminal.take("why?")
    first, second = terminal.conversation.turns
    assert [image.size for image in first.pictures] == [(30, 40), (30, 40), (8, 8)]
    assert (second.question, second.pictures, terminal.waiting) == ("why?", (), [])


def test_a_file_that_changes_later_changes_no_earlier_turn(terminal: Terminal, picture: Path) -> None:
    terminal.take(f"/image {picture}")
    terminal.take("what color?")
    picture.unlink()
    terminal.take("and now?")
    assert [turn.question for turn in terminal.conversation.turns] == ["what color?", "and now?"]


def test_undo_takes_back_step_by_step_and_clear_all(terminal: Terminal, picture: Path, capsys) -> None:
    for line in (f"/image {picture}", "what color?", "why?", f"/image {picture}", "/undo"):
        terminal.take(line)
    assert (len(terminal.waiting), len(terminal.conversation.turns)) == (0, 2)
    terminal.take("/undo")
    terminal.take("/undo")
    assert (len(terminal.waiting), terminal.conversation.turns) == (1, [])  # the picture of the question waits again
    terminal.take("/undo")
    assert terminal.waiting == []
    terminal.take("/undo")
    assert "nothing to take back" in capsys.readouterr().err
    terminal.take("what?")
    terminal.take("/clear")
    assert terminal.conversation.turns == []
    assert not terminal.take("/quit")


def test_an_answer_is_written_as_it_grows(terminal: Terminal, capsys) -> None:
    def replies(*texts: str):
        for text in texts:
            yield Reply(text, "end" if text is texts[-1] else None, 1, 0, 1, 1.0)

    terminal.write(replies("caf\ufffd", "caf\u00e9", "caf\u00e9 [bold]au[/bold] \x1b[2Jlait"))
    assert capsys.readouterr().out == "caf\u00e9 [bold]au[/bold] [2Jlait\n"
    terminal.write(replies("do n't", "don't", "don't go"))  # a tokenizer that rewords
    assert capsys.readouterr().out == "do n't\ndon't go\n"


class _Screen:
    """What a program writes to its terminal."""

    def __init__(self, terminal: int):
        self.terminal, self.rest = terminal, ""

    def until(self, text: str, *, again: bytes = b"") -> str:
        """All that is shown up to and with this text; what follows it is kept for the next call.

        `again` is typed once more each second that nothing comes: Python sees a Ctrl-C between the moment in which it
        has written a prompt and that in which it listens only at the next key.
        """
        end = time.monotonic() + WAIT_SECONDS
        while text not in self.rest:
            assert time.monotonic() < end, f"{text!r} did not come; there is {self.rest!r}"
            if select.select([self.terminal], [], [], 1)[0]:
                self.rest += os.read(self.terminal, 4096).decode(errors="replace")
            elif again:
                os.write(self.terminal, again)
        shown, _, self.rest = self.rest.partition(text)
        return shown + text


@pytest.mark.skipif(not hasattr(os, "login_tty"), reason="needs a pseudo-terminal")
def test_ctrl_c_stops_an_answer_and_keeps_the_chat(tiny_checkpoint: Path) -> None:
    with (
        pseudo_terminal() as (ours, name),
        command(
            "chat", tiny_checkpoint, "--max-new-tokens", 100000,
            terminal=name, environment={"TERM": "dumb"}, before=default_interrupts,
        ) as chat,
    ):  # fmt: skip
        screen = _Screen(ours)
        screen.until("> ")
        os.write(ours, b"tell me everything\n")
        screen.until("everything\r\n")
        screen.until(" ")  # the answer is on its way
        os.write(ours, b"\x03")
        assert "(0 tokens" not in screen.until("; stopped)")
        screen.until("> ")
        os.write(ours, b"\x03")
        screen.until("Ctrl-D or /quit ends the chat", again=b"\x03")
        screen.until("> ")
        os.write(ours, b"\x04")
        assert chat.wait(WAIT_SECONDS) == 0
