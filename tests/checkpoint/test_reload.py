"""A model that a checkpoint would bring back as another one is named before anything is trained or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.checkpoint.folder import CheckpointError
from mmllm.checkpoint.reload import check_reload
from mmllm.inference.engine import Engine
from mmllm.interop.import_llava import ImportOptions, import_model
from mmllm.model import build
from mmllm.model.build import build_model
from mmllm.model.vision import build_tower
from mmllm.stages.registry import build_stage
from tests.builders.small_towers import small_towers, small_trunks
from tests.builders.tiny import model_config
from tests.builders.tiny_runs import settings_of


@pytest.fixture
def odd_tower(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Towers are an EVA-02 whose rotary positions are not those that its config says."""
    with small_trunks():
        tower: Any = build_tower(small_towers()["EVA02-B-16"][0])
        tower.encoder.trunk.rope.pos_embed.mul_(2)
        monkeypatch.setattr(build, "load_tower", lambda config: tower)
        yield tower


def test_a_tower_that_would_come_back_otherwise_is_named(
    odd_tower: Any, tiny_runs: Path, tiny_parts: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="vision tower EVA02-B-16: saved and loaded again it would differ"):
        build_stage(settings_of(tiny_runs / "stage1.yaml", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    options = ImportOptions(vision=f"local-dir:{tiny_parts / 'vision'}", template="tokenizer")
    with pytest.raises(CheckpointError, match="vision tower EVA02-B-16"):
        import_model(str(tiny_parts / "language"), tmp_path / "imported", options)
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_llm_that_would_come_back_otherwise_is_named(dtype: torch.dtype, tiny_parts: Path) -> None:
    torch.manual_seed(0)
    model, processor, _ = build_model(model_config(tiny_parts))
    model.language_model.to(dtype)
    engine = Engine(model, processor, name="tiny")
    state = torch.get_rng_state()
    check_reload(engine.model, engine.processor)
    assert torch.equal(torch.get_rng_state(), state), "the run's random numbers are those of a run without the check"
    model.language_model.model.rotary_emb.inv_freq.mul_(0).add_(1)
    with pytest.raises(CheckpointError, match="LLM LlamaForCausalLM: saved and loaded again it would differ"):
        check_reload(engine.model, engine.processor)
