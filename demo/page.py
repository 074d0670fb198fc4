"""The layout of the page, and the event that each button starts."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import gradio as gr

from demo.chat import MAX_PICTURES, Sessions
from demo.events import ANY_SEED, Events
from demo.examples import draw_examples
from demo.preview import EMPTY_PREVIEW, counts_html
from demo.theme import asset
from mmllm.inference.engine import Engine

# (column, row, opacity) of each square of the logo: the patches of a picture
PATCHES = ((0, 0, 1), (1, 0, 0.55), (2, 0, 0.25), (0, 1, 0.55), (1, 1, 1), (0, 2, 0.25), (2, 2, 1))
WELCOME = (
    "<h2>Show it something</h2><p>Attach, paste or draw a picture and ask about it, or start with one of these.</p>"
)
SECONDS_IN_DAY = 86_400
MODEL_QUEUE = "model"
MAX_TABS_AT_ONCE = 32  # answered at once; Gradio has 40 threads for them and for everything else


def logo_html() -> str:
    patches = "".join(
        f'<rect x="{1 + 9.5 * column}" y="{1 + 9.5 * row}" width="7" height="7" rx="2" opacity="{opacity}"/>'
        for column, row, opacity in PATCHES
    )
    return f'<svg viewBox="0 0 28 28" width="30" height="30" fill="currentColor" aria-hidden="true">{patches}</svg>'


def header_html(model_name: str) -> str:
    return (
        f'<header class="bar"><span class="logo">{logo_html()}</span><h1>mmllm</h1>'
        f'<span class="model" title="The model of this page">{html.escape(model_name)}</span>'
        '<button type="button" class="shade" aria-label="Switch between light and dark" title="Light or dark">'
        '<svg viewBox="0 0 20 20" width="18" height="18" aria-hidden="true"><path fill="currentColor" '
        'd="M10 2a8 8 0 1 0 0 16zM10 1a9 9 0 1 1 0 18 9 9 0 0 1 0-18z"/></svg></button></header>'
    )


def _chat_column(events: Events) -> tuple[gr.Chatbot, gr.HTML, gr.MultimodalTextbox]:
    chat = gr.Chatbot(
        label="Conversation",
        show_label=False,
        elem_id="chat",
        editable="user",
        buttons=["copy"],
        group_consecutive_messages=False,
        allow_tags=False,
        latex_delimiters=[],
        feedback_options=None,
        placeholder=WELCOME,
        examples=[
            {"text": example.question, "files": [str(path) for path in example.pictures]} for example in events.examples
        ],
    )
    notice = gr.HTML(elem_id="notice")
    composer = gr.MultimodalTextbox(
        label="Message",
        show_label=False,
        elem_id="composer",
        file_count="multiple",
        placeholder="Ask a question",
        lines=1,
        max_lines=6,
        max_plain_text_length=100_000,
        submit_btn="Send",
        autofocus=True,
        html_attributes=gr.InputHTMLAttributes(spellcheck=False, autocapitalize="off"),
    )
    gr.HTML(
        '<p class="hint"><kbd>Enter</kbd> sends, <kbd>Shift</kbd>+<kbd>Enter</kbd> starts a new line. '
        f"Up to {MAX_PICTURES} pictures a message: attach, drop, paste or draw. Everything stays on this computer.</p>"
    )
    return chat, notice, composer


def _side_column() -> tuple[gr.HTML, list[gr.components.Component], gr.HTML, gr.HTML]:
    """(drawing pad, sampling settings, counts, preview)."""
    with gr.Accordion("Draw a picture", open=False, elem_classes="side"):
        pad = gr.HTML(html_template=asset("pad.html"), js_on_load=asset("pad.js"), elem_id="pad")
    with gr.Accordion("How it answers", open=False, elem_classes="side"):
        settings: list[gr.components.Component] = [
            gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 takes the likeliest token, more is more varied"),
            gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="Draws from the likeliest tokens of this total share"),
            gr.Slider(1, 2048, 128, step=1, label="Longest answer", info="In new tokens"),
            gr.Number(
                ANY_SEED, precision=0, minimum=ANY_SEED, label="Seed", info="The same seed, the same answer; -1 is any"
            ),
        ]
    with gr.Accordion("What the model saw", open=True, elem_classes="side"):
        counts = gr.HTML(counts_html(None))
        preview = gr.HTML(EMPTY_PREVIEW)
    return pad, settings, counts, preview


def build_page(engine: Engine, sessions: Sessions, folder: Path) -> gr.Blocks:
    """The page of one model. Drawings and example pictures are written to `folder`, which Gradio serves."""
    events = Events(engine, sessions, draw_examples(folder / "examples"), folder)
    with gr.Blocks(
        analytics_enabled=False,
        title=f"{engine.name} · mmllm",
        fill_width=True,
        delete_cache=(3600, SECONDS_IN_DAY),
    ) as page:
        gr.HTML(header_html(engine.name), elem_id="header")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=7, min_width=320, elem_id="main"):
                chat, notice, composer = _chat_column(events)
            with gr.Column(scale=3, min_width=320, elem_id="side"):
                pad, settings, counts, preview = _side_column()
        _connect(events, chat, notice, composer, preview, counts, pad, settings)
        page.unload(events.leave)
    return page


def _connect(
    events: Events,
    chat: gr.Chatbot,
    notice: gr.HTML,
    composer: gr.MultimodalTextbox,
    preview: gr.HTML,
    counts: gr.HTML,
    pad: gr.HTML,
    settings: list[gr.components.Component],
) -> None:
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    questions = [
        composer.submit(events.send, composer, [composer, chat, notice], **quick),
        chat.retry(events.retry, None, [chat, notice], **quick),
        chat.edit(events.edit, None, [chat, notice], **quick),
        chat.example_select(events.ask_example, None, [chat, notice], **quick),
    ]
    for question in questions:
        answer = question.then(
            events.answer,
            settings,
            [composer, chat, preview, counts],
            concurrency_id=MODEL_QUEUE,
            concurrency_limit=MAX_TABS_AT_ONCE,  # the engine batches them
            show_progress="hidden",
            api_visibility="private",
            trigger_mode="multiple",
        )
        answer.then(events.reset_composer, None, composer, **quick)
    composer.stop(events.stop, None, [composer, chat], **quick)
    chat.undo(events.undo, None, [composer, chat, notice], **quick)
    chat.clear(events.clear, None, [chat, preview, counts, notice], **quick)
    pad.submit(events.attach_drawing, composer, [composer, notice], **quick)
