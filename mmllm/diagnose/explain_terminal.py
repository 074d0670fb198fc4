"""An explained example in the terminal: its pictures as half-block characters, its tokens colored by kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmllm.diagnose.explain import Explanation, PromptComparison, Token, runs
from mmllm.inference.terminal_chat import printable

STYLES = {"image": "white on blue", "prompt": "", "answer": "black on green", "end": "black on yellow"}
PICTURE_COLUMNS = 32  # characters, each one pixel wide and two pixels high
TABLE_WIDTH = 120  # in characters, where the output is not a terminal
# A unit is a token, or a group of consecutive image tokens.
NUM_UNITS_BEFORE = 6  # shown before the first token that differs
NUM_UNITS_AFTER = 12  # shown from that token on


def shown_text(text: str) -> str:
    """A token's text with line ends and tabs made visible, and without the control characters of a terminal."""
    return printable(text.replace("\n", "⏎").replace("\t", "⇥")) or "·"


def show(explanation: Explanation, html: Path | None) -> None:
    """Prints the explanation; pictures only on a terminal with colors."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    example = explanation.example
    console.print(
        Text(printable(example.id), style="bold"), f"in {example.source} ({explanation.split})", soft_wrap=True
    )
    if explanation.also_in:
        console.print(
            f"note: other files hold an example with this id: {', '.join(explanation.also_in)}", soft_wrap=True
        )
    _show_pictures(console, explanation)
    console.print(_counts(explanation))
    console.print()
    console.print(_tokens_table(explanation.tokens))
    console.print()
    style = "bold green" if all(prompt.differs_at is None for prompt in explanation.prompts) else "bold red"
    console.print(Text("inference prompt", style="bold"), Text(explanation.verdict, style=style), soft_wrap=True)
    for reason in explanation.reasons:
        console.print(f"because {reason}", soft_wrap=True)
    for number, prompt in enumerate(explanation.prompts, start=1):
        _show_prompt(console, number, prompt)
    if html is not None:
        console.print(f"page: {html}", soft_wrap=True)


def half_blocks(picture: Image.Image, columns: int) -> Text:
    """The picture drawn with the character ▀: one pixel for each column, two for each line."""
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


def _show_pictures(console: Console, explanation: Explanation) -> None:
    for picture in explanation.pictures:
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


def _counts(explanation: Explanation) -> Text:
    counts = explanation.counts
    text = Text(f"{counts['total']} tokens of at most {explanation.max_length_tokens}: ")
    for kind, style in STYLES.items():
        text.append(f" {counts[kind]} {kind} ", style=style).append(" ")
    return text.append(f" {counts['supervised']} are supervised; template {explanation.template}")


def _joined(tokens: Sequence[Token]) -> Text:
    """Tokens one after the other, a bar between two; consecutive image tokens as their number."""
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


def _show_prompt(console: Console, number: int, prompt: PromptComparison) -> None:
    place = prompt.differs_at
    name = f"  answer {number}"
    if place is None:
        console.print(Text(f"{name}: equal, {len(prompt.training)} tokens", style="green"), soft_wrap=True)
        return
    if prompt.inference is None:
        console.print(Text(f"{name}: cannot be asked, a question needs words", style="red"), soft_wrap=True)
        return
    console.print(Text(f"{name}: differs from position {place} on", style="red"), soft_wrap=True)
    grid = Table.grid(padding=(0, 2))
    for label, tokens in (("training", prompt.training), ("inference", prompt.inference)):
        before, after = _units(tokens[:place]), _units(tokens[place:])
        shown = Text.assemble(
            ("… " if len(before) > NUM_UNITS_BEFORE else "", "dim"),
            _joined([token for unit in before[-NUM_UNITS_BEFORE:] for token in unit]),
            (" ▶ ", "bold red"),
            _joined([token for unit in after[:NUM_UNITS_AFTER] for token in unit]),
            (" …" if len(after) > NUM_UNITS_AFTER else "", "dim"),
        )
        grid.add_row(f"    {label}, {len(tokens)} tokens", shown)
    console.print(grid)


def _units(tokens: Sequence[Token]) -> list[list[Token]]:
    """Each token alone, but consecutive image tokens together."""
    return [
        unit for _, run in runs(tokens) for unit in ([run] if run[0].kind == "image" else [[token] for token in run])
    ]
