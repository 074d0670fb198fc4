"""The one renderer: messages -> (input_ids, is_answer), for training, chat, captioning, evaluation and export.

A conversation is rendered to one text (`transcript.py`), and its ids are those that other programs make of it. The text
is tokenised in one go, never piece by piece: a SentencePiece tokenizer puts a space before each piece. Which tokens are
answer follows from their places in the text.
"""

from __future__ import annotations

import functools
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mmllm.batch import IGNORE_INDEX, IMAGE_TOKEN, TEXT_ENCODING, Example, ImageRef, Message
from mmllm.chat.piecewise import PiecewiseTranscriptRenderer
from mmllm.chat.templates import OWN_TEMPLATE, TEMPLATES, ChatError, exported_jinja, find_template
from mmllm.chat.transcript import Transcript, TranscriptRenderer
from mmllm.images import image_size

Size = tuple[int, int]  # height and width

_CACHED_CHARACTERS = 200  # segments up to this length are cached: template pieces, short questions and answers repeat


@dataclass(frozen=True)
class AnswerTokens:
    """Tokens of one answer: its content from `start` to `content_end`, then what closes it, up to `end`."""

    start: int
    content_end: int
    end: int


@dataclass(frozen=True)
class RenderedConversation:
    """Token ids of a conversation, and which of them are answers: supervised, end tokens included."""

    input_ids: list[int]
    is_answer: list[bool]
    num_image_tokens: int
    answers: tuple[AnswerTokens, ...] = ()
    text: str = ""  # with one `<image>` for each picture
    ends: tuple[int, ...] = ()  # where each token ends in `text`

    @property
    def texts(self) -> list[str]:
        """The part of the text that each token stands for. A character that several tokens share goes to the first."""
        texts, last_end = [], 0
        for end in self.ends:
            texts.append(self.text[last_end:end])
            last_end = max(last_end, end)
        return texts

    @property
    def labels(self) -> list[int]:
        return [i if is_answer else IGNORE_INDEX for i, is_answer in zip(self.input_ids, self.is_answer, strict=True)]


_Token = tuple[int, int]  # id, and where it ends in the transcript's text


class Renderer:
    """Turns conversations into tokens for one tokenizer, template and number of image tokens.

    Args:
        template: a key of TEMPLATES, or `tokenizer`.
        num_image_tokens: of every picture, or a function of a picture's (height, width).
        encoding: the text encoding of the checkpoint. 2: the text is tokenised in one go. 1: each piece of the template
            and each text by itself (`piecewise.py`); so were checkpoints trained that do not name their encoding.
        saved_jinja: the chat template that a checkpoint of encoding 1 was saved with.

    Raises ChatError for a template that cannot be rendered, or whose answers would have no end token.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        *,
        image_token_id: int,
        num_image_tokens: int | Callable[[Size], int],
        encoding: int = TEXT_ENCODING,
        saved_jinja: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.template_name = template
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens
        self.encoding, self._saved_jinja = encoding, saved_jinja
        self.template = find_template(template, tokenizer)
        self._transcripts: TranscriptRenderer | PiecewiseTranscriptRenderer
        if encoding == 1:
            self._transcripts = PiecewiseTranscriptRenderer(tokenizer, saved_jinja or "")
        else:
            self._transcripts = TranscriptRenderer(tokenizer, self.template)
        self._lock = threading.Lock()
        self._encode_cached = functools.lru_cache(maxsize=65536)(self._encode_segment)
        self._special_ids, self.control_tokens = self._special_tokens()
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)))
        self.end_token_id, self.has_end_token = self._end_token()
        if template != OWN_TEMPLATE:
            self.require_end()

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: constructed anew there, since a cache cannot be pickled."""
        construct = functools.partial(
            Renderer, image_token_id=self.image_token_id, num_image_tokens=self.num_image_tokens,
            encoding=self.encoding, saved_jinja=self._saved_jinja,
        )  # fmt: skip
        return construct, (self.tokenizer, self.template_name)

    def _special_tokens(self) -> tuple[dict[str, int], frozenset[str]]:
        """({special token: id}, the control tokens among them).

        Control tokens are those that the tokenizer names and those that the template writes. Texts cannot contain them.
        Other special tokens are content, such as `<box>` in an answer: texts can contain and answers show them.
        """
        added = self.tokenizer.added_tokens_decoder
        special = dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))
        special |= {token.content: number for number, token in added.items() if token.special}
        special[IMAGE_TOKEN] = self.image_token_id
        named = {token for token in self.tokenizer.special_tokens_map.values() if isinstance(token, str)}
        frame = self._transcripts.frame_text()
        written = {token for token in special if token in frame or token in self.template.jinja}
        # Some tokens of templates are not flagged as special, such as DeepSeek's <|User|>. A <think> that comes only
        # before the last answer is not in the frame.
        special |= {token.content: number for number, token in added.items() if token.content in frame}
        return special, frozenset({*named, *written, IMAGE_TOKEN, *(token for token in special if token in frame)})

    def _end_token(self) -> tuple[int, bool]:
        """(the id that ends an answer, whether the template writes it).

        Also sets `_lead`, the text that the template writes before an answer's content.
        """
        rendered = self.render([Message("user", ("Uu0",)), Message("assistant", ("A",))])
        answer = rendered.answers[-1]
        probe = self._decode_shown(self.tokenizer.encode("A", add_special_tokens=False))
        self._lead = (
            self._decode_shown(rendered.input_ids[answer.start : answer.content_end]).removesuffix(probe).strip()
        )
        closing = rendered.input_ids[answer.content_end : answer.end]
        special = {*self.tokenizer.get_added_vocab().values(), *self.tokenizer.all_special_ids}
        if end := next((number for number in closing if number in special), None):
            return end, True
        if self.tokenizer.eos_token_id is None:
            raise ChatError(
                f"template {self.template_name!r} ends answers with nothing, and the tokenizer has no end token; "
                "choose a template that ends answers, or a tokenizer with an end token"
            )
        return int(self.tokenizer.eos_token_id), False

    def require_end(self) -> None:
        """Raises ChatError where training on this template could not teach where an answer ends."""
        if self.has_end_token:
            return
        raise ChatError(
            f"template {self.template_name!r} ends answers with {self._transcripts.closing!r}, for which this "
            "tokenizer has no special token, so training could not teach where an answer ends; choose one "
            f"of {', '.join(TEMPLATES)}"
        )

    def count_image_tokens(self, image: Any) -> int:
        """The number of image tokens of a picture, whose size is read only where the number depends on it."""
        if isinstance(self.num_image_tokens, int):
            return self.num_image_tokens
        return self.num_image_tokens(image_size(image))

    def render(self, messages: Sequence[Message], images: Sequence[Any] = ()) -> RenderedConversation:
        """The tokens of a conversation, or the prompt of one that ends with a question.

        Each picture becomes as many image tokens as it needs. `images` are what the messages refer to; they are needed
        only where the number of image tokens depends on the picture. A prompt is, token by token, the beginning of the
        conversation with its answer: a token that is partly answer is not in it. Raises ChatError.
        """
        is_prompt = not messages or messages[-1].role != "assistant"
        transcript = (
            self._transcripts.prompt_transcript(messages) if is_prompt else self._transcripts.full_transcript(messages)
        )
        refs = [part.index for message in messages for part in message.parts if isinstance(part, ImageRef)]
        if len(refs) != len(transcript.images):
            raise ChatError(
                f"the chat template shows {len(transcript.images)} of the conversation's {len(refs)} pictures"
            )
        has_fixed_count = isinstance(self.num_image_tokens, int)
        counts = [self.count_image_tokens(None if has_fixed_count else images[index]) for index in refs]
        tokens = self._tokens(transcript, counts)
        ends = [end for _, end in tokens]
        answers = [
            AnswerTokens(*(bisect_right(ends, place) for place in (span.start, span.content_end, span.end)))
            for span in transcript.answers
        ]
        if is_prompt:
            del tokens[answers[-1].start :], answers[-1]
        is_answer = [False] * len(tokens)
        for answer in answers:
            is_answer[answer.start : answer.end] = [True] * (answer.end - answer.start)
        ids = [number for number, _ in tokens]
        if any(
            part
            for message in messages
            if message.role == "assistant"
            for part in message.parts
            if isinstance(part, ImageRef)
        ):  # image tokens are never supervised
            is_answer = [flag and number != self.image_token_id for flag, number in zip(is_answer, ids, strict=True)]
        return RenderedConversation(
            ids, is_answer, sum(counts), tuple(answers), transcript.text, tuple(ends[: len(ids)])
        )

    def render_example(self, example: Example) -> RenderedConversation:
        """`render`, after checking that the example's messages refer to each of its images once, in order."""
        refs = [part.index for message in example.messages for part in message.parts if isinstance(part, ImageRef)]
        if refs != list(range(len(example.images))):
            raise ChatError(f"example {example.id}: its text refers to images {refs} but it has {len(example.images)}")
        return self.render(example.messages, example.images)

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation or prompt as one text, for people to read. Each picture is one `<image>`."""
        return self.text_and_images(messages)[0]

    def text_and_images(self, messages: Sequence[Message]) -> tuple[str, tuple[int, ...]]:
        """`text`, and where the `<image>` of each picture begins in it. An `<image>` anywhere else was typed."""
        if not messages or messages[-1].role != "assistant":
            transcript = self._transcripts.prompt_transcript(messages)
            return transcript.prompt, transcript.images
        transcript = self._transcripts.full_transcript(messages)
        return transcript.text, transcript.images

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without control tokens and without what the template writes before a content.

        That is an empty thought, `<think></think>`, where a template of a thinking model writes one before each answer.
        """
        text = self._decode_shown(ids)
        return "" if text and self._lead.startswith(text) else text.removeprefix(self._lead).strip()

    def _decode_shown(self, ids: Sequence[int]) -> str:
        hidden_ids = {self._special_ids[token] for token in self.control_tokens if token in self._special_ids}
        shown = [number for number in ids if number not in hidden_ids]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False)).strip()

    def saved_template(self, label: str) -> str:
        """The chat template as it is saved for other programs. `label` precedes each of several pictures."""
        if self.encoding == 1 and self._saved_jinja:
            return self._saved_jinja
        return exported_jinja(self.template, self.tokenizer, label=label)

    def _tokens(self, transcript: Transcript, counts: Sequence[int]) -> list[_Token]:
        """The tokens of the text, with `counts` of them for each picture.

        A control token is a token where the template wrote it, and plain text where it is part of a content.
        """
        text = transcript.text
        count_at = dict(zip(transcript.images, counts, strict=True))
        content_starts = [start for start, _ in transcript.contents]
        cuts = self._cuts(transcript)
        edges: list[int] = []
        if not self.tokenizer.is_fast:
            edges = [edge for span in transcript.answers for edge in (span.start, span.content_end, span.end)]
        tokens: list[_Token] = []
        place, before = 0, ""
        for match in self._special_pattern.finditer(text):
            token, (start, end) = match[0], match.span()
            count = count_at.get(start, 0) if token == IMAGE_TOKEN else 1
            if token in self.control_tokens and (token != IMAGE_TOKEN or not count):
                content = bisect_right(content_starts, start) - 1
                if content >= 0 and end <= transcript.contents[content][1]:
                    continue  # it is part of a content
            if place < start:
                self._add_segment(tokens, text, (place, start), (before, token), cuts, edges)
            tokens += [(self._special_ids[token], end)] * count
            place, before = end, token
        if place < len(text):
            self._add_segment(tokens, text, (place, len(text)), (before, ""), cuts, edges)
        return tokens

    def _cuts(self, transcript: Transcript) -> set[int]:
        """Places that divide the text: what is on either side is tokenised by itself."""
        cuts = set(transcript.cuts)
        if self.encoding > 1 and (begin := self.template.begin) and transcript.text.startswith(begin):
            cuts.add(len(begin))
        if self.encoding == 1 or self.template.cuts_at_images:
            cuts |= {place + side for place in transcript.images for side in (0, len(IMAGE_TOKEN))}
        return cuts

    def _add_segment(
        self, tokens: list[_Token], text: str, span: tuple[int, int], neighbours: tuple[str, str], cuts: set[int],
        edges: Sequence[int],
    ) -> None:  # fmt: skip
        """Adds the tokens of a span of the text; no special token is in it. `neighbours` are those around it."""
        inner = [cut for cut in cuts if span[0] < cut < span[1]] if cuts else []
        borders = [span[0], *sorted(inner), span[1]]
        for first, last in pairwise(borders):
            before = "" if first in cuts or first > span[0] else neighbours[0]
            after = "" if last in cuts or last < span[1] else neighbours[1]
            here = tuple(edge - first for edge in edges if first < edge < last)
            encode = self._encode_cached if last - first <= _CACHED_CHARACTERS else self._encode_segment
            tokens += [(number, first + end) for number, end in encode(text[first:last], before, after, here)]

    def _encode_segment(
        self, text: str, before: str, after: str, edges: tuple[int, ...]
    ) -> tuple[tuple[int, int], ...]:
        """(id, where it ends in `text`) of each token. The text is encoded between these two special tokens.

        A tokenizer that is not fast gives no character offsets. Then a token ends at the first of `edges` after it.
        """
        options = {"add_special_tokens": False, "split_special_tokens": False}
        if self._special_pattern.search(text):  # as part of a content they are plain text
            before, after, options["split_special_tokens"] = "", "", True
        whole = before + text + after
        skipped = bool(before), bool(after)
        if self.tokenizer.is_fast:
            with self._lock:  # threads must not use one fast tokenizer at the same time
                encoded = self.tokenizer(whole, return_offsets_mapping=True, **options)
            pairs = zip(encoded.input_ids, (end for _, end in encoded.offset_mapping), strict=True)
            tokens = [(number, min(max(end - len(before), 0), len(text))) for number, end in pairs]
            return tuple(tokens[skipped[0] : len(tokens) - skipped[1]])
        ids = self.tokenizer.encode(whole, **options)[skipped[0] :]
        ids = ids[: len(ids) - skipped[1]]
        ends = [len(text)] * len(ids)
        for edge in sorted(edges, reverse=True):
            part = self.tokenizer.encode(before + text[:edge], **options)[skipped[0] :]
            same = next(
                (index for index, pair in enumerate(zip(ids, part, strict=False)) if pair[0] != pair[1]), len(part)
            )
            ends[:same] = [edge] * same
        return tuple(zip(ids, ends, strict=True))


__all__ = ["OWN_TEMPLATE", "TEMPLATES", "AnswerTokens", "ChatError", "RenderedConversation", "Renderer"]
