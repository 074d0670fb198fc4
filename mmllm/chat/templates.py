"""Chat templates: those of LLaVA and others by name, a tokenizer's own, and how each is saved for other programs.

A template is Jinja text, which transformers renders. The templates here take a message's content as one text with an
`<image>` mark for each picture.
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
# For these, LLaVA's tokenizers put the first begin token. In other templates it is part of the template.
_BOS_BY_TOKENIZER = ("plain", "vicuna_v1", "llama_2", "mistral_instruct")


@dataclass(frozen=True)
class ChatTemplate:
    """A template for one tokenizer.

    `cuts_at_images`: the text between two pictures is tokenised by itself, as LLaVA's code does. The text of a
    tokenizer's own template is tokenised in one go, as transformers does.
    """

    name: str
    jinja: str
    cuts_at_images: bool
    begin: str = ""  # a begin token that the tokenizer puts in front; the text after it is tokenised by itself
    keeps_user_text: bool = True  # `plain` shows the picture and nothing else, as LLaVA's stage 1 does
    content: Literal["text", "parts"] = "text"  # how the template takes a content: as a text, or as a list of parts


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its begin token before a text.

    A Llama tokenizer that was read from `tokenizer.model` alone has the token but no rule for it; its published class
    puts it before texts, and so does this one. A token that also ends texts (GPT-2) or opens each turn (SmolLM2) is not
    put before texts.
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
    chat_template = getattr(tokenizer, "chat_template", None) or ""
    jinja = str(chat_template.get("default", "")) if isinstance(chat_template, dict) else str(chat_template)
    if not jinja.startswith(_SAVED_HEAD) or _SPACED in jinja:  # _SPACED is only written for templates of ours
        return jinja
    return jinja.split(_SAVED_END, 1)[1]


def find_template(name: str, tokenizer: Any) -> ChatTemplate:
    """The template of this name; the name `tokenizer` stands for the tokenizer's own. Raises ChatError."""
    if name == OWN_TEMPLATE:
        jinja = _own_jinja(tokenizer)
        if not jinja:
            raise ChatError(f"the tokenizer has no chat template of its own; choose one of {', '.join(TEMPLATES)}")
        return ChatTemplate(name, jinja, cuts_at_images=False, content=_content_kind(tokenizer, jinja))
    if name not in TEMPLATES:
        raise ChatError(f"no chat template {name!r}; allowed: {', '.join([*TEMPLATES, OWN_TEMPLATE])}")
    jinja, begin = TEMPLATES[name], ""
    if name in _BOS_BY_TOKENIZER:
        begin = tokenizer.bos_token if begins_with_bos(tokenizer) else ""
        jinja = jinja if begin else jinja.replace("bos_token", "''")
    return ChatTemplate(name, jinja, cuts_at_images=True, begin=begin, keeps_user_text=name != _PLAIN)


def render_template(
    tokenizer: Any, jinja: str, chats: Sequence[Any], *, prompt: bool = False, **variables: Any
) -> list[str]:
    """The rendered texts of conversations, each a list of `{"role", "content"}`. Raises ChatError.

    With `prompt`, each text ends where the answer begins.
    """
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
    except (TypeError, AttributeError, ValueError, KeyError, IndexError) as error:  # from expressions of the template
        raise ChatError(f"the chat template cannot be rendered: {type(error).__name__}: {error}") from error
    return texts


def _content_kind(tokenizer: Any, jinja: str) -> Literal["text", "parts"]:
    """How a template takes a content. Those of vision-language models take a list of parts, and drop a mere text."""
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

    Templates get the date from the function `strftime_now` of transformers. Here they are rendered with a text in its
    place, so a template that writes the date raises TypeError.
    """
    if "strftime_now" not in jinja:
        return
    try:
        render_template(tokenizer, jinja, chats)
    except ChatError:  # the template refuses this conversation on every date
        return
    try:
        render_template(tokenizer, jinja, chats, strftime_now="")
    except ChatError as error:
        raise ChatError(
            "the tokenizer's chat template writes today's date, so prompts would differ from those of the training; "
            f"choose one of {', '.join(TEMPLATES)}"
        ) from error


# Other programs (transformers' pipeline, servers) give a content as a list of parts. Here it becomes a text. Pictures
# before the text get what our own chat writes: a label where there are several, and a line of their own.
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
    """The template as it is saved for other programs, whose contents may be a text or a list of texts and images.

    `label` precedes each of several pictures. Where LLaVA's code tokenises the text after a picture with a space in
    front, and transformers would not, the template writes this space.
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
    head = re.sub("|".join(values), lambda match: values[match[0]], _SAVED)
    jinja = template.jinja
    if template.name == _PLAIN and values["MARKS"]:
        jinja = jinja.replace("m.content | trim", "(' ' if loop.previtem is defined else '') + m.content | trim")
    elif template.begin and _lacks_space(tokenizer, template.begin, "A" if template.name == _VICUNA else "[INST]"):
        jinja = jinja.replace(_BEGIN, "{{ bos_token + ' ' }}", 1)
    return head + jinja


def _lacks_space(tokenizer: Any, before: str, text: str) -> bool:
    """Whether a text after the special token `before` has the tokens that it has alone only if a space is between."""
    if before not in tokenizer.get_vocab():
        return False
    alone, together, spaced = (
        tokenizer.encode(string, add_special_tokens=False) for string in (text, before + text, f"{before} {text}")
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
