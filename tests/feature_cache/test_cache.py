"""The feature cache: whatever is killed, damaged, shared or at work at the same time, a row is what the tower says."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm.batch import Example
from mmllm.data.sources import DataError
from mmllm.feature_cache import encoder as encoder_module
from mmllm.feature_cache.cache import cache_key, open_cache
from mmllm.feature_cache.encoder import FeatureEncoder
from mmllm.feature_cache.files import RECORD
from mmllm.inference.engine import Engine
from mmllm.model.build import build_model
from tests.builders.feature_caches import CPU, fill_slowly, open_encoder
from tests.builders.launches import Forked
from tests.builders.tiny import model_config

NUM_PICTURES = 48


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(NUM_PICTURES):
        Image.new("RGB", (32, 32), (number * 5, 255 - number * 5, 100)).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture
def opened(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> Callable[[], FeatureEncoder]:
    return lambda: open_encoder(tiny_checkpoint, pictures, tmp_path / "cache")


def filler(checkpoint: Path, pictures: Path, folder: Path, rank: int, world_size: int, seconds: float) -> Forked:
    """A process that fills the cache as this rank; each chunk of two pictures takes it so many seconds longer."""
    return Forked(fill_slowly, given=(checkpoint, pictures, folder, rank, world_size, seconds))


def encoded(encoder: FeatureEncoder) -> Tensor:
    pixels = encoder.processor.load_pixels(encoder.cache.images)["pixel_values"]
    with torch.inference_mode():
        features: Tensor = encoder.tower(pixels)
    return features.bfloat16().float()


def rows_written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("features-*/*.idx")) // RECORD.itemsize


def assert_whole(encoder: FeatureEncoder) -> None:
    cache = encoder.cache
    assert cache.num_missing == 0
    assert torch.allclose(cache.get(cache.images), encoded(encoder), atol=0.05)


def test_what_is_read_is_what_the_tower_says(
    opened: Callable[[], FeatureEncoder], capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = opened()
    assert not encoder.cache.root.exists(), "nothing is written before it is asked for"
    assert encoder.cache.num_missing == NUM_PICTURES
    encoder.fill(CPU)
    told = capsys.readouterr().out
    assert f"{NUM_PICTURES} pictures x 1.02 kB = 49.2 kB in bf16" in told
    assert "times as fast" in told or "it gains nothing with this tower; data.cache_features=false" in told
    assert_whole(encoder)
    assert_whole(opened())


def test_pictures_of_one_content_have_one_row_under_any_path(
    opened: Callable[[], FeatureEncoder], tiny_checkpoint: Path, pictures: Path
) -> None:
    opened().fill(CPU)
    cache, engine = opened().cache, Engine.load(tiny_checkpoint, device="cpu")
    data = (pictures / "03.png").read_bytes()
    again = open_cache(engine.model, engine.processor, [Example("x", "", (), (data,))], cache.root)
    assert again.num_missing == 0
    assert torch.equal(again.get([data]), cache.get([str(pictures / "03.png")]))


@pytest.mark.parametrize("what", ["bit", "half", "empty index"])
def test_damaged_rows_are_found_and_encoded_anew(opened: Callable[[], FeatureEncoder], what: str) -> None:
    opened().fill(CPU)
    file = max((opened().cache.folder).glob("*.bin"), key=lambda path: path.stat().st_size)
    if what == "bit":
        data = bytearray(file.read_bytes())
        data[100] ^= 4
        file.write_bytes(data)
    elif what == "half":
        os.truncate(file, file.stat().st_size // 2)
    else:
        os.truncate(file.with_suffix(".idx"), 0)
    encoder = opened()
    assert 0 < encoder.cache.num_missing < NUM_PICTURES
    encoder.fill(CPU)
    assert_whole(encoder)
    assert_whole(opened())


def test_a_row_that_is_damaged_while_a_run_reads_is_no_feature(opened: Callable[[], FeatureEncoder]) -> None:
    opened().fill(CPU)
    cache = opened().cache
    for file in cache.folder.glob("*.bin"):
        with file.open("r+b") as data:
            data.write(b"\x01\x02\x03")
    with pytest.raises(DataError, match="has been damaged since it was written"):
        cache.get(cache.images)


@pytest.mark.timeout(400)
def test_what_was_encoded_stays_when_the_process_is_killed(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path, opened: Callable[[], FeatureEncoder]
) -> None:
    with filler(tiny_checkpoint, pictures, tmp_path / "cache", 0, 1, 0.2) as process:
        while rows_written(tmp_path / "cache") < 5:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    encoder = opened()
    assert 0 < encoder.cache.num_missing <= NUM_PICTURES - 5
    encoder.fill(CPU)
    assert_whole(encoder)
    assert rows_written(tmp_path / "cache") == NUM_PICTURES, "no row is encoded twice"


@pytest.mark.timeout(400)  # two processes that load all libraries
@pytest.mark.parametrize("ranks", [((0, 2), (1, 2)), ((0, 1), (0, 1))], ids=["two ranks", "two runs"])
def test_two_at_once_share_the_work(
    tiny_checkpoint: Path, pictures: Path, tmp_path: Path, opened: Callable[[], FeatureEncoder], ranks: Any
) -> None:
    with contextlib.ExitStack() as stack:
        fillers = [filler(tiny_checkpoint, pictures, tmp_path / "cache", *rank, 0.02) for rank in ranks]
        told = [process.completed().stdout for process in map(stack.enter_context, fillers)]
    assert [text.strip().splitlines()[-1].startswith(("missing 0", "feature cache")) for text in told] == [True, True]
    assert_whole(opened())
    assert rows_written(tmp_path / "cache") == NUM_PICTURES, "no row is encoded twice"


def test_a_cache_that_the_disk_has_no_room_for_is_refused_before_it_is_written(
    opened: Callable[[], FeatureEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = opened()
    usage = encoder_module.shutil.disk_usage(encoder.cache.root.parent)
    monkeypatch.setattr(encoder_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"48 pictures x 1\.02 kB = 49\.2 kB in bf16; 1 kB free .*data\.cache_folder"):
        encoder.fill(CPU)
    assert not encoder.cache.folder.exists()


def key_of(parts: Path, **vision: Any) -> str:
    model, processor, _ = build_model(model_config(parts, **vision))
    return cache_key(model.vision_tower, processor)


def test_a_tower_is_known_by_what_it_holds_and_not_by_its_path(tiny_parts: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_parts, moved)
    assert key_of(moved) == key_of(tiny_parts)
    assert key_of(tiny_parts, source=f"local-dir:{tiny_parts}/../{tiny_parts.name}/vision") == key_of(tiny_parts)
    others = [
        key_of(tiny_parts, feature_layer=-2),
        key_of(tiny_parts, image_size_px=16),
        key_of(tiny_parts, image_mode="pad"),
    ]
    weights = moved / "vision" / "open_clip_model.safetensors"
    changed = {name: value + 0.5 if name == "visual.proj" else value for name, value in load_file(weights).items()}
    assert len({key_of(tiny_parts), *others}) == 4
    changed["visual.class_embedding"] = changed["visual.class_embedding"] + 1
    save_file(changed, weights)
    assert key_of(moved) != key_of(tiny_parts)


def test_the_gain_is_that_of_warm_reads_and_a_loss_is_called_one(
    opened: Callable[[], FeatureEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = opened()
    encoder.fill(CPU)
    read, reads = encoder.cache.get, []

    def first_is_cold(images: Any) -> Tensor:
        reads.append(images)
        time.sleep(1 if len(reads) == 1 else 0)
        return read(images)

    monkeypatch.setattr(encoder.cache, "get", first_is_cold)
    monkeypatch.setattr(encoder, "_encode", lambda *given: time.sleep(0.5))
    assert "times as fast" in encoder._gain(CPU), "one cold read does not decide"
    monkeypatch.setattr(encoder, "_encode", lambda *given: None)
    assert "it gains nothing with this tower; data.cache_features=false" in encoder._gain(CPU)


def test_folders_of_other_towers_are_told_of_before_a_new_one_is_filled(
    opened: Callable[[], FeatureEncoder], capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = opened()
    (encoder.cache.root / "features-0123456789").mkdir(parents=True)
    encoder.fill(CPU)
    assert f"1 other folder(s) in {encoder.cache.root}: of other towers or transforms" in capsys.readouterr().out
