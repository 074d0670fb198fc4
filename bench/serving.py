"""Requests that arrive at random, batched in each way; and what a second question about a picture costs."""

from __future__ import annotations

import gc
import queue
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.workload import SIZES, write_checkpoint, write_clip, write_language

if TYPE_CHECKING:
    from mmllm.batch import Example
    from mmllm.inference.engine import Engine, Reply

MODEL = "runs/tiny/stage2"
NUM_REQUESTS = 32
STATIC_BATCH = 8  # requests that static batching waits for
LOAD = 8  # requests arrive so many times faster than one after the other is answered
ROUNDS = 3
MAX_NEW_TOKENS = 48
Answer = Callable[["Example"], "Reply"]
Times = tuple[float, list[float]]  # seconds until the last answer, and seconds to each first token


def _examples() -> list[Example]:
    """Half of them questions with short answers, half descriptions."""
    from mmllm.evaluation.scenes import find_task

    questions = [question.example() for question in find_task("scenes-val").questions(64)]
    pictures = [example for example in questions if len(example.images) == 1]
    told = [example for example in pictures if "escri" in example.messages[-1].text]
    asked = [example for example in pictures if "escri" not in example.messages[-1].text]
    half = NUM_REQUESTS // 2
    assert len(told) >= half, f"only {len(told)} descriptions"
    mixed = [*told[:half], *asked[:half]]
    random.Random(0).shuffle(mixed)
    return mixed


def _in_threads(examples: Sequence[Example], arrivals: Sequence[float], answer: Answer) -> Times:
    """Each request in a thread of its own, begun when it arrives."""
    firsts: list[float] = []
    begun = time.monotonic()

    def ask(example: Example, arrival: float) -> None:
        time.sleep(max(0.0, begun + arrival - time.monotonic()))
        firsts.append(answer(example).seconds_to_first_token or 0.0)

    threads = [threading.Thread(target=ask, args=pair) for pair in zip(examples, arrivals, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - begun, firsts


def _in_static_batches(engine: Engine, examples: Sequence[Example], arrivals: Sequence[float]) -> Times:
    """Whoever arrives waits until STATIC_BATCH are there; then they are answered together."""
    from mmllm.inference.sampling import Sampling

    arrived: queue.SimpleQueue[tuple[Example, float]] = queue.SimpleQueue()
    begun = time.monotonic()

    def arrive() -> None:
        for example, arrival in zip(examples, arrivals, strict=True):
            time.sleep(max(0.0, begun + arrival - time.monotonic()))
            arrived.put((example, time.monotonic()))

    threading.Thread(target=arrive, daemon=True).start()
    firsts: list[float] = []
    for _ in range(0, len(examples), STATIC_BATCH):
        batch = [arrived.get() for _ in range(STATIC_BATCH)]
        started = time.monotonic()
        replies = engine.reply_batch([example for example, _ in batch], Sampling(max_new_tokens=MAX_NEW_TOKENS))
        firsts += [
            started - since + (reply.seconds_to_first_token or 0.0)
            for reply, (_, since) in zip(replies, batch, strict=True)
        ]
    return time.monotonic() - begun, firsts


def batching() -> dict[str, float]:
    """32 requests that arrive at random: one after the other, static, dynamic and continuous batches."""
    from mmllm.inference.engine import Engine
    from mmllm.inference.sampling import Sampling

    sampling, examples = Sampling(max_new_tokens=MAX_NEW_TOKENS), _examples()
    # without caches, since rounds ask the same again
    options = {"feature_cache_bytes": 0, "prefix_cache_bytes": 0}
    static = Engine.load(MODEL, batching="static")
    engines = {
        kind: Engine(static.model, static.processor, name=kind, batching=kind, **options)  # type: ignore[arg-type]
        for kind in ("dynamic", "continuous")
    }
    expected = [static.reply(example, sampling).text for example in examples]
    for kind, engine in engines.items():
        assert [reply.text for reply in engine.reply_batch(examples, sampling)] == expected, f"{kind} answers otherwise"
    begun = time.monotonic()
    for example in examples:
        static.reply(example, sampling)
    rng, gap = random.Random(0), (time.monotonic() - begun) / NUM_REQUESTS / LOAD
    arrivals = [0.0]
    for _ in range(NUM_REQUESTS - 1):
        arrivals.append(arrivals[-1] + rng.expovariate(1 / gap))
    continuous = engines["continuous"].scheduler
    continuous.step_seconds = []  # type: ignore[union-attr]
    ways: dict[str, Callable[[], Times]] = {
        "one after the other": lambda: _in_threads(examples, arrivals, lambda one: static.reply(one, sampling)),
        "static": lambda: _in_static_batches(static, examples, arrivals),
        **{
            kind: lambda engine=engine: _in_threads(examples, arrivals, lambda one: engine.reply(one, sampling))
            for kind, engine in engines.items()
        },
    }
    gc.collect()
    rounds: dict[str, list[Times]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, run in ways.items():
            rounds[way].append(run())
    results: dict[str, float] = {}
    for way, times in rounds.items():
        seconds = statistics.median(total for total, _ in times)
        results[f"{way}: requests a s"] = NUM_REQUESTS / seconds
        results[f"{way}: p95 to first token"] = statistics.median(_percentile(firsts, 95) for _, firsts in times)
        if way != "one after the other":
            slow = statistics.median(total for total, _ in rounds["one after the other"])
            results[f"{way}: throughput ratio"] = slow / seconds
    results["continuous: p99 of a step"] = _percentile(continuous.step_seconds, 99)  # type: ignore[union-attr]
    return results


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def second_question() -> dict[str, float]:
    """Time to the first token of a second question about a picture, against the first's: 100M parameters."""
    import torch

    from mmllm.batch import Example, message
    from mmllm.inference.engine import Engine
    from mmllm.inference.sampling import Sampling
    from mmllm.scenes.draw import draw
    from mmllm.scenes.world import sample_scene

    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), SIZES["large"]
        torch.manual_seed(0)
        write_clip(folder / "vision", size)
        write_language(folder / "language", size)
        write_checkpoint(folder)
        engine = Engine.load(folder / "checkpoint", device="cpu", verify=False)
    rng, sampling = random.Random(0), Sampling(max_new_tokens=2)
    firsts: list[float] = []
    seconds: list[float] = []
    engine.ask("is it round?", [draw(sample_scene(rng, "train"), rng)], sampling)
    for _ in range(ROUNDS):
        picture = draw(sample_scene(rng, "train"), rng).resize((640, 480))
        for question, times in (("what color is it?", firsts), ("where is the small red ring?", seconds)):
            example = Example("", "", (message("user", f"<image>\n{question}"),), (picture,))
            times.append(engine.reply(example, sampling).seconds_to_first_token or 0.0)
    ratio = statistics.median(later / first for first, later in zip(firsts, seconds, strict=True))
    return {"first question": statistics.median(firsts), "second": statistics.median(seconds), "ratio": ratio}
