"""load_image: whatever a folder of pictures holds becomes an upright RGB picture or one readable error."""

from __future__ import annotations

import io
import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFile

from mmllm.images import MAX_PIXELS, ImageError, load_image
from tests.builders.image_files import BLUE, EXIF_ORIENTATION, RED, WHITE, encode, noise, png


def upright() -> Image.Image:
    """24 x 16, and different in each of its corners, so that every wrong turn shows."""
    picture = Image.new("RGB", (24, 16), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 7, 7), fill="red")
    draw.rectangle((16, 0, 23, 7), fill="blue")
    draw.rectangle((0, 8, 7, 15), fill="black")
    return picture


def assert_close(picture: Image.Image, expected: Image.Image, *, within: int = 0) -> None:
    assert picture.size == expected.size
    difference = np.abs(np.asarray(picture).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= within


# How a camera stores the picture that stands upright once it is turned as EXIF says (the inverse of that turn).
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied_once(tmp_path: Path, kind: str, orientation: int) -> None:
    turn = STORED[orientation]
    stored = upright() if turn is None else upright().transpose(turn)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    path = tmp_path / "camera"
    path.write_bytes(encode(stored, kind, exif=exif.tobytes(), **options))
    loaded = load_image(path)
    assert_close(loaded, upright(), within=8 if kind == "JPEG" else 0)
    assert_close(load_image(loaded), loaded)  # loaded again, it is not turned again


def test_a_damaged_exif_block_does_not_cost_the_picture() -> None:
    data = encode(upright(), "PNG", exif=b"Exif\0\0no TIFF header at all")
    assert_close(load_image(data), upright())


def half_transparent(mode: str) -> Image.Image:
    """Left half opaque red (grey: black), right half fully transparent over a colour that must not show."""
    picture = Image.new("RGBA", (8, 4), (*RED, 255))
    picture.paste((*BLUE, 0), (4, 0, 8, 4))
    if mode == "LA":
        picture = Image.merge("LA", (Image.new("L", (8, 4), 0), picture.getchannel("A")))
    return picture


@pytest.mark.parametrize(("mode", "colour"), [("RGBA", RED), ("LA", (0, 0, 0))])
def test_transparency_is_laid_on_white(mode: str, colour: tuple[int, int, int]) -> None:
    for source in (half_transparent(mode), encode(half_transparent(mode), "PNG")):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert loaded.getpixel((0, 0)) == colour
        assert loaded.getpixel((7, 0)) == WHITE


def test_half_transparency_is_mixed_with_white() -> None:
    assert load_image(Image.new("RGBA", (2, 2), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize(("kind", "transparency"), [("PNG", 1), ("PNG", b"\xff\x00\xff"), ("GIF", 1)])
def test_transparent_palette_entries_are_white(kind: str, transparency: int | bytes) -> None:
    picture = Image.new("P", (3, 1))
    picture.putpalette([*RED, *BLUE, 0, 255, 0])
    picture.putdata([0, 1, 2])
    loaded = load_image(encode(picture, kind, transparency=transparency))
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [RED, WHITE, (0, 255, 0)]


def test_transparent_colour_of_a_picture_without_alpha_is_white() -> None:
    picture = Image.new("RGB", (2, 1), RED)
    picture.putpixel((1, 0), BLUE)
    loaded = load_image(encode(picture, "PNG", transparency=BLUE))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [RED, WHITE]


@pytest.mark.parametrize(("bits", "row", "colours"), [
    (1, 0b01000000, [0, 255, 0, 0]),
    (2, 0b00011011, [0, 85, 170, 255]),
    (4, 0x0F, [0, 255]),
])  # fmt: skip
def test_transparent_grey_of_few_bits_is_white(bits: int, row: int, colours: list[int]) -> None:
    for transparent in {colour * (2**bits - 1) // 255 for colour in colours}:
        value = transparent.to_bytes(2, "big")
        loaded = load_image(png((len(colours), 1), bytes([0, row]), (b"tRNS", value), bits=bits, colour_type=0))
        seen = [255 if colour * (2**bits - 1) // 255 == transparent else colour for colour in colours]
        assert [loaded.getpixel((x, 0)) for x in range(len(colours))] == [(colour,) * 3 for colour in seen]


@pytest.mark.parametrize(("colour_type", "values", "transparent", "colours"), [
    (2, [65535, 0, 32768, 0, 257, 65535], None, [(255, 0, 128), (0, 1, 255)]),
    (2, [65535, 0, 32768, 0, 257, 65535], [65535, 0, 32768], [WHITE, (0, 1, 255)]),
    (4, [0, 32896, 0, 65535, 65535, 0], None, [(127, 127, 127), (0, 0, 0), WHITE]),
    (6, [65535, 0, 0, 32896, 0, 0, 65535, 0], None, [(255, 127, 127), WHITE]),
], ids=["RGB", "RGB with a transparent colour", "grey with alpha", "RGBA"])  # fmt: skip
def test_16_bit_colours_and_alpha_are_read(
    colour_type: int, values: list[int], transparent: list[int] | None, colours: list[tuple[int, int, int]]
) -> None:
    extra = [(b"tRNS", struct.pack(">3H", *transparent))] if transparent else []
    row = b"\0" + struct.pack(f">{len(values)}H", *values)
    loaded = load_image(png((len(colours), 1), row, *extra, bits=16, colour_type=colour_type))
    assert [loaded.getpixel((x, 0)) for x in range(len(colours))] == colours


def grey16() -> Image.Image:
    return Image.fromarray(np.array([[0, 128, 129, 32896, 65535]], dtype=np.uint16))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "memory"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    loaded = load_image(grey16() if kind == "memory" else encode(grey16(), kind))
    assert [loaded.getpixel((x, 0))[0] for x in range(5)] == [0, 0, 1, 128, 255]


def test_big_endian_and_32_bit_containers_of_16_bit_grey_are_read() -> None:
    values = np.array([[0, 65535]])
    pictures = (Image.frombytes("I;16B", (2, 1), values.astype(">u2").tobytes()), Image.fromarray(values.astype("i4")))
    for picture in pictures:
        loaded = load_image(picture)
        assert [loaded.getpixel((x, 0)) for x in range(2)] == [(0, 0, 0), WHITE]


def test_transparent_value_of_16_bit_grey_is_white() -> None:
    loaded = load_image(encode(grey16(), "PNG", transparency=0))
    assert [loaded.getpixel((x, 0))[0] for x in range(5)] == [255, 0, 1, 128, 255]


@pytest.mark.parametrize("picture", [
    Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)),
    Image.fromarray(np.array([[-1, 5]], dtype=np.int32)),
    Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)),
], ids=["above", "below", "float"])  # fmt: skip
def test_pixels_without_a_defined_white_are_refused(picture: Image.Image) -> None:
    with pytest.raises(ImageError, match=r"white is not defined; save it with 8 or 16 bits"):
        load_image(encode(picture, "TIFF"))


def test_cmyk_becomes_its_colour() -> None:
    stored = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert_close(load_image(encode(stored, "JPEG", quality=100)), Image.new("RGB", (16, 16), RED), within=4)
    assert_close(load_image(encode(stored, "TIFF")), Image.new("RGB", (16, 16), RED))


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV", "RGBX", "RGBa"])
def test_other_modes_become_rgb(mode: str) -> None:
    source = noise("RGBA").convert("RGBa") if mode == "RGBa" else noise().convert(mode)
    loaded = load_image(source)
    expected = source.convert("RGBA").convert("RGB") if mode == "RGBa" else source.convert("RGB")
    assert (loaded.mode, type(loaded)) == ("RGB", Image.Image)
    assert_close(loaded, expected)


def test_a_mode_without_way_to_rgb_is_refused() -> None:
    with pytest.raises(ImageError, match=r"the image in memory has colour mode La .*; save it as RGB"):
        load_image(Image.new("La", (2, 2)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_of_several_frames_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    data = encode(first, kind, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert_close(load_image(data), first, within=4)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".txt", ""])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO"])
def test_the_content_decides_the_format(tmp_path: Path, kind: str, suffix: str) -> None:
    picture = Image.new("RGB", (16, 16), RED)
    options = {"save_all": True, "append_images": [picture]} if kind == "MPO" else {}
    path = tmp_path / f"picture{suffix}"
    path.write_bytes(encode(picture, kind, **options))
    for source in (path, str(path), path.read_bytes()):
        assert_close(load_image(source), picture, within=4)


def test_the_smallest_picture_is_read() -> None:
    assert_close(load_image(encode(Image.new("RGB", (1, 1), BLUE), "PNG")), Image.new("RGB", (1, 1), BLUE))


def test_the_result_shares_nothing_with_a_picture_in_memory() -> None:
    picture = Image.new("RGB", (2, 2), RED)
    picture.info["note"] = "kept"
    loaded = load_image(picture)
    loaded.putpixel((0, 0), BLUE)
    assert picture.getpixel((0, 0)) == RED
    assert picture.info == {"note": "kept"}
    assert loaded.info == {}


def test_a_picture_in_memory_keeps_the_frame_at_which_it_stands() -> None:
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    picture = Image.open(io.BytesIO(encode(first, "GIF", save_all=True, append_images=[second])))
    picture.seek(1)
    assert_close(load_image(picture), second)
    assert picture.tell() == 1


def test_no_file_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    upright().save(path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        load_image(path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


CUT = [
    *[(kind, part) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM", "AVIF", "JPEG2000") for part in (0.5, 0.9)],
    ("TIFF", 0.5),
]


@pytest.mark.parametrize(("kind", "part"), CUT)
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, part: float) -> None:
    data = encode(noise(), kind)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(len(data) * part)])
    # Pillow cannot tell the rest of an AVIF file from a file of another format.
    text = (
        r"is not an image .*, or copy it again" if kind == "AVIF" else r"is damaged or cut off \(.+\); copy or download"
    )
    with pytest.raises(ImageError, match=rf"cut\.img {text}"):
        load_image(path)


@pytest.mark.parametrize("options", [{"progressive": True}, {"quality": 95}], ids=["progressive", "baseline"])
def test_a_truncated_jpeg_is_refused_wherever_it_is_cut(options: dict[str, object]) -> None:
    data = encode(noise(), "JPEG", **options)
    for size in range(30, len(data) - 200, 997):
        with pytest.raises(ImageError):
            load_image(data[:size])


def test_a_wrong_checksum_is_refused() -> None:
    data = bytearray(encode(noise(), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(ImageError, match=r"the image given as [\d,]+ bytes is damaged or cut off"):
        load_image(bytes(data))


@pytest.mark.parametrize("size", [(60_000, 60_000), (2_000_000_000, 2_000_000_000), (1, 2_000_000_000)])
def test_a_header_that_claims_a_huge_picture_is_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=r"has too many pixels .*; make it smaller"):
        load_image(png(size, b"\0" * 64))


def test_the_cap_holds_between_pillows_warning_and_its_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"has 10000 x 9000 = 90,000,000 pixels; at most 89,478,485 are"):
            load_image(png((10_000, 9_000), b"\0" * 64))


def test_the_cap_is_exact_and_names_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    path.write_bytes(png((100, 101), b"\0" * 64))
    with pytest.raises(ImageError, match=r"big\.png has 100 x 101 = 10,100 pixels; at most 10,000 are"):
        load_image(path, max_pixels=10_000)
    assert load_image(Image.new("RGB", (100, 100)), max_pixels=10_000).size == (100, 100)
    with pytest.raises(ImageError, match=r"the image in memory has 100 x 101"):
        load_image(Image.new("RGB", (100, 101)), max_pixels=10_000)


def test_a_cap_below_one_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"max_pixels must be at least 1, got 0"):
        load_image(upright(), max_pixels=0)


def test_nothing_global_is_changed() -> None:
    def state() -> object:
        return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)

    before = state()
    load_image(encode(upright(), "PNG"))
    for broken in (encode(noise(), "PNG")[:5000], png((60_000, 60_000), b"\0" * 64)):
        with pytest.raises(ImageError):
            load_image(broken)
    assert state() == before
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS  # the figure that the default says it follows


def test_warnings_of_others_are_shown_again_after_threads_read_pictures() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            for loaded in pool.map(load_image, [encode(noise(), "PNG", exif=b"Exif\0\0damaged")] * 100):
                assert loaded.size == (96, 96)
        assert warnings.filters == before


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A folder with one of each thing that is named like a picture and is none."""
    (tmp_path / "notes.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    (tmp_path / "empty.png").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "drawing.png").write_bytes(encode(upright(), "EPS"))
    (tmp_path / "start.png").write_bytes(png((4, 4), b"\0" * 64)[:10])
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path


@pytest.mark.parametrize(("name", "text"), [
    ("notes.jpg", r"notes\.jpg is not an image that can be read, it starts with b'version https://git-lfs.'; give"),
    ("empty.png", r"empty\.png is empty \(0 bytes\); copy or download it again"),
    ("folder.png", r"folder\.png is a folder, not an image; give the path of one image file"),
    ("gone.png", r"no image file at .*gone\.png; check the path \(now in /"),
    ("link.png", r"no image file at .*link\.png"),
    ("pipe.png", r"pipe\.png is a device or a pipe, not an image"),
    ("drawing.png", r"drawing\.png is PostScript, which is not read; convert it to PNG or JPEG"),
    ("start.png", r"start\.png is damaged or cut off \(its header cannot be read\); copy or download it again"),
    ("n" * 5000, r"n\.\.\. \([\d,]+ characters\) cannot be opened \(File name too long\)"),
    ("half\0name.png", r"no image file at .*half"),
])  # fmt: skip
def test_a_file_that_is_no_picture_gives_one_clear_message(zoo: Path, name: str, text: str) -> None:
    for source in (zoo / name, str(zoo / name)):
        with pytest.raises(ImageError, match=text) as caught:
            load_image(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("source", "text"), [
    ("https://example.org/cat.png", r"cat\.png is an address; .* download it first"),
    (b"", r"the image given as 0 bytes is empty"),
    (b"GIF89a", r"the image given as 6 bytes is (not an image|damaged)"),
    (b"plain words", r"the image given as 11 bytes is not an image .* b'plain words'"),
    (Image.new("RGB", (0, 3)), r"the image in memory has no pixels \(0 x 3\)"),
    (np.zeros((2, 2, 3)), r"an image must be a path, bytes or a PIL image, got ndarray"),
    (None, r"an image must be a path, bytes or a PIL image, got NoneType"),
])  # fmt: skip
def test_what_is_no_picture_gives_one_clear_message(source: str | bytes | Image.Image, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        load_image(source)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights_is_named(tmp_path: Path) -> None:
    path = tmp_path / "locked.png"
    upright().save(path)
    path.chmod(0)
    with pytest.raises(ImageError, match=r"locked\.png cannot be opened \(Permission denied\); check the path"):
        load_image(path)


def test_a_picture_whose_file_was_closed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "closed.png"
    upright().save(path)
    with Image.open(path) as picture:
        pass
    with pytest.raises(ImageError, match=r"the file of the image in memory was closed before its pixels"):
        load_image(picture)
