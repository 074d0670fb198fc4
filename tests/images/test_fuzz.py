"""load_image: any picture that Pillow writes comes back in its colors; any other bytes give a picture or an ImageError.

The examples are the same on every run. MMLLM_FUZZ=20 tries twenty times as many.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmllm.images import FORMATS, ImageError, image_size, load_image
from tests.builders.image_files import EXIF_ORIENTATION, READ, REFUSED, WHITE, encode, huge

EFFORT = int(os.environ.get("MMLLM_FUZZ", "1"))
MAX_PIXELS = 100_000
fuzz = settings(derandomize=True, deadline=None, database=None, max_examples=60 * EFFORT)

BEST: dict[str, dict[str, object]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "TIFF": {"compression": "tiff_deflate"},  # Pillow cannot read the YCbCr that it writes without compression
}
# How far a value may be off at the best quality. JPEG and AVIF store YCbCr of 8 bits.
TOLERANCE = {"JPEG": 8, "AVIF": 12}
# What Pillow writes of the modes that a picture can have, but for what a format does not keep: GIF's colors beyond 256,
# BMP's alpha.
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "GIF": ("1", "L", "P"),
    "WEBP": ("L", "RGB", "RGBA", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
    "AVIF": ("L", "RGB", "RGBA"),
}
PAIRS = [(kind, mode) for kind, modes in MODES.items() for mode in modes]
TURNED = {"PNG", "JPEG", "TIFF", "WEBP", "AVIF"}  # formats in which Pillow writes an EXIF orientation


@pytest.fixture(autouse=True)
def _no_warning_leaks() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def picture_of(mode: str, width: int, height: int, seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    if mode in ("I;16", "I"):
        values = random.integers(0, 65536, (height, width), dtype=np.uint16)
        return Image.fromarray(values if mode == "I;16" else values.astype(np.int32))
    if mode == "YCbCr":  # of colors that RGB has
        return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    bands = {"1": 1, "L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    values = random.integers(0, 256, (height, width, bands), dtype=np.uint8)
    if mode == "1":
        return Image.fromarray(values[..., 0] > 127)
    picture = Image.frombytes(mode, (width, height), values.tobytes())
    if mode == "P":
        picture.putpalette(random.integers(0, 256, 768, dtype=np.uint8).tobytes())
    return picture


def colors_of(picture: Image.Image) -> np.ndarray:
    """What should be seen, [H, W, 3], worked out from the values themselves."""
    values = np.asarray(picture).astype(float)
    if picture.mode in ("I;16", "I"):
        values = values / 257
    elif picture.mode == "1":
        values = values * 255
    elif picture.mode == "P":
        values = np.array(picture.getpalette()).reshape(-1, 3)[values.astype(int)]
    elif picture.mode == "CMYK":
        values = (255 - values[..., :3]) * (255 - values[..., 3:]) / 255
    elif picture.mode == "YCbCr":
        luma, blue, red = values[..., 0], values[..., 1] - 128, values[..., 2] - 128
        values = np.stack((luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue), axis=-1)
    elif picture.mode in ("LA", "RGBA"):
        alpha = values[..., -1:] / 255
        values = values[..., :-1] * alpha + 255 * (1 - alpha)
    if values.ndim == 2 or values.shape[2] == 1:
        values = np.repeat(values.reshape(*values.shape[:2], 1), 3, axis=2)
    return values.clip(0, 255)


def upright(colors: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF 2.32, tag 274: which side of what is seen the stored rows and columns begin at."""
    if orientation >= 5:
        colors = colors.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        colors = colors[:, ::-1]
    if orientation in (3, 4, 7, 8):
        colors = colors[::-1]
    return colors


def test_the_properties_are_asked_of_every_format() -> None:
    assert set(MODES) == set(FORMATS)


@pytest.mark.parametrize(("kind", "mode"), PAIRS)
@settings(fuzz, max_examples=10 * EFFORT)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2**32), st.integers(1, 8))
def test_every_picture_that_pillow_writes_is_read_upright_and_in_its_colors(
    kind: str, mode: str, width: int, height: int, seed: int, orientation: int
) -> None:
    picture = picture_of(mode, width, height, seed)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    file = encode(picture, kind, exif=exif.tobytes(), **BEST.get(kind, {}))
    loaded = load_image(file)
    assert image_size(file) == (loaded.height, loaded.width), "told from the head of the file"
    expected = upright(colors_of(picture), orientation if kind in TURNED else 1)
    assert (loaded.mode, loaded.info) == ("RGB", {})
    assert loaded.size == expected.shape[1::-1]
    assert np.abs(np.asarray(loaded) - expected).max() <= TOLERANCE.get(kind, 2)


FILES = {f"{kind}-{mode}": encode(picture_of(mode, 17, 13, 0), kind) for kind, mode in PAIRS}


def loads_or_refuses(data: bytes) -> None:
    try:
        loaded = load_image(data, max_pixels=MAX_PIXELS)
    except ImageError:
        return
    assert image_size(data) == (loaded.height, loaded.width)
    assert (loaded.mode, loaded.info) == ("RGB", {})
    assert 0 < loaded.width * loaded.height <= MAX_PIXELS
    assert len(loaded.tobytes()) == 3 * loaded.width * loaded.height


@fuzz
@given(st.sampled_from(sorted(FILES)), st.integers(0, 40), st.binary(max_size=300))
def test_any_bytes_give_a_picture_or_an_image_error(name: str, start: int, data: bytes) -> None:
    loads_or_refuses(FILES[name][:start] + data)


@fuzz
@given(st.sampled_from(sorted(FILES)), st.floats(0, 1, exclude_max=True))
def test_any_truncation_gives_a_picture_or_an_image_error(name: str, part: float) -> None:
    loads_or_refuses(FILES[name][: int(part * len(FILES[name]))])


@settings(fuzz, max_examples=400 * EFFORT)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6),
    st.booleans(),
)
def test_any_flipped_bits_give_a_picture_or_an_image_error(
    name: str, flips: list[tuple[float, int]], in_header: bool
) -> None:
    data = bytearray(FILES[name])
    for part, bits in flips:
        data[int(part * (min(len(data), 120) if in_header else len(data)))] ^= bits
    loads_or_refuses(bytes(data))


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_file_is_refused(name: str) -> None:
    with pytest.raises(ImageError, match=r"; .*(copy|give|make|save|convert)"):
        load_image(REFUSED[name]())


@pytest.mark.parametrize("name", READ)
def test_an_odd_file_is_read(name: str) -> None:
    build, color = READ[name]
    loaded = load_image(source := build())
    assert image_size(source) == (loaded.height, loaded.width)
    assert loaded.size == (8, 8)
    assert np.abs(np.asarray(loaded).astype(int) - color).max() <= 4


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_of_100000_by_100000_is_refused_and_one_of_1_by_1_is_read(kind: str) -> None:
    with pytest.raises(ImageError, match=r"has too many pixels|is not an image that can be read") as caught:
        load_image(huge(kind))
    assert ("not an image" in str(caught.value)) == (kind == "AVIF")  # libavif refuses it before Pillow does
    small = load_image(encode(Image.new("RGB", (1, 1), WHITE), kind))
    assert (small.size, small.getpixel((0, 0))) == ((1, 1), WHITE)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every hostile file, named like pictures."""
    folder = tmp_path_factory.mktemp("hostile")
    files = {**REFUSED, **{name: build for name, (build, _) in READ.items()}}
    for number, build in enumerate([*files.values(), *((lambda kind=kind: huge(kind)) for kind in FORMATS)]):
        (folder / f"{number}.png").write_bytes(build())
    return folder


READ_ALL = """
import json, resource, sys
from pathlib import Path
from mmllm.images import ImageError, load_image
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # a file that is read for ever ends this process
used = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
grown = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    before = used()
    try:
        load_image(path)
    except ImageError:
        pass
    grown[path.name] = used() - before
print(json.dumps(grown))
"""


def test_no_hostile_file_takes_long_or_much_memory(hostile: Path) -> None:
    for path in hostile.iterdir():
        assert path.stat().st_size <= 150_000
    command = [sys.executable, "-W", "error", "-c", READ_ALL, str(hostile)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = json.loads(done.stdout)
    assert len(grown) == len(list(hostile.iterdir()))
    assert sum(grown.values()) < 200  # megabytes; the bombs among them would fill gigabytes
