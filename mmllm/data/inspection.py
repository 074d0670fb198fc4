"""What is asked of every row before a run uses it, and what is kept of it: a few numbers, or the reason why not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmllm.batch import Example
from mmllm.chat.renderer import ChatError, Rendered, Renderer
from mmllm.data.formats import row_id, unread_keys
from mmllm.data.sources import BadRow, hash_of, load_pictures
from mmllm.images import ImageError, load_image
from mmllm.readers.files import RowError, Stored

_PICTURE_WORDS = re.compile(r"\b(picture|image|photo|photograph)s?\b", re.IGNORECASE)

Quarantine = Mapping[tuple[str, int], BadRow]  # (file, row): left out without being looked at again


@dataclass(frozen=True)
class Rules:
    """What is asked of every example. Without a renderer no token is counted; `decode` looks into every picture."""

    renderer: Renderer | None
    max_length_tokens: int
    decode: bool = False
    max_positions: int | None = None  # the longest row that the LLM can be given; None where it has no such end
    quarantine: Quarantine = field(default_factory=dict)


@dataclass
class Part:
    """What some rows of a source are: the numbers of the usable ones, and the bad ones with their reasons."""

    rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)  # how many the usable ones have
    contents: list[int] = field(default_factory=list)  # hashes of what the usable ones say
    ids: list[int] = field(default_factory=list)  # hashes of the ids of all
    bad: list[BadRow] = field(default_factory=list)
    undecodable: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)  # keys of rows that are not read


class Inspector:
    """Looks at rows one by one and keeps in `part` what it finds."""

    def __init__(self, rules: Rules):
        self.rules = rules
        self.part = Part()
        self._decoded: set[str] = set()

    def look(self, name: str, row: int, read: Callable[[], Any], make: Callable[[Any, int], Example]) -> Example | None:
        """The example of a row, None where it cannot be used. `read` gives the raw row and `make` its example."""
        part, fields = self.part, None
        because: Any = "row"
        if known := self.rules.quarantine.get((name, row)):
            part.bad.append(known)
            part.ids.append(hash_of(known.id))
            return None
        try:
            fields = read()
            example = make(fields, row)
            because = "picture"
            seen = [self._identity(image, f"a picture in {name} row {row}") for image in example.images]
            because = "settings"
            length = self._count_tokens(example)
        except (RowError, ChatError, ImageError) as error:
            part.bad.append(BadRow(name, row, row_id(fields, row), str(error), because))
            return None
        finally:
            part.ids.append(hash_of(row_id(fields, row)))
        part.rows.append(row)
        part.lengths.append(length)
        part.images.append(len(seen))
        part.contents.append(hash_of(repr((seen, example.messages))))
        part.unread.update(unread_keys(fields))
        part.counts["images"] += len(seen)
        if not seen:
            part.counts["without_image"] += 1
            part.counts["asking"] += bool(_PICTURE_WORDS.search(example.messages[0].text))
        return example

    def _identity(self, image: Any, unnamed: str) -> str | int:
        """What tells a picture from others: its path, or a hash of its bytes where they are here.

        Raises RowError where `decode` is asked for and fails.
        """
        name = image if isinstance(image, str) else image.name if isinstance(image, Stored) else unnamed
        if name in self.part.undecodable:
            raise RowError(self.part.undecodable[name])
        if isinstance(image, Stored) and not self.rules.decode:
            return str(name)
        data = image.load() if isinstance(image, Stored) else image
        if self.rules.decode and name not in self._decoded:
            try:
                load_image(data, may_shrink=True)
            except ImageError as error:
                reason = str(error) if isinstance(image, str) else f"{name}: {error}"
                self.part.undecodable[name] = reason
                raise RowError(reason) from error
            if isinstance(image, str):
                self._decoded.add(name)
        return str(image) if isinstance(image, str) else hash_of(data)

    def _count_tokens(self, example: Example) -> int:
        """The example's length in tokens, 0 where they are not counted. Raises RowError as `check_tokens` does."""
        if self.rules.renderer is None:
            return 0
        if not isinstance(self.rules.renderer.num_image_tokens, int):  # then pictures are looked into
            example = load_pictures(example)
        tokens = check_tokens(
            example, self.rules.renderer, self.rules.max_length_tokens, max_positions=self.rules.max_positions
        )
        self.part.counts["image_tokens"] += tokens.num_image_tokens
        self.part.counts["supervised"] += sum(tokens.is_answer)
        return len(tokens.input_ids)


def positions_note(max_length_tokens: int, max_positions: int) -> str:
    """What is said once where data.max_length_tokens allows more than the LLM can be given."""
    return (
        f"data.max_length_tokens = {max_length_tokens} is more than the {max_positions} positions of the LLM: "
        f"examples of more than {max_positions} tokens are left out"
    )


def check_tokens(
    example: Example, renderer: Renderer, max_length_tokens: int, *, max_positions: int | None = None
) -> Rendered:
    """The example's tokens. Raises RowError where it is too long, or does not teach every answer to its end."""
    rendered = renderer.render_example(example)
    length = len(rendered.input_ids)
    limit, of = max_length_tokens, f"data.max_length_tokens = {max_length_tokens}"
    if max_positions is not None and max_positions < max_length_tokens:
        limit, of = max_positions, f"the {max_positions} positions of the LLM, which cannot be given a longer row"
    if length > limit:
        raise RowError(f"{length} tokens ({rendered.num_image_tokens} of them for images) are more than {of}")
    answer_ids = [i for i, is_answer in zip(rendered.input_ids, rendered.is_answer, strict=True) if is_answer]
    num_answers = sum(message.role == "assistant" for message in example.messages)
    num_ends = answer_ids.count(renderer.end_token_id)
    if not any(rendered.is_answer[1:]) or num_ends < num_answers:
        raise RowError(f"no answer token is supervised, or no end: {num_ends} ends of {num_answers} answers")
    return rendered
