"""An explained example as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from mmllm.diagnose.explain import ExplainedPicture, Explanation, PromptComparison, Token, runs
from mmllm.web_page import png_data_uri, self_contained_page

MAX_SIDE_PX = 1024  # of a picture in the page; a larger one is shrunk
KINDS = {
    "image": "what the projector makes of the picture",
    "prompt": "read, not taught",
    "answer": "taught",
    "end": "taught: here the answer stops",
}


def page(explanation: Explanation) -> str:
    """The whole page as HTML."""
    style = Path(__file__).with_name("explain.css").read_text(encoding="utf-8")
    title = _plain(explanation.example.id)
    body = [
        _head(explanation),
        _pictures(explanation.pictures),
        _counts(explanation),
        _tokens(explanation),
        _prompts(explanation),
    ]
    return self_contained_page(f"{title} - mmllm explain", style, "".join(body))


def _head(explanation: Explanation) -> str:
    also = "".join(
        f"<p class=note>{escape(path)} holds an example with this id too.</p>" for path in explanation.also_in
    )
    return (
        f"<header><p class=over>What the model sees and is taught</p><h1>{_plain(explanation.example.id)}</h1>"
        f"<p class=where>{escape(explanation.split)}, {escape(explanation.example.source)}<br>"
        f"settings {escape(explanation.config)}, template {escape(explanation.template)}</p>{also}</header>\n"
    )


def _pictures(pictures: Sequence[ExplainedPicture]) -> str:
    return "".join(
        f"<section><div class=pictures>{_figure(picture.stored, picture.stored_px, 'as stored')}"
        f"{_figure(picture.seen, picture.seen.size, 'as the tower sees it')}</div>"
        f"<p class=where>{_plain(picture.name)}</p></section>\n"
        for picture in pictures
    )


def _figure(picture: Image.Image, size_px: tuple[int, int], caption: str) -> str:
    size = f"{size_px[0]} × {size_px[1]} pixels"
    return (
        f'<figure><img src="{png_data_uri(picture, max_side_px=MAX_SIDE_PX)}" alt="The picture {caption}">'
        f"<figcaption><b>{caption}</b> {size}</figcaption></figure>"
    )


def _counts(explanation: Explanation) -> str:
    counts = explanation.counts
    full = max(explanation.max_length_tokens, counts["total"])
    bar = "".join(f'<i class="{kind}" style="width:{100 * counts[kind] / full:.2f}%"></i>' for kind in KINDS)
    legend = "".join(
        f'<li><span class="key {kind}"></span><b>{counts[kind]}</b> {kind} <small>{text}</small></li>'
        for kind, text in KINDS.items()
    )
    return (
        f"<section><h2>{counts['total']} tokens <small>of at most {explanation.max_length_tokens}; "
        f"{counts['supervised']} are supervised</small></h2><div class=bar>{bar}</div><ul class=legend>{legend}</ul>"
        "</section>\n"
    )


def _plain(text: str) -> str:
    """A text from the data, escaped and on one line; line ends and tabs are visible, other controls are replaced."""
    return escape("".join(c if c.isprintable() else "�" for c in text.replace("\n", "⏎").replace("\t", "⇥")))


def _visible(text: str) -> str:
    """A token's text, escaped; a line end is visible and also breaks the line."""
    return "\n".join(_plain(line) for line in text.split("\n")).replace("\n", "<s>⏎</s>\n") or "·"


def _spans(tokens: Sequence[Token], *, mark: int | None = None) -> str:
    """Tokens in order, each with its id and position on hover. Consecutive image tokens are one span with their number.

    `mark` is the position of the token to highlight.
    """
    spans = []
    for start, run in runs(tokens):
        if run[0].kind == "image":
            tip = f"id {run[0].id} · positions {start} to {start + len(run) - 1}"
            is_marked = " differs" if mark is not None and start <= mark < start + len(run) else ""
            text = f"{escape(run[0].text)} × {len(run)}"
            spans.append(f'<span class="t image{is_marked}" data-tip="{tip}">{text}</span>')
            continue
        for position, token in enumerate(run, start=start):
            tip = f"id {token.id} · position {position}" + (" · supervised" if token.is_supervised else "")
            is_marked = " differs" if position == mark else ""
            spans.append(f'<span class="t {token.kind}{is_marked}" data-tip="{tip}">{_visible(token.text)}</span>')
    return f"<p class=tokens>{''.join(spans)}</p>"


def _tokens(explanation: Explanation) -> str:
    return f"<section><h2>Training</h2>{_spans(explanation.tokens)}</section>\n"


def _prompt(number: int, prompt: PromptComparison) -> str:
    place = prompt.differs_at
    if place is None:
        verdict = f"<em class=equal>equal</em> {len(prompt.training)} tokens"
    elif prompt.inference is None:
        verdict = "<em class=wrong>cannot be asked</em> a question needs words"
    else:
        verdict = (
            f"<em class=wrong>differs</em> from position {place} on: {len(prompt.training)} tokens in training, "
            f"{len(prompt.inference)} at inference"
        )
    columns = f"<div><h3>Training</h3>{_spans(prompt.training, mark=place)}</div>"
    if prompt.inference is not None:
        columns += f"<div><h3>Inference</h3>{_spans(prompt.inference, mark=place)}</div>"
    is_open = " open" if place is not None else ""
    return (
        f"<details{is_open}><summary><b>Answer {number}</b> <q>{_plain(prompt.answer)}</q> "
        f"<span class=verdict>{verdict}</span></summary><div class=pair>{columns}</div></details>"
    )


def _prompts(explanation: Explanation) -> str:
    is_equal = all(prompt.differs_at is None for prompt in explanation.prompts)
    reasons = "".join(f"<p class=reason>Because {escape(reason)}.</p>" for reason in explanation.reasons)
    verdict = explanation.verdict
    details = "".join(_prompt(number, prompt) for number, prompt in enumerate(explanation.prompts, start=1))
    return (
        f'<section><h2>Inference</h2><p class="banner {"equal" if is_equal else "wrong"}">'
        f"{escape(verdict[:1].upper() + verdict[1:])}.</p>{reasons}{details}</section>\n"
    )
