"""Pictures of any shape: tiles and native aspect ratio, from the file to the answer, in training and after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from mmllm.batch import Example, message
from mmllm.checkpoint.folder import load_checkpoint
from mmllm.checkpoint.golden import verify_golden
from mmllm.cli import app
from mmllm.config import ConfigError, ModelConfig, VisionConfig
from mmllm.inference.engine import Engine
from mmllm.inference.sampling import Sampling
from mmllm.model.build import build_model
from mmllm.model.image_tokens import NEXT_GRIDS, Layout, Native, Tiles, build_layout
from mmllm.model.vision import load_tower
from tests.builders.llava_parts import make_encoder
from tests.builders.tiny import make_checkpoint, model_config
from tests.builders.tiny_runs import settings_of, train_in_process, weights_of

TILES: dict[str, Any] = {"image_mode": "anyres"}
NATIVE: dict[str, Any] = {"image_mode": "native", "max_image_tokens": 9}
sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(sizes)
def test_tiles_have_as_many_tokens_as_transformers_counts_for_llava_next(size: tuple[int, int]) -> None:
    layout = Tiles(24 * 24, 336, NEXT_GRIDS)
    processor = transformers.LlavaNextProcessor.__new__(transformers.LlavaNextProcessor)  # only for its arithmetic
    processor.patch_size, processor.num_additional_image_tokens = 14, 0
    processor.image_processor = transformers.LlavaNextImageProcessor(image_grid_pinpoints=layout.pinpoints)
    assert layout.num_tokens(size) == processor._get_number_of_features(*size, 336, 336)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(sizes, st.integers(1, 600))
def test_native_keeps_the_aspect_ratio_and_the_budget(size: tuple[int, int], budget: int) -> None:
    layout = Native(0, 14, 2, budget)
    rows, columns = layout.shape(size)
    assert 1 <= rows * columns <= budget
    assert layout.num_tokens_of_size(size) == rows * (columns + 1)
    wanted = size[0] / size[1]
    assert (rows - 1) / columns < wanted < rows / max(columns - 1, 1e-9) or min(rows, columns) == 1


def test_a_layout_is_the_same_again_when_a_checkpoint_names_it() -> None:
    for layout in (Layout(4), Tiles(4, 32, NEXT_GRIDS), Native(4, 8, 2, 9)):
        assert build_layout(4, json.loads(json.dumps(layout.to_json()))) == layout


def test_tiles_stand_where_they_were_cut(tiny_parts: Path) -> None:
    """A picture whose right half alone changes moves the tokens of its right half alone, and those of the whole."""
    model, processor, _ = build_model(model_config(tiny_parts, **TILES))
    with torch.inference_mode():
        features = []
        for color in ("red", "blue"):
            picture = Image.new("RGB", (64, 32), "white")
            picture.paste(Image.new("RGB", (32, 32), color), (32, 0))
            inputs = processor.image_inputs([picture])
            sizes = [(32, 64)]
            patches = model.encode_images(**inputs)
            features.append(model.layout.project(model.projector, patches, sizes, model.image_newline))
    moved = (features[0] - features[1]).abs().sum(1) > 1e-5
    whole, grid = moved[:4], moved[4:].view(2, 5)  # 2 x 2 tokens a tile, two tiles, a newline
    assert whole.any()
    assert grid.tolist() == [[False, False, True, True, False]] * 2


def test_the_native_view_of_a_square_is_the_square_view(tiny_parts: Path) -> None:
    picture = noise(32, 32)
    torch.manual_seed(0)
    square, one, _ = build_model(model_config(tiny_parts))
    torch.manual_seed(0)
    native, other, _ = build_model(model_config(tiny_parts, image_mode="native"))
    assert native.layout == Native(4, 8, 2, 4), "by default as many tokens as of a square"
    with torch.inference_mode():
        expected = square.projector(square.encode_images(**one.image_inputs([picture])))[0]
        inputs = other.image_inputs([picture])
        features = native.encode_images(**inputs)
        tokens = native.layout.project(native.projector, features, [(2, 2)], native.image_newline)
    lines = tokens.view(2, 3, -1)
    torch.testing.assert_close(lines[:, :2].flatten(0, 1), expected)
    assert all(torch.equal(line, native.image_newline) for line in lines[:, 2])


@pytest.mark.parametrize("source", ["clip", "siglip", "local-dir", "patches", "ViT-B-16-SigLIP", "RN50"])
def test_towers_take_pictures_that_are_not_square(source: str, tiny_parts: Path, tmp_path: Path) -> None:
    """Of a wide picture, patches stand row by row: a change on the right moves those on the right most."""
    if source in ("clip", "siglip"):
        tower = load_tower(
            VisionConfig(source=f"transformers:{make_encoder(source, tmp_path / source)}", feature_layer=-2)
        )
    elif source == "local-dir":
        tower = load_tower(VisionConfig(source=f"local-dir:{tiny_parts / 'vision'}", feature_layer=-1))
    elif source == "patches":
        tower = load_tower(VisionConfig(source="patches:8", image_size_px=32))
    else:
        tower = small_open_clip(source, tmp_path)
    patch = tower.spec.image_size_px // round(tower.num_patches**0.5)
    one = torch.randn(1, 3, 2 * patch, 8 * patch, generator=torch.Generator().manual_seed(0))
    other = one.clone()
    other[..., -patch:] += 3
    with torch.inference_mode():
        there, here = tower.eval()(one), tower(other)
    assert there.shape == (1, 16, tower.width)
    moved = (there - here).abs().sum(2).view(2, 8)
    assert (moved.argmax(1) == 7).all()


def small_open_clip(name: str, folder: Path) -> Any:
    import open_clip

    config = open_clip.get_model_config(name)
    if "layers" in config["vision_cfg"]:
        config["vision_cfg"] |= {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
    else:
        config["vision_cfg"] |= {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg"}
    config["text_cfg"] = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    path = folder / "small.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    torch.save(open_clip.create_model("small", pretrained=None).state_dict(), folder / "small.pt")
    return load_tower(VisionConfig(source=str(path), pretrained=str(folder / "small.pt"), feature_layer=-2))


@pytest.fixture(scope="module")
def wide_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows with pictures of all shapes, one of them thin, two in one row, and three rows of text."""
    folder = tmp_path_factory.mktemp("wide")
    shapes = [(90, 40), (40, 90), (32, 32), (200, 30), (1, 300), (64, 60)]
    rows: list[dict[str, Any]] = []
    for number in range(12):
        noise(*shapes[number % 6], seed=number).save(folder / f"{number}.png")
        images = [f"{number}.png"] if number else ["0.png", "1.png"]
        value = "".join("<image>\n" for _ in images) + "what is in the picture?"
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "a red circle"}]
        rows.append({"id": f"row-{number}", "image": images, "conversations": turns})
    text = [{"from": "human", "value": "what color?"}, {"from": "gpt", "value": "blue"}]
    rows += [{"id": f"text-{number}", "conversations": text} for number in range(3)]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def write_config(folder: Path, parts: Path, rows: Path, vision: dict[str, Any], **options: Any) -> Path:
    tree = {
        "stage": "stage1",
        "out": str(folder / "out"),
        "model": model_config(parts, **vision).model_dump(mode="json", exclude_none=True),
        "data": {"train": [{"path": str(rows / "train.json")}], "val": [{"path": str(rows / "train.json")}]},
        "train": ["projector"],
        "optim": {"learning_rates": {"projector": 0.02}, "max_steps": 5},
        "compute": {"batch_size": 4, "num_threads": 1},
        "validation": {"num_samples": 2},
        "log": {"every_steps": 1},
    }
    for section, values in options.items():
        tree[section] |= values
    path = folder / "stage1.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("vision", [TILES, NATIVE], ids=["tiles", "native"])
def test_a_model_is_trained_on_pictures_of_all_shapes_and_answers_as_it_was_trained(
    vision: dict[str, Any], tiny_parts: Path, wide_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, tiny_parts, wide_data, vision)
    shown = CliRunner().invoke(app, ["check", str(config), "--json"])
    assert shown.exit_code == 0, shown.output
    report = json.loads(shown.stdout)
    assert report["image_layout"] == {"anyres": "tiles"}.get(vision["image_mode"], vision["image_mode"])
    out = train_in_process(config, tmp_path / "run")
    model, processor, _ = load_checkpoint(out)
    torch.manual_seed(0)
    fresh = build_model(settings_of(config, tmp_path / "x").model)[0].image_newline
    assert "image_newline" in weights_of(out)
    assert not torch.allclose(model.image_newline, fresh, atol=1e-3), "the newline is trained"
    assert all(check.holds for check in verify_golden(model, processor, out))
    engine = Engine.load(out, device="cpu")
    pictures = [str(wide_data / f"{number}.png") for number in range(6)]
    examples = [Example(name, "", (message("user", "<image>\nwhat is it?"),), (name,)) for name in pictures]
    together = [reply.text for reply in engine.reply_batch(examples, Sampling(max_new_tokens=6))]
    assert together == [engine.reply(example, Sampling(max_new_tokens=6)).text for example in examples]
    for example in examples:
        count = engine.renderer.render_example(example).num_image_tokens
        with torch.inference_mode():
            inputs = engine.processor.load_pixels(example.images)
            features = engine.model.encode_images(**inputs)
            shapes = [(int(a), int(b)) for a, b in inputs["image_sizes"].tolist()]
            layout = engine.model.layout
            assert len(layout.project(engine.model.projector, features, shapes, model.image_newline)) == count
    said = CliRunner().invoke(app, ["explain", str(config), "--sample", "row-3", "--json"])
    assert said.exit_code == 0, said.output
    explained = json.loads(said.stdout)
    asked = Example("x", "", (message("user", "<image>\nwhat is in the picture?"),), (pictures[3],))
    assert explained["counts"]["image"] == engine.renderer.render_example(asked).num_image_tokens
    assert explained["equal"]
    lines = CliRunner().invoke(app, ["caption", str(out), str(wide_data), "--out", str(tmp_path / "c.jsonl")])
    assert lines.exit_code == 0, lines.output
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 12


def test_streamed_pictures_inside_data_files_are_measured_too(
    tiny_parts: Path, wide_data: Path, tmp_path: Path
) -> None:
    import tarfile

    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        for number in range(12):
            row = tmp_path / f"{number}.json"
            turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a circle"}]
            row.write_text(json.dumps({"conversations": turns}))
            tar.add(wide_data / f"{number}.png", f"{number}.png")
            tar.add(row, f"{number}.json")
    for streaming in (False, True):
        source = {"path": str(tmp_path / "data.tar"), "streaming": streaming}
        folder = tmp_path / str(streaming)
        folder.mkdir()
        config = write_config(folder, tiny_parts, wide_data, TILES, data={"train": [source], "val": []})
        assert (train_in_process(config, folder / "run") / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("vision", "projector", "message_"),
    [
        (
            {"image_mode": "anyres"},
            {"kind": "resampler", "options": {"num_heads": 4}},
            "anyres needs a projector whose tokens keep the grid",
        ),
        (
            {"image_mode": "native"},
            {"kind": "c_abstractor", "options": {"num_tokens": 4}},
            "native needs a projector whose tokens keep the grid",
        ),
    ],
)
def test_a_projector_without_places_is_refused(
    vision: dict[str, Any], projector: dict[str, Any], message_: str, tiny_parts: Path
) -> None:
    tree = model_config(tiny_parts, **vision).model_dump(mode="json", exclude_none=True)
    with pytest.raises(ConfigError, match=f"model.vision.image_mode: {message_}"):
        build_model(ModelConfig.model_validate({**tree, "projector": projector}))


def test_a_tower_for_one_size_alone_is_refused_by_name(tiny_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmllm.model import vision_open_clip

    monkeypatch.setattr(vision_open_clip.OpenClipTower, "_placed", lambda self, pixels: {})
    with pytest.raises(
        ConfigError, match=r"native needs a tower that takes pictures of any shape.*take image_mode: anyres"
    ):
        build_model(model_config(tiny_parts, image_mode="native"))


@pytest.mark.parametrize(
    ("options", "message_"),
    [
        ({"image_mode": "pad", "tile_grids": [[1, 2]]}, "tile_grids is for image_mode: anyres, but image_mode is pad"),
        (
            {"image_mode": "anyres", "max_image_tokens": 9},
            "max_image_tokens is for image_mode: native, but image_mode is anyres",
        ),
        ({"image_mode": "anyres", "tile_grids": []}, "give at least one pair of rows and columns"),
    ],
)
def test_options_of_another_fit_are_refused(options: dict[str, Any], message_: str) -> None:
    with pytest.raises(ValueError, match=message_):
        VisionConfig(source="x", **options)


def test_pictures_without_their_sizes_are_refused(tiny_parts: Path, tmp_path: Path) -> None:
    engine = Engine.load(make_checkpoint(tmp_path / "m", tiny_parts, **TILES), device="cpu")
    pixels = engine.processor.load_pixels([noise(40, 20)])["pixel_values"]
    with pytest.raises(ValueError, match="pictures laid out as tiles need image_sizes beside pixel_values"):
        engine.model(input_ids=torch.zeros(1, 4, dtype=torch.long), pixel_values=pixels)


def test_a_feature_cache_of_tiles_is_refused(tiny_parts: Path, wide_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_parts, wide_data, TILES, data={"cache_features": True})
    with pytest.raises(
        ConfigError, match=r"data\.cache_features keeps one view of each picture, .*image_mode anyres or native"
    ):
        train_in_process(config, tmp_path / "run")
