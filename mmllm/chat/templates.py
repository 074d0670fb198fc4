"""Chat templates: those of LLaVA and others by name, a tokenizer's own, and how each is saved for other programs.

A template is Jinja text, rendered by transformers. Those here take a message's content as one text in which `<image>`
marks each picture.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmllm.batch import IMAGE_TOKEN
from mmllm.errors import MmllmError


class ChatError(MmllmError):
    """Messages or a template that cannot be rendered exactly."""


_NO_SYSTEM = "{{ raise_exception('it has no system turn') }}"
_FIRST_SYSTEM = (
    "{% if messages and messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = DEFAULT %}{% set turns = messages %}{% endif %}"
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def _first_system(default: str) -> str:
    return _FIRST_SYSTEM.replace("DEFAULT", ascii(default))


_TURNS = "{% for m in turns %}{% if m.role == 'user' %}"
_OTHER = "{% else %}{{ raise_exception('it has a system turn in front only') }}{% endif %}{% endfor %}"
# Sources: plain, vicuna_v1, llama_2, mistral_instruct: LLaVA conversation.py (https://arxiv.org/abs/2310.03744);
# chatml: OpenAI's ChatML as Qwen writes it; llama3: https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/
TEMPLATES: dict[str, str] = {
    "plain": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        "{% elif m.role == 'assistant' %}{{ m.content | trim + eos_token }}"
        "{% else %}" + _NO_SYSTEM + "{% endif %}{% endfor %}"
    ),
    "vicuna_v1": (
        _first_system(_VICUNA_SYSTEM) + "{{ bos_token }}{{ system + ' ' }}" + _TURNS
        + "{{ 'USER: ' + m.content | trim + ' ' }}"
        "{% elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content | trim + eos_token }}" + _OTHER
        + "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "llama_2": (
        _first_system(_LLAMA_2_SYSTEM) + "{{ bos_token }}" + _TURNS
        + "{{ ('' if loop.first else bos_token) + '[INST] ' }}"
        "{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
        "{{ m.content | trim + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}" + _OTHER
    ),
    "mistral_instruct": (
        _first_system("") + "{{ bos_token }}" + _TURNS + "{{ '[INST] ' }}"
        "{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
        "{{ m.content | trim + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}" + _OTHER
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' "
        "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
}  # fmt: skip
OWN_TEMPLATE = "tokenizer"
_PLAIN, _VICUNA = "plain", "vicuna_v1"
_BEGIN = "{{ bos_token }}"
# The first begin token of these is what LLaVA's tokenizers put there; others' is part of the template.
_BEGUN_BY_TOKENIZER = ("plain", "vicuna_v1", "llama_2", "mistral_instruct")


@dataclass(frozen=True)
class ChatTemplate:
    """A template for one tokenizer.

    `cuts_at_images`: the text between two pictures is encoded as a text of its own, as LLaVA's code does. A tokenizer's
    own template is encoded in one go with the marks of the pictures in it, as transformers does.
    """

    name: str
    jinja: str
    cuts_at_images: bool
    begin: str = ""  # the begin token that the tokenizer, not the template, puts in front; what follows begins a text
    keeps_user_text: bool = True  # `plain` shows the picture and nothing else, as LLaVA's stage 1 does
    content: Literal["text", "parts"] = "text"  # how the template takes a message: a text, or a list of parts


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether a text begins with the begin token by the tokenizer's own rule.

    A Llama tokenizer read from `tokenizer.model` alone has the token and no rule; such a one begins texts with it, as
    its published class does. A token that also ends texts (GPT-2) or opens each turn (SmolLM2) begins no text.
    """
    bos = tokenizer.bos_token
    if bos is None:
        return False
    if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        return True
    has_rule = tokenizer.init_kwargs.get("add_bos_token") is False
    return not has_rule and bos != tokenizer.eos_token and bos not in _own_jinja(tokenizer)


def _own_jinja(tokenizer: Any) -> str:
    """The tokenizer's own template, the default one where it has several; empty where it has none."""
    own = getattr(tokenizer, "chat_template", None) or ""
    jinja = str(own.get("default", "")) if isinstance(own, dict) else str(own)
    if not jinja.startswith(_SAVED_HEAD) or _SPACED in jinja:  # with spaces, it is another template's
        return jinja
    return jinja.split(_SAVED_END, 1)[1]


def find_template(name: str, tokenizer: Any) -> ChatTemplate:
    """The template of this name; `tokenizer` is the tokenizer's own. Raises ChatError with the allowed names."""
    if name == OWN_TEMPLATE:
        jinja = _own_jinja(tokenizer)
        if not jinja:
            raise ChatError(f"the tokenizer has no chat template of its own; choose one of {', '.join(TEMPLATES)}")
        return ChatTemplate(name, jinja, cuts_at_images=False, content=_content_kind(tokenizer, jinja))
    if name not in TEMPLATES:
        raise ChatError(f"no chat template {name!r}; allowed: {', '.join([*TEMPLATES, OWN_TEMPLATE])}")
    jinja, begin = TEMPLATES[name], ""
    if name in _BEGUN_BY_TOKENIZER:
        begin = tokenizer.bos_token if begins_with_bos(tokenizer) else ""
        jinja = jinja if begin else jinja.replace("bos_token", "''")
    return ChatTemplate(name, jinja, cuts_at_images=True, begin=begin, keeps_user_text=name != _PLAIN)


def render_template(
    tokenizer: Any, jinja: str, chats: Sequence[Any], *, prompt: bool = False, **variables: Any
) -> list[str]:
    """The texts of these conversations, each a list of `{"role", "content"}`. Raises ChatError where it cannot."""
    from jinja2 import TemplateError

    options = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or "", **variables}
    try:
        texts: list[str] = tokenizer.apply_chat_template(
            list(chats), chat_template=jinja, tokenize=False, add_generation_prompt=prompt, **options
        )
    except TemplateError as error:
        if type(error) is TemplateError:  # raised by the template itself
            raise ChatError(f"the chat template refuses this conversation: {error}") from error
        raise ChatError(f"the chat template cannot be rendered: {error}") from error
    except (TypeError, AttributeError, ValueError, KeyError, IndexError) as error:  # a template's own expressions
        raise ChatError(f"the chat template cannot be rendered: {type(error).__name__}: {error}") from error
    return texts


def _content_kind(tokenizer: Any, jinja: str) -> Literal["text", "parts"]:
    """Templates of vision-language models take a content as a list of parts, and lose one that is a text."""
    probe = "0815"
    texts = {}
    for kind, content in (("text", probe), ("parts", [{"type": "text", "text": probe}])):
        try:
            texts[kind] = render_template(tokenizer, jinja, [[{"role": "user", "content": content}]], prompt=True)[0]
        except ChatError as error:
            texts[kind] = ""
            reason = error
    if probe in texts["text"]:
        return "text"
    if probe in texts["parts"]:
        return "parts"
    if not any(texts.values()):
        raise reason
    raise ChatError(
        f"the tokenizer's chat template does not show a question as it is: {texts['text'] or texts['parts']!r}; choose "
        f"one of {', '.join(TEMPLATES)}"
    )


def refuse_dates(tokenizer: Any, jinja: str, chats: Sequence[Any]) -> None:
    """Raises ChatError where the template writes today's date.

    Templates get it from transformers' function `strftime_now`; a text in its place raises where they call it.
    """
    if "strftime_now" not in jinja:
        return
    try:
        render_template(tokenizer, jinja, chats)
    except ChatError:  # a conversation that it does not take, whatever the day
        return
    try:
        render_template(tokenizer, jinja, chats, strftime_now="")
    except ChatError as error:
        raise ChatError(
            "the tokenizer's chat template writes today's date, so a model would be asked otherwise than it was "
            f"trained; choose one of {', '.join(TEMPLATES)}"
        ) from error


# How other programs (transformers' pipeline, servers) give pictures: a content is a list of parts. Pictures in front of
# the words get what our own chat writes: a label where they are several, and a line of their own.
_SAVED_HEAD = "{#- a content may be a list of texts and images -#}"
_SAVED_END = "{#- the template itself -#}"
_SAVED = (
    _SAVED_HEAD + "{%- set all = namespace(messages=[]) -%}{%- for m in messages -%}"
    "{%- if m.content is string -%}{%- set text = TEXT -%}{%- else -%}"
    "{%- set out = namespace(text='', images=0, words=false) -%}"
    "{%- set count = m.content | selectattr('type', 'equalto', 'image') | list | length -%}"
    "{%- for part in m.content -%}{%- if part.type == 'image' -%}"
    "{%- set out.images = out.images + 1 -%}"
    "{%- if LABEL and count > 1 and not out.words -%}"
    "{%- set out.text = out.text + LABEL.replace('{}', out.images | string) -%}{%- endif -%}"
    "{%- set out.text = out.text + '<image>' -%}"
    "{%- if not out.words and LINES and (loop.nextitem is not defined or loop.nextitem.type == 'image' "
    "or loop.nextitem.text[:1] != '\\n') -%}{%- set out.text = out.text + '\\n' -%}{%- endif -%}"
    "{%- elif part.text is defined and (KEEPS or m.role != 'user') -%}"
    "{%- set out.text = out.text + part.text -%}{%- set out.words = true -%}{%- endif -%}{%- endfor -%}"
    "{%- set text = out.text -%}{%- endif -%}"
    "MARKS{%- set all.messages = all.messages + [dict(role=m.role, content=CONTENT)] -%}{%- endfor -%}"
    "{%- set messages = all.messages -%}" + _SAVED_END
)
_SPACED = (
    "{%- set spaced = namespace(text='') -%}{%- for chunk in text.split('<image>') -%}"
    "{%- if not loop.first -%}{%- set spaced.text = spaced.text + '<image>' -%}"
    "{%- if chunk and chunk[0] != ' ' -%}{%- set spaced.text = spaced.text + ' ' -%}{%- endif -%}{%- endif -%}"
    "{%- set spaced.text = spaced.text + chunk -%}{%- endfor -%}{%- set text = spaced.text -%}"
)


def exported_jinja(template: ChatTemplate, tokenizer: Any, *, label: str) -> str:
    """The template as it is saved for other programs: a content may be a text, or a list of texts and images.

    `label` is what stands before each of several pictures. Where LLaVA's way of encoding puts a space behind a picture
    that transformers' does not, the text has that space.
    """
    images_only = "'<image>' * (m.content.split('<image>') | length - 1) if m.role == 'user' else m.content"
    values = {
        "TEXT": "m.content" if template.keeps_user_text else images_only,
        "LABEL": ascii(label if template.keeps_user_text else ""),
        "LINES": "true" if template.keeps_user_text else "false",
        "KEEPS": "true" if template.keeps_user_text else "false",
        "MARKS": _SPACED if template.cuts_at_images and _lacks_space(tokenizer, IMAGE_TOKEN, "\na") else "",
        "CONTENT": "text" if template.content == "text" else "[{'type': 'text', 'text': text}]",
    }
    head = re.sub("|".join(values), lambda found: values[found[0]], _SAVED)
    jinja = template.jinja
    if template.name == _PLAIN and values["MARKS"]:
        jinja = jinja.replace("m.content | trim", "(' ' if loop.previtem is defined else '') + m.content | trim")
    elif template.begin and _lacks_space(tokenizer, template.begin, "A" if template.name == _VICUNA else "[INST]"):
        jinja = jinja.replace(_BEGIN, "{{ bos_token + ' ' }}", 1)
    return head + jinja


def _lacks_space(tokenizer: Any, before: str, text: str) -> bool:
    """Whether a text alone has the tokens that it has behind a special token and a space, and not behind that alone."""
    if before not in tokenizer.get_vocab():
        return False
    alone, together, spaced = (
        tokenizer.encode(one, add_special_tokens=False) for one in (text, before + text, f"{before} {text}")
    )
    return bool(alone != together[1:] and alone == spaced[1:])


__all__ = [
    "OWN_TEMPLATE",
    "TEMPLATES",
    "ChatError",
    "ChatTemplate",
    "begins_with_bos",
    "exported_jinja",
    "find_template",
    "refuse_dates",
    "render_template",
]  # fmt: skip
