"""One safe way from a file, bytes or a picture in memory to an RGB picture.

Rules: EXIF orientation is applied; transparency is laid on white; 16-bit grey is scaled so that 65535 is white; of an
animation or several pages the first is taken; the content decides the format, never the suffix; colour profiles are not
applied. A picture that cannot be decoded to its end is an ImageError, so a truncated file never becomes half grey.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from mmllm.batch import PreparedImage
from mmllm.errors import MmllmError

# Pillow warns from this many pixels on, see Image.MAX_IMAGE_PIXELS: a quarter of a gigabyte as RGB.
MAX_PIXELS = 89_478_485
MAX_FILE_BYTES = 1 << 30  # of a file that is read into memory before it is decoded

# A JPEG with more pixels may be decoded directly at a half, a quarter or an eighth of its size. A photo of up to 33
# megapixels is then read at full size, and one of 50 takes 50 MB instead of 200.
MAX_WHOLE_PIXELS = 1 << 25
MIN_SHRUNK_SIDE_PX = 1024  # of the shorter side; far more than any vision tower sees

# Not every format that Pillow can open: its EPS reader starts Ghostscript, and TGA has no signature to recognise it by.
# MPO, in which phones put several JPEG pictures into one file, is read as JPEG.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# Formats that are recognised by their first bytes only to name them in the error.
_UNREAD_FORMATS = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"8BPS": "a Photoshop file",
    b"<svg": "an SVG drawing",
    b"%!PS": "PostScript",
    b"%PDF": "a PDF",
}
# The brands of HEIF files with HEVC pictures, as phones write them (ISO 23008-12). AVIF files may also have `mif1`.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_HEIF_GENERAL_BRANDS = (b"mif1", b"mif2", b"msf1")

# The chunks that decide a PNG's pixels and orientation. Others, such as text, are dropped where Pillow fails on them.
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_PNG_CHECKED_CHUNKS = (b"eXIf",)  # dropped where their checksum is wrong

# What Pillow's readers raise on damaged files; they have no common base class.
_DECODING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)

# How to turn a stored picture upright, by its EXIF orientation (EXIF 2.32, tag 274); 1 is upright already.
_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow scales PNG's grey of 1, 2 or 4 bits to 0-255, but not the transparent grey value of the file. By raw mode.
_GREY_STEPS = {"1": 255, "L;2": 85, "L;4": 17}

# Pillow's warnings say no more than the picture or the ImageError does, and a million rows would repeat them.
_PILLOW_WARNING_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


HEIF_INSTALL = "pip install 'mmllm[heif]'"


class ImageError(MmllmError):
    """An image that cannot be used. The message names it, what is wrong with it and what to do."""


def load_image(
    source: str | Path | bytes | Image.Image,
    *,
    max_pixels: int = MAX_PIXELS,
    may_shrink: bool = False,
    name: str | None = None,
) -> Image.Image:
    """The upright RGB picture of a path, a file's bytes or a picture in memory, which is not changed.

    The result shares no memory with the source and has no metadata. `max_pixels` (width x height) is checked before
    anything is decoded; Pillow's own limit, twice the default, holds too. With `may_shrink`, a JPEG of more than
    MAX_WHOLE_PIXELS may be smaller than `image_size` says, and `max_pixels` limits its decoded size. `name` is what
    errors call a picture that is given as bytes. Raises ImageError.
    """
    if max_pixels < 1:
        raise ValueError(f"max_pixels must be at least 1, got {max_pixels}")
    with _ignore_pillow_warnings():
        if isinstance(source, Image.Image):
            return _decode(source, "the image in memory", max_pixels, is_ours=False)
        if isinstance(source, bytes):
            name = _short_name(name) if name else f"the image given as {len(source):,} bytes"
            return _load_file(io.BytesIO(source), name, max_pixels, may_shrink)
        if not isinstance(source, str | Path):
            raise ImageError(f"an image must be a path, bytes or a PIL image, got {type(source).__name__}")
        with _open_file(source) as file:
            return _load_file(file, _short_name(source), max_pixels, may_shrink)


def read_image_file(source: str | Path) -> bytes:
    """The bytes of an image file, not decoded. Raises ImageError where there is none or it is too large for one."""
    with _open_file(source) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"{_short_name(source)} has more than {MAX_FILE_BYTES:,} bytes; make the picture smaller")
    return data


@contextlib.contextmanager
def _ignore_pillow_warnings() -> Iterator[None]:
    """Like `warnings.catch_warnings`, which would lose or keep filters when several threads read pictures."""
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    filters.insert(0, _PILLOW_WARNING_FILTER)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # another thread may have emptied the list
            filters.remove(_PILLOW_WARNING_FILTER)


def _short_name(source: str | Path) -> str:
    text = str(source)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _open_file(source: str | Path) -> IO[bytes]:
    name, path = _short_name(source), Path(source)
    try:
        if path.is_dir():
            raise ImageError(f"{path} is a folder, not an image; give the path of one image file")
        if not path.exists():
            if "://" in name:
                raise ImageError(f"{name} is an address; images are only read from disk, so download it first")
            raise ImageError(f"no image file at {name}; check the path (now in {Path.cwd()})")
        if not path.is_file():
            raise ImageError(f"{name} is a device or a pipe, not an image; give the path of an image file")
        return path.open("rb")
    except OSError as error:
        raise ImageError(f"{name} cannot be opened ({error.strerror}); check the path and permissions") from error


def image_size(source: str | Path | bytes | Image.Image | PreparedImage) -> tuple[int, int]:
    """(height, width) of the upright picture, read from the file's header alone. Raises ImageError."""
    if isinstance(source, PreparedImage):
        return source.size
    with _ignore_pillow_warnings():
        if isinstance(source, Image.Image):
            return _upright_size(source, _orientation(source))
        if isinstance(source, bytes):
            return _size_of_file(io.BytesIO(source), f"the image given as {len(source):,} bytes")
        with _open_file(source) as file:
            return _size_of_file(file, _short_name(source))


def _size_of_file(file: IO[bytes], name: str) -> tuple[int, int]:
    is_in_header = not _has_late_chunks(file)
    file.seek(0)
    return _upright_size(picture := _open_picture(file, name), _orientation(picture, header_only=is_in_header))


def _has_late_chunks(file: IO[bytes]) -> bool:
    """Whether a PNG has chunks after its pixels, which may hold the orientation."""
    if file.read(8) != _PNG_SIGNATURE:
        return False
    has_pixels = False
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        has_pixels |= head[4:] == b"IDAT"
        if has_pixels and head[4:] not in (b"IDAT", b"fcTL", b"fdAT"):
            return True
        file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
    return False


def _upright_size(picture: Image.Image, orientation: int) -> tuple[int, int]:
    width, height = picture.size  # for a TIFF, Pillow already gives the upright size
    is_turned = picture.format != "TIFF" and orientation in (5, 6, 7, 8)  # these swap the sides
    return (width, height) if is_turned else (height, width)


def _load_file(file: IO[bytes], name: str, max_pixels: int, may_shrink: bool) -> Image.Image:
    try:
        picture = _open_picture(file, name)
        if may_shrink:
            _decode_smaller(picture)
        return _decode(picture, name, max_pixels)
    except ImageError as error:
        if isinstance(error.__cause__, _DECODING_ERRORS) and (bare := _png_without_extras(file)) is not None:
            return _decode(_open_picture(bare, name), name, max_pixels)
        raise


def _decode_smaller(picture: Image.Image) -> None:
    """Makes Pillow decode a large JPEG at a fraction of its size, from fewer frequencies of each block."""
    width, height = picture.size
    if picture.format not in ("JPEG", "MPO") or width * height <= MAX_WHOLE_PIXELS:
        return
    divisors = [divisor for divisor in (2, 4, 8) if min(width, height) // divisor >= MIN_SHRUNK_SIDE_PX]
    sufficient = [divisor for divisor in divisors if width * height <= MAX_WHOLE_PIXELS * divisor**2]
    if divisors:
        divisor = min(sufficient, default=max(divisors))
        picture.draft(None, (width // divisor, height // divisor))


def _open_picture(file: IO[bytes], name: str) -> Image.Image:
    start = file.read(64)
    if not start:
        raise ImageError(f"{name} is empty (0 bytes); copy or download it again")
    file.seek(0)
    try:
        if _is_heif(start):
            return _open_heif(file, name)
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        kind = next((kind for begin, kind in _UNREAD_FORMATS.items() if start.startswith(begin)), None)
        if kind:
            raise ImageError(f"{name} is {kind}, which is not read; convert it to PNG or JPEG") from error
        if (bare := _png_without_extras(file)) is not None:  # only something besides the pixels is damaged
            return _open_picture(bare, name)
        if start.startswith(_PNG_SIGNATURE):
            raise ImageError(_damage_message(name, error)) from error
        raise ImageError(
            f"{name} is not an image that can be read, it starts with {start[:24]!r}; "
            f"give one of {', '.join(FORMATS)}, HEIF, or copy it again if it should be one"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has too many pixels ({error}); make it smaller") from error
    except _DECODING_ERRORS as error:
        if (bare := _png_without_extras(file)) is not None:
            return _open_picture(bare, name)
        raise ImageError(_damage_message(name, error)) from error


def _is_heif(start: bytes) -> bool:
    """Whether a file begins like HEIF with HEVC pictures. Pillow itself reads AVIF, which has the same container."""
    if start[4:8] != b"ftyp":
        return False
    size, brand = int.from_bytes(start[:4], "big"), start[8:12]
    others = start[16 : max(16, size)]
    return brand in _HEIF_BRANDS or (brand in _HEIF_GENERAL_BRANDS and b"avif" not in others and b"avis" not in others)


def _open_heif(file: IO[bytes], name: str) -> Image.Image:
    """A HEIF picture, by pillow-heif's own reader: registered with Pillow, it would open other formats too."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise ImageError(f"{name} is HEIF, as phones write it, which needs {HEIF_INSTALL}; or convert it") from error
    picture: Image.Image = HeifImageFile(file)  # type: ignore[no-untyped-call]
    return picture


def _png_without_extras(file: IO[bytes]) -> IO[bytes] | None:
    """A PNG reduced to the chunks that its pixels need; None for other files, and for a PNG that has no other chunks.

    Some programs keep megabytes of text in PNGs. Pillow refuses those, to guard against texts that grow when they are
    decompressed. Here they are not decompressed at all, so Pillow's limits need not change.
    """
    file.seek(0)
    if file.read(8) != _PNG_SIGNATURE:
        return None
    bare, num_dropped = io.BytesIO(), 0
    bare.write(_PNG_SIGNATURE)
    while head := file.read(8):
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind in _PNG_CHUNKS or kind in _PNG_CHECKED_CHUNKS:
            body = file.read(size + 4)
            if kind in _PNG_CHUNKS or body[-4:] == zlib.crc32(kind + body[:-4]).to_bytes(4, "big"):
                bare.write(head + body)
                continue
        else:
            file.seek(size + 4, io.SEEK_CUR)
        num_dropped += 1
    bare.seek(0)
    return bare if num_dropped else None


def _damage_message(name: str, error: Exception) -> str:
    is_unidentified = isinstance(error, UnidentifiedImageError)  # whose text is no more than a memory address
    why = "its header cannot be read" if is_unidentified else str(error) or type(error).__name__
    return f"{name} is damaged or cut off ({why}); copy or download it again"


def _decode(picture: Image.Image, name: str, max_pixels: int, *, is_ours: bool = True) -> Image.Image:
    """The upright RGB picture. A picture that is not ours was opened by the caller and must not change."""
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} = {width * height:,} pixels; at most {max_pixels:,} are allowed; "
            "make it smaller"
        )
    if width * height == 0:
        raise ImageError(f"{name} has no pixels ({width} x {height}); give a picture of at least 1 x 1")
    tiles = picture.tile if isinstance(picture, ImageFile.ImageFile) else []
    stored = str(tiles[0].args) if tiles else ""
    try:
        picture.load()
    except AssertionError as error:  # Pillow's, for a picture whose file is closed
        raise ImageError(f"the file of {name} was closed before its pixels were read; call its load() first") from error
    except _DECODING_ERRORS as error:
        raise ImageError(_damage_message(name, error)) from error
    turn = _TRANSPOSE_OF_ORIENTATION.get(_orientation(picture))
    if (
        isinstance(picture, ImageFile.ImageFile)
        and is_ours
        and picture.mode == "RGB"
        and "transparency" not in picture.info
    ):
        rgb = picture._new(picture.im)  # without a copy, which would take hundreds of megabytes for a large picture
    else:
        rgb = _to_rgb(_with_transparent_colour(picture, stored), name)
    if turn is not None:
        rgb = rgb.transpose(turn)
    rgb.info = {}  # it still has the old orientation: loaded again, the picture would be turned again
    return rgb


def _orientation(picture: Image.Image, *, header_only: bool = False) -> int:
    """The EXIF orientation. A picture with a damaged EXIF block is left as it is stored, as viewers do.

    With `header_only`, a PNG is not decoded to look for EXIF after its pixels.
    """
    try:
        exif = Image.Image.getexif(picture) if header_only else picture.getexif()
        value = exif.get(ExifTags.Base.Orientation, 1)
    except _DECODING_ERRORS:
        return 1
    return value if isinstance(value, int) else 1


def _with_transparent_colour(picture: Image.Image, stored: str) -> Image.Image:
    """The picture with PNG's transparent colour scaled as its pixels are. `stored` is Pillow's raw mode of the file."""
    transparent = picture.info.get("transparency")
    if stored in _GREY_STEPS and isinstance(transparent, int):
        transparent *= _GREY_STEPS[stored]
    elif stored == "RGB;16B" and isinstance(transparent, tuple):  # with it, all colours that are equal in 8 bits
        transparent = tuple(value >> 8 for value in transparent)
    else:
        return picture
    picture = picture.copy()
    picture.info["transparency"] = transparent
    return picture


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        picture = _grey_of_16_bits(picture, name)
    if picture.mode == "F":
        raise ImageError(f"{name} has floating-point pixels, for which white is not defined; save it with 8 or 16 bits")
    if picture.mode in ("P", "PA") and picture.palette is None:
        raise ImageError(f"{name} has palette colours but no palette; save it as RGB")
    try:
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        rgba = picture.convert("RGBA")
    except ValueError as error:
        raise ImageError(f"{name} has colour mode {picture.mode} ({error}); save it as RGB") from error
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey_of_16_bits(picture: Image.Image, name: str) -> Image.Image:
    """A 16-bit picture in mode L. In some versions and modes, Pillow's own conversion clips it at 255."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name} has 32-bit grey values from {values.min()} to {values.max()}, for which white is not defined; "
            "save it with 8 or 16 bits"
        )
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)
