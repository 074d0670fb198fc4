"""An explained example in the terminal: its pictures in half blocks, its tokens in the colors of their kinds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmllm.diagnose.explain import Asked, Explanation, Token, runs
from mmllm.inference.terminal_chat import printable

STYLES = {"image": "white on blue", "prompt": "", "answer": "black on green", "end": "black on yellow"}
PICTURE_COLUMNS = 32  # and as many pixels, two of them in each character's height
FILE_WIDTH = 120  # of tables where no terminal gives one
CONTEXT_UNITS = 6  # tokens shown before the first one that differs; image tokens that stand together count as one
NUM_UNITS_AFTER = 12  # and from it on


def shown_text(text: str) -> str:
    """A token's text with what cannot be seen made visible, and nothing in it that commands a terminal."""
    return printable(text.replace("\n", "⏎").replace("\t", "⇥")) or "·"


def show(found: Explanation, html: Path | None) -> None:
    """Prints the explanation; pictures only where there is a terminal with colors."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    example = found.example
    console.print(Text(printable(example.id), style="bold"), f"in {example.source} ({found.split})", soft_wrap=True)
    if found.also_in:
        console.print(f"note: other files have an example of this id: {', '.join(found.also_in)}", soft_wrap=True)
    _show_pictures(console, found)
    console.print(_counts(found))
    console.print()
    console.print(_tokens_table(found.tokens))
    console.print()
    style = "bold green" if all(asked.differs_at is None for asked in found.prompts) else "bold red"
    console.print(Text("inference prompt", style="bold"), Text(found.verdict, style=style), soft_wrap=True)
    for reason in found.reasons:
        console.print(f"because {reason}", soft_wrap=True)
    for number, asked in enumerate(found.prompts, start=1):
        _show_prompt(console, number, asked)
    if html is not None:
        console.print(f"page: {html}", soft_wrap=True)


def half_blocks(picture: Image.Image, columns: int) -> Text:
    """The picture with one pixel a column, two a line."""
    columns = min(columns, picture.width)
    rows = max(2, round(picture.height * columns / picture.width / 2) * 2)
    small = picture.resize((columns, rows), Image.Resampling.BOX)
    text = Text()
    for y in range(0, rows, 2):
        for x in range(columns):
            upper, lower = (small.getpixel((x, y + below)) for below in (0, 1))
            assert isinstance(upper, tuple)
            assert isinstance(lower, tuple)
            text.append("▀", style=f"rgb({','.join(map(str, upper))}) on rgb({','.join(map(str, lower))})")
        text.append("\n")
    return text


def _show_pictures(console: Console, found: Explanation) -> None:
    for picture in found.pictures:
        sizes = [f"{width} x {height}" for width, height in (picture.stored_px, picture.seen.size)]
        if not console.is_terminal or not console.color_system:
            console.print(f"{printable(picture.name)}: {sizes[0]}, {sizes[1]} as the tower sees it", soft_wrap=True)
            continue
        console.print(printable(picture.name), style="dim", soft_wrap=True)
        columns = min(PICTURE_COLUMNS, (console.width - 4) // 2)
        grid = Table.grid(padding=(0, 4))
        grid.add_row(f"as stored, {sizes[0]}", f"as the tower sees it, {sizes[1]}")
        grid.add_row(half_blocks(picture.stored, columns), half_blocks(picture.seen, columns))
        console.print(grid)


def _counts(found: Explanation) -> Text:
    counts = found.counts
    text = Text(f"{counts['total']} tokens of at most {found.max_length_tokens}: ")
    for kind, style in STYLES.items():
        text.append(f" {counts[kind]} {kind} ", style=style).append(" ")
    return text.append(f" {counts['supervised']} are supervised; template {found.template}")


def _joined(tokens: Sequence[Token]) -> Text:
    """Tokens of any kinds behind each other, with a line between two; image tokens as their number."""
    text = Text()
    for _, run in runs(tokens):
        if text:
            text.append("│", style="dim")
        if run[0].kind == "image":
            text.append(f"{run[0].text} x {len(run)}", style=STYLES["image"])
            continue
        for index, token in enumerate(run):
            if index:
                text.append("│", style=f"dim {STYLES[token.kind]}")
            text.append(shown_text(token.text), style=STYLES[token.kind])
    return text


def _tokens_table(tokens: Sequence[Token]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("position", justify="right", style="dim")
    table.add_column("kind")
    table.add_column("taught")
    table.add_column("tokens", overflow="fold")
    for start, run in runs(tokens):
        last = start + len(run) - 1
        place = str(start) if last == start else f"{start}-{last}"
        taught = "yes" if any(token.is_supervised for token in run) else ""
        table.add_row(place, run[0].kind, taught, _joined(run))
    return table


def _show_prompt(console: Console, number: int, asked: Asked) -> None:
    place = asked.differs_at
    name = f"  answer {number}"
    if place is None:
        console.print(Text(f"{name}: equal, {len(asked.training)} tokens", style="green"), soft_wrap=True)
        return
    if asked.inference is None:
        console.print(Text(f"{name}: cannot be asked, a question needs words", style="red"), soft_wrap=True)
        return
    console.print(Text(f"{name}: differs from position {place} on", style="red"), soft_wrap=True)
    grid = Table.grid(padding=(0, 2))
    for label, tokens in (("training", asked.training), ("inference", asked.inference)):
        before, after = _units(tokens[:place]), _units(tokens[place:])
        shown = Text.assemble(
            ("… " if len(before) > CONTEXT_UNITS else "", "dim"),
            _joined([token for unit in before[-CONTEXT_UNITS:] for token in unit]),
            (" ▶ ", "bold red"),
            _joined([token for unit in after[:NUM_UNITS_AFTER] for token in unit]),
            (" …" if len(after) > NUM_UNITS_AFTER else "", "dim"),
        )
        grid.add_row(f"    {label}, {len(tokens)} tokens", shown)
    console.print(grid)


def _units(tokens: Sequence[Token]) -> list[list[Token]]:
    """Tokens one by one, but neighbouring image tokens together."""
    return [
        unit for _, run in runs(tokens) for unit in ([run] if run[0].kind == "image" else [[token] for token in run])
    ]
