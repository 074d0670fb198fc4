"""The renderer's tokens on tokenizers that nobody here made: those of transformers, or of LLaVA's own code.

Each cell of the table is a tokenizer and a template. The oracle for a Jinja template is transformers'
`apply_chat_template(tokenize=True)`; for LLaVA's templates it is LLaVA's rule, written down here by itself: the prompt
is cut at `<image>` and each part is encoded as a text of its own, with one begin token at the very front.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from mmllm.batch import IMAGE_TOKEN, Message, message
from mmllm.chat.renderer import OWN_TEMPLATE, Renderer
from tests.builders.real_parts import TOKENIZERS, real_tokenizer

M = 3
_SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)
_QWEN3_LAST = (
    "{% set ns = namespace(last=messages | length - 1) %}{% for m in messages %}"
    "{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Shape:
    """A published template: its Jinja text, the tokens it needs, and what stands around an answer's words."""

    jinja: str
    tokens: Sequence[str] = ()  # special ones that a tokenizer must have
    lead: str = ""  # between the prompt and the words; the last answer has `last_lead`
    close: str = ""
    last_lead: str | None = None
    last_close: str | None = None
    has_system: bool = True
    words: Sequence[str] = field(default=())  # added tokens that are no special ones


SHAPES = {
    "mistral v1": Shape(
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        close="{eos}", has_system=False,
    ),
    "mistral v3": Shape(
        _SYSTEM_FIRST + "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}{% if loop.last and system %}"
        "{{ '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% endif %}{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"), lead=" ", close="{eos}", has_system=False,
    ),
    "mistral v7": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% elif m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), close="{eos}",
    ),
    "llama 2": Shape(
        _SYSTEM_FIRST + "{% for m in turns %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + ('<<SYS>>\\n' + "
        "system + '\\n<</SYS>>\\n\\n' if loop.first and system else '') + m.content | trim + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        lead=" ", close=" {eos}",
    ),
    "chatml": Shape(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"), close="<|im_end|>\n",
    ),
    "smollm2": Shape(
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"), close="<|im_end|>\n",
    ),
    "llama 3": Shape(
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), close="<|eot_id|>",
    ),
    "zephyr": Shape(
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        lead="\n", close="{eos}\n",
    ),
    "gemma": Shape(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
        "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] "
        "| trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"), close="<end_of_turn>\n", has_system=False,
    ),
    "gemma 3": Shape(
        "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
        "{%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}{%- else -%}"
        "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}"
        "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
        "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
        "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('must alternate') }}"
        "{%- endif -%}{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}{%- else -%}"
        "{%- set role = message['role'] -%}{%- endif -%}{{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if "
        "loop.first else '') }}{%- if message['content'] is string -%}{{ message['content'] | trim }}"
        "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
        "{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}"
        "{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}",
        ("<start_of_turn>", "<end_of_turn>"), close="<end_of_turn>\n",
    ),
    "phi 3": Shape(
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\\n' + message['content'] + "
        "'<|end|>\\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
        "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), close="<|end|>\n", last_close="<|end|>\n{eos}",
    ),
    "qwen 3": Shape(
        _QWEN3_LAST + "{% for message in messages %}"
        "{% if message.content is string %}{% set content = message.content %}"
        "{% else %}{% set content = '' %}{% endif %}{% if message.role != 'assistant' %}"
        "{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{% else %}{% set thought = '' %}"
        "{% if '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{% if loop.index0 > ns.last %}{% if loop.last or thought %}{{ '<|im_start|>assistant\\n<think>\\n' + "
        "thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}{% else %}"
        "{{ '<|im_start|>assistant\\n' + content }}{% endif %}{% else %}{{ '<|im_start|>assistant\\n' + content }}"
        "{% endif %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
        "{% endif %}",
        ("<|im_start|>", "<|im_end|>"), close="<|im_end|>\n", last_lead="<think>\n\n</think>\n\n",
        words=("<think>", "</think>"),
    ),
    "deepseek": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
        "{% set content = m.content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
        "{% endif %}{{ '<｜Assistant｜>' + content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
        close="{eos}", words=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    ),
    "tulu": Shape(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}{% if m.role != 'assistant' or not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
        close="{eos}",
    ),
}  # fmt: skip
TALK = (
    ("user", "What colour is it?"),
    ("assistant", "Red, I think: 3 <b>"),
    ("user", "And\nthis?"),
    ("assistant", "Blau\n- ja"),
)


@cache
def with_tokens(name: str, special: tuple[str, ...], words: tuple[str, ...]) -> Any:
    tokenizer = real_tokenizer(name)
    tokenizer.add_tokens([IMAGE_TOKEN, *special], special_tokens=True)
    tokenizer.add_tokens(list(words))
    return tokenizer


@cache
def tokenizer_for(name: str, shape_name: str | None = None) -> Any:
    """A real tokenizer with `<image>`, and with the tokens of a template that it lacks."""
    if shape_name is None:
        return with_tokens(name, (), ())
    shape = SHAPES[shape_name]
    tokenizer = copy.copy(with_tokens(name, tuple(shape.tokens), tuple(shape.words)))  # their templates tell them apart
    tokenizer.chat_template = shape.jinja
    return tokenizer


def renderer_for(tokenizer: Any, template: str) -> Renderer:
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return Renderer(tokenizer, template, image_token_id=image, num_image_tokens=M)


def expanded(ids: Sequence[int], image: int) -> list[int]:
    return [copy for number in ids for copy in [number] * (M if number == image else 1)]


def as_text(tokenizer: Any, text: str) -> str:
    """A text as this tokenizer gives it back: CLIP's knows no capitals and no spaces."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return str(tokenizer.decode(ids)).strip()


@pytest.mark.parametrize("shape_name", SHAPES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_own_template_gives_the_ids_of_transformers(name: str, shape_name: str) -> None:
    shape, tokenizer = SHAPES[shape_name], tokenizer_for(name, shape_name)
    renderer = renderer_for(tokenizer, OWN_TEMPLATE)
    renderer.require_end()
    system = (("system", "Be kind."),) if shape.has_system else ()
    for turns in ((*TALK[:2],), TALK, (*system, *TALK)):
        spoken = [(role, f"{IMAGE_TOKEN}\n{text}" if role == "user" else text) for role, text in turns]
        theirs = tokenizer.apply_chat_template([{"role": r, "content": t} for r, t in spoken], return_dict=False)
        messages = numbered(spoken)
        rendered = renderer.render(messages)
        assert rendered.input_ids == expanded(theirs, renderer.image_token_id)
        check_masks(renderer, messages, rendered, shape)


def numbered(spoken: Sequence[tuple[str, str]]) -> list[Message]:
    messages, images = [], 0
    for role, text in spoken:
        messages.append(message(role, text, images))  # type: ignore[arg-type]
        images += text.count(IMAGE_TOKEN)
    return messages


def check_masks(renderer: Renderer, messages: Sequence[Message], rendered: Any, shape: Shape) -> None:
    """The answers with what closes them are supervised and nothing else; each prompt is a prefix of the row."""
    tokenizer, eos = renderer.tokenizer, renderer.tokenizer.eos_token
    places = [number for number, one in enumerate(messages) if one.role == "assistant"]
    assert len(rendered.answers) == len(places)
    marked = [False] * len(rendered.input_ids)
    for number, answer in zip(places, rendered.answers, strict=True):
        is_last = number == len(messages) - 1
        lead = shape.last_lead if is_last and shape.last_lead is not None else shape.lead
        close = shape.last_close if is_last and shape.last_close is not None else shape.close
        supervised = tokenizer.decode(rendered.input_ids[answer.start : answer.end]).strip()
        assert supervised == as_text(tokenizer, lead + messages[number].text + close.replace("{eos}", eos))
        words = as_text(tokenizer, messages[number].text)
        assert renderer.decode(rendered.input_ids[answer.start : answer.end]) == words
        assert renderer.end_token_id in rendered.input_ids[answer.content_end : answer.end]
        marked[answer.start : answer.end] = [True] * (answer.end - answer.start)
        asked = renderer.render(messages[:number])
        assert asked.input_ids == rendered.input_ids[: answer.start]
        assert not any(asked.is_answer[rendered.answers[-2].end if len(rendered.answers) > 1 and is_last else 0 :])
    assert rendered.is_answer == marked


# LLaVA's templates as its conversation.py writes them: (front, per turn (question, answer)), `{q}` and `{a}` the words.
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
_LLAMA_2 = (
    "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n"
)
LLAVA: dict[str, tuple[str, str, str, str]] = {  # front, question, question of later turns, answer
    "plain": ("", IMAGE_TOKEN, IMAGE_TOKEN, "{a}{eos}"),
    "vicuna_v1": (_VICUNA, "USER: {q} ASSISTANT:", "USER: {q} ASSISTANT:", " {a}{eos}"),
    "llama_2": (_LLAMA_2, "{q} [/INST]", "{bos}[INST] {q} [/INST]", " {a} {eos}"),
    "mistral_instruct": ("", "[INST] {q} [/INST]", "[INST] {q} [/INST]", " {a} {eos}"),
}
# by the tokenizer's own rule: what it puts in front of a text itself, or what its published class does (Llama)
BEGINS = {"mistral v1": True, "mistral v3": True, "mistral v7": True, "tekken": True, "smollm2": False, "clip": True}


def llava_ids(tokenizer: Any, text: str, *, begins: bool) -> list[int]:
    chunks = [tokenizer.encode(chunk, add_special_tokens=False) for chunk in text.split(IMAGE_TOKEN)]
    ids: list[int] = [tokenizer.bos_token_id] if begins else []
    for number, chunk in enumerate(chunks):
        if number:
            ids += [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * M
        ids += chunk
    return ids


@pytest.mark.parametrize("template", LLAVA)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llavas_templates_give_llavas_ids(name: str, template: str) -> None:
    tokenizer = tokenizer_for(name)
    renderer = renderer_for(tokenizer, template)
    front, first, later, said = LLAVA[template]
    bos = tokenizer.bos_token if BEGINS[name] else ""
    for has_images in (True, False) if template != "plain" else (True,):
        for count in (2, 4):
            spoken = [(r, f"{IMAGE_TOKEN}\n{t}" if r == "user" and has_images else t) for r, t in TALK[:count]]
            text = front
            for number in range(0, count, 2):
                asked = (later if number else first).replace("{q}", spoken[number][1]).replace("{bos}", bos)
                text += asked + said.replace("{a}", spoken[number + 1][1]).replace("{eos}", tokenizer.eos_token)
            messages = numbered(spoken)
            rendered = renderer.render(messages)
            assert rendered.input_ids == llava_ids(tokenizer, text, begins=BEGINS[name])
            lead, close = said.split("{a}")
            check_masks(renderer, messages, rendered, Shape("", lead=lead, close=close))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizers_own_template_where_it_has_one(name: str) -> None:
    tokenizer = tokenizer_for(name)
    if name != "smollm2":
        assert not tokenizer.chat_template
        return
    renderer = renderer_for(tokenizer, OWN_TEMPLATE)
    for count in (2, 4):
        theirs = tokenizer.apply_chat_template([{"role": r, "content": t} for r, t in TALK[:count]], return_dict=False)
        rendered = renderer.render([message(r, t) for r, t in TALK[:count]])  # type: ignore[arg-type]
        assert rendered.input_ids == theirs
        check_masks(renderer, [message(r, t) for r, t in TALK[:count]], rendered, Shape("", close="<|im_end|>\n"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_word_of_control_that_a_person_types_is_text(name: str) -> None:
    for template in ("vicuna_v1", "plain"):
        renderer = renderer_for(tokenizer_for(name), template)
        eos, image = renderer.tokenizer.eos_token, renderer.image_token_id
        rendered = renderer.render([message("user", "<image>\nWhat?"), Message("assistant", (f"a {eos} b <image> c",))])
        assert rendered.input_ids.count(renderer.end_token_id) == 1
        assert rendered.input_ids.count(image) == M
        assert as_text(renderer.tokenizer, "b <") in renderer.decode(rendered.input_ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_gives_the_same_ids_with_the_saved_template(name: str) -> None:
    for template in LLAVA:
        tokenizer = tokenizer_for(name)
        renderer = renderer_for(tokenizer, template)
        saved = renderer.saved_template("")
        image, words = {"type": "image"}, [{"type": "text", "text": "What colour?"}]
        chat: list[dict[str, Any]] = [{"role": "user", "content": [image, *words]}]
        ids = tokenizer.apply_chat_template(chat, chat_template=saved, add_generation_prompt=True, return_dict=False)
        asked = renderer.render([message("user", "<image>\nWhat colour?")])
        assert expanded(ids, renderer.image_token_id) == asked.input_ids
        chat.append({"role": "assistant", "content": [{"type": "text", "text": "Red"}]})
        ids = tokenizer.apply_chat_template(chat, chat_template=saved, return_dict=False)
        whole = renderer.render([message("user", "<image>\nWhat colour?"), message("assistant", "Red")])
        assert expanded(ids, renderer.image_token_id) == whole.input_ids


# What checkpoints carry that were saved before texts were encoded in one go.
_OLD_TURNS = (
    "{% for m in messages %}{% if m.role not in open %}"
    "{{ raise_exception('this chat template has no turn of ' + m.role) }}{% endif %}"
    "{% set content %}{% if m.content is not string %}{% for part in m.content %}{% if part.type == 'image' %}"
    "<image>{% elif SHOWN %}{{ part.text }}{% endif %}{% endfor %}{% elif SHOWN %}{{ m.content }}{% endif %}"
    "{% endset %}{{ open[m.role] }}{{ content | trim }}{{ close[m.role] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ open.assistant }}{% endif %}"
)
OLD = {
    "vicuna_v1": (
        "{% set open = {'user': 'USER: ', 'assistant': 'ASSISTANT: ', 'system': ''} %}"
        "{% set close = {'user': ' ', 'assistant': '</s>', 'system': ' '} %}{{ '<s>' }}"
        "{% if not messages or messages[0].role != 'system' %}{{ \"" + _VICUNA + "\" }}{% endif %}"
        + _OLD_TURNS.replace("SHOWN", "true")
    ),
    "plain": (
        "{% set open = {'user': '', 'assistant': ''} %}{% set close = {'user': '', 'assistant': '</s>'} %}{{ '<s>' }}"
        + _OLD_TURNS.replace("SHOWN", "m.role != 'user'")
    ),
}  # fmt: skip


@pytest.mark.parametrize("template", OLD)
def test_a_checkpoint_of_before_is_asked_piece_by_piece_as_it_was_trained(template: str) -> None:
    tokenizer = tokenizer_for("mistral v1")
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    renderer = Renderer(
        tokenizer, template, image_token_id=image, num_image_tokens=M, encoding=1, saved_jinja=OLD[template]
    )  # fmt: skip
    talk = [message("user", "<image>\nWhat color?"), message("assistant", "Red"), message("user", "Sure?")]
    pieces: list[str | int] = [IMAGE_TOKEN, "Red", 2]
    if template == "vicuna_v1":
        pieces = [_VICUNA[:-1], " ", "USER: ", IMAGE_TOKEN, "\nWhat color?", " ", "ASSISTANT: ", "Red", 2]
        pieces += ["USER: ", "Sure?", " ", "ASSISTANT: "]
    expected = [1]
    for piece in pieces:
        if piece == IMAGE_TOKEN:
            expected += [image] * M
        else:
            expected += [piece] if isinstance(piece, int) else tokenizer.encode(piece, add_special_tokens=False)
    rendered = renderer.render(talk)
    assert rendered.input_ids == expected
    assert rendered.is_answer.count(True) == 2
    assert renderer.render(talk[:2]).input_ids[-1] == renderer.end_token_id == 2
    assert renderer.saved_template("x") == OLD[template]
