"""The panel "What the model saw": each picture as the vision tower receives it, the exact prompt, tokens and speed."""

from __future__ import annotations

import html

from mmllm.batch import IMAGE_TOKEN, Example, ImageSource
from mmllm.inference.engine import Engine, Reply
from mmllm.web_page import png_data_uri

EMPTY_PREVIEW = '<p class="quiet">Ask about a picture, and this shows how the model got it.</p>'


def _picture_html(engine: Engine, source: ImageSource, number: int) -> str:
    image = engine.prepare(source)
    pixels = engine.preview(image)
    text = engine.seen(image).warning
    warning = f'<span class="warning">{html.escape(text)}</span>' if text else ""
    return (
        f'<figure><img src="{png_data_uri(pixels, optimize=False)}" alt="Picture {number} as the vision tower sees it">'
        f"<figcaption><b>Picture {number}</b> {image.size[1]}×{image.size[0]} → {pixels.width}×{pixels.height} px"
        f"{warning}</figcaption></figure>"
    )


def preview_html(engine: Engine, example: Example) -> str:
    """The pictures and the prompt of one request. Raises MmllmError where the example does not fit the model."""
    pictures = "".join(_picture_html(engine, image, number) for number, image in enumerate(example.images, 1))
    prompt, images = engine.renderer.text_and_images(example.messages)
    starts = [0, *(place + len(IMAGE_TOKEN) for place in images)]
    texts = [html.escape(prompt[start:end]) for start, end in zip(starts, (*images, None), strict=True)]
    return (
        (f'<div class="figures">{pictures}</div>' if pictures else '<p class="quiet">No picture was sent.</p>')
        + '<h3>Prompt, to the letter</h3><pre class="prompt" tabindex="0" aria-label="The exact prompt">'
        + f"<mark>{html.escape(IMAGE_TOKEN)}</mark>".join(texts)
        + "</pre>"
    )


def counts_html(reply: Reply | None) -> str:
    """Token counts and speed of a reply, finished or not; dashes without a reply."""
    counts = dict.fromkeys(("prompt<br>tokens", "image<br>tokens", "new<br>tokens", "tokens<br>a second"), "–")
    if reply is not None:
        speed = reply.num_new_tokens / reply.seconds if reply.seconds > 0 else 0.0
        numbers = (reply.num_prompt_tokens, reply.num_image_tokens, reply.num_new_tokens)
        texts = (*(f"{number:,}" for number in numbers), f"{speed:,.1f}" if speed < 1000 else f"{speed:,.0f}")
        counts = dict(zip(counts, texts, strict=True))
    rows = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in counts.items())
    return f'<dl class="counts">{rows}</dl>'
