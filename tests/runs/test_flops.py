"""FLOPs of a step: what is counted from the config is what torch's counter sees in the real step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmllm.batch import IGNORE_INDEX, Batch
from mmllm.config import LoraConfig
from mmllm.model.build import build_model
from mmllm.model.capabilities import has_plain_head
from mmllm.model.tower import TowerSpec
from mmllm.model.vision_transformers import TransformersTower
from mmllm.runs import flops
from mmllm.runs.flops import PEAKS, StepFlops, _measured, device_peak, row_lengths
from mmllm.training.lora import add_lora
from mmllm.training.losses import conversation_loss_sum
from tests.builders.tiny import model_config
from tests.builders.tiny_backbones import BACKBONES, STATE_SPACE, make_backbone_parts


def make_batch(model: Any, lengths: tuple[int, ...]) -> Batch:
    """A picture in each row, the last third of each supervised."""
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), 20)
    labels, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : model.config.num_image_tokens] = model.config.image_token_id
        labels[row, 2 * length // 3 : length] = 21
        mask[row, :length] = 1
    side = model.vision_tower.spec.image_size_px
    return Batch(ids, mask, labels, torch.randn(len(lengths), 3, side, side))


def seen_by_torch(model: Any, batch: Batch, *, plain_head: bool) -> int:
    model.train()  # the frozen tower too: the counter does not know torch's fused kernel of inference
    # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        conversation_loss_sum(model, batch, plain_head=plain_head).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("train", [("projector",), ("projector", "language"), ("vision", "projector"), ("language",)])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "mixtral", "gpt2", "opt", "phi3"])
def test_a_step_costs_what_torch_counts(kind: str, train: tuple[str, ...], tiny_parts: Path, tmp_path: Path) -> None:
    changes = {"sliding_window": 64} if kind == "gemma2" else {}  # wider than the rows: kernels do not skip
    model = build_model(make_backbone_parts(tmp_path, kind, tiny_parts, **changes))[0]
    model.requires_grad_(False)
    for part in train:
        {"vision": model.vision_tower, "projector": model.projector, "language": model.language_model}[
            part
        ].requires_grad_(True)
    if kind == "mixtral":
        model.language_model.set_experts_implementation("eager")  # the counter does not know the grouped product
    plain = has_plain_head(model.language_model)
    batch = make_batch(model, (24, 17))
    counted = StepFlops(model, plain_head=plain).count(batch)
    assert counted.hardware == pytest.approx(seen_by_torch(model, batch, plain_head=plain), rel=0.03)
    assert counted.model < counted.hardware, "padding is no work of the model"
    even = StepFlops(model, plain_head=True).count(make_batch(model, (24, 24)))
    assert even.model == even.hardware


def frozen_but(model: Any, *parts: Any) -> Any:
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    return model


@pytest.fixture
def tiny(tiny_parts: Path) -> Any:
    return build_model(model_config(tiny_parts))[0]


def test_lora_costs_its_adapters_and_no_gradients_of_frozen_weights(tiny: Any) -> None:
    frozen_but(tiny, tiny.projector)
    add_lora(tiny, LoraConfig(rank=4))
    batch = make_batch(tiny, (24, 24))
    counted = StepFlops(tiny).count(batch)
    assert counted.hardware == pytest.approx(seen_by_torch(tiny, batch, plain_head=True), rel=0.03)
    whole = StepFlops(frozen_but(tiny, tiny.projector, tiny.language_model)).count(batch)
    assert counted.model < whole.model


def test_checkpointed_layers_are_work_of_the_hardware_alone(tiny: Any) -> None:
    frozen_but(tiny, tiny.projector, tiny.language_model)
    batch = make_batch(tiny, (24, 24))
    plain = StepFlops(tiny).count(batch)
    counted = StepFlops(tiny, recomputes_language=True).count(batch)
    assert counted.model == plain.model
    tiny.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    # torch ends the recomputation at the last tensor that it needs, which leaves a layer's last product out
    assert counted.hardware == pytest.approx(seen_by_torch(tiny, batch, plain_head=True), rel=0.04)
    assert counted.hardware > 1.15 * plain.hardware


def test_cached_features_cost_no_tower(tiny: Any) -> None:
    frozen_but(tiny, tiny.projector)
    batch = make_batch(tiny, (24, 24))
    features = torch.zeros(2, tiny.vision_tower.num_patches, tiny.vision_tower.width)
    cached = replace(batch, pixel_values=None, image_features=features)
    flops = StepFlops(tiny)
    assert flops.count(batch).model - flops.count(cached).model == 2 * flops.view.forward


def test_a_vision_transformer_costs_what_its_formula_says(tiny: Any) -> None:
    width, tokens, layers, patch = 32, 17, 2, 8  # tests/builders/tiny.py, with CLS
    linear = 2 * tokens * layers * 12 * width**2 + 2 * (tokens - 1) * width * 3 * patch**2
    attention = layers * 4 * tokens**2 * width
    assert StepFlops(frozen_but(tiny)).view.forward == pytest.approx(linear + attention, rel=0.01)


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_towers_of_transformers_are_measured_as_they_run(kind: str) -> None:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    cfg = {"model_type": kind, "image_size": 32, "patch_size": 8, **size}
    tower = TransformersTower(TowerSpec(cfg, -1, 32, (0.5,) * 3, (0.5,) * 3, "bicubic", "test", "transformers"))
    tower.requires_grad_(True)
    pixels = torch.zeros(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tower(pixels).sum().backward()
    assert _measured(tower, pixels.to("meta"), False).both == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_llm_is_counted_or_says_what_is_left_out(kind: str, tiny_parts: Path, tmp_path: Path) -> None:
    model = frozen_but(build_model(make_backbone_parts(tmp_path, kind, tiny_parts))[0])
    flops = StepFlops(model)
    assert (flops.note is not None) == (kind in STATE_SPACE)
    assert flops.count(make_batch(model, (24, 24))).model > 0


def test_packed_conversations_do_not_look_at_each_other() -> None:
    ids = torch.zeros(1, 7, dtype=torch.long)
    batch = Batch(ids, torch.tensor([[1] * 6 + [0]]), ids)
    assert row_lengths(batch) == [6]
    batch.position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 0]])  # type: ignore[attr-defined]
    assert row_lengths(batch) == [4, 2]


def test_the_peak_of_this_device_is_measured_where_no_table_has_it() -> None:
    peak = device_peak(torch.device("cpu"), "fp32")
    assert peak.source == "measured"
    assert peak.flops_per_second > 1e8
    assert PEAKS["H100"][0] == 989e12


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA A100-SXM4-80GB", "A100"),
     ("NVIDIA L40S", "L40S"), ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA A10G", "A10G")],
)  # fmt: skip
def test_a_gpu_is_known_by_the_whole_word_of_its_name(name: str, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = device_peak(torch.device("cuda"), "bf16")
    assert (peak.source, peak.flops_per_second) == (known, PEAKS[known][0])


def test_a_gpu_with_another_ones_name_in_its_own_is_not_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A1000")
    monkeypatch.setattr(flops, "measure_peak", lambda *given: 1.0)
    assert device_peak(torch.device("cuda"), "bf16").source == "measured"


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [("fp32", "fp32", [False] * 3), ("bf16", "fp32", [True, False, False]), ("fp32", "bf16", [True] * 3)],
)
def test_operations_are_of_the_type_that_is_computed_in(
    dtype: str, precision: str, expected: list[bool], tiny_parts: Path
) -> None:
    config = model_config(tiny_parts)
    assert config.language
    language = config.language.model_copy(update={"dtype": dtype})
    model = frozen_but(build_model(config.model_copy(update={"language": language}))[0])
    model.projector.requires_grad_(True)
    flops_ = StepFlops(model, precision=precision)
    assert flops_.in_bf16 == expected
    found = flops_.count(make_batch(model, (24, 17)))
    shares = {"fp32fp32": found.model_bf16 == 0, "bf16fp32": 0 < found.model_bf16 < found.model,
              "fp32bf16": found.model_bf16 == found.model and found.hardware_bf16 == found.hardware}  # fmt: skip
    assert shares[dtype + precision]


def test_the_peak_is_the_best_of_several_sizes_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "_SIDES", {"cpu": (64, 256)})
    monkeypatch.setattr(flops, "PEAK_SECONDS", 0.02)
    device = torch.device("cpu")
    flops._measure_products.cache_clear()
    try:
        best, usual = flops._measure_products(device, torch.float32, 1)
        assert best >= usual > 0
        assert flops.measure_peak(device, torch.float32, 1) == best
        monkeypatch.setattr(flops, "_measure_products", lambda device, dtype, threads: (1.0, 3.0 / threads))
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        told = flops.threads_text(device, torch.float32)
        assert told is not None
        assert told.startswith("one thread computes 2.0 times as fast as 2 here")
    finally:
        monkeypatch.undo()
        flops._measure_products.cache_clear()
