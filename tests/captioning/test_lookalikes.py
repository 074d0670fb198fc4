"""Pictures that are there twice are counted, by their bytes and by their look."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmllm.captioning.inputs import FoundPicture
from mmllm.captioning.ledger import JobSettings, Ledger, Outcome
from mmllm.captioning.lookalikes import describe_repeats, perceptual_hash

SETTINGS = JobSettings("model", "hash", "what?")


def scenes_pictures(folder: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def test_a_picture_keeps_its_hash_where_it_is_resized_or_compressed(tiny_scenes: Path) -> None:
    pictures = scenes_pictures(tiny_scenes / "train" / "images")
    hashes = [perceptual_hash(picture) for picture in pictures]
    assert len(set(hashes)) > 0.9 * len(hashes)  # a scene may be very like another
    num_kept = 0
    for picture, own_hash in zip(pictures, hashes, strict=True):
        file = io.BytesIO()
        picture.resize((picture.width * 2, picture.height * 2)).save(file, "JPEG", quality=80)
        num_kept += perceptual_hash(Image.open(file)) == own_hash
    assert num_kept >= 0.6 * len(pictures)


def test_pictures_of_one_colour_have_no_look() -> None:
    assert perceptual_hash(Image.new("RGB", (40, 30), "red")) is None


def test_without_imagehash_there_is_no_look(tiny_scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert perceptual_hash(scenes_pictures(tiny_scenes / "val" / "images")[0]) is None


def test_repeats_are_counted_and_none_is_merged(tmp_path: Path) -> None:
    with Ledger(tmp_path / "a.ledger", may_create=True) as ledger:
        ledger.add([FoundPicture(name, name) for name in "abcdef"], SETTINGS, max_new_tokens=9)
        assert describe_repeats(ledger.database) == []
        outcomes = [
            Outcome(picture, content, look, {"image": picture.place, "caption": "x"})
            for picture, content, look in zip(ledger.take(SETTINGS, 9), "112334", "556778", strict=True)
        ]
        ledger.finish(outcomes, SETTINGS)
        same_bytes, same_look = describe_repeats(ledger.database)
        assert same_bytes == (
            "4 pictures have the same bytes as another (2 groups, such as a and b); each has its own caption"
        )
        assert same_look.startswith("4 pictures look like another (2 groups")
        assert len(list(ledger.records(with_flagged=True))) == 6
