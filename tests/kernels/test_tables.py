"""Tables that no file of weights holds: every tower comes back as it went, whatever stood in memory before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.config import LanguageConfig, VisionConfig
from mmllm.kernels.tables import tables
from mmllm.model.language import load_language
from mmllm.model.model_config import VisionLanguageConfig
from mmllm.model.tower import VisionTower
from mmllm.model.vision import FusedTower, build_tower, load_tower
from mmllm.model.vision_transformers import ENCODERS
from mmllm.model.vlm import VisionLanguageModel
from projector import build_projector
from tests.builders.small_towers import small_towers, small_trunks
from tests.builders.towers import folder_of

TOWERS = small_towers()
HAVE_TABLES = {"EVA01-g-14", "EVA02-B-16", "EVA02-E-14", "EVA02-L-14", "PE-Core-B-16", "swin_base_patch4_window7_224",
               "vit_relpos_medium_patch16_cls_224"}  # fmt: skip


@pytest.fixture(scope="module")
def language(tiny_parts: Path) -> Any:
    return load_language(LanguageConfig(source=str(tiny_parts / "language"), attention="eager"))[0]


@pytest.fixture
def garbage() -> Iterator[None]:
    """Inside, memory that nobody wrote to holds NaN, and the largest whole number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def model_of(tower: VisionTower, language: Any) -> VisionLanguageModel:
    torch.manual_seed(1)
    config = VisionLanguageConfig(
        vision=tower.spec.to_json(), projector={"kind": "mlp", "options": {}}, text_config=language.config,
        image_token_id=1, num_image_tokens=tower.num_patches,
    )  # fmt: skip
    projector = build_projector("mlp", vision_dim=tower.width, llm_dim=language.config.hidden_size)
    return VisionLanguageModel.assemble(config, tower, projector, language)


def logits_of(model: Any) -> Tensor:
    """[1, T, V] for two pictures and three words after them."""
    side = model.vision_tower.spec.image_size_px
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1] * 2 * model.config.num_image_tokens + [5, 6, 7]])
    return model(input_ids=ids, pixel_values=pixels, use_cache=False).logits  # type: ignore[no-any-return]


def comes_back(tower: VisionTower, language: Any, folder: Path) -> None:
    """Two steps of training, saved, loaded: the same logits, and the same tables bit by bit."""
    model = model_of(tower, language)
    trained = [*model.vision_tower.parameters(), *model.projector.parameters()]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    for _ in range(2):
        logits_of(model.train()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder)
    again = VisionLanguageModel.from_pretrained(folder).eval()
    for (_, name, before), (_, _, after) in zip(tables(model), tables(again), strict=True):
        assert torch.equal(before, after), name
    with torch.no_grad():
        torch.testing.assert_close(logits_of(again), logits_of(model), atol=1e-5, rtol=0)
        assert logits_of(model).std() > 0.1


@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_of_open_clip_comes_back_as_it_went(
    name: str, language: Any, tmp_path: Path, garbage: None
) -> None:
    with small_trunks():
        tower = build_tower(TOWERS[name][0])
        assert name not in HAVE_TABLES or list(tables(tower))
        comes_back(tower, language, tmp_path)


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_of_transformers_comes_back_as_it_went(
    kind: str, language: Any, tmp_path: Path, garbage: None
) -> None:
    tower = load_tower(VisionConfig(source=f"transformers:{folder_of(kind, tmp_path / 'encoder')}", feature_layer=-1))
    comes_back(tower, language, tmp_path / "model")


def test_two_fused_towers_come_back_as_they_went(language: Any, tmp_path: Path, garbage: None) -> None:
    with small_trunks():
        first, second = (build_tower(TOWERS[name][0]) for name in ("EVA02-B-16", "PE-Core-B-16"))
        comes_back(FusedTower.join(first, second), language, tmp_path)


def test_the_small_towers_are_all_that_open_clip_registers() -> None:
    import open_clip

    assert sorted(name for _, names in TOWERS.values() for name in names) == sorted(open_clip.list_models())
