"""Inspects rows before a run uses them, and keeps a few numbers of each usable one, or the reason why it is not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmllm.batch import Example
from mmllm.chat.renderer import ChatError, RenderedConversation, Renderer
from mmllm.data.formats import row_id, unread_keys
from mmllm.data.sources import BadRow, hash64, load_pictures
from mmllm.images import ImageError, load_image
from mmllm.readers.files import LazyImage, RowError

_PICTURE_WORDS = re.compile(r"\b(picture|image|photo|photograph)s?\b", re.IGNORECASE)

Quarantine = Mapping[tuple[str, int], BadRow]  # {(file, row): why it is left out}; such rows are not read again


@dataclass(frozen=True)
class RowRules:
    """What a row must fulfil. Without a renderer no tokens are counted; `decode` decodes every picture."""

    renderer: Renderer | None
    max_length_tokens: int
    decode: bool = False
    max_positions: int | None = None  # the longest row that the LLM can take; None where it has no limit
    quarantine: Quarantine = field(default_factory=dict)


@dataclass
class PartReport:
    """What was found in some rows of a source, its part."""

    rows: list[int] = field(default_factory=list)  # numbers of the usable rows
    lengths: list[int] = field(default_factory=list)  # tokens of each usable row
    images: list[int] = field(default_factory=list)  # pictures of each usable row
    contents: list[int] = field(default_factory=list)  # a hash of the messages and pictures of each usable row
    ids: list[int] = field(default_factory=list)  # a hash of the id of every row
    bad: list[BadRow] = field(default_factory=list)
    undecodable: dict[str, str] = field(default_factory=dict)  # {picture: why it cannot be decoded}
    counts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # keys of rows that nothing reads


class RowInspector:
    """Inspects rows one by one and collects its findings in `report`."""

    def __init__(self, rules: RowRules):
        self.rules = rules
        self.report = PartReport()
        self._decoded: set[str] = set()

    def inspect(
        self, name: str, row: int, read: Callable[[], Any], make: Callable[[Any, int], Example]
    ) -> Example | None:
        """The example of a row, None where it cannot be used. `read` returns the raw row, `make` its example."""
        report, fields = self.report, None
        because: Any = "row"
        if listed := self.rules.quarantine.get((name, row)):
            report.bad.append(listed)
            report.ids.append(hash64(listed.id))
            return None
        try:
            fields = read()
            example = make(fields, row)
            because = "picture"
            picture_keys = [self._picture_key(image, f"a picture in {name} row {row}") for image in example.images]
            because = "settings"
            length = self._count_tokens(example)
        except (RowError, ChatError, ImageError) as error:
            report.bad.append(BadRow(name, row, row_id(fields, row), str(error), because))
            return None
        finally:
            report.ids.append(hash64(row_id(fields, row)))
        report.rows.append(row)
        report.lengths.append(length)
        report.images.append(len(picture_keys))
        report.contents.append(hash64(repr((picture_keys, example.messages))))
        report.unread.update(unread_keys(fields))
        report.counts["images"] += len(picture_keys)
        if not picture_keys:
            report.counts["without_image"] += 1
            report.counts["asking"] += bool(_PICTURE_WORDS.search(example.messages[0].text))
        return example

    def _picture_key(self, image: Any, unnamed: str) -> str | int:
        """What tells a picture from others: its path, or a hash of its bytes where they are at hand.

        With the rule `decode`, raises RowError where the picture cannot be decoded. `unnamed` is how messages call a
        picture that has no path.
        """
        name = image if isinstance(image, str) else image.name if isinstance(image, LazyImage) else unnamed
        if name in self.report.undecodable:
            raise RowError(self.report.undecodable[name])
        if isinstance(image, LazyImage) and not self.rules.decode:
            return str(name)
        data = image.load() if isinstance(image, LazyImage) else image
        if self.rules.decode and name not in self._decoded:
            try:
                load_image(data, may_shrink=True)
            except ImageError as error:
                reason = str(error) if isinstance(image, str) else f"{name}: {error}"
                self.report.undecodable[name] = reason
                raise RowError(reason) from error
            if isinstance(image, str):
                self._decoded.add(name)
        return str(image) if isinstance(image, str) else hash64(data)

    def _count_tokens(self, example: Example) -> int:
        """The example's length in tokens, 0 where they are not counted. Raises RowError as `check_tokens` does."""
        if self.rules.renderer is None:
            return 0
        if not isinstance(self.rules.renderer.num_image_tokens, int):  # their number depends on each picture's size
            example = load_pictures(example)
        tokens = check_tokens(
            example, self.rules.renderer, self.rules.max_length_tokens, max_positions=self.rules.max_positions
        )
        self.report.counts["image_tokens"] += tokens.num_image_tokens
        self.report.counts["supervised"] += sum(tokens.is_answer)
        return len(tokens.input_ids)


def positions_note(max_length_tokens: int, max_positions: int) -> str:
    """The message, printed once, where data.max_length_tokens allows more than the LLM can take."""
    return (
        f"data.max_length_tokens = {max_length_tokens} is more than the {max_positions} positions of the LLM: "
        f"examples of more than {max_positions} tokens are left out"
    )


def check_tokens(
    example: Example, renderer: Renderer, max_length_tokens: int, *, max_positions: int | None = None
) -> RenderedConversation:
    """The example's tokens. Raises RowError where it is too long, or where an answer is not learnt to its end."""
    rendered = renderer.render_example(example)
    length = len(rendered.input_ids)
    limit, limit_name = max_length_tokens, f"data.max_length_tokens = {max_length_tokens}"
    if max_positions is not None and max_positions < max_length_tokens:
        limit, limit_name = max_positions, f"the {max_positions} positions of the LLM, which cannot take a longer row"
    if length > limit:
        raise RowError(f"{length} tokens ({rendered.num_image_tokens} of them for images) are more than {limit_name}")
    answer_ids = [i for i, is_answer in zip(rendered.input_ids, rendered.is_answer, strict=True) if is_answer]
    num_answers = sum(message.role == "assistant" for message in example.messages)
    num_ends = answer_ids.count(renderer.end_token_id)
    if not any(rendered.is_answer[1:]) or num_ends < num_answers:
        raise RowError(
            f"some answer has no supervised token or no end token: {num_ends} end tokens in {num_answers} answers"
        )
    return rendered
