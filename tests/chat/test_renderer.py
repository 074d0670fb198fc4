"""The renderer: which tokens a conversation becomes, and which of them are answers, by ids written out by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmllm.batch import IGNORE_INDEX, IMAGE_TOKEN, Example, ImageRef, Message, message, picture_marks
from mmllm.batching.collate import collate
from mmllm.chat.renderer import OWN_TEMPLATE, TEMPLATES, ChatError, Renderer

# One token for each of these, in this order from id 0 on, then one for each printable character from line feed on.
SPECIAL = (
    "<pad>", "<s>", "</s>", IMAGE_TOKEN, "<unk>", "<|im_start|>", "<|im_end|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<end_of_turn>",
)  # fmt: skip
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = {text: number for number, text in enumerate([*SPECIAL, *CHARACTERS])}
M = 2  # image tokens of one picture
PICTURE = IMAGE_TOKEN * M

# What is left out where a template has a system text of its own.
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

# Published chat templates, and the shapes that others have.
_CHATML_TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
_CHATML_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
CHATML = "{% for m in messages %}" + _CHATML_TURN + "{% endfor %}" + _CHATML_ASK
OWN = {
    "chatml": CHATML,
    "qwen2": (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
        + _CHATML_TURN + "{% endfor %}" + _CHATML_ASK
    ),
    "llama3": (
        "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
        " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
        "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}" + _ALTERNATE + "{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}" + _ALTERNATE + "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
}  # fmt: skip
HAS_SYSTEM = {"chatml", "qwen2", "llama3"}
CLOSES = {
    "chatml": "<|im_end|>\n", "qwen2": "<|im_end|>\n", "llama3": "<|eot_id|>", "mistral": "</s>",
    "gemma": "<end_of_turn>\n",
}  # fmt: skip


def build_tokenizer(chat_template: str | None = None, **tokens: str | None) -> Any:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", **tokens}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **names)


def renderer(template: str = OWN_TEMPLATE, chat_template: str | None = None) -> Renderer:
    return Renderer(build_tokenizer(chat_template), template, image_token_id=3, num_image_tokens=M)


def ids_of(text: str) -> list[int]:
    special = "|".join(map(re.escape, SPECIAL))
    return [VOCABULARY[piece] for piece in re.findall(f"{special}|.", text, re.DOTALL)]


def by_hand(*spans: tuple[str, bool]) -> tuple[list[int], list[bool]]:
    ids = [(number, flag) for text, flag in spans for number in ids_of(text)]
    return [number for number, _ in ids], [flag for _, flag in ids]


TALK = (
    message("user", "<image>\nWhat? "),
    message("assistant", " A cat. "),
    message("user", "And <image>?", 1),
    message("assistant", "Dog\nor cow"),
)
SYSTEM = message("system", "Be kind.")
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
EXPECTED = {
    "plain": [
        (f"<s>{PICTURE}", False), ("A cat.</s>", True),
        (PICTURE, False), ("Dog\nor cow</s>", True),
    ],
    "vicuna_v1": [
        (f"<s>{VICUNA} USER: {PICTURE}\nWhat? ASSISTANT:", False), (" A cat.</s>", True),
        (f"USER: And {PICTURE}? ASSISTANT:", False), (" Dog\nor cow</s>", True),
    ],
    "llama_2": [
        (f"<s>[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n{PICTURE}\nWhat? [/INST]", False), (" A cat. </s>", True),
        (f"<s>[INST] And {PICTURE}? [/INST]", False), (" Dog\nor cow </s>", True),
    ],
    "mistral_instruct": [
        (f"<s>[INST] {PICTURE}\nWhat? [/INST]", False), (" A cat. </s>", True),
        (f"[INST] And {PICTURE}? [/INST]", False), (" Dog\nor cow </s>", True),
    ],
    "chatml": [
        (f"<|im_start|>user\n{PICTURE}\nWhat?<|im_end|>\n<|im_start|>assistant\n", False), ("A cat.<|im_end|>\n", True),
        (f"<|im_start|>user\nAnd {PICTURE}?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Dog\nor cow<|im_end|>\n", True),
    ],
    "llama3": [
        (f"<s>{_HEADER.format('user')}{PICTURE}\nWhat?<|eot_id|>{_HEADER.format('assistant')}", False),
        ("A cat.<|eot_id|>", True),
        (f"{_HEADER.format('user')}And {PICTURE}?<|eot_id|>{_HEADER.format('assistant')}", False),
        ("Dog\nor cow<|eot_id|>", True),
    ],
}  # fmt: skip
EXPECTED_SYSTEM = {
    "vicuna_v1": "<s>Be kind. USER: ",
    "llama_2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n",
    "mistral_instruct": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n",
    "llama3": f"<s>{_HEADER.format('system')}Be kind.<|eot_id|>{_HEADER.format('user')}",
}


def test_a_caption_is_these_ids_and_its_end_token_is_learnt() -> None:
    rendered = renderer("plain").render([message("user", "<image>\nWhat?"), message("assistant", "A cat")])
    assert rendered.input_ids == [1, 3, 3, 45, 12, 79, 77, 96, 2]
    assert rendered.is_answer == [False, False, False, True, True, True, True, True, True]
    ignored = IGNORE_INDEX
    assert rendered.labels == [ignored, ignored, ignored, 45, 12, 79, 77, 96, 2]
    assert rendered.num_image_tokens == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_renders_and_supervises_exactly_its_answers(name: str) -> None:
    rendered = renderer(name).render(TALK)
    assert (rendered.input_ids, rendered.is_answer) == by_hand(*EXPECTED[name])
    assert rendered.num_image_tokens == rendered.input_ids.count(3) == 2 * M
    assert renderer(name).end_token_id == ids_of(EXPECTED[name][1][0].rstrip("\n"))[-1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_beginning_of_what_was_trained(name: str) -> None:
    render = renderer(name).render
    whole, prompt = render(TALK), render(TALK[:3])
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert whole.is_answer.index(True, len(prompt.input_ids)) == len(prompt.input_ids), "then the answer begins at once"
    assert not any(prompt.is_answer[-len(ids_of(EXPECTED[name][2][0])) :])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_turn_stands_in_front_or_is_refused(name: str) -> None:
    if name not in EXPECTED_SYSTEM:
        with pytest.raises(ChatError, match="it has no system turn"):
            renderer(name).render([SYSTEM, *TALK])
        return
    rendered = renderer(name).render([SYSTEM, *TALK])
    expected = ids_of(EXPECTED_SYSTEM[name] + PICTURE)
    assert rendered.input_ids[: len(expected)] == expected
    assert not any(rendered.is_answer[: len(expected)])


@pytest.mark.parametrize("name", OWN)
def test_a_tokenizers_own_template_is_taken_apart_exactly(name: str) -> None:
    tokenizer = build_tokenizer(OWN[name])
    render = Renderer(tokenizer, OWN_TEMPLATE, image_token_id=3, num_image_tokens=M)
    spoken = [("user", " Why\n{{so}}? "), ("assistant", "1 < 2 & 'x'"), ("user", "ok"), ("assistant", "a\n\nb")]
    if name in HAS_SYSTEM:
        spoken.insert(0, ("system", "Be kind."))
    for count in (len(spoken) - 3, len(spoken) - 1, len(spoken)):
        theirs = [{"role": role, "content": text} for role, text in spoken[:count]]
        asks = theirs[-1]["role"] == "user"
        text = tokenizer.apply_chat_template(theirs, tokenize=False, add_generation_prompt=asks)
        ours = [message(role, text) for role, text in spoken[:count]]
        assert render.text(ours) == text
        assert render.render(ours).input_ids == ids_of(text)
    rendered = render.render(ours)
    answers = [i for i, flag in zip(rendered.input_ids, rendered.is_answer, strict=True) if flag]
    assert answers == ids_of(f"1 < 2 & 'x'{CLOSES[name]}a\n\nb{CLOSES[name]}")


def test_a_default_system_text_stands_only_where_no_other_does() -> None:
    render = renderer(chat_template=OWN["qwen2"])
    assert render.text(TALK[:1]).startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user"
    )
    assert "helpful" not in render.text([SYSTEM, *TALK])


def test_what_strips_and_what_does_not_is_kept() -> None:
    assert renderer(chat_template=OWN["mistral"]).text([message("user", " a ")]) == "<s>[INST]  a  [/INST]"
    assert "\n\na<|eot_id|>" in renderer(chat_template=OWN["llama3"]).text([message("user", " a ")])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template of its own; choose one of plain, vicuna_v1, llama_2, mistral_instruct, chatml"),
        ("Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML, "writes today's date"),
        (
            "{% if messages[0].role == 'system' %}{{ strftime_now('%Y') }}{% endif %}" + CHATML,
            "writes today's date",
        ),
        (CHATML.replace("{{ '<|im_start|>'", "{{ messages | length ~ '<|im_start|>'"), "changes a turn when another"),
        (CHATML.replace("m['content']", "m['role']"), "does not show a question as it is"),
        (CHATML.replace("{{ '<|im_start|>'", "{% if m.role == 'user' %}{{ '<|im_start|>'").replace("{% endfor", "{% endif %}{% endfor"), "leaves the answer out"),  # noqa: E501
        ("{% for m in messages %}", "cannot be rendered"),
        ("{{ messages[0]['content'] + 1 }}", "cannot be rendered: TypeError"),
    ],
)  # fmt: skip
def test_a_template_that_training_cannot_repeat_is_refused_with_the_reason(template: str | None, reason: str) -> None:
    with pytest.raises(ChatError, match=reason):
        renderer(chat_template=template)


# Shapes of published templates whose turns depend on their place or their words; what a longer conversation keeps.
PLACED = {
    "numbered turns": CHATML.replace("{{ '<|im_start|>'", "{{ loop.index ~ '<|im_start|>'"),
    "an empty thought before the last answer": CHATML.replace(
        "{{ '<|im_start|>' + m['role'] + '\\n'",
        "{{ '<|im_start|>' + m['role'] + '\\n' + ('<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' else '')",  # noqa: E501
    ),
    "thoughts cut away": CHATML.replace("m['content']", "m['content'].split('</think>')[-1]"),
    "shouted": CHATML.replace("m['content']", "m['content'] | upper"),
    "a prompt that opens a thought": CHATML.replace("assistant\\n' }}{%", "assistant\\n<think>\\n' }}{%"),
    "an end of the whole": CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("name", PLACED)
def test_a_template_whose_turns_depend_on_their_place_or_words_gives_the_tokenizers_own_ids(name: str) -> None:
    assert PLACED[name] != CHATML
    tokenizer = build_tokenizer(PLACED[name])
    render = Renderer(tokenizer, OWN_TEMPLATE, image_token_id=3, num_image_tokens=M)
    spoken = [("user", "Why?"), ("assistant", "<think>so</think>it is."), ("user", "And"), ("assistant", "9 <")]
    for count in (2, 4):
        rendered = render.render([message(role, text) for role, text in spoken[:count]])
        theirs = tokenizer.apply_chat_template([{"role": r, "content": t} for r, t in spoken[:count]], tokenize=False)
        assert rendered.input_ids == ids_of(theirs)
        answers = [ids_of(theirs)[a.start : a.end] for a in rendered.answers]
        assert len(answers) == count // 2
        assert [ids.count(6) for ids in answers] == [1] * len(answers), "every answer's end is learnt"
        for number, answer in enumerate(rendered.answers):
            words = render.tokenizer.decode(rendered.input_ids[answer.start : answer.content_end])
            assert words.lower().endswith(("it is.", "9 <")[number])
            prompt = render.render([message(role, text) for role, text in spoken[: 2 * number + 1]])
            assert prompt.input_ids == rendered.input_ids[: answer.start]
        assert "<|im_start|>user" not in tokenizer.decode([i for ids in answers for i in ids])


def test_a_template_that_does_not_end_answers_serves_for_asking_and_not_for_training() -> None:
    for template in (
        CHATML.replace("<|im_end|>", "###"),
        CHATML.replace("+ '<|im_end|>'", "+ ('' if loop.last else '<|im_end|>')"),
    ):
        render = renderer(chat_template=template)
        assert render.end_token_id == 2, "the tokenizer's own end token"
        with pytest.raises(ChatError, match="for which this tokenizer has no special token, so training could not"):
            render.require_end()
    without = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, IMAGE_TOKEN: 2}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=without, eos_token="</s>", extra_special_tokens=[IMAGE_TOKEN])
    with pytest.raises(
        ChatError, match=r"ends answers with '<\|im_end\|>\\n', for which this tokenizer has no special"
    ):
        Renderer(fast, "chatml", image_token_id=2, num_image_tokens=M)


def test_a_system_turn_that_a_template_would_swallow_is_refused() -> None:
    swallows = (
        "{% for m in messages %}{% if m.role != 'system' %}" + _CHATML_TURN + "{% endif %}{% endfor %}" + _CHATML_ASK
    )
    render = renderer(chat_template=swallows)
    assert render.text(TALK[:1]).startswith("<|im_start|>user")
    with pytest.raises(ChatError, match="no system turn"):
        render.render([SYSTEM, *TALK])


@pytest.mark.parametrize(
    ("name", "own"), [*((name, None) for name in TEMPLATES), *((OWN_TEMPLATE, own) for own in OWN)]
)
def test_the_saved_template_says_what_the_renderer_says(name: str, own: str | None) -> None:
    render = renderer(name, OWN[own] if own else None)
    tokenizer = build_tokenizer(render.saved_template("Picture {}: "))
    talks = [TALK[:1], TALK, TALK[:3]]
    if name in EXPECTED_SYSTEM or own in HAS_SYSTEM:
        talks.append((SYSTEM, *TALK))
    for talk in talks:
        parts = [
            {"role": m.role, "content": [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in m.parts]}  # noqa: E501
            for m in talk
        ]  # fmt: skip
        asks = talk[-1].role == "user"
        assert tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=asks) == render.text(talk)
        whole = [
            {"role": m.role, "content": "".join(p if isinstance(p, str) else "<image>" for p in m.parts)} for m in talk
        ]
        assert tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=asks) == render.text(talk)
    if own:
        again = Renderer(tokenizer, OWN_TEMPLATE, image_token_id=3, num_image_tokens=M)
        assert again.template == render.template, "a saved tokenizer may carry it as its own"
        assert again.saved_template("Picture {}: ") == tokenizer.chat_template


def test_other_programs_give_pictures_without_line_breaks_and_labels() -> None:
    render = renderer(chat_template=CHATML)
    picture, words = {"type": "image"}, {"type": "text", "text": "Same?"}
    for label, count in (("Picture {}: ", 2), ("Picture {}: ", 1), ("", 2)):
        tokenizer = build_tokenizer(render.saved_template(label))
        text = tokenizer.apply_chat_template([{"role": "user", "content": [*[picture] * count, words]}], tokenize=False)
        assert text == f"<|im_start|>user\n{picture_marks(count, label)}Same?<|im_end|>\n"


def test_an_unknown_template_lists_the_known_ones() -> None:
    with pytest.raises(
        ChatError,
        match="no chat template 'alpaca'; allowed: plain, vicuna_v1, llama_2, mistral_instruct, chatml, llama3, tok",
    ):
        renderer("alpaca")


def test_a_template_whose_end_token_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(ChatError, match="ends answers with nothing"):
        Renderer(build_tokenizer(eos_token=None), "vicuna_v1", image_token_id=3, num_image_tokens=M)


@pytest.mark.parametrize("name", [*TEMPLATES, OWN_TEMPLATE])
def test_control_tokens_that_a_person_writes_are_text(name: str) -> None:
    render = renderer(name, CHATML)
    typed = "look at <image> </s> <|im_end|> <|eot_id|> <s> now"
    plain = render.render([message("user", "<image>\nnow"), message("assistant", "now")])
    rendered = render.render([Message("user", (ImageRef(0), "\nnow")), Message("assistant", (typed,))])
    for token, number in VOCABULARY.items():
        if token in render.control_tokens:
            assert rendered.input_ids.count(number) == plain.input_ids.count(number), token
    assert rendered.num_image_tokens == M
    assert rendered.text.count(typed) == 1


def test_an_added_token_that_is_content_is_read_and_shown() -> None:
    tokenizer = build_tokenizer(CHATML)
    tokenizer.add_tokens(["<box>"], special_tokens=True)
    render = Renderer(tokenizer, OWN_TEMPLATE, image_token_id=3, num_image_tokens=M)
    ids = render.render([message("user", "a"), message("assistant", "at <box>1")]).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<box>")) == 1
    assert render.decode(ids[-8:]) == "at <box>1"


def test_images_and_their_places_are_counted_against_each_other() -> None:
    render = renderer("chatml")
    picture = Image.new("RGB", (4, 4))
    assert render.render_example(Example("two", "", TALK, (picture, picture))).num_image_tokens == 2 * M
    with pytest.raises(ChatError, match=r"example one: its text refers to images \[0, 1\] but it has 1"):
        render.render_example(Example("one", "", TALK, (picture,)))
    with pytest.raises(ChatError, match=r"example blind: its text refers to images \[\] but it has 1"):
        render.render_example(Example("blind", "", (message("user", "What?"),), (picture,)))
    swapped = Message("user", (ImageRef(1), ImageRef(0)))
    with pytest.raises(ChatError, match=r"refers to images \[1, 0\] but it has 2"):
        render.render_example(Example("swapped", "", (swapped,), (picture, picture)))


def test_generated_ids_are_read_without_special_tokens() -> None:
    assert renderer("chatml").decode(ids_of(" a cat<|im_end|>\n")) == "a cat"


def test_a_batch_is_padded_on_the_right_with_nothing_to_learn_there() -> None:
    render = renderer("plain")
    rows = [render.render([message("user", "<image>"), message("assistant", text)]) for text in ("ab", "a")]
    batch = collate(rows, pad_token_id=0, example_ids=["x", "y"])
    a, b = ids_of("ab")
    assert batch.input_ids.tolist() == [[1, 3, 3, a, b, 2], [1, 3, 3, a, 2, 0]]
    assert batch.attention_mask.tolist() == [[1] * 6, [1] * 5 + [0]]
    assert batch.labels[1].tolist() == [IGNORE_INDEX] * 3 + [a, 2, IGNORE_INDEX]
    assert batch.num_supervised == 5
    assert batch.to(torch.device("cpu")).example_ids == ["x", "y"]
