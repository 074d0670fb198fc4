"""The vision tower: the layer that is asked for, exactly as open_clip computes it, and nothing behind it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import _build_vision_tower

from mmllm.config import ConfigError, VisionConfig
from mmllm.model.tower import TowerSpec, VisionTower
from mmllm.model.vision import build_tower, load_tower
from mmllm.model.vision_open_clip import needs_quick_gelu
from tests.builders.tiny import CLIP, SIDE_PX
from tests.builders.towers import OPEN_CLIP as ENCODERS
from tests.builders.towers import spec_of

PIXELS = torch.rand(2, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(0))


def load(source: str, **options: Any) -> Any:
    return load_tower(VisionConfig(source=source, **options))


def refused(source: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(source, **options)
    return str(caught.value)


@pytest.mark.parametrize("layer", [-1, -2])
def test_a_pretrained_tower_says_what_open_clip_says_at_that_layer(tiny_parts: Path, layer: int) -> None:
    tower = load(f"local-dir:{tiny_parts / 'vision'}", feature_layer=layer).eval()
    visual = open_clip.create_model(f"local-dir:{tiny_parts / 'vision'}", require_pretrained=True).visual.eval()
    seen: list[torch.Tensor] = []
    blocks = visual.transformer.resblocks
    blocks[layer].register_forward_hook(lambda block, args, output: seen.append(output))
    with torch.no_grad():
        patches = tower(PIXELS)
        visual(PIXELS)
        own = visual.forward_intermediates(PIXELS, indices=[len(blocks) + layer])["image_intermediates"][0]
    in_order, near = seen[0][:, 1:], {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(patches, in_order, **near, msg="patches in their order, without CLS")
    torch.testing.assert_close(patches, own.flatten(2).transpose(1, 2), **near)
    assert (tower.num_patches, tower.width) == patches.shape[1:] == (16, 32)


def test_the_shape_of_a_spec_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_tower(spec_of(ENCODERS["vit"], -1))
    runs: list[VisionTower] = []
    found = VisionTower._output_shape
    monkeypatch.setattr(VisionTower, "_output_shape", lambda tower: (runs.append(tower), found(tower))[1])
    again = build_tower(first.spec)
    assert runs == []
    assert (again.num_patches, again.width) == (first.num_patches, first.width)
    other = build_tower(spec_of({**ENCODERS["vit"], "width": 24}, -1))
    assert runs == [other]
    assert (other.num_patches, other.width) == (first.num_patches, 24)


def test_nothing_stands_behind_the_layer_that_is_read(tiny_parts: Path) -> None:
    shallow = load(f"local-dir:{tiny_parts / 'vision'}", feature_layer=-2)
    deep = load(f"local-dir:{tiny_parts / 'vision'}", feature_layer=-1)
    assert [len(tower.encoder.transformer.resblocks) for tower in (shallow, deep)] == [1, 2]
    names = [name for name, _ in deep.named_parameters()]
    assert not [name for name in names if "ln_post" in name or name.endswith("encoder.proj")]
    shallow(PIXELS).square().sum().backward()
    assert [name for name, p in shallow.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("layer", [-1, -2])
def test_every_kind_of_encoder_is_read_as_open_clip_reads_it(name: str, layer: int) -> None:
    torch.manual_seed(0)
    tower: Any = build_tower(spec_of(ENCODERS[name], layer)).eval()
    encoder = _build_vision_tower(16, ENCODERS[name], False).eval()
    if name == "timm":
        encoder.set_input_size(tower.spec.image_size_px)
    names = encoder.state_dict()
    encoder.load_state_dict({**names, **tower.encoder.state_dict()})
    side = tower.spec.image_size_px
    pixels = torch.rand(2, 3, side, side)
    with torch.no_grad():
        patches = tower(pixels)
        all_layers = encoder.forward_intermediates(pixels, intermediates_only=True)["image_intermediates"]
    assert torch.allclose(patches, all_layers[layer].flatten(2).transpose(1, 2), atol=1e-5)
    assert (tower.num_patches, tower.width) == patches.shape[1:]
    assert (
        build_tower(TowerSpec.from_json(json.loads(json.dumps(tower.spec.to_json())))).num_patches == tower.num_patches
    )


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(tiny_parts: Path) -> None:
    text = refused(f"local-dir:{tiny_parts / 'vision'}", feature_layer=-3)
    assert text == "model.vision.feature_layer: -3 is not a layer; this tower has -2 to -1"


def test_an_unknown_name_brings_names_that_are_near() -> None:
    text = refused("ViT-B-31", pretrained="openai")
    assert "open_clip has no model 'ViT-B-31'; near it: " in text
    assert "ViT-B-32" in text
    assert "local-dir:FOLDER, FILE.json, hf-hub:ORG/NAME" in text
    assert "near it: nothing" in refused("%%%%", pretrained="openai")


def test_a_tower_without_weights_is_refused_with_the_tags_there_are() -> None:
    text = refused("ViT-B-32")
    assert "model.vision.pretrained: ViT-B-32 needs a weights file or one of open_clip's tags (openai, " in text
    assert "an untrained tower sees nothing" in text
    assert "cannot load ViT-B-32: " in refused("ViT-B-32", pretrained="nowhere.safetensors")


def test_files_that_are_no_tower_are_named(tiny_parts: Path, tmp_path: Path) -> None:
    assert refused("local-dir:nowhere") == "model.vision.source: no folder nowhere"
    assert "cannot read nowhere.json" in refused("nowhere.json", pretrained="x")
    path = tmp_path / "odd.json"
    path.write_text("[]")
    assert "must hold an open_clip config, got list" in refused(str(path), pretrained="x")
    path.write_text('{"embed_dim": 3}')
    assert "lacks vision_cfg: not an open_clip model config" in refused(str(path), pretrained="x")
    folder = Path(shutil.copytree(tiny_parts / "vision", tmp_path / "vision"))
    (folder / "open_clip_model.safetensors").unlink()
    assert "model.vision: cannot load" in refused(f"local-dir:{folder}")


def test_a_config_file_with_weights_is_the_same_tower(tiny_parts: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny-test-tower.json"
    path.write_text(json.dumps(CLIP))
    weights = tiny_parts / "vision" / "open_clip_model.safetensors"
    tower = load(str(path), pretrained=str(weights), feature_layer=-1).eval()
    same = load(f"local-dir:{tiny_parts / 'vision'}", feature_layer=-1).eval()
    assert torch.equal(tower(PIXELS), same(PIXELS))
    assert tower.spec.source == f"{path} {weights}"


def test_weights_trained_with_quick_gelu_get_it() -> None:
    assert needs_quick_gelu("ViT-L-14-336", "openai")
    assert not needs_quick_gelu("ViT-B-32", "laion2b_s34b_b79k")
    assert not needs_quick_gelu("ViT-B-32", None)
    assert not needs_quick_gelu("some-file", "weights.pt")


# One registered name of each kind of trunk; all of them were tried once, and every one could be built and read.
REGISTERED = (
    "ViT-B-32-quickgelu", "RN50", "convnext_base", "EVA02-B-16", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2-256",
    "coca_ViT-B-32", "ViTamin-S", "MobileCLIP-S1", "vit_medium_patch16_gap_256", "roberta-ViT-B-32",
)  # fmt: skip


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_models_can_be_read(name: str) -> None:
    config = open_clip.get_model_config(name)
    side = config["vision_cfg"]["image_size"]
    spec = TowerSpec(config, -2, side, (0.5,) * 3, (0.5,) * 3, "bicubic", name)
    with torch.device("meta"):  # without memory
        tower = build_tower(spec)
    assert tower.num_patches > 1
    assert tower.width > 1
    assert len(tower.blocks()) > 1


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_several_layers_stand_side_by_side_in_the_order_given(name: str) -> None:
    torch.manual_seed(0)
    options = ENCODERS[name]
    both: Any = build_tower(TowerSpec.from_json(spec_of(options, -1).to_json() | {"layer": [-1, -2]})).eval()
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        patches = both(pixels)
        last, one = (build_tower(spec_of(options, layer)).eval() for layer in (-1, -2))
        for tower in (last, one):
            tower.load_encoder_weights(both.encoder.state_dict())  # type: ignore[attr-defined]
        assert torch.allclose(patches, torch.cat([last(pixels), one(pixels)], dim=2), atol=1e-6)
    assert both.width == 2 * last.width


def test_layers_of_different_grids_are_refused() -> None:
    spec = TowerSpec.from_json(spec_of(ENCODERS["resnet"], -1).to_json() | {"layer": [-1, -2]})
    with pytest.raises(
        ConfigError, match=r"model.vision.feature_layer: these layers have 4, 16 patches; read layers of one size"
    ):
        build_tower(spec)


def test_another_picture_size_is_what_open_clip_makes_of_it(tiny_parts: Path) -> None:
    source = f"local-dir:{tiny_parts / 'vision'}"
    tower = load(source, feature_layer=-1, image_size_px=48).eval()
    visual = open_clip.create_model(source, require_pretrained=True, force_image_size=48).visual.eval()
    pixels = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        own = visual.forward_intermediates(pixels)["image_intermediates"][-1]
        assert torch.allclose(tower(pixels), own.flatten(2).transpose(1, 2), atol=1e-6)
    assert (tower.num_patches, tower.spec.image_size_px) == (36, 48)
    twin = build_tower(TowerSpec.from_json(json.loads(json.dumps(tower.spec.to_json())))).eval()
    twin.load_state_dict(tower.state_dict())
    assert torch.equal(twin(pixels), tower(pixels))


@pytest.mark.parametrize("size", [(32, 48), (64, 32)])
def test_a_timm_trunk_that_resamples_its_positions_itself_takes_a_picture_of_any_shape(size: tuple[int, int]) -> None:
    tower: Any = build_tower(spec_of(ENCODERS["timm"], -1)).eval()
    assert tower.encoder.trunk.dynamic_img_size
    pixels = torch.rand(2, 3, *size)
    with torch.no_grad():
        own = tower.encoder.forward_intermediates(pixels)["image_intermediates"][-1]
        assert torch.equal(tower(pixels), own.flatten(2).transpose(1, 2))


def test_a_revision_is_refused_where_open_clip_would_not_read_it(tiny_parts: Path) -> None:
    text = refused(f"local-dir:{tiny_parts / 'vision'}", revision="abc")
    assert "model.vision.revision: open_clip reads no revisions" in text
