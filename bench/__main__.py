"""Side-by-side measurements, as ratios within one run: `python -m bench [NAME ...]`.

The two sides of a pair, on the embedded default, take turns for several rounds, and the median round is printed.
Results are also written to bench/results/. Only `training` takes `--size` and `--stage`, see bench/training.py. What
only a GPU shows is another command with its own arguments: `python -m bench gpu --help`.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import gpu
from bench.captioning import captioning
from bench.growth import growth
from bench.million_rows import million_rows
from bench.packing import packing
from bench.serving import batching, second_question
from bench.training import training
from bench.workload import SIZES, STAGES

ROUNDS = 7
Work = Callable[[], object]


def side_by_side(left: Work, right: Work, rounds: int = ROUNDS) -> tuple[float, float]:
    """Median seconds of both, called in turn after one warm-up round."""
    left(), right()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for work, seconds in zip((left, right), times, strict=True):
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
    return statistics.median(times[0]), statistics.median(times[1])


def _stage(**changes: Any) -> Any:
    from mmllm.config import StageConfig
    from mmllm.config.file import load_config
    from mmllm.runs.requirements import resolve_precision
    from mmllm.stages.conversation import ConversationStage

    config = resolve_precision(load_config("configs/tiny/stage2.yaml", ["out=bench/results/run"]))
    assert isinstance(config, StageConfig)
    if changes:
        config = config.model_copy(update={"data": config.data.model_copy(update=changes)})
    stage = ConversationStage(config)
    if stage.features:
        stage.prepare_features(stage.model.device, rank=0, world_size=1)
    return stage


def _train_step(stage: Any, batch: Any) -> Work:
    import torch

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = stage.module(batch() if callable(batch) else batch)
        loss.backward()
        stage.model.zero_grad()

    return work


def supervised_rows() -> dict[str, float]:
    """One training step with the LLM's head applied to supervised positions only, against all positions."""
    stage, full = _stage(), _stage()
    full.module.plain_head = False
    batch = stage.batch(range(32))
    ours, theirs = side_by_side(_train_step(stage, batch), _train_step(full, batch))
    return {"head on supervised rows": ours, "head on all rows": theirs, "ratio": theirs / ours}


def feature_cache() -> dict[str, float]:
    """One training step with its data: cached patch features, against decoding and encoding each picture."""
    cached, plain = _stage(), _stage(cache_features=False)
    indices = list(range(32))
    ours, theirs = side_by_side(
        _train_step(cached, lambda: cached.batch(indices)), _train_step(plain, lambda: plain.batch(indices))
    )
    return {"cached features": ours, "tower in every step": theirs, "ratio": theirs / ours}


def attention() -> dict[str, float]:
    """One training step with eager attention against sdpa."""
    eager, sdpa = _stage(), _stage()
    sdpa.model.language_model.set_attn_implementation("sdpa")
    batch = eager.batch(range(32))
    ours, theirs = side_by_side(_train_step(eager, batch), _train_step(sdpa, batch))
    return {"eager": ours, "sdpa": theirs, "ratio": theirs / ours}


def batched_replies() -> dict[str, float]:
    """32 answers in one batch, against one by one."""
    from mmllm.evaluation.scenes import find_task
    from mmllm.inference.engine import Engine
    from mmllm.inference.sampling import Sampling

    engine = Engine.load("runs/tiny/stage2")
    examples = [question.example() for question in find_task("scenes-val").questions(8)][:32]
    sampling = replace(Sampling(), max_new_tokens=8)
    ours, theirs = side_by_side(
        lambda: engine.reply_batch(examples, sampling),
        lambda: [engine.reply(example, sampling) for example in examples],
        rounds=3,
    )
    return {"batch of 32": ours, "one by one": theirs, "ratio": theirs / ours}


def golden_answers() -> dict[str, float]:
    """Loading a checkpoint, against verifying its golden prompts, pictures and answers."""
    from mmllm.checkpoint.folder import load_checkpoint
    from mmllm.checkpoint.golden import read_golden, verify_golden

    folder = "runs/tiny/stage2"
    assert read_golden(folder), f"{folder} has no golden answers; train it again"
    model, processor, _ = load_checkpoint(folder)
    ours, theirs = side_by_side(lambda: verify_golden(model, processor, folder), lambda: load_checkpoint(folder))
    return {"verifying": ours, "loading": theirs, "ratio": theirs / ours}


BENCHES: dict[str, Callable[[], dict[str, float]]] = {
    "supervised_rows": supervised_rows,
    "feature_cache": feature_cache,
    "attention": attention,
    "batched_replies": batched_replies,
    "batching": batching,
    "second_question": second_question,
    "golden_answers": golden_answers,
    "million_rows": million_rows,
    "packing": packing,
    "training": training,
    "growth": growth,
    "captioning": captioning,
}


def main(arguments: list[str]) -> int:
    """Runs the named measurements, or all, and prints a line for each. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(BENCHES)}")
    parser.add_argument("--size", choices=SIZES, action="append", help="training: shapes of the model; may be repeated")
    parser.add_argument("--stage", choices=STAGES, action="append", help="training: default: all")
    parser.add_argument("--quick", action="store_true", help="training, growth: small shapes, to see that they run")
    if arguments[:1] == ["gpu"]:
        return gpu.main(arguments[1:])
    options = parser.parse_args(arguments)
    names = options.names
    sizes = ["quick"] if options.quick else options.size or ["tiny", "large"]
    configured = {
        "training": functools.partial(training, sizes, options.stage or tuple(STAGES)),
        "growth": functools.partial(growth, is_quick=options.quick),
    }
    benches = {**BENCHES, **configured}
    if unknown := [name for name in names if name not in BENCHES]:
        print(f"error: no measurement {unknown[0]!r}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    results = {}
    for name in names or benches:
        results[name] = benches[name]()
        shown = "  ".join(
            f"{what} {value:.3f}{'' if 'ratio' in what or what.endswith((' s', ' MiB')) else ' s'}"
            for what, value in results[name].items()
        )
        print(f"{name}: {shown}", flush=True)
    folder = Path("bench/results")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"python": platform.python_version(), "machine": platform.machine(), "results": results}
    (folder / "latest.json").write_text(json.dumps(facts, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
