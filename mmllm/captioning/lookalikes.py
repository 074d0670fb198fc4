"""Pictures that are there twice: the same bytes, or the same look by a perceptual hash. They are counted, never merged.

The hash is pHash, https://github.com/JohannesBuchner/imagehash: 64 bits of the picture's coarse waves, which stay where
it is resized or compressed anew.
"""

from __future__ import annotations

import sqlite3

import numpy as np
from PIL import Image

HASHED_SIDE_PX = 128  # a picture is shrunk to this before it is hashed, which is quick
MIN_CONTRAST = 16  # of 255: pictures of one colour all have the same hash


def perceptual_hash(picture: Image.Image) -> str | None:
    """The hash in hexadecimal; None for a picture of one colour, and where imagehash is not installed."""
    try:
        import imagehash
    except ImportError:
        return None
    small = picture.resize((HASHED_SIDE_PX, HASHED_SIDE_PX), Image.Resampling.BILINEAR, reducing_gap=2.0)
    contrast = np.ptp(np.asarray(small.convert("L")))
    return str(imagehash.phash(small)) if contrast >= MIN_CONTRAST else None


def describe_repeats(database: sqlite3.Connection) -> list[str]:
    """A sentence each about pictures with the same bytes and pictures with the same look; none where there are none."""
    lines = []
    for column, what in (("content", "have the same bytes as another"), ("look", "look like another")):
        count, groups = database.execute(
            f"SELECT coalesce(sum(number), 0), count(*) FROM (SELECT count(*) AS number FROM pictures "
            f"WHERE {column} IS NOT NULL GROUP BY {column} HAVING number > 1)"
        ).fetchone()
        if count:
            first = database.execute(
                f"SELECT min(place), max(place) FROM pictures WHERE {column} IS NOT NULL GROUP BY {column} "
                "HAVING count(*) > 1 LIMIT 1"
            ).fetchone()
            names = " and ".join(str(name) for name in first)
            lines.append(f"{count:,} pictures {what} ({groups:,} groups, such as {names}); each has its own caption")
    return lines
