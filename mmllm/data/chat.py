"""The one renderer: messages -> (input_ids, is_answer) in one pass, for training, chat, captioning and evaluation.

A template is data: the text that opens and closes each role's turn. Every piece is tokenised by itself, so answers
and their end token are known by position and never searched for. A tokenizer's own Jinja template is taken apart
into such pieces by rendering probes, and refused where the pieces do not give the same text again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmllm.batch import IGNORE_INDEX, Example, ImageRef, Message, Role
from mmllm.data.images import image_size
from mmllm.user_error import UserError

Size = tuple[int, int]  # height and width


class ChatError(UserError):
    """Messages or a template that cannot be rendered exactly."""


@dataclass(frozen=True)
class Template:
    """What stands around each turn. `{bos}` and `{eos}` stand for the tokenizer's own tokens.

    `assistant_open` is prompt, `assistant_close` is answer: it is supervised and its first token ends generation.
    """

    begin: str
    system_open: str
    system_close: str
    user_open: str
    user_close: str
    assistant_open: str
    assistant_close: str
    default_system: str | None = None
    keeps_user_text: bool = True  # `plain` shows the picture and nothing else, as LLaVA's stage 1 does
    strips: bool = True  # whether each turn's text is stripped, as most tokenizers' own templates do


# Sources: plain, vicuna_v1: LLaVA conversation.py (https://arxiv.org/abs/2310.03744); chatml: OpenAI's ChatML as Qwen
# writes it; llama3: https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"
TEMPLATES: dict[str, Template] = {
    "plain": Template("{bos}", "", "", "", "", "", "{eos}", keeps_user_text=False),
    "vicuna_v1": Template("{bos}", "", " ", "USER: ", " ", "ASSISTANT: ", "{eos}", default_system=_VICUNA_SYSTEM),
    "chatml": Template(
        "",
        "<|im_start|>system\n",
        "<|im_end|>\n",
        "<|im_start|>user\n",
        "<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_end|>\n",
    ),
    "llama3": Template(
        "{bos}",
        _LLAMA3.format("system"),
        "<|eot_id|>",
        _LLAMA3.format("user"),
        "<|eot_id|>",
        _LLAMA3.format("assistant"),
        "<|eot_id|>",
    ),
}
OWN_TEMPLATE = "tokenizer"


def _render_own(tokenizer: Any, turns: Sequence[tuple[str, str]], *, prompt: bool = False, **variables: Any) -> str:
    """The turns in the tokenizer's own template.

    Those of vision-language models take a content as a list of parts, and lose one that is a text without a word.
    """

    def render(contents: list[Any]) -> str:
        messages = [{"role": role, "content": content} for (role, _), content in zip(turns, contents, strict=True)]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **variables)
        return text

    text = render([content for _, content in turns])
    if all(content.strip() in text for _, content in turns):
        return text
    from jinja2 import TemplateError

    try:
        parts = render([[{"type": "text", "text": content}] for _, content in turns])
    except (TypeError, TemplateError):  # this one takes texts, and leaves some out for a reason of its own
        return text
    return parts if all(content.strip() in parts for _, content in turns) else text


def _refuse_dates(tokenizer: Any, turns: Sequence[tuple[str, str]]) -> None:
    """Templates get today's date from transformers' function `strftime_now`: in place of it stands what is none."""
    try:
        _render_own(tokenizer, turns, strftime_now="")
    except TypeError as error:
        raise ChatError(
            "the tokenizer's chat template writes today's date, so a model would be asked otherwise than it was "
            f"trained; choose one of {', '.join(TEMPLATES)}"
        ) from error


def _between(text: str, first: str, second: str | None) -> str:
    start = text.index(first) + len(first)
    return text[start : text.index(second, start) if second else len(text)]


def own_template(tokenizer: Any) -> Template:
    """The tokenizer's Jinja template as pieces. Raises ChatError where they would not render the same text.

    Refused are templates whose text depends on the turn's position, the date, or the words themselves.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ChatError(f"the tokenizer has no chat template of its own; choose one of {', '.join(TEMPLATES)}")
    from jinja2 import TemplateError

    user, answer, again, system = "Uu0", "Aa1", "Uu2", "Ss3"
    try:
        one = _render_own(tokenizer, [("user", user)])
        _refuse_dates(tokenizer, [("user", user)])
        asked = _render_own(tokenizer, [("user", user)], prompt=True)
        two = _render_own(tokenizer, [("user", user), ("assistant", answer), ("user", again)])
        middle = _between(two, answer, again)
        closing = _render_own(tokenizer, [("user", user), ("assistant", answer)])
        close = _between(closing, answer, None)
        if not middle.startswith(close) or not asked.startswith(one):
            raise ChatError(
                "the tokenizer's chat template changes a turn when another follows; choose another template"
            )
        user_open = middle.removeprefix(close)
        head = one[: one.index(user)]
        if not head.endswith(user_open):
            raise ChatError("the tokenizer's chat template opens the first user turn unlike later ones")
        try:
            with_system = _render_own(tokenizer, [("system", system), ("user", user)])
        except TemplateError:
            with_system = ""
        begin, system_open, system_close, default_system = head.removesuffix(user_open), "", "", None
        if system in with_system:
            _refuse_dates(tokenizer, [("system", system), ("user", user)])
            system_close = _between(with_system, system, user).removesuffix(user_open)
            system_open = with_system[: with_system.index(system)]
            default = begin.removeprefix(system_open).removesuffix(system_close)
            if system_open and begin == f"{system_open}{default}{system_close}":
                begin, default_system = "", default
            elif system_open.startswith(begin):
                system_open = system_open.removeprefix(begin)
            else:
                begin = ""
        spaced = _render_own(tokenizer, [("user", f"  {user}  ")])
        template = Template(
            begin=begin,
            system_open=system_open,
            system_close=system_close,
            user_open=user_open,
            user_close=_between(one, user, None),
            assistant_open=asked.removeprefix(one),
            assistant_close=close,
            default_system=default_system,
            strips=f"  {user}" not in spaced,
        )
        _compare(tokenizer, template, system in with_system)
    except TemplateError as error:
        raise ChatError(f"the tokenizer's chat template cannot be rendered: {error}") from error
    except ValueError as error:
        if isinstance(error, ChatError):
            raise
        raise ChatError(f"the tokenizer's chat template does not show each turn's text as it is: {error}") from error
    return template


def _compare(tokenizer: Any, template: Template, has_system: bool) -> None:
    """Renders probes both ways: several turns, awkward text, and a system turn where the template knows one."""
    probes: list[list[tuple[Role, str]]] = [
        [
            ("user", "Why?\n\nSay: <b> {x} & 7"),
            ("assistant", "Because.\n- one\n- two"),
            ("user", "  And? "),
            ("assistant", "So"),
        ],
        [("user", "a"), ("assistant", "b")] * 3,
    ]
    if has_system:
        probes.append([("system", "Be kind."), *probes[0]])
    for turns in probes:
        theirs = _render_own(tokenizer, turns)
        ours = "".join(
            text
            for text, _ in pieces(template, [Message(role, (text,)) for role, text in turns])
            if isinstance(text, str)
        )
        if theirs != ours:
            raise ChatError(
                "the tokenizer's chat template cannot be taken apart exactly: "
                f"it renders {theirs!r} where its pieces give {ours!r}; choose one of {', '.join(TEMPLATES)}"
            )


def find_template(name: str, tokenizer: Any) -> Template:
    """The template of this name; `tokenizer` is the tokenizer's own. Raises ChatError with the allowed names."""
    if name == OWN_TEMPLATE:
        return own_template(tokenizer)
    if name not in TEMPLATES:
        raise ChatError(f"no chat template {name!r}; allowed: {', '.join([*TEMPLATES, OWN_TEMPLATE])}")
    return TEMPLATES[name]


def pieces(template: Template, messages: Sequence[Message]) -> list[tuple[str | ImageRef, bool]]:
    """The conversation as (text or image, is answer), in order. The last turn may be the one to be answered."""
    out: list[tuple[str | ImageRef, bool]] = [(template.begin, False)]
    if template.default_system and (not messages or messages[0].role != "system"):
        messages = [Message("system", (template.default_system,)), *messages]
    for message in messages:
        is_answer = message.role == "assistant"
        if message.role == "system" and not template.system_open and not template.system_close:
            raise ChatError("this chat template has no system turn, but the conversation starts with one")
        out.append((getattr(template, f"{message.role}_open"), False))
        parts: list[str | ImageRef] = list(message.parts)
        if message.role == "user" and not template.keeps_user_text:
            parts = [part for part in parts if isinstance(part, ImageRef)]
        if template.strips and parts:
            if isinstance(parts[0], str):
                parts[0] = parts[0].lstrip()
            if isinstance(parts[-1], str):
                parts[-1] = parts[-1].rstrip()
        out += [(part, is_answer) for part in parts]
        out.append((getattr(template, f"{message.role}_close"), is_answer))
    if messages and messages[-1].role == "user":
        out.append((template.assistant_open, False))
    return [(piece, flag) for piece, flag in out if piece != ""]


def jinja_template(template: Template) -> str:
    """The template as the Jinja text that transformers and others render chats with, images included.

    A message's content is a text, or a list of `{"type": "image"}` and `{"type": "text", "text": ...}`.
    """
    roles = ["user", "assistant"]
    if template.system_open or template.system_close:
        roles.append("system")
    opens, closes = ({role: getattr(template, f"{role}_{side}") for role in roles} for side in ("open", "close"))
    begin = "{{ " + ascii(template.begin) + " }}"
    if template.default_system:
        system = template.default_system.strip() if template.strips else template.default_system
        system = ascii(template.system_open + system + template.system_close)
        begin += "{% if not messages or messages[0].role != 'system' %}{{ " + system + " }}{% endif %}"
    shown = "true" if template.keeps_user_text else "m.role != 'user'"
    return (
        "{% set open = "
        + ascii(opens)
        + " %}{% set close = "
        + ascii(closes)
        + " %}"
        + begin
        + "{% for m in messages %}"
        "{% if m.role not in open %}{{ raise_exception('this chat template has no turn of ' + m.role) }}{% endif %}"
        "{% set content %}{% if m.content is not string %}{% for part in m.content %}{% if part.type == 'image' %}"
        "<image>{% elif " + shown + " %}{{ part.text }}{% endif %}{% endfor %}"
        "{% elif " + shown + " %}{{ m.content }}{% endif %}{% endset %}"
        "{{ open[m.role] }}{{ "
        + ("content | trim" if template.strips else "content")
        + " }}{{ close[m.role] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ open.assistant }}{% endif %}"
    )


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation, and which of them are answers (supervised, end token included)."""

    input_ids: list[int]
    is_answer: list[bool]
    num_image_tokens: int

    @property
    def labels(self) -> list[int]:
        return [i if answer else IGNORE_INDEX for i, answer in zip(self.input_ids, self.is_answer, strict=True)]


class Renderer:
    """Turns conversations into tokens for one tokenizer, template and number of image tokens.

    That number is the same for every picture, or a function of a picture's (height, width).
    """

    def __init__(
        self, tokenizer: Any, template: str, *, image_token_id: int, num_image_tokens: int | Callable[[Size], int]
    ):
        self.tokenizer = tokenizer
        self.template_name = template
        found = find_template(template, tokenizer)
        marks = {"{bos}": tokenizer.bos_token or "", "{eos}": tokenizer.eos_token or ""}
        begin, close = (functools.reduce(lambda text, mark: text.replace(*mark), marks.items(), text)
                        for text in (found.begin, found.assistant_close))  # fmt: skip
        self.template = replace(found, begin=begin, assistant_close=close)
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens
        self.encode = functools.lru_cache(maxsize=65536)(self._encode_piece)
        closing_ids = self.encode(close)
        if not closing_ids:
            raise ChatError(f"template {template!r} ends answers with nothing; the tokenizer needs an end token")
        self.end_token_id: int = closing_ids[0]
        if self.end_token_id not in {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}:
            raise ChatError(
                f"template {template!r} ends answers with {close!r}, which this tokenizer has no special token for, so "
                "an answer would end wherever these characters stand; choose another template"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: made anew there, since a cache cannot travel."""
        make = functools.partial(Renderer, image_token_id=self.image_token_id, num_image_tokens=self.num_image_tokens)
        return make, (self.tokenizer, self.template_name)

    def _encode_piece(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if self.image_token_id in ids:
            raise ChatError(f"the text {text[:60]!r} holds the image token itself; images are given as images")
        return tuple(ids)

    def count_image_tokens(self, image: Any) -> int:
        """The image tokens of a picture: its file is looked into where their number depends on it."""
        if isinstance(self.num_image_tokens, int):
            return self.num_image_tokens
        return self.num_image_tokens(image_size(image))

    def render(self, messages: Sequence[Message], images: Sequence[Any] = ()) -> Rendered:
        """One pass over the messages; images become as many image tokens as they need.

        `images` are those that the messages refer to; they are asked for where the number of tokens depends on them.
        """
        ids: list[int] = []
        answers: list[bool] = []
        num_image_tokens = 0
        for piece, is_answer in pieces(self.template, messages):
            if isinstance(piece, ImageRef):
                is_fixed = isinstance(self.num_image_tokens, int)
                count = self.count_image_tokens(None if is_fixed else images[piece.index])
                new: tuple[int, ...] = (self.image_token_id,) * count
                num_image_tokens += count
                is_answer = False
            else:
                new = self.encode(piece)
            ids.extend(new)
            answers.extend([is_answer] * len(new))
        return Rendered(ids, answers, num_image_tokens)

    def render_example(self, example: Example) -> Rendered:
        """`render`, with the example's images counted against its references."""
        refs = [part.index for message in example.messages for part in message.parts if isinstance(part, ImageRef)]
        if refs != list(range(len(example.images))):
            raise ChatError(f"example {example.id}: its text refers to images {refs} but it has {len(example.images)}")
        return self.render(example.messages, example.images)

    def text(self, messages: Sequence[Message]) -> str:
        """The same conversation as one text, for people to read; each image is one `<image>`."""
        return "".join(
            "<image>" if isinstance(piece, ImageRef) else piece for piece, _ in pieces(self.template, messages)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens without special ones."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()
