"""Self-contained HTML pages: one file that loads nothing, and that its Content-Security-Policy keeps from loading."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # no script, and no request to anywhere


def self_contained_page(title: str, style: str, body: str) -> str:
    """The whole page: `style` is CSS that follows web_page.css, `title` and `body` are HTML, escaped already."""
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8") + style
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>\n{style}</style>\n</head>\n'
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def png_data_uri(picture: Image.Image, *, max_side_px: int | None = None, optimize: bool = True) -> str:
    """The picture as a `data:` address that holds a PNG file; shrunk where a side is longer than `max_side_px`."""
    if max_side_px is not None:
        picture = picture.copy()
        picture.thumbnail((max_side_px, max_side_px))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=optimize)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
