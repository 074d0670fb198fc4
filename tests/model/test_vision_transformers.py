"""transformers' encoders as vision towers: what they say at the layers that are read, without CLS and registers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mmllm.config import ConfigError, VisionConfig
from mmllm.model.tower import TowerSpec
from mmllm.model.vision import build_tower, load_tower
from mmllm.model.vision_transformers import ENCODERS
from tests.builders.towers import SIDE_PX, TRANSFORMERS, encoder_of, folder_of

PIXELS = torch.rand(2, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(0))


def load(folder: Path, **options: Any) -> Any:
    return load_tower(VisionConfig(source=f"transformers:{folder}", **options)).eval()


def refused(source: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_tower(VisionConfig(source=source, **options))
    return str(caught.value)


def outputs_of_layers(encoder: Any, model_type: str, pixels: torch.Tensor) -> list[torch.Tensor]:
    """What each layer of the whole encoder hands on, patches only, by hooks."""
    seen: list[torch.Tensor] = []
    for layer in encoder.get_submodule(ENCODERS[model_type].layers):
        layer.register_forward_hook(lambda _, __, output: seen.append(output))
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if model_type == "siglip2_vision_model":
        from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

        inputs = {
            "pixel_values": torch.stack([convert_image_to_patches(picture, 8) for picture in pixels]),
            "pixel_attention_mask": torch.ones(len(pixels), 16),
            "spatial_shapes": torch.tensor([[4, 4]] * len(pixels)),
        }
    with torch.no_grad():
        encoder(**inputs)
    prefix = ENCODERS[model_type].num_prefix_tokens + getattr(encoder.config, "num_register_tokens", 0)
    return [one.flatten(2).transpose(1, 2) if one.ndim == 4 else one[:, prefix:] for one in seen]


@pytest.mark.parametrize("model_type", ENCODERS)
@pytest.mark.parametrize("layer", [-1, -2])
def test_every_encoder_is_read_at_its_layer(model_type: str, layer: int, tmp_path: Path) -> None:
    tower = load(folder_of(model_type, tmp_path), feature_layer=layer)
    expected = outputs_of_layers(encoder_of(model_type), model_type, PIXELS)[layer]
    with torch.no_grad():
        patches = tower(PIXELS)
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=0)
    assert (tower.num_patches, tower.width) == patches.shape[1:]
    assert tower.spec.image_size_px == SIDE_PX
    assert len(tower.blocks()) == len(outputs_of_layers(encoder_of(model_type), model_type, PIXELS)) + layer + 1


@pytest.mark.parametrize("model_type", [name for name in ENCODERS if name != "dinov3_convnext"])
def test_several_layers_stand_side_by_side_in_the_order_given(model_type: str, tmp_path: Path) -> None:
    tower = load(folder_of(model_type, tmp_path), feature_layer=(-1, -3))
    expected = outputs_of_layers(encoder_of(model_type), model_type, PIXELS)
    with torch.no_grad():
        patches = tower(PIXELS)
    torch.testing.assert_close(patches, torch.cat([expected[-1], expected[-3]], dim=2), atol=1e-5, rtol=0)
    assert tower.width == 64


@pytest.mark.parametrize("model_type", ENCODERS)
def test_every_encoder_is_built_again_from_plain_values_and_trains_whole(model_type: str, tmp_path: Path) -> None:
    tower = load(folder_of(model_type, tmp_path), feature_layer=-2)
    twin = build_tower(TowerSpec.from_json(json.loads(json.dumps(tower.spec.to_json())))).eval()
    twin.load_state_dict(tower.state_dict())
    assert torch.equal(tower(PIXELS), twin(PIXELS))
    tower(PIXELS).square().sum().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model", "dinov2", "dinov3_vit"])
def test_another_picture_size_is_what_transformers_makes_of_it(model_type: str, tmp_path: Path) -> None:
    tower = load(folder_of(model_type, tmp_path), feature_layer=-1, image_size_px=48)
    pixels = torch.rand(1, 3, 48, 48)
    encoder = encoder_of(model_type)
    options = {} if model_type.startswith("dino") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        own = encoder(pixels, output_hidden_states=True, **options).hidden_states[-1]
        patches = tower(pixels)
    torch.testing.assert_close(patches, own[:, -36:], atol=1e-5, rtol=0)
    twin = build_tower(TowerSpec.from_json(json.loads(json.dumps(tower.spec.to_json())))).eval()
    twin.load_state_dict(tower.state_dict())
    assert torch.equal(twin(pixels), tower(pixels))


def test_the_transform_is_the_towers_own(tmp_path: Path) -> None:
    spec = load(folder_of("clip_vision_model", tmp_path)).spec
    assert spec.mean == (0.4, 0.5, 0.6)
    assert (spec.interpolation, spec.image_size_px) == ("bicubic", SIDE_PX)
    spec = load(folder_of("siglip2_vision_model", tmp_path / "siglip2")).spec
    assert (spec.mean, spec.interpolation, spec.image_size_px) == ((0.5,) * 3, "bilinear", SIDE_PX)


def test_the_encoder_inside_a_whole_clip_is_found(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=TRANSFORMERS["clip_vision_model"])
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    expected = outputs_of_layers(clip.vision_model, "clip_vision_model", PIXELS)[-2]
    torch.testing.assert_close(load(tmp_path)(PIXELS), expected, atol=1e-5, rtol=0)


def test_what_is_no_tower_is_refused_by_name(tmp_path: Path) -> None:
    assert "model.vision.source: nowhere/at-all is no folder here" in refused("transformers:nowhere/at-all")
    llama = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=16
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path / "llm")
    text = refused(f"transformers:{tmp_path / 'llm'}")
    assert "is of type 'llama', which is no vision encoder that can be read; allowed: clip_vision_model" in text
    folder = folder_of("clip_vision_model", tmp_path / "clip")
    assert "-4 is not a layer; this tower has -3 to -1" in refused(f"transformers:{folder}", feature_layer=-4)
    (folder / "preprocessor_config.json").unlink()
    assert "cannot load" in refused(f"transformers:{folder}")


def test_a_half_copied_encoder_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = folder_of("clip_vision_model", tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "layers.1.mlp.fc1.weight" in name)
    save_file({name: value for name, value in weights.items() if name != lost}, folder / "model.safetensors")
    assert "lacks 1 weights of its encoder, such as encoder.layers.1.mlp.fc1.weight" in refused(
        f"transformers:{folder}"
    )
    (folder / "model.safetensors").unlink()
    assert "has a config.json but no weights" in refused(f"transformers:{folder}")


def test_two_towers_are_fused_by_channel_each_with_its_own_transform(tmp_path: Path) -> None:
    clip, siglip = (folder_of(name, tmp_path / name) for name in ("clip_vision_model", "siglip_vision_model"))
    shutil.copy(clip / "preprocessor_config.json", siglip / "preprocessor_config.json")
    transform = json.loads((siglip / "preprocessor_config.json").read_text())
    transform.update(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    (siglip / "preprocessor_config.json").write_text(json.dumps(transform))
    tower = load(clip, fuse_with={"source": f"transformers:{siglip}", "feature_layer": -1})
    one, two = load(clip), load(siglip, feature_layer=-1)
    raw = torch.rand(2, 3, SIDE_PX, SIDE_PX)

    def seen(part: Any) -> torch.Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (part.spec.mean, part.spec.std))
        return (raw - mean) / std

    with torch.no_grad():
        expected = torch.cat([one(seen(one)), two(seen(two))], dim=2)
        torch.testing.assert_close(tower(seen(one)), expected, atol=1e-5, rtol=0)
    assert (tower.num_patches, tower.width) == (16, 64)
    twin = build_tower(TowerSpec.from_json(json.loads(json.dumps(tower.spec.to_json())))).eval()
    twin.load_state_dict(tower.state_dict())
    assert torch.equal(twin(raw), tower(raw))
    assert [len(pair) for pair in tower.blocks()] == [2, 2]


def test_two_towers_that_cut_pictures_otherwise_are_refused(tmp_path: Path) -> None:
    clip, siglip = (folder_of(name, tmp_path / name) for name in ("clip_vision_model", "siglip_vision_model"))
    text = refused(f"transformers:{clip}", fuse_with={"source": f"transformers:{siglip}", "image_size_px": 48})
    assert "has 16 patches of a picture of 32 pixels" in text
    assert "has 36 of 48; both need the same picture" in text


def test_a_tower_without_encoder_hands_on_the_pixels_of_each_patch() -> None:
    tower = load_tower(VisionConfig(source="patches:8", image_size_px=32))
    patches = tower(PIXELS)
    assert (tower.num_patches, tower.width) == patches.shape[1:] == (16, 192)
    assert torch.equal(patches[1, 6].view(3, 8, 8), PIXELS[1, :, 8:16, 16:24]), "row 1, column 2"
    assert list(tower.parameters()) == []
    assert "30 is not a multiple of the patch size, 8" in refused("patches:8", image_size_px=30)
    assert "must say the side of a patch in pixels" in refused("patches:big")
