"""What stands beside the pixels of a file, large or broken, keeps no picture from being read; nor is it unpacked."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from mmllm.images import ImageError, image_size, load_image
from tests.builders.image_files import RED, SMALL_PX, chunk, encode, noise, red, red_png

MILLIONS = 3_000_000


def is_red(data: bytes) -> bool:
    assert image_size(data) == (SMALL_PX, SMALL_PX)
    picture = load_image(data)
    return picture.size == (SMALL_PX, SMALL_PX) and bool((np.asarray(picture) == RED).all())


def packed_text(kind: bytes, size: int) -> tuple[bytes, bytes]:
    head = {b"zTXt": b"workflow\0\0", b"iTXt": b"workflow\0\1\0\0\0"}[kind]
    return kind, head + zlib.compress(b"x" * size)


EXIF_TURNED = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
CHUNKS: dict[str, list[tuple[bytes, bytes]]] = {
    "text of megabytes": [(b"tEXt", b"prompt\0" + b"x" * MILLIONS)],
    "many texts": [(b"tEXt", b"prompt\0" + b"x" * 900_000)] * 80,
    "packed text": [packed_text(b"zTXt", MILLIONS)],
    "packed international text": [packed_text(b"iTXt", MILLIONS)],
    "text that is not packed as it says": [(b"zTXt", b"workflow\0\0" + b"no stream")],
    "another packing": [(b"zTXt", b"workflow\0\x09" + b"?")],
    "a large profile": [(b"iCCP", b"profile\0\0" + zlib.compress(b"x" * MILLIONS))],
    "a broken profile": [(b"iCCP", b"profile\0\0" + b"no stream")],
    "a profile without an end": [(b"iCCP", b"profile")],
    "a short gamma": [(b"gAMA", b"\0")],
    "a short size of pixels": [(b"pHYs", b"\0")],
    "broken EXIF": [(b"eXIf", b"II*\0\xff\xff\xff\xff")],
    "no EXIF": [(b"eXIf", b"")],
}


@pytest.mark.parametrize("what", CHUNKS)
@pytest.mark.parametrize("is_behind", [False, True], ids=["before", "behind"])
def test_a_png_is_read_whatever_its_other_chunks_hold(what: str, is_behind: bool) -> None:
    data = red_png(*([] if is_behind else CHUNKS[what]))
    if is_behind:
        end = data.index(b"IEND") - 4
        data = data[:end] + b"".join(chunk(*one) for one in CHUNKS[what]) + data[end:]
    assert is_red(data)


def test_a_png_whose_text_has_a_wrong_checksum_is_read() -> None:
    data = bytearray(red_png((b"tEXt", b"prompt\0a cat")))
    data[data.index(b"a cat")] ^= 1
    assert is_red(bytes(data))


def test_a_png_with_broken_pixels_is_still_refused() -> None:
    data = encode(noise(), "PNG")
    with pytest.raises(ImageError, match="damaged or cut off"):
        load_image(red_png((b"tEXt", b"a\0" + b"x" * MILLIONS))[: 45 + MILLIONS] + data[:0])
    with pytest.raises(ImageError, match="damaged or cut off"):
        load_image(data[: len(data) // 2])


def test_a_bomb_of_text_is_not_unpacked_and_pillows_limits_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES
    unpacked = []
    safe = PngImagePlugin._safe_zlib_decompress
    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", lambda data: unpacked.append(len(data)) or safe(data))
    bomb = zlib.compress(bytes(30_000_000))
    assert is_red(
        red_png((b"zTXt", b"bomb\0\0" + bomb), (b"iTXt", b"bomb\0\1\0\0\0" + bomb), (b"iCCP", b"b\0\0" + bomb))
    )
    assert len(unpacked) <= 2  # what Pillow tried, up to its limit, when the file was opened for each question
    assert limits == (
        PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES
    )  # fmt: skip


def test_the_orientation_of_a_png_counts_beside_text_that_is_too_large() -> None:
    picture = Image.new("RGB", (40, 20), "red")
    large = packed_text(b"zTXt", MILLIONS)
    data = encode(picture, "PNG", exif=EXIF_TURNED)
    end = data.index(b"IDAT") - 4
    data = data[:end] + chunk(*large) + data[end:]
    assert load_image(data).size == (20, 40)
    assert image_size(data) == (40, 20)


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_an_orientation_that_there_is_not_turns_nothing(value: int) -> None:
    exif = Image.Exif()
    exif[274] = value
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = encode(Image.new("RGB", (40, 20), "red"), kind, exif=exif)
        assert load_image(data).size == (40, 20)
        assert image_size(data) == (20, 40)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF", "AVIF", "PNG"])
def test_a_picture_with_damaged_exif_and_profile_is_read(kind: str) -> None:
    exif = Image.Exif()
    exif[271] = "a camera" * 20
    whole = b"Exif\0\0" + exif.tobytes()
    for cut in (whole[:9], whole[:20], whole[:-30], whole[:6] + b"XX" + whole[8:], b"", b"Exif\0\0" + b"\xff" * 60):
        options = {} if kind in ("TIFF", "AVIF") else {"exif": cut}
        data = encode(red(), kind, icc_profile=b"no profile at all", **options)
        assert image_size(data) == (SMALL_PX, SMALL_PX)
        assert load_image(data).size == (SMALL_PX, SMALL_PX)


def test_the_size_of_a_png_is_known_from_its_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 20)).save(path, exif=EXIF_TURNED)

    def refuse(picture: object) -> None:
        raise AssertionError("its pixels are not asked for")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", refuse)
    assert image_size(path) == (40, 20)


def test_an_embedded_profile_of_a_jpeg_in_wrong_pieces_is_passed_over() -> None:
    data = encode(red(), "JPEG", quality=95)
    piece = b"ICC_PROFILE\0" + bytes([9, 2]) + b"x" * 50
    broken = data[:2] + b"\xff\xe2" + struct.pack(">H", len(piece) + 2) + piece + data[2:]
    assert load_image(io.BytesIO(broken).getvalue()).size == (SMALL_PX, SMALL_PX)
