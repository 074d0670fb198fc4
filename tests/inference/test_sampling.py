"""Sampled replies: repeatable by their seed, whatever else is in the batch, and true to the model's probabilities."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.errors import MmllmError
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling, TokenSampler
from tests.builders.conversations import MIXED, answered, generate

DRAWN = Sampling(temperature=1.3, max_new_tokens=8, seed=5)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine.load(tiny_checkpoint, device="cpu")


def test_a_reply_depends_on_its_seed_and_not_on_its_batch(engine: Engine) -> None:
    together = [reply.text for reply in engine.reply_batch(MIXED, DRAWN)]
    assert together == [engine.reply(example, DRAWN).text for example in MIXED]
    assert together[0] == [*engine.stream(MIXED[0], DRAWN)][-1].text
    others = [engine.reply(MIXED[0], Sampling(temperature=1.3, max_new_tokens=8, seed=seed)).text for seed in range(6)]
    assert len(set(others)) > 1


def test_replies_without_a_seed_differ_and_leave_torchs_generator_alone(engine: Engine) -> None:
    state = torch.get_rng_state()
    texts = {engine.reply(MIXED[0], Sampling(temperature=2.0, max_new_tokens=8)).text for _ in range(6)}
    assert len(texts) > 1
    engine.reply(MIXED[0], DRAWN)
    assert torch.equal(torch.get_rng_state(), state)
    assert engine.reply(MIXED[0], Sampling(temperature=1, max_new_tokens=2)).num_new_tokens == 2, "an integer will do"


def drawn(logits: list[float], **settings: Any) -> Tensor:
    """The share of each token among those that 2,000 seeds draw."""
    counts = torch.zeros(len(logits))
    for seed in range(2000):
        counts[TokenSampler(Sampling(seed=seed, **settings)).choose([], [], torch.tensor(logits))] += 1
    return counts / 2000


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 2.0, "top_p": 0.85}, 3),  # the last token is outside of the 85%
        ({"temperature": 2.0, "top_k": 2}, 2),
        ({"temperature": 2.0, "min_p": 0.5}, 2),  # the third is at exp(-1) of the first
        ({"temperature": 2.0}, 4),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_of_the_settings(settings: dict[str, Any], kept: int) -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    probs = (torch.tensor(logits[:kept]) / 2).softmax(-1)
    torch.testing.assert_close(drawn(logits, **settings), torch.cat([probs, torch.zeros(4 - kept)]), rtol=0, atol=0.04)


BATCHINGS = ("continuous", "static")


@pytest.fixture(scope="module", params=BATCHINGS)
def either(request: pytest.FixtureRequest, engine: Engine) -> Engine:
    """Both ways to run the model: settings hold in each."""
    return Engine(engine.model, engine.processor, name="tiny", batching=request.param)


def test_a_stop_text_ends_the_answer_and_is_cut_off(either: Engine) -> None:
    whole = either.reply(MIXED[0], Sampling(max_new_tokens=12))
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    sampling = Sampling(max_new_tokens=12, stop=("not in it", stop))
    replies = [*either.stream(MIXED[0], sampling)]
    assert replies[-1].text == whole.text[: whole.text.index(stop)]
    assert (replies[-1].finish_reason, replies[-1].num_new_tokens < 12) == ("end", True)
    shown = [reply.text.rstrip() for reply in replies]
    assert all(replies[-1].text.startswith(text) for text in shown), "no part of a stop text is shown meanwhile"


def test_a_beginning_of_a_stop_text_is_shown_once_it_turns_out_to_be_none() -> None:
    sampling = Sampling(stop=("</end>",))
    assert sampling.cut("done </e", is_finished=False) == "done "
    assert sampling.cut("done </e", is_finished=True) == "done </e"
    assert sampling.cut("done </else", is_finished=False) == "done </else"
    assert sampling.cut("done </end> and", is_finished=False) == "done "


def test_banned_texts_never_occur_however_they_are_cut_into_tokens(either: Engine) -> None:
    free = either.reply(MIXED[0], Sampling(max_new_tokens=16)).text
    banned = tuple({free[start : start + 2].upper() for start in range(0, len(free) - 2, 3)})
    for sampling in (Sampling(max_new_tokens=16, banned=banned), replace(DRAWN, banned=banned)):
        text = either.reply(MIXED[0], sampling).text
        assert text
        assert not any(one.casefold() in text.casefold() for one in banned)


def next_logits(engine: Engine, ids: Tensor) -> Tensor:
    """What the model itself gives after these tokens about the picture of the second example."""
    with torch.inference_mode():
        logits = engine.model(input_ids=ids, **engine.processor.load_pixels(MIXED[1].images)).logits[0, -1].clone()
        logits[engine.processor.image_token_id] = -torch.inf
        return logits


def test_settings_that_leave_no_token_fail_with_the_reason(either: Engine) -> None:
    pytest.importorskip("llguidance")
    sampling = Sampling(max_new_tokens=9, regex="yes|yellow", banned=("ye",))
    with pytest.raises(MmllmError, match="the banned texts leave no token that the grammar allows"):
        either.reply(MIXED[0], sampling)


def test_the_answer_goes_on_from_its_prefix(either: Engine) -> None:
    prefix = "a small red"
    reply = either.reply(MIXED[1], Sampling(max_new_tokens=4, prefix=prefix))
    assert reply.text.startswith(prefix)
    assert reply.num_new_tokens == 4
    # the prompt is what the model is trained on when the answer has these words
    rendered = either.renderer.render_example(answered(MIXED[1], prefix))
    ids = torch.tensor([rendered.input_ids[: rendered.answers[-1].content_end]])
    logits = next_logits(either, ids)
    first = either.reply(MIXED[1], Sampling(max_new_tokens=1, prefix=prefix))
    assert first.text == either.renderer.decode([*ids[0, rendered.answers[-1].start :].tolist(), int(logits.argmax())])


def test_penalties_are_those_of_transformers_and_of_the_answer_alone(either: Engine) -> None:
    expected = generate(either, MIXED[0], repetition_penalty=1.8, max_new_tokens=8)[0].tolist()
    reply = either.reply(MIXED[0], Sampling(max_new_tokens=8, repetition_penalty=1.8))
    assert reply.text == either.renderer.decode(expected)
    sampler = TokenSampler(Sampling(presence_penalty=2.0))
    logits = torch.tensor([1.0, 2.5, 0.0])
    assert sampler.choose([1, 1], [], logits) == 1, "a token of the prompt is not penalised"
    assert sampler.choose([0], [1, 1], logits) == 0, "once, however often it occurs"


def test_log_probabilities_are_those_of_the_model_before_the_settings(either: Engine) -> None:
    reply = either.reply(MIXED[1], Sampling(max_new_tokens=5, logprobs=True, temperature=2.0, seed=1, top_k=3))
    assert reply.logprobs is not None
    assert len(reply.logprobs) == reply.num_new_tokens == 5
    greedy = either.reply(MIXED[1], Sampling(max_new_tokens=1, logprobs=True))
    ids = torch.tensor([either.renderer.render_example(MIXED[1]).input_ids])
    logits = next_logits(either, ids)
    assert greedy.logprobs == pytest.approx([float(logits.log_softmax(-1).max())], abs=1e-4)
    assert either.reply(MIXED[1], Sampling(max_new_tokens=1)).logprobs is None


def test_several_replies_are_those_of_consecutive_seeds(either: Engine) -> None:
    reply = either.reply(MIXED[1], replace(DRAWN, n=3))
    texts = [reply.text, *(other.text for other in reply.others)]
    assert texts == [either.reply(MIXED[1], replace(DRAWN, seed=seed)).text for seed in (5, 6, 7)]
    with pytest.raises(MmllmError, match="a stream is of one reply"):
        next(either.stream(MIXED[1], replace(DRAWN, n=3)))


SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["color", "count"],
    "additionalProperties": False,
}


def test_an_answer_follows_its_json_schema_or_regex(either: Engine) -> None:
    pytest.importorskip("llguidance")
    for seed in range(3):
        sampling = Sampling(temperature=1.0, seed=seed, max_new_tokens=60, json_schema=json.dumps(SCHEMA))
        reply = either.reply(MIXED[1], sampling)
        assert reply.finish_reason == "end"
        value = json.loads(reply.text)
        assert value.keys() == {"color", "count"}
        assert value["color"] in ("red", "blue")
        assert 0 <= value["count"] <= 99
        pattern = r"(yes|no), [a-f]{2,4}\."
        text = either.reply(MIXED[0], Sampling(temperature=1.0, seed=seed, max_new_tokens=30, regex=pattern)).text
        assert re.fullmatch(pattern, text)
    begun = either.reply(MIXED[0], Sampling(max_new_tokens=30, regex=pattern, prefix="no, "))
    assert re.fullmatch(r"no, [a-f]{2,4}\.", begun.text)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"json_schema": "{"}, "json_schema cannot be used"),
        ({"json_schema": '{"type": "nothing"}'}, "json_schema cannot be used"),
        ({"regex": "(a"}, "regex cannot be used"),
        ({"regex": "yes", "prefix": "no"}, "does not begin an answer that regex allows"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused(engine: Engine, settings: dict[str, str], problem: str) -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(MmllmError, match=problem):
        engine.reply(MIXED[0], Sampling(**settings))  # type: ignore[arg-type]


def test_without_the_package_the_extra_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MmllmError, match=r"mmllm\[structured\]"):
        engine.reply(MIXED[0], Sampling(regex="yes"))


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}, {"top_k": -1}, {"min_p": 1.5},
        {"repetition_penalty": 0.0}, {"presence_penalty": float("nan")}, {"stop": "word"}, {"stop": ("",)},
        {"banned": (1,)}, {"prefix": "a Cat", "banned": ("cat",)}, {"prefix": "a cat", "stop": ("a ",)}, {"n": 0},
        {"n": 2}, {"json_schema": "{}", "regex": "a"}, {"temperature": float("nan")},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(MmllmError, match=next(iter(values))):
        Sampling(**values)  # type: ignore[arg-type]
