"""Gradient checkpointing of LLM and tower: less is kept for backward, and the gradients are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mmllm.config import ConfigError
from mmllm.model.vision import build_tower
from mmllm.optimizers.optim import build_optimizers
from mmllm.stages.conversation import ConversationStage
from mmllm.stages.registry import build_stage
from tests.builders.backward import saved_bytes
from tests.builders.tiny_runs import settings_of, train_in_process
from tests.builders.towers import OPEN_CLIP, TOWERS, spec_of

TRAIN_ALL = ("train=[vision,projector,language]",
             "optim.learning_rates={vision: 0.01, projector: 0.01, language: 0.01}")  # fmt: skip


@pytest.mark.parametrize("kind", TOWERS)
def test_every_tower_recomputes_the_same_gradients_and_keeps_less(kind: str) -> None:
    torch.manual_seed(0)
    tower = TOWERS[kind]().train()
    side = tower.spec.image_size_px
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    found: list[tuple[int, dict[str, Tensor]]] = []
    for recomputes in (False, True):
        if recomputes:
            tower.checkpoint_layers()
        tower.zero_grad()
        kept = saved_bytes(lambda: tower(pixels).square().sum())
        torch.manual_seed(1)  # DINOv3 shakes its positions in training
        tower(pixels).square().sum().backward()
        found.append((kept, {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}))
    (plain_bytes, plain), (bytes_, recomputed) = found
    assert plain
    torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-7)
    assert bytes_ < 0.6 * plain_bytes


def test_batch_norm_is_not_run_twice() -> None:
    with pytest.raises(ConfigError, match="has batch norm, which would count every batch twice"):
        build_tower(spec_of(OPEN_CLIP["resnet"], -1)).checkpoint_layers()


@pytest.mark.parametrize("adapters", [(), ("lora={rank: 2}", "vision_lora={rank: 2}"), ("vision_last_layers=1",)])
def test_llm_and_tower_are_recomputed_apart_and_learn_the_same(
    adapters: tuple[str, ...], tiny_runs: Path, tmp_path: Path
) -> None:
    kept, gradients = {}, {}
    for parts in ("[]", "[language]", "[vision]", "[language, vision]", "true"):
        setting = f"compute.gradient_checkpointing={parts}"
        stage = ConversationStage(settings_of(tiny_runs / "stage2.yaml", tmp_path, *TRAIN_ALL, *adapters, setting))
        for name, parameter in stage.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        batch = stage.batch([0, 1, 10])
        kept[parts] = saved_bytes(lambda stage=stage, batch=batch: stage.module(batch))
        stage.module(batch).backward()
        gradients[parts] = {name: p.grad for named in stage.parts.values() for name, p in named}
    assert kept["[language, vision]"] < min(kept["[language]"], kept["[vision]"]) < kept["[]"]
    assert kept["true"] == kept["[language]"] < kept["[]"]
    assert kept["[vision]"] < kept["[]"]
    for found in gradients.values():
        torch.testing.assert_close(found, gradients["[]"], rtol=1e-5, atol=1e-6)


def test_only_what_keeps_something_is_recomputed(tiny_runs: Path, tmp_path: Path) -> None:
    path = tiny_runs / "stage2.yaml"
    with pytest.raises(ConfigError, match=r"gradient_checkpointing lists vision, but train does not"):
        settings_of(path, tmp_path, "compute.gradient_checkpointing=[vision]")
    with pytest.raises(ConfigError, match=r"gradient_checkpointing.*projector"):
        settings_of(path, tmp_path, "compute.gradient_checkpointing=[projector]")


def test_a_run_recomputes_both(tiny_runs: Path, tmp_path: Path) -> None:
    short = (*TRAIN_ALL, "optim.max_steps=2", "compute.precision=bf16")
    train_in_process(
        tiny_runs / "stage2.yaml", tmp_path / "out", *short, "compute.gradient_checkpointing=[language, vision]"
    )


@pytest.mark.timeout(600)
def test_compiled_layers_learn_the_same_with_adapters_and_recomputed(tiny_runs: Path, tmp_path: Path) -> None:
    options = ("lora.rank=2", "compute.gradient_checkpointing=true")
    found = []
    for compiles in ("false", "true"):
        stage = ConversationStage(
            settings_of(tiny_runs / "stage2.yaml", tmp_path, *options, f"compute.compile={compiles}")
        )
        for name, parameter in stage.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        counters.clear()
        losses = []
        for batch in (stage.batch([5, 6, 7, 8]), stage.batch([3, 11, 12, 5])):  # packed, of other lengths
            assert batch.position_ids is not None
            loss = stage.module(batch)
            loss.backward()
            losses.append(float(loss.detach()))
        graphs = counters["stats"]["unique_graphs"]
        stage.validation.examples = [stage.examples[number] for number in range(1)]
        val_loss = stage.validate(1)["val_loss"]
        assert counters["stats"]["unique_graphs"] == graphs, "answers compile nothing"
        assert (graphs > 0) == (compiles == "true")
        assert not [name for name in stage.model.state_dict() if "_orig_mod" in name]
        grads = {name: p.grad for named in stage.parts.values() for name, p in named}
        found.append((losses, val_loss, grads))
    (plain, plain_val, plain_grads), (compiled, compiled_val, compiled_grads) = found
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert compiled_val == pytest.approx(plain_val, rel=1e-6)
    torch.testing.assert_close(compiled_grads, plain_grads, rtol=1e-3, atol=1e-3)


def test_without_a_compiler_nothing_is_loaded(tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    config = settings_of(
        tiny_runs / "stage2.yaml", tmp_path, "compute.compile=true", "model.language.source=/nothing/here"
    )
    with pytest.raises(ConfigError, match=r"compute.compile needs a C\+\+ compiler"):
        build_stage(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run where there is a GPU")
def test_kernels_without_a_gpu_are_refused_before_anything_loads(tiny_runs: Path, tmp_path: Path) -> None:
    path, nowhere = tiny_runs / "stage2.yaml", "model.language.source=/nothing/here"
    with pytest.raises(ConfigError, match=r"compute.liger: its kernels run on a CUDA GPU, and this machine shows none"):
        build_stage(settings_of(path, tmp_path, "compute.liger=true", nowhere))
    with pytest.raises(ConfigError, match=r"lora.quantise ends on the CPU, where compute.liger has no kernels"):
        settings_of(path, tmp_path, "compute.liger=true", "lora.quantise=nf4")


@pytest.mark.parametrize("trained", ["whole", "adapters", "nothing"])
def test_without_pictures_a_frozen_tower_does_not_run_and_a_trained_one_stays_in_the_graph(
    trained: str, tiny_runs: Path, tmp_path: Path
) -> None:
    options = () if trained == "nothing" else TRAIN_ALL
    adapters = ("vision_lora={rank: 2}",) if trained == "adapters" else ()
    stage = ConversationStage(settings_of(tiny_runs / "stage2.yaml", tmp_path, *options, *adapters))
    runs: list[int] = []
    stage.model.vision_tower.register_forward_hook(lambda module, args, output: runs.append(len(args[0])))
    batch = stage.batch([12, 13])
    assert batch.pixel_values is None
    loss = stage.module(batch)
    loss.backward()
    with torch.no_grad():
        assert float(stage.module(batch)) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert runs == ([] if trained == "nothing" else [1])
    for _, parameter in stage.parts.get("vision", []):
        assert parameter.grad is not None
        assert not parameter.grad.any()


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_bf16_computes_while_trained_weights_and_their_state_stay_fp32(
    kind: str, tiny_runs: Path, tmp_path: Path
) -> None:
    options = ("lora.rank=2", "model.language.dtype=bf16", f"optim.kind={kind}")
    stage = ConversationStage(settings_of(tiny_runs / "stage2.yaml", tmp_path, *options))
    [optimizer] = build_optimizers(stage.module, stage.parts, stage.config.optim, depths=stage.depths)
    with torch.autocast("cpu", torch.bfloat16):
        stage.module(stage.batch(range(4))).backward()
    optimizer.step()
    for named in stage.parts.values():
        for _, parameter in named:
            state = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
            dtypes = {value.dtype for value in [parameter, *state]}
            assert dtypes <= {torch.float32, torch.uint8}
    assert {p.dtype for p in stage.model.language_model.parameters() if not p.requires_grad} == {torch.bfloat16}
