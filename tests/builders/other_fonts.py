"""Draws written words in fonts that training never shows: four families of packages that nobody here made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from mmllm.scenes.draw import draw
from tests.builders.other_renderer import redraw
from tests.builders.real_parts import PARTS

FONTS = tuple(
    str(PARTS / path)
    for path in (
        "font_source_sans_pro/files/SourceSansPro-Regular.ttf",
        "font_source_sans_pro/files/SourceSansPro-Bold.ttf",
        "font_source_serif_pro/files/SourceSerifPro-Regular.ttf",
        "font_source_serif_pro/files/SourceSerifPro-Bold.ttf",
        "font_manrope/files/Manrope-Regular.ttf",
        "font_manrope/files/Manrope-Bold.ttf",
        "font_caladea/files/Caladea-Regular.ttf",
        "font_caladea/files/Caladea-Bold.ttf",
    )
)


@contextmanager
def other_fonts() -> Iterator[None]:
    """Inside, every written line is in one of FONTS."""
    with mock.patch("mmllm.scenes.draw.font_files", return_value=FONTS):
        yield


def redraw_words(folder: Path) -> None:
    """Draws the pictures with written words of a split anew."""
    with other_fonts():
        redraw(folder, draw, kinds=("text",))
