"""An explained example as one page: a file that needs nothing else, light and dark, wide and narrow."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from mmllm.diagnose.explain import Asked, ExplainedPicture, Explanation, Token, runs

MAX_SIDE_PX = 1024  # of a picture in the page; a larger one is shown smaller
KINDS = {
    "image": "what the projector puts in for the picture",
    "prompt": "read, not taught",
    "answer": "taught",
    "end": "taught: here the answer stops",
}
# No script, and nothing is loaded from anywhere.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(found: Explanation) -> str:
    """The whole page as HTML."""
    style = Path(__file__).with_name("explain.css").read_text(encoding="utf-8")
    title = _plain(found.example.id)
    body = [_head(found), _pictures(found.pictures), _counts(found), _tokens(found), _prompts(found)]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title} - mmllm explain</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>\n{style}</style>\n</head>\n'
        f"<body>\n<main>\n{''.join(body)}</main>\n</body>\n</html>\n"
    )


def _head(found: Explanation) -> str:
    also = "".join(f"<p class=note>{escape(path)} has an example of this id too.</p>" for path in found.also_in)
    return (
        f"<header><p class=over>What the model sees and is taught</p><h1>{_plain(found.example.id)}</h1>"
        f"<p class=where>{escape(found.split)}, {escape(found.example.source)}<br>"
        f"settings {escape(found.config)}, template {escape(found.template)}</p>{also}</header>\n"
    )


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _pictures(pictures: Sequence[ExplainedPicture]) -> str:
    return "".join(
        f"<section><div class=pictures>{_figure(picture.stored, picture.stored_px, 'as stored')}"
        f"{_figure(picture.seen, picture.seen.size, 'as the tower sees it')}</div>"
        f"<p class=where>{_plain(picture.name)}</p></section>\n"
        for picture in pictures
    )


def _figure(picture: Image.Image, size_px: tuple[int, int], caption: str) -> str:
    shown = picture.copy()
    shown.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    size = f"{size_px[0]} × {size_px[1]} pixels"
    return (
        f'<figure><img src="{_data_uri(shown)}" alt="The picture {caption}">'
        f"<figcaption><b>{caption}</b> {size}</figcaption></figure>"
    )


def _counts(found: Explanation) -> str:
    counts = found.counts
    full = max(found.max_length_tokens, counts["total"])
    bar = "".join(f'<i class="{kind}" style="width:{100 * counts[kind] / full:.2f}%"></i>' for kind in KINDS)
    legend = "".join(
        f'<li><span class="key {kind}"></span><b>{counts[kind]}</b> {kind} <small>{text}</small></li>'
        for kind, text in KINDS.items()
    )
    return (
        f"<section><h2>{counts['total']} tokens <small>of at most {found.max_length_tokens}; "
        f"{counts['supervised']} are supervised</small></h2><div class=bar>{bar}</div><ul class=legend>{legend}</ul>"
        "</section>\n"
    )


def _plain(text: str) -> str:
    """A text from the data on one line, with nothing in it that the page would take for its own."""
    return escape("".join(c if c.isprintable() else "�" for c in text.replace("\n", "⏎").replace("\t", "⇥")))


def _visible(text: str) -> str:
    """A token's text; a line end is shown, and breaks the line."""
    return "\n".join(_plain(line) for line in text.split("\n")).replace("\n", "<s>⏎</s>\n") or "·"


def _spans(tokens: Sequence[Token], *, mark: int | None = None) -> str:
    """Tokens as they read, each with its id and position on hover; image tokens as one with their number."""
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


def _tokens(found: Explanation) -> str:
    return f"<section><h2>Training</h2>{_spans(found.tokens)}</section>\n"


def _prompt(number: int, asked: Asked) -> str:
    place = asked.differs_at
    if place is None:
        verdict = f"<em class=equal>equal</em> {len(asked.training)} tokens"
    elif asked.inference is None:
        verdict = "<em class=wrong>cannot be asked</em> a question needs words"
    else:
        verdict = (
            f"<em class=wrong>differs</em> from position {place} on: {len(asked.training)} tokens in training, "
            f"{len(asked.inference)} at inference"
        )
    columns = f"<div><h3>Training</h3>{_spans(asked.training, mark=place)}</div>"
    if asked.inference is not None:
        columns += f"<div><h3>Inference</h3>{_spans(asked.inference, mark=place)}</div>"
    is_open = " open" if place is not None else ""
    return (
        f"<details{is_open}><summary><b>Answer {number}</b> <q>{_plain(asked.answer)}</q> "
        f"<span class=verdict>{verdict}</span></summary><div class=pair>{columns}</div></details>"
    )


def _prompts(found: Explanation) -> str:
    is_equal = all(asked.differs_at is None for asked in found.prompts)
    reasons = "".join(f"<p class=reason>Because {escape(reason)}.</p>" for reason in found.reasons)
    verdict = found.verdict
    details = "".join(_prompt(number, asked) for number, asked in enumerate(found.prompts, start=1))
    return (
        f'<section><h2>Inference</h2><p class="banner {"equal" if is_equal else "wrong"}">'
        f"{escape(verdict[:1].upper() + verdict[1:])}.</p>{reasons}{details}</section>\n"
    )
