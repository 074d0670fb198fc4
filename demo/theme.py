"""Colors, fonts and borders of the page, light and dark: paper, ink, and one green. System fonts only."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from gradio.themes.utils import colors

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif")
FONT_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")
# fmt: off
PINE = colors.Color("#effaf6", "#d7f1e8", "#b0e2d2", "#7fcdb6", "#4bb295", "#2b9479", "#1a7561", "#155f50", "#134c41",
                    "#103e36", "#08231f", name="pine")
PAPER = colors.Color("#faf8f4", "#f3f0e9", "#e6e1d6", "#d3ccbe", "#a8a193", "#7d776b", "#5f5a50", "#47443d", "#2b2a27",
                     "#1f1f1d", "#161615", name="paper")
# fmt: on


def asset(name: str) -> str:
    """The text of a file in this folder."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def build_theme() -> gr.themes.Base:
    theme = gr.themes.Base(primary_hue=PINE, secondary_hue=PINE, neutral_hue=PAPER, font=FONT, font_mono=FONT_MONO)
    return theme.set(
        body_background_fill="*neutral_100",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="#fffefb",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_50",
        background_fill_secondary_dark="*neutral_800",
        block_background_fill="#fffefb",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_radius="14px",
        block_shadow="none",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_200",
        block_title_text_weight="600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        border_color_primary="*neutral_200",
        border_color_primary_dark="#383631",
        input_background_fill="#ffffff",
        input_background_fill_dark="*neutral_800",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_400",
        input_radius="10px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_300",
        button_primary_background_fill_hover_dark="*primary_200",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="*neutral_950",
        slider_color="*primary_600",
        slider_color_dark="*primary_300",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="*primary_950",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
    )
