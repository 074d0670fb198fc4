"""Picture files for tests: real ones as Pillow writes them, and small hostile ones, built byte by byte."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
EXIF_ORIENTATION, EXIF_POINTER = 274, 34665
HUGE_PX = 100_000
SMALL_PX = 8


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    """A picture that does not compress, so that a cut in the middle of the file is a cut in the pixels."""
    values = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def red() -> Image.Image:
    return Image.new("RGB", (SMALL_PX, SMALL_PX), RED)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(size: tuple[int, int], rows: bytes, *extra: tuple[bytes, bytes], bits: int = 8, colour_type: int = 2) -> bytes:
    """A PNG of these filtered rows. Colour types: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, 0))
    chunks = b"".join(chunk(*one) for one in extra)
    return b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def red_png(*extra: tuple[bytes, bytes], more: bytes = b"") -> bytes:
    return png((SMALL_PX, SMALL_PX), (b"\0" + bytes(RED) * SMALL_PX) * SMALL_PX + more, *extra)


def tiff(*entries: tuple[int, int, int, int], following: int = 0, first: int = 8, behind: bytes = b"") -> bytes:
    """A little-endian TIFF of one directory with (tag, type, count, value) rows. Types: 3 short, 4 long."""
    rows = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return struct.pack("<2sHIH", b"II", 42, first, len(entries)) + rows + struct.pack("<I", following) + behind


def grey_tiff(*entries: tuple[int, int, int, int], following: int = 0, side: int = SMALL_PX) -> bytes:
    """A TIFF with one strip of white pixels; `entries` replace or add tags."""
    own = {256: (3, side), 257: (3, side), 258: (3, 8), 259: (3, 1), 262: (3, 1), 273: (4, 0), 278: (3, side),
           279: (4, SMALL_PX * SMALL_PX)}  # fmt: skip
    rows = {tag: (tag, kind, 1, value) for tag, (kind, value) in own.items()} | {row[0]: row for row in entries}
    start = 8 + 2 + 12 * len(rows) + 4
    rows[273] = (273, 4, 1, start)
    return tiff(*rows.values(), following=following, behind=b"\xff" * SMALL_PX * SMALL_PX)


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP file of these chunks."""
    body = b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new)
    assert data.count(old) >= 1
    return data.replace(old, new)


def gif(*, second_frame: bytes = b"") -> bytes:
    """A red GIF of one frame with something behind it."""
    return encode(red(), "GIF").removesuffix(b";") + second_frame + b";"


def orientation(value: int, kind: int = 3) -> bytes:
    """An EXIF block with an orientation of this value and TIFF type."""
    return b"Exif\0\0" + tiff((EXIF_ORIENTATION, kind, 1, value))


def bomb(num_bytes: int) -> bytes:
    return zlib.compress(b"\0" * num_bytes, 9)


def huge_stream() -> bytes:
    """A JPEG 2000 file whose header says 23 x 29, and whose code stream inside 100,000 x 100,000."""
    small = encode(Image.new("RGB", (23, 29), RED), "JPEG2000")
    return patched(small, struct.pack(">II", 23, 29), struct.pack(">II", HUGE_PX, HUGE_PX))


def huge(kind: str) -> bytes:
    """A small file that declares 100,000 x 100,000 pixels, or as many as its format can."""
    small = encode(Image.new("RGB", (23, 29), RED), kind)
    both = {
        "PNG": lambda: png((HUGE_PX, HUGE_PX), b"\0" * 64),
        "JPEG": lambda: patched(small, struct.pack(">HH", 29, 23), b"\xff" * 4),
        "GIF": lambda: patched(small, struct.pack("<HH", 23, 29), b"\xff" * 4),
        "WEBP": lambda: riff((b"VP8L", b"\x2f" + struct.pack("<I", (1 << 28) - 1) + b"\0" * 40)),
        "BMP": lambda: patched(small, struct.pack("<ii", 23, 29), struct.pack("<ii", HUGE_PX, HUGE_PX)),
        "TIFF": lambda: grey_tiff((256, 4, 1, HUGE_PX), (257, 4, 1, HUGE_PX)),
        "PPM": lambda: b"P6 %d %d 255\n" % (HUGE_PX, HUGE_PX) + bytes(100),
        "JPEG2000": lambda: patched(huge_stream(), struct.pack(">II", 29, 23), struct.pack(">II", HUGE_PX, HUGE_PX)),
        "AVIF": lambda: patched(small, struct.pack(">II", 23, 29), struct.pack(">II", HUGE_PX, HUGE_PX)),
    }  # fmt: skip
    return both[kind]()


# Small files that must be refused, or else must give a small picture in the color that is said.
REFUSED: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: bytes(1000),
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>',
    "html": lambda: b"<!doctype html><title>404 Not Found</title>" + b" " * 500,
    "script": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ls) (r) file\n",
    "pickle": lambda: b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "png without pixels": lambda: png((0, 0), b""),
    "png of a palette without one": lambda: png((2, 1), b"\0\0\1", colour_type=3),
    "gif without a frame": lambda: b"GIF89a\x08\0\x08\0\0\0\0;",
    "gif cut in its first frame": lambda: encode(noise(), "GIF")[:2000],
    "gif whose frame is huge": lambda: patched(gif(), b"," + struct.pack("<4H", 0, 0, SMALL_PX, SMALL_PX),
                                              b"," + b"\xff" * 8),
    "tiff without a directory": lambda: tiff(first=0),
    "tiff whose directory is far behind its end": lambda: tiff(first=2**32 - 2),
    "tiff with tiles of 2 gigabytes": lambda: grey_tiff((322, 4, 1, 2**15), (323, 4, 1, 2**16), (324, 4, 1, 8),
                                                       (325, 4, 1, 64), (259, 3, 1, 5)),
    "tiff without a size": lambda: tiff((258, 3, 1, 8), (273, 4, 1, 8)),
    "webp cut": lambda: encode(noise(), "WEBP", lossless=True)[:3000],
    "webp of one empty chunk": lambda: riff((b"VP8 ", b"")),
    "webp whose canvas is huge": lambda: riff((b"VP8X", b"\2\0\0\0" + b"\xff" * 6), (b"ANIM", bytes(6))),
    "jpeg of two markers": lambda: b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(9) + b"\xff\xd9",
    "jpeg without tables": lambda: bytes.fromhex("ffd8ffc0000b080008000801011100ffda0008010100003f0000ffd9"),
    "jpeg2000 larger inside than it says": huge_stream,
    "ppm with a number that never ends": lambda: b"P6 " + b"1" * 5000,
    "ppm without pixels": lambda: b"P5 4 4 255\n",
    "bmp whose size is negative": lambda: patched(encode(red(), "BMP"), struct.pack("<ii", SMALL_PX, SMALL_PX),
                                                 struct.pack("<ii", -SMALL_PX, SMALL_PX)),
}  # fmt: skip
READ: dict[str, tuple[Callable[[], bytes], tuple[int, int, int]]] = {
    "png text bomb": (lambda: red_png((b"zTXt", b"c\0\0" + bomb(20_000_000))), RED),
    "png of many text bombs": (lambda: red_png(*[(b"zTXt", b"%d\0\0" % i + bomb(1_000_000)) for i in range(80)]), RED),
    "png international text bomb": (lambda: red_png((b"iTXt", b"c\0\1\0\0\0" + bomb(20_000_000))), RED),
    "png profile bomb": (lambda: red_png((b"iCCP", b"p\0\0" + bomb(20_000_000))), RED),
    "png with more pixels than it says": (lambda: red_png(more=bytes(50_000_000)), RED),
    "png animation of no frames": (lambda: red_png((b"acTL", bytes(8))), RED),
    "png animation declared twice": (lambda: red_png(*[(b"acTL", struct.pack(">II", 1, 0))] * 2), RED),
    "png with damaged exif": (lambda: red_png((b"eXIf", b"II*\0\xff\xff\xff\xff")), RED),
    "png whose exif goes round in a circle": (
        lambda: red_png((b"eXIf", tiff((EXIF_POINTER, 4, 1, 8), following=8))), RED),
    "gif with a broken second frame": (lambda: gif(second_frame=b"," + b"\xff" * 9), RED),
    "gif cut in its second frame": (
        lambda: encode(red(), "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)])[:-8], RED),
    "tiff whose directory is followed by itself": (lambda: grey_tiff(following=8), WHITE),
    "tiff whose next directory is behind its end": (lambda: grey_tiff(following=2**31), WHITE),
    "tiff that counts four billion bytes in a strip": (lambda: grey_tiff((279, 4, 1, 2**32 - 1)), WHITE),
    "tiff whose exif is itself": (lambda: grey_tiff((EXIF_POINTER, 4, 1, 8)), WHITE),
    "tiff whose exif counts four billions": (lambda: grey_tiff((EXIF_POINTER, 4, 2**32 - 1, 8)), WHITE),
    "jpeg of inverted cmyk": (lambda: encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), RED),
    "mpo of two pictures": (
        lambda: encode(red(), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)], quality=100), RED),
    "mpo without its second picture": (
        lambda: encode(red(), "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)], quality=100)[:-500],
        RED),
    **{f"jpeg of orientation {value}, which is none": (
        lambda value=value: encode(red(), "JPEG", exif=orientation(value), quality=100), RED)
        for value in (0, 9, 65535)},
    "jpeg whose orientation is a text": (
        lambda: encode(red(), "JPEG", exif=orientation(0x36363636, 2), quality=100), RED),
}  # fmt: skip
