"""Batching: whoever shares a batch, and whenever it enters, each request gets the answer that it gets alone."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.batch import Example
from mmllm.config import ModelConfig, ProjectorConfig
from mmllm.errors import MmllmError
from mmllm.inference.engine import Engine
from mmllm.inference.requests import Request
from mmllm.inference.sampling import Sampling
from mmllm.inference.scheduler import EngineBusyError, Scheduler
from mmllm.model.build import build_model
from projector import PROJECTORS
from tests.builders.conversations import TWO, A, B, asked, generate, picture
from tests.builders.matrix import PROJECTOR_OPTIONS
from tests.builders.page_driver import wait_until
from tests.builders.pairwise import Choices, covering_combinations
from tests.builders.tiny_backbones import BACKBONES, STATE_SPACE, make_backbone_parts

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    asked("hello"),
    asked("<image>\nwhat is in the picture?", A),
    TWO,
    asked("is a circle round? is a square round? what else is round, and what is not?"),
    asked("<image>?", B),
    asked("<image>\nand here, what is in this picture, and where?", picture(3, 64, 64)),
]
LENGTHS = (9, 3, 12, 5, 1, 7)  # new tokens of each, so that rows leave at different steps
NEEDS_GRID = ("resampler",)  # its tokens do not keep the grid of patches, which tiles are made of
COVERED = ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "mamba")  # each with every projector and image mode
AXES = {
    "language": COVERED,
    "projector": tuple(PROJECTORS),
    "image mode": ("stretch", "crop", "pad", "anyres", "native"),
}


def is_refused(choices: Choices) -> bool:
    return choices.get("image mode") in ("anyres", "native") and choices.get("projector") in NEEDS_GRID


COMBINATIONS = [
    *covering_combinations(AXES, is_refused),
    *(
        {"language": kind, "projector": "downsample", "image mode": "stretch"}
        for kind in BACKBONES
        if kind not in COVERED
    ),
]


def build_engine(config: ModelConfig, **options: Any) -> Engine:
    torch.manual_seed(0)
    model, processor, _ = build_model(config)
    return Engine(model.eval(), processor, name="tiny", **options)


def requests_of(engine: Engine, examples: Sequence[Example], *samplings: Sampling, **options: Any) -> list[Request]:
    pictures = engine.read_pictures(examples)
    return [
        engine.make_requests(example, seen, sampling, **options)[0]
        for example, seen, sampling in zip(examples, pictures, samplings, strict=True)
    ]


def run_staggered(scheduler: Scheduler, requests: Sequence[Request], steps_between: int = 2) -> None:
    """Each request arrives some steps after the one before, without a thread: the same at every run."""
    waiting, step = list(requests), 0
    with torch.inference_mode():
        while waiting or scheduler.decoder.requests or len(scheduler.waiting):
            if waiting and step % steps_between == 0:
                scheduler.waiting.put(waiting.pop(0))
            scheduler.step()
            step += 1


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine.load(tiny_checkpoint, device="cpu")


@pytest.fixture
def unstarted(engine: Engine) -> Engine:
    """An engine without a thread, whose steps a test makes itself."""
    return Engine(engine.model, engine.processor, name="tiny", max_waiting=len(EXAMPLES))


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("languages")


@pytest.mark.parametrize("choices", COMBINATIONS, ids=lambda choices: "-".join(choices.values()))
def test_requests_that_arrive_one_after_the_other_are_answered_as_alone(
    choices: Choices, tiny_parts: Path, languages: Path
) -> None:
    kind, projector = choices["language"], choices["projector"]
    config = make_backbone_parts(languages / "-".join(choices.values()), kind, tiny_parts)
    vision = {"image_mode": choices["image mode"]} | (
        {"max_image_tokens": 9} if choices["image mode"] == "native" else {}
    )
    config = config.model_copy(
        update={
            "vision": config.vision.model_copy(update=vision),
            "projector": ProjectorConfig(kind=projector, options=PROJECTOR_OPTIONS.get(projector, {})),
        }
    )
    engine = build_engine(config)
    expected = [
        generate(engine, example, max_new_tokens=length)[0].tolist()
        for example, length in zip(EXAMPLES, LENGTHS, strict=True)
    ]
    requests = requests_of(engine, EXAMPLES, *(Sampling(max_new_tokens=length) for length in LENGTHS))
    scheduler = engine.scheduler
    assert isinstance(scheduler, Scheduler)
    assert scheduler.batching == ("dynamic" if kind in STATE_SPACE else "continuous"), engine.describe_batching()
    assert ("its state is not a KV cache" in engine.describe_batching()) == (kind in STATE_SPACE)
    run_staggered(scheduler, requests)
    assert [request.new_ids for request in requests] == expected


@pytest.mark.parametrize("batching", ["static", "dynamic", "continuous"])
def test_each_kind_of_batching_answers_the_same(batching: Any, tiny_checkpoint: Path, engine: Engine) -> None:
    sampling = Sampling(max_new_tokens=8)
    expected = [engine.renderer.decode(generate(engine, one, max_new_tokens=8)[0].tolist()) for one in EXAMPLES]
    other = Engine.load(tiny_checkpoint, device="cpu", batching=batching)
    assert [reply.text for reply in other.reply_batch(EXAMPLES, sampling)] == expected
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        texts[number] = [*other.stream(EXAMPLES[number], sampling)][-1].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(EXAMPLES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [texts[number] for number in range(len(EXAMPLES))] == expected
    assert batching in other.describe_batching()


def test_a_sampled_reply_depends_on_its_own_seed_alone(unstarted: Engine) -> None:
    settings = [Sampling(temperature=1.5, top_p=0.9, max_new_tokens=length, seed=4) for length in LENGTHS]
    settings[2] = Sampling(temperature=0.7, max_new_tokens=9, seed=1, top_k=5, repetition_penalty=1.3)
    together = requests_of(unstarted, EXAMPLES, *settings)
    run_staggered(unstarted.scheduler, together, steps_between=1)
    for example, sampling, request in zip(EXAMPLES, settings, together, strict=True):
        (alone,) = requests_of(unstarted, [example], sampling)
        run_staggered(unstarted.scheduler, [alone])
        assert alone.new_ids == request.new_ids


def test_rows_and_memory_limit_what_runs_at_once_and_all_is_answered(tiny_checkpoint: Path, engine: Engine) -> None:
    expected = [reply.text for reply in engine.reply_batch(EXAMPLES, Sampling(max_new_tokens=6))]
    size = engine._joining.bytes_per_token
    for options, most in (({"max_rows": 2}, 2), ({"cache_bytes": 150 * size}, 3)):
        small = Engine.load(tiny_checkpoint, device="cpu", **options)
        running: list[int] = []
        small.model.register_forward_hook(lambda *_, small=small, running=running: running.append(small.num_running))
        assert [reply.text for reply in small.reply_batch(EXAMPLES, Sampling(max_new_tokens=6))] == expected
        assert 1 <= max(running) <= most
    assert "hold 150 tokens" in small.describe_batching()
    with pytest.raises(MmllmError, match="150 tokens for which the KV cache has memory"):
        small.reply(EXAMPLES[0], Sampling(max_new_tokens=200))


def test_a_higher_priority_enters_first_and_equals_in_their_order(unstarted: Engine) -> None:
    unstarted.scheduler.max_rows = 1
    low = requests_of(unstarted, EXAMPLES[:2], *[Sampling(max_new_tokens=2)] * 2)
    high = requests_of(unstarted, EXAMPLES[2:4], *[Sampling(max_new_tokens=2)] * 2, priority=1)
    for request in [*low, *high]:
        unstarted.scheduler.waiting.put(request)
    run_staggered(unstarted.scheduler, [])
    times = [request.first_token for request in [*high, *low]]
    assert times == sorted(times)


def test_a_full_queue_makes_callers_wait_or_says_so(unstarted: Engine) -> None:
    for request in requests_of(unstarted, EXAMPLES, *[Sampling(max_new_tokens=2)] * len(EXAMPLES)):
        unstarted.scheduler.waiting.put(request)
    (late,) = requests_of(unstarted, EXAMPLES[:1], Sampling(), deadline=time.monotonic() + 0.1)
    with pytest.raises(EngineBusyError, match="6 requests are waiting already"):
        unstarted.scheduler.submit(late, wait=False)
    unstarted.scheduler.waiting.put(late)  # gives up at its deadline
    assert late.finish_reason == "timeout"
    small = Engine(unstarted.model, unstarted.processor, name="tiny", max_waiting=2)
    replies = small.reply_batch(EXAMPLES, Sampling(max_new_tokens=2))  # waits for places
    assert [reply.num_new_tokens for reply in replies] == [2] * len(EXAMPLES)


def test_stopping_closing_and_deadlines_free_the_row_and_leave_the_others(engine: Engine) -> None:
    stop = threading.Event()
    long = Sampling(max_new_tokens=2000)
    stopped, closed = engine.stream(EXAMPLES[0], long, stop=stop), engine.stream(EXAMPLES[1], long)
    timed = engine.stream(EXAMPLES[2], long, timeout_seconds=0.3)
    for stream in (stopped, closed, timed):
        next(stream)
    wait_until(lambda: engine.num_running == 3)
    stop.set()
    closed.close()
    assert [*stopped][-1].finish_reason == "stopped"
    last = [*timed][-1]
    assert (last.finish_reason, last.num_new_tokens > 0) == ("timeout", True)
    expected = generate(engine, EXAMPLES[3], max_new_tokens=5)[0].tolist()
    assert engine.reply(EXAMPLES[3], Sampling(max_new_tokens=5)).text == engine.renderer.decode(expected)
    wait_until(lambda: engine.num_running == 0)


def test_a_request_that_fails_takes_no_other_with_it(unstarted: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = requests_of(unstarted, EXAMPLES, *[Sampling(max_new_tokens=3)] * len(EXAMPLES))
    requests[1].prompt_ids.remove(unstarted.processor.image_token_id)  # one slot too few: a bug of the renderer
    for request in requests:
        unstarted.scheduler.waiting.put(request)
    run_staggered(unstarted.scheduler, [])
    assert [request.error is None for request in requests] == [True, False, True, True, True, True]
    with pytest.raises(ValueError, match="image slots in the text"):
        requests[1].raise_error()
    monkeypatch.setattr(unstarted.scheduler.decoder, "decode", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unstarted.reply(EXAMPLES[0], Sampling(max_new_tokens=3))
    monkeypatch.undo()
    assert unstarted.reply(EXAMPLES[0], Sampling(max_new_tokens=3)).num_new_tokens == 3


def test_an_engine_that_nobody_uses_frees_its_model_and_its_thread(tiny_checkpoint: Path) -> None:
    one = Engine.load(tiny_checkpoint, device="cpu")
    one.reply(EXAMPLES[0], Sampling(max_new_tokens=1))
    wait_until(lambda: not any(thread.name == "engine" for thread in threading.enumerate()))
    model = weakref.ref(one.model)
    del one
    gc.collect()
    assert model() is None


PROGRAM = """
import sys, threading
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.batch import Example, message
engine, question = Engine.load(sys.argv[1], device="cpu"), Example("x", "", (message("user", "hello"),))
left = engine.stream(question, Sampling(max_new_tokens=2000))
next(left)
others = engine.stream(question, Sampling(max_new_tokens=50))
threading.Thread(target=lambda: print([*others][-1].finish_reason, engine.num_running)).start()
"""


def test_an_answer_ends_with_the_main_thread_that_began_it_and_others_go_on(tiny_checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_checkpoint)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0
    assert done.stdout in ("length 0\n", "length 1\n")  # its own row at most: the other one was dropped meanwhile
    assert done.stderr == ""


def test_batching_that_does_not_exist_is_refused(engine: Engine) -> None:
    with pytest.raises(MmllmError, match="continuous, dynamic, static, got 'paged'"):
        Engine(engine.model, engine.processor, name="x", batching="paged")  # type: ignore[arg-type]
