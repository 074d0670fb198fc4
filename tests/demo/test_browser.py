"""The page in headless Chromium, as people use it: everything is done by keys, clicks and files."""

from __future__ import annotations

import contextlib
import random
import re
import signal
import socket
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

from mmllm.scenes.draw import draw
from mmllm.scenes.questions import QUESTION_TYPES
from mmllm.scenes.world import sample_scene
from tests.builders.launches import Forked, run_page
from tests.builders.page_driver import NARROW, WIDE, free_port, wait_until

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

RIGHT_OF_FIVE = 4  # answers about fresh pictures; a model that guesses has about one


# Asking


def test_a_picture_and_a_question_get_a_streamed_answer_and_the_panel_shows_what_was_seen(page, picture):
    page.ask("what is it?", picture)
    page.expect(page.pictures).to_have_count(1)
    page.wait_for_words()
    page.wait_for_end()
    page.expect(page.seen).to_have_count(1)
    page.expect(page.prompt).to_contain_text("<image>\nwhat is it?")
    page.expect(page.tab.locator(".counts")).to_contain_text("128")  # new tokens: the default of the longest answer
    assert page.pictures.evaluate("picture => picture.naturalWidth") == 90
    size = page.seen.evaluate("picture => [picture.naturalWidth, picture.naturalHeight]")
    assert size == [32, 32]


def test_several_pictures_go_with_one_question_and_stay_for_the_next(page, picture):
    page.set(longest_answer=8)
    page.ask("the same or different?", picture, picture)
    page.wait_for_end()
    page.expect(page.prompt).to_contain_text("Picture 1: <image>\nPicture 2: <image>\nthe same or different?")
    page.ask("why?")
    page.expect(page.prompt).to_contain_text("why?")
    page.expect(page.prompt).to_contain_text("Picture 2: <image>\nthe same or different?")
    page.expect(page.seen).to_have_count(2)
    page.wait_for_end(2)


def test_a_pasted_picture_is_attached(page):
    page.typed.evaluate(
        """async (typed) => {
            const canvas = Object.assign(document.createElement("canvas"), { width: 20, height: 20 });
            const blob = await new Promise((done) => canvas.toBlob(done));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([blob], "pasted.png", { type: "image/png" }));
            typed.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true }));
        }"""
    )
    page.expect(page.attached).to_have_count(1)


def test_a_drawing_is_attached_and_seen(page):
    page.set(longest_answer=8)
    page.button("Draw a picture").click()
    canvas = page.tab.locator(".pad canvas")
    page.tab.get_by_label("blue").check(force=True)
    canvas.hover(position={"x": 60, "y": 60})
    page.tab.mouse.down()
    canvas.hover(position={"x": 200, "y": 200})
    page.tab.mouse.up()
    page.button("Attach to message").click()
    page.expect(page.attached).to_have_count(1)
    page.ask("what is it?")
    page.wait_for_end()
    page.expect(page.pictures).to_have_count(1)
    color = page.pictures.evaluate(
        """(picture) => {
            const brush = Object.assign(document.createElement("canvas"), { width: 320, height: 320 }).getContext("2d");
            brush.drawImage(picture, 0, 0, 320, 320);
            return [...brush.getImageData(125, 125, 1, 1).data];
        }"""
    )
    assert color[2] > 150 > color[0]


def test_an_example_is_asked_by_one_click(page, served):
    page.set(longest_answer=8)
    page.tab.get_by_role("button", name=re.compile("Select example 8")).click()
    page.expect(page.questions).to_have_count(1)
    page.expect(page.pictures).to_have_count(2)
    page.wait_for_end()


def test_enter_sends_and_shift_enter_begins_a_line(page):
    page.set(longest_answer=8)
    page.typed.fill("one")
    page.typed.press("Shift+Enter")
    page.typed.press_sequentially("two")
    page.expect(page.questions).to_have_count(0)
    page.typed.press("Enter")
    page.expect(page.questions).to_have_count(1)
    page.expect(page.prompt).to_contain_text("one\ntwo")
    page.wait_for_end()


# Stopping


def test_stop_stops_the_computation_and_the_page_goes_on(page, served, slowly):
    page.set(longest_answer=2048)
    page.ask("what is it?")
    page.wait_for_words()
    assert served.engine.num_running
    page.button("Stop").click()
    page.expect(page.answers).to_contain_text("stopped")
    wait_until(lambda: not served.engine.num_running, seconds=5)
    page.tab.wait_for_timeout(500)  # the last words may still be on their way
    said = page.answers.inner_text()
    page.tab.wait_for_timeout(1000)
    assert page.answers.inner_text() == said
    page.ask("and now?")
    page.wait_for_words(2)
    page.button("Stop").click()
    page.wait_for_end(2)


def test_closing_the_tab_ends_the_computation_and_deletes_the_pictures(open_page, served, slowly, picture):
    page = open_page(served.address)
    page.set(longest_answer=2048)
    page.ask("what is it?", picture)
    page.wait_for_words()
    kept = list(served.folder.rglob("red.png"))  # as it was uploaded, and as the chat shows it
    assert kept
    page.tab.close()
    wait_until(lambda: not served.engine.num_running)
    wait_until(lambda: not any(path.exists() for path in kept))


def test_a_new_question_ends_the_answer_that_is_being_written(page, served, slowly):
    page.set(longest_answer=2048)
    page.ask("one?")
    page.wait_for_words()
    page.ask("two?")
    page.expect(page.answers.first).to_contain_text("stopped")
    page.wait_for_words(2)
    wait_until(lambda: served.engine.num_running == 1)
    page.button("Stop").click()
    page.wait_for_end(2)


def test_tabs_are_answered_at_once_and_one_that_leaves_stops_only_its_own(open_page, served, slowly):
    one, other, third = (open_page(served.address) for _ in range(3))
    for tab in (one, other, third):
        tab.set(longest_answer=2048)
        tab.ask("what is it?")
        tab.wait_for_words()
    assert served.engine.num_running == 3
    one.tab.close()
    other.button("Stop").click()
    other.expect(other.answers).to_contain_text("stopped")
    wait_until(lambda: served.engine.num_running == 1)
    before = third.answers.inner_text()
    wait_until(lambda: len(third.answers.inner_text()) > len(before))
    third.button("Stop").click()
    third.wait_for_end()


# Changing


def test_regenerate_undo_edit_and_clear(page, picture):
    page.set(longest_answer=8, temperature=1.5, seed=1)
    page.ask("one?", picture)
    page.wait_for_end()
    first = page.answers.inner_text()
    page.set(seed=2)
    page.button("Retry").click()
    page.expect(page.answers).not_to_have_text(first)
    page.wait_for_end()
    page.expect(page.questions).to_have_text(["one?"])

    page.ask("two?")
    page.wait_for_end(2)
    page.button("Undo").click()
    page.expect(page.questions).to_have_count(1)
    page.expect(page.typed).to_have_value("two?")

    page.tab.locator("#chat").get_by_role("button", name="Edit").click()
    edited = page.tab.locator("#chat textarea")
    edited.fill("what color?")
    page.tab.locator("#chat").get_by_role("button", name="Submit").click()
    page.expect(page.questions).to_have_text(["what color?"])
    page.expect(page.prompt).to_contain_text("<image>\nwhat color?")
    page.wait_for_end()

    page.button("Clear").first.click()
    page.expect(page.questions).to_have_count(0)
    page.expect(page.seen).to_have_count(0)
    page.expect(page.tab.get_by_text("Show it something")).to_be_visible()


def test_what_was_typed_is_shown_copied_and_edited_to_the_letter(open_page, served):
    text = "# <b>*one*</b> &amp; <image> </s>\n\n    - `two`\ttab  \u4f60\n```"
    page = open_page(served.address, permissions=["clipboard-read", "clipboard-write"])
    page.set(longest_answer=8)
    page.ask(text)
    page.wait_for_end()
    assert page.questions.inner_text() == text
    chat = page.tab.locator("#chat")
    chat.get_by_role("button", name=re.compile("copy", re.IGNORECASE)).first.click()
    wait_until(lambda: page.tab.evaluate("navigator.clipboard.readText()") == text)
    chat.get_by_role("button", name="Edit").click()
    edited = chat.locator("textarea")
    page.expect(edited).to_have_value(text)
    assert edited.evaluate("box => box.scrollHeight <= box.clientHeight")  # all of it is in sight
    chat.get_by_role("button", name="Submit").click()
    page.wait_for_end()
    page.expect(page.prompt).to_contain_text(text)
    assert page.prompt.locator("mark").count() == 0


def test_a_question_that_is_sent_is_scrolled_to(page):
    page.set(longest_answer=8)
    page.ask("line\n" * 60)
    page.wait_for_end()
    page.tab.locator("#chat .bubble-wrap").evaluate("chat => chat.scrollTo(0, 0)")
    page.ask("two?")
    page.expect(page.questions.last).to_be_in_viewport()
    page.wait_for_end(2)


# Bad input


def test_a_file_that_is_no_picture_is_named_and_the_question_stays(page, picture, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("hello")
    page.ask("what is it?", notes, picture)
    page.expect(page.notice).to_contain_text("notes.txt is not an image")
    page.expect(page.questions).to_have_count(0)
    page.expect(page.typed).to_have_value("what is it?")
    page.expect(page.attached).to_have_count(1)


def test_a_file_that_is_too_large_is_refused_with_the_limit(page, tmp_path):
    from demo.chat import MAX_FILE_SIZE

    huge = tmp_path / "huge.png"
    huge.write_bytes(b"\x89PNG" + bytes(65 * 2**20))
    page.tab.set_input_files("#composer input[type=file]", str(huge))
    said = page.tab.get_by_test_id("toast-body").first
    page.expect(said).to_contain_text("huge.png")
    page.expect(said).to_contain_text(re.compile(MAX_FILE_SIZE.removesuffix("mb")))


def test_a_conversation_that_is_too_long_says_so_in_the_chat(page, served):
    page.ask("word " * 5000)
    page.expect(page.chat).to_contain_text("No answer.")
    page.expect(page.chat).to_contain_text(f"this model takes {served.engine.max_length_tokens}")
    page.wait_for_end()


# Privacy and looks


def test_two_tabs_do_not_see_each_other(open_page, served, picture):
    one, other = open_page(served.address), open_page(served.address)
    one.set(longest_answer=8)
    other.set(longest_answer=8)
    one.ask("mine?", picture)
    one.wait_for_end()
    other.expect(other.questions).to_have_count(0)
    other.ask("yours?")
    other.wait_for_end()
    other.expect(other.questions).to_have_text(["yours?"])
    other.expect(other.seen).to_have_count(0)
    one.expect(one.questions).to_have_text(["mine?"])
    one.ask("and mine?")
    one.expect(one.prompt).to_contain_text("mine?")
    one.expect(one.prompt).not_to_contain_text("yours?")
    one.wait_for_end(2)


def test_nothing_but_this_computer_is_asked_for_anything(page, picture):
    page.set(longest_answer=8)
    page.ask("what is it?", picture)
    page.wait_for_end()
    addresses = {urlsplit(url).hostname for url in page.requests if not url.startswith(("data:", "blob:"))}
    assert addresses == {"127.0.0.1"}
    blocked = page.tab.evaluate("fetch('http://example.com').then(() => 'went out', (error) => String(error))")
    assert blocked.startswith("TypeError")


def test_a_page_under_another_name_is_refused(served):
    request = urllib.request.Request(served.address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_the_page_fits_and_every_control_has_a_name(open_page, served, viewport, scheme):
    page = open_page(served.address, viewport=viewport, color_scheme=scheme)
    for name in ("Draw a picture", "How it answers"):
        page.button(name).click()
    page.tab.get_by_label("Temperature").first.wait_for()
    assert page.tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.tab.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    nameless = page.tab.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, canvas, select")]
            .filter((control) => control.checkVisibility() && !control.closest("[tabindex='-1']"))
            .filter((control) => !(control.getAttribute("aria-label") || control.innerText || control.title
                                   || control.labels?.[0]?.innerText))
            .map((control) => control.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    page.tab.get_by_role("button", name="Switch between light and dark").click()
    assert page.tab.evaluate("document.body.classList.contains('dark')") != (scheme == "dark")


def test_the_keyboard_shows_where_it_is(page):
    page.typed.focus()
    for _ in range(3):
        page.tab.keyboard.press("Tab")
        outline = page.tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", page.tab.evaluate("document.activeElement.outerHTML")


# The command, with the trained model


@contextlib.contextmanager
def started(model, port):
    """`python -m demo` as a person starts it; yields (process, its first lines)."""
    with Forked(run_page, [model, "--port", port], name="demo") as process:
        yield process, process.wait_for("(Ctrl-C ends)")


def test_ctrl_c_ends_the_command_and_leaves_nothing_behind(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with started(tiny_checkpoint, port) as (process, said):
            assert f"port {port} is taken" in said
            assert list(tmp_path.glob("mmllm-demo-*"))
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
    assert not list(tmp_path.glob("mmllm-demo-*"))


def test_the_trained_model_answers_about_drawn_pictures(open_page, trained_model, tmp_path):
    asked = []
    for seed in range(5):
        rng = random.Random(seed)
        scene = sample_scene(rng, "val", "objects")
        path = tmp_path / f"picture-{seed}.png"
        draw(scene, rng).save(path)
        (turn,) = QUESTION_TYPES["count"](scene, rng)
        asked.append((path, turn))
    with started(trained_model, free_port()) as (_, said):
        page = open_page(re.search(r"http://\S+", said).group())
        num_right = 0
        for path, turn in asked:
            page.ask(turn.question, path)
            page.wait_for_words()
            with contextlib.suppress(AssertionError):
                page.expect(page.answers).to_have_text(turn.answer, timeout=10_000)
                num_right += 1
            page.button("Clear").first.click()
            page.expect(page.questions).to_have_count(0)
        assert num_right >= RIGHT_OF_FIVE
