"""The tables of docs/scale.md, a plan on paper: `python -m bench.paper_plan` prints them.

Counted from LLaVA-1.5-7B's config, without its weights: FLOPs of a pair (mmllm/runs/flops.py) and bytes of its
features. Measured here: reading and transforming a JPEG, and reading a cached row. Assumed: the share of a GPU's peak
that training reaches, and prices.
"""

from __future__ import annotations

import io
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

PEAK, MFU = 989e12, 0.40  # H100/H200, dense bf16; published MFU of such models: 40% (lmms-engine), 29% (LLaVA)
PRICE = 2.5  # dollars per hour of one GPU
STORE_PRICE = 0.02  # dollars per GB and month of object storage
JPEG_BYTES = 100e3  # of a picture, 640x480 at quality 90
GPUS = (1, 8, 64, 512)
PAIRS = {"1M": 1e6, "100M": 1e8, "1B": 1e9}
CAPTION_TOKENS, ANSWER_TOKENS, PROMPT_TOKENS = 24, 160, 90  # of a pair in stage 1; of a conversation in stage 2
STATE_BYTES = 12  # of a trained parameter: fp32 weight and AdamW's two moments


def build_model(trained: tuple[str, ...]) -> Any:
    """LLaVA-1.5-7B on the meta device: CLIP ViT-L/14-336, two-layer MLP, Llama of 7B."""
    import open_clip
    import torch
    from transformers import LlamaConfig

    from mmllm.model.model_config import VisionLanguageConfig
    from mmllm.model.tower import TowerSpec
    from mmllm.model.vlm import VisionLanguageModel

    clip = open_clip.get_model_config("ViT-L-14-336-quickgelu")
    spec = TowerSpec(clip, -2, 336, (0.5,) * 3, (0.5,) * 3, "bicubic", "ViT-L-14-336-quickgelu")
    text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    config = VisionLanguageConfig(
        spec.to_json(), {"kind": "mlp", "options": {"depth": 2}}, text, image_token_id=32000, num_image_tokens=576
    )
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    model.requires_grad_(False)
    for part in trained:
        getattr(model, part).requires_grad_(True)
    return model


def flops_of(trained: tuple[str, ...], prompt: int, answer: int, *, cached: bool) -> float:
    """FLOPs of forward and backward for one pair with its 576 image tokens."""
    import torch

    from mmllm.batch import IGNORE_INDEX, Batch
    from mmllm.runs.flops import StepFlops

    model = build_model(trained)
    ids = torch.zeros(1, 576 + prompt + answer, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -answer:] = 1
    tower = model.vision_tower
    pictures = {"image_features": torch.zeros(1, tower.num_patches, tower.width, device="meta")} if cached else {
        "pixel_values": torch.zeros(1, 3, 336, 336, device="meta")}  # fmt: skip
    return float(StepFlops(model).count(Batch(ids, torch.ones_like(ids), labels, **pictures)).model)


def seconds_per_picture() -> float:
    """Seconds of one core to read, decode and transform a JPEG of 640x480 as CLIP does; the median of 30."""
    import numpy as np
    from PIL import Image

    from mmllm.config.file import load_config
    from mmllm.inference.engine import Engine
    from mmllm.model.build import build_model as build_parts

    config: Any = load_config("configs/tiny/stage1.yaml", ["out=bench/results/paper"])
    model, processor, _ = build_parts(config.model)
    Engine(model, processor, name="tiny")
    processor.image_processor.size = {"height": 336, "width": 336}
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    picture = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jpg"
        picture.save(path, quality=90)
        for _ in range(33):
            begun = time.perf_counter()
            processor.load_pixels([str(path)])
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[3:])


def megabytes_per_second() -> float:
    """MB a second of one core that reads rows of cached features (1.2 MB each) from the page cache, as a step does."""
    import numpy as np

    rows = np.zeros((256, 576, 1024), np.int16)
    buffer = io.BytesIO()
    buffer.write(rows.tobytes())
    with tempfile.NamedTemporaryFile() as file:
        file.write(buffer.getvalue())
        file.flush()
        mapped = np.memmap(file.name, np.int16, "r", shape=rows.shape)
        begun = time.perf_counter()
        for start in range(0, 256, 16):
            mapped[list(range(start, start + 16))].sum()
        return rows.nbytes / 1e6 / (time.perf_counter() - begun)


def _hours(hours: float) -> str:
    return f"{hours * 60:.0f} min" if hours < 1 else f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.0f} days"


def _bytes(count: float) -> str:
    power = min(4, int(math.log10(max(1, count)) // 3))
    return (
        f"{count / 1000**power:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"
        if count < 1e15
        else f"{count / 1e15:.3g} PB"
    )


def time_table(title: str, flops: float) -> None:
    """Prints training times and costs for a pair of this many FLOPs."""
    print(f"\n{title}: {flops / 1e12:.1f} TFLOP a pair, {PEAK * MFU / flops:.0f} pairs/s a GPU\n")
    print("| pairs | " + " | ".join(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPUS) + " | cost |")
    print("|---|" + "---|" * (len(GPUS) + 1))
    for name, pairs in PAIRS.items():
        hours = [flops * pairs / (PEAK * MFU * gpus) / 3600 for gpus in GPUS]
        print(f"| {name} | " + " | ".join(map(_hours, hours)) + f" | ${hours[0] * PRICE:,.0f} |")


def main() -> None:
    """Prints all tables."""
    stage1 = flops_of(("projector",), 4, CAPTION_TOKENS, cached=False)
    warm = flops_of(("projector",), 4, CAPTION_TOKENS, cached=True)
    stage2 = flops_of(("projector", "language_model"), PROMPT_TOKENS, ANSWER_TOKENS, cached=False)
    time_table("Stage 1", stage1)
    time_table("Stage 1, features cached", warm)
    time_table("Stage 2, the LLM trained whole", stage2)
    picture, rate = seconds_per_picture(), megabytes_per_second()
    row = 576 * 1024 * 2
    per_gpu = {"stage 1": PEAK * MFU / stage1, "stage 1, cached": PEAK * MFU / warm, "stage 2": PEAK * MFU / stage2}
    print(f"\nA picture takes {picture * 1e3:.1f} ms of a core, a cached row of {row / 1e6:.2f} MB "
          f"{row / 1e6 / rate * 1e3:.2f} ms ({rate:,.0f} MB/s)\n")  # fmt: skip
    print("| | pairs/s a GPU | cores a GPU | I/O a GPU | of 8 GPUs | of 512 |\n|---|---|---|---|---|---|")
    for name, pairs in per_gpu.items():
        cached = "cached" in name
        size, busy = (row, row / 1e6 / rate) if cached else (JPEG_BYTES, picture)
        cells = [f"{pairs:.0f}", f"{pairs * busy:.2g}", *(f"{_bytes(pairs * size * gpus)}/s" for gpus in (1, 8, 512))]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\n| pairs | pictures as JPEG | a month of it | features in bf16 | a month of it |\n|---|---|---|---|---|")
    for name, pairs in PAIRS.items():
        cells = [
            text
            for size in (JPEG_BYTES, row)
            for text in (_bytes(pairs * size), f"${pairs * size / 1e9 * STORE_PRICE:,.0f}")
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    model = build_model(())
    for what, parts in (
        ("projector", [model.projector]),
        ("projector and LLM", [model.projector, model.language_model]),
    ):
        trained = sum(p.numel() for part in parts for p in part.parameters())
        print(f"\nA saved state of {what}: {trained / 1e9:.3g}B trained parameters, {_bytes(trained * STATE_BYTES)}")


if __name__ == "__main__":
    main()
