"""Pictures, results and states of a captioning ledger, without files and without a model."""

from __future__ import annotations

from mmllm.captioning.inputs import FoundPicture
from mmllm.captioning.ledger import JobSettings, Ledger, Outcome, TakenPicture

SETTINGS = JobSettings("model", "hash", "what?")


def found(names: str | list[str], **values: str) -> list[FoundPicture]:
    return [FoundPicture(name, name, **values) for name in names]


def record(picture: TakenPicture, text: str = "a caption") -> dict[str, object]:
    return {"image": picture.place, "caption": text, "prompt": "what?", "finish": "end", "max_new_tokens": 9}


def outcomes(taken: list[TakenPicture], text: str = "a caption") -> list[Outcome]:
    return [Outcome(picture, f"bytes of {picture.id}", None, record(picture, text)) for picture in taken]


def states(ledger: Ledger) -> dict[str, str]:
    return {row["place"]: row["state"] for row in ledger.database.execute("SELECT place, state FROM pictures")}
