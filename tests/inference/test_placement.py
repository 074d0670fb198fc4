"""Models that are spread over several devices answer as they do on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model

from mmllm.checkpoint.folder import load_checkpoint
from mmllm.inference.engine import Engine
from mmllm.inference.placement import answer_dtype, spread_model
from mmllm.inference.sampling import Sampling
from mmllm.kernels.precision import multiplies_bf16
from mmllm.model.build import build_model
from tests.builders.conversations import MIXED
from tests.builders.tiny_backbones import make_backbone_parts

SHORT = Sampling(max_new_tokens=6)


def texts(engine: Engine) -> list[str]:
    return [reply.text for reply in engine.reply_batch(MIXED, SHORT)]


def test_a_model_placed_by_itself_answers_as_on_one_device(tiny_checkpoint: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU the dtype is another")
    spread = Engine.load(tiny_checkpoint, device="auto")
    assert {p.device.type for p in spread.model.parameters()} == {"cpu"}
    assert texts(spread) == texts(Engine.load(tiny_checkpoint, device="cpu"))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mamba", "opt"])
def test_layers_that_come_from_elsewhere_when_they_run_answer_as_before(
    kind: str, tiny_parts: Path, tmp_path: Path
) -> None:
    """No second device here, so half of the model is on disk: the hooks that bring weights are the same."""
    model, processor, _ = build_model(make_backbone_parts(tmp_path, kind, tiny_parts))
    engine = Engine(model.eval(), processor, name="tiny")
    expected = texts(engine)
    names = [name for name, module in model.language_model.named_modules() if name and not list(module.children())]
    places = {f"language_model.{name}": "disk" if number % 2 else "cpu" for number, name in enumerate(names)}
    places |= {"vision_tower": "cpu", "projector": "disk"}
    loose = {name for name, _ in model.named_parameters() if not any(name.startswith(place) for place in places)}
    engine.model = dispatch_model(
        model,
        places | dict.fromkeys(loose, "cpu"),
        main_device="cpu",
        offload_dir=tmp_path / "offload",
        skip_keys=sorted(model._skip_keys_device_placement or ()),
    )
    assert {p.device.type for p in model.projector.parameters()} == {"meta"}
    assert texts(engine) == expected


def test_a_model_that_is_too_large_for_the_machine_is_refused(tiny_checkpoint: Path) -> None:
    model = load_checkpoint(tiny_checkpoint)[0]
    with pytest.raises(ValueError, match=r"the model needs 0.0 GiB, more than this machine has free .*cpu: 0.0"):
        spread_model(model, max_memory={"cpu": 1000})


# whether the CPU multiplies in bf16, what a part is stored in, what it answers in
ON_A_CPU = [
    (True, torch.float32, torch.float32),
    (True, torch.bfloat16, torch.bfloat16),
    (True, torch.float16, torch.float32),
    (False, torch.bfloat16, torch.float32),
    (False, torch.float32, torch.float32),
]


@pytest.mark.parametrize(("multiplies", "stored", "expected"), ON_A_CPU)
def test_a_cpu_answers_in_the_stored_dtype_where_it_is_fast_in_it(
    multiplies: bool, stored: torch.dtype, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm.kernels.precision._cpu_multiplies_bf16", lambda: multiplies)
    assert answer_dtype(torch.device("cpu"), stored) == expected


def test_whether_this_cpu_multiplies_in_bf16_is_what_its_flags_say() -> None:
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").is_file() else None
    if flags is None:
        pytest.skip("no /proc/cpuinfo to compare with")
    assert multiplies_bf16(torch.device("cpu")) == bool({"avx512_bf16", "amx_bf16", "bf16", "svebf16"} & set(flags))
