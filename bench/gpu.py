"""What only a GPU shows: `python -m bench gpu [--smoke] [--minutes N] [--section NAME ...]`, tables in Markdown.

Needs no network: `make gpu-wheels` downloads the packages of bench/gpu_packages.txt beforehand. The most valuable
sections run first. Each section has its own process, so that it frees its memory and its failure stays its own. A
section that does not fit into the remaining time is left out, and the table says so. `--smoke`, or a machine without
CUDA, runs all sections in small shapes in this process: that shows that they run, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MINUTES = 8.0
CLOSING_SECONDS = 10  # reserved for writing the results


@dataclass(frozen=True)
class Section:
    """One part of the output, which `run(is_smoke)` prints row by row; it takes at least `seconds` on one H100."""

    title: str
    seconds: float
    run: Callable[[bool], None]


def _losses(is_smoke: bool) -> None:
    from bench.gpu_losses import losses

    losses(is_smoke)


def _steps(is_smoke: bool) -> None:
    from bench.gpu_steps import steps

    steps(is_smoke)


def _beside(is_smoke: bool) -> None:
    from bench.gpu_large import beside_others

    beside_others(is_smoke)


def _large(name: str) -> Callable[[bool], None]:
    def run(is_smoke: bool) -> None:
        from bench.gpu_large import large

        large(name, is_smoke)

    return run


SECTIONS = {
    "losses": Section("The CPU's losses on the GPU", 60, _losses),
    "steps": Section("One step: waits for the GPU, and the precision of its products", 30, _steps),
    "lora-packed": Section("7B shapes, stage 2 with LoRA, packed", 45, _large("lora-packed")),
    "stage1": Section("7B shapes, stage 1", 45, _large("stage1")),
    "beside": Section("SmolLM2-135M and CLIP-L shapes beside others, stage 2", 90, _beside),
    "lora": Section("7B shapes, stage 2 with LoRA, padded", 45, _large("lora")),
    "whole-packed": Section("7B shapes, stage 2 whole, packed", 60, _large("whole-packed")),
    "stage1-packed": Section("7B shapes, stage 1, packed", 45, _large("stage1-packed")),
    "whole": Section("7B shapes, stage 2 whole, padded", 60, _large("whole")),
}


def _machine(is_smoke: bool) -> str:
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    smoke = ", in smoke form: small shapes, which say nothing about a GPU" if is_smoke else ""
    return f"On {device}, torch {torch.__version__}, transformers {transformers.__version__}{smoke}."


def _run_in_process(name: str, seconds: float) -> str:
    """The output of a section, which is stopped after `seconds`."""
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "bench", "gpu", "--section", name]
        process = subprocess.Popen(command, stdout=printed, stderr=errors)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
        printed.seek(0)
        errors.seek(0)
        text = printed.read()
        if status is None:
            return f"{text}\nSTOPPED after {seconds:.0f} s: no time was left.\n"
        return text if status == 0 else f"{text}\nFAILED with status {status}:\n\n    {errors.read()[-1500:].strip()}\n"


def gpu(*, is_smoke: bool = False, minutes: float = MINUTES, names: Sequence[str] = ()) -> int:
    """Prints all sections and writes them to bench/results/gpu.md; returns 1 where one failed.

    Sections in `names` run in this process instead, and are only printed.
    """
    import torch

    begun, has_failed = time.monotonic(), False
    if names:
        for name in names:
            SECTIONS[name].run(is_smoke)
        return 0
    if not torch.cuda.is_available() and not is_smoke:
        print("There is no CUDA here: this is the smoke run, in small shapes on the CPU.\n")
        is_smoke = True
    report = [f"## On a GPU\n\n`python -m bench gpu`. {_machine(is_smoke)}\n"]
    print(report[-1], flush=True)
    for name, section in SECTIONS.items():
        print(f"### {section.title}\n", flush=True)
        left = minutes * 60 - (time.monotonic() - begun) - CLOSING_SECONDS
        if is_smoke:
            section.run(is_smoke)
            continue
        if left < section.seconds:
            text = f"LEFT OUT: it needs about {section.seconds:.0f} s and {max(0, left):.0f} s are left.\n"
        else:
            text = _run_in_process(name, left)
            has_failed |= "\nFAILED" in text
        report.append(f"### {section.title}\n\n{text}")
        print(text, flush=True)
    if not is_smoke:
        folder = Path("bench/results")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu.md").write_text("\n".join(report))
    return int(has_failed)


def main(arguments: Sequence[str]) -> int:
    """`python -m bench gpu ...`."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small shapes, on a GPU or a CPU")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="time for all sections together; default: %(default)s"
    )
    parser.add_argument("--section", choices=SECTIONS, action="append", help="only this section; may be repeated")
    options = parser.parse_args(arguments)
    return gpu(is_smoke=options.smoke, minutes=options.minutes, names=options.section or ())
