"""Pictures, results and states of a captioning ledger, without a model."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mmllm.captioning.inputs import FoundPicture
from mmllm.captioning.ledger import JobSettings, Ledger, Outcome, TakenPicture

SETTINGS = JobSettings("model", "hash", "what?")


def write_pictures(folder: Path) -> Path:
    """Six pictures of different colours in a new folder."""
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (20, 20), (40 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


def found(names: str | list[str], **values: str) -> list[FoundPicture]:
    return [FoundPicture(name, name, **values) for name in names]


def record(picture: TakenPicture, text: str = "a caption") -> dict[str, object]:
    return {"image": picture.place, "caption": text, "prompt": "what?", "finish": "end", "max_new_tokens": 9}


def outcomes(taken: list[TakenPicture], text: str = "a caption") -> list[Outcome]:
    return [Outcome(picture, f"bytes of {picture.id}", None, record(picture, text)) for picture in taken]


def states(ledger: Ledger) -> dict[str, str]:
    return {row["place"]: row["state"] for row in ledger.database.execute("SELECT place, state FROM pictures")}
