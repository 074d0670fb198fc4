"""The rate of good captions of a whole job, from the labels of a person for a few of them.

Prediction-powered inference (Angelopoulos et al. 2023, https://arxiv.org/abs/2301.09633): the flags of the whole job
predict which captions are bad, and the labelled ones tell how far the flags are off. For a mean, with f the flags of
all N captions and Y the labels of n of them (section 2 of the paper):

    rate = mean_N(f) + mean_n(Y - f),   variance = var_N(f) / N + var_n(Y - f) / n

Where few labels differ from the flags, the sample variance is too small, and it is 0 where none does. So a pair of
labels that differ, one each way, counts beside those of the person, as in Agresti and Caffo 2000 for two proportions.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TypeVar

from mmllm.captioning.ledger import Ledger, to_sql
from mmllm.errors import MmllmError

GOOD = ("yes", "y", "1", "true", "good")
BAD = ("no", "n", "0", "false", "bad")
Row = TypeVar("Row")
COLUMNS = ("image", "caption", "good")
NUM_ADDED_PAIRS = 1
MIN_LABELS = 10


@dataclass(frozen=True)
class Rate:
    """A share with its confidence interval, 0 to 1."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


def prediction_powered_rate(
    predicted_share: float, num_predicted: int, pairs: Sequence[tuple[bool, bool]], *, confidence: float = 0.95
) -> Rate:
    """The rate of a property in all captions.

    Args:
        predicted_share: the share of all captions that are predicted to have it.
        num_predicted: the number of all captions.
        pairs: (label, prediction) of those that a person labelled, drawn at random from all.
    """
    errors = [int(label) - int(prediction) for label, prediction in pairs]
    total, squares = sum(errors), sum(error**2 for error in errors)
    num = len(errors) + 2 * NUM_ADDED_PAIRS
    centre = predicted_share + total / num
    variance = (squares + 2 * NUM_ADDED_PAIRS) / num - (total / num) ** 2
    deviation = (predicted_share * (1 - predicted_share) / num_predicted + variance / num) ** 0.5
    margin = NormalDist().inv_cdf((1 + confidence) / 2) * deviation
    value = predicted_share + total / len(errors)
    return Rate(*(min(1.0, max(0.0, share)) for share in (value, centre - margin, centre + margin)))


def wilson_rate(num_hits: int, num: int, *, confidence: float = 0.95) -> Rate:
    """A rate from labels alone, by Wilson's interval (1927, https://doi.org/10.1080/01621459.1927.10502953)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = num_hits / num
    centre = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    margin = z / (1 + z**2 / num) * (share * (1 - share) / num + z**2 / (4 * num**2)) ** 0.5
    return Rate(share, max(0.0, centre - margin), min(1.0, centre + margin))


def write_sample(ledger: Ledger, path: Path, *, num_pictures: int, seed: int) -> int:
    """Writes a table for a person to fill in, of captions drawn at random; returns how many. Raises MmllmError."""
    if path.exists():
        raise MmllmError(f"{path} exists, and may hold labels; name another file with --out")
    sample = draw(ledger.records(with_flagged=True), num_pictures, seed)
    if not sample:
        raise MmllmError(f"{ledger.path} holds no captions to label")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in sample:
            record = json.loads(row["record"])
            writer.writerow((record["image"], record["caption"], ""))
    return len(sample)


def draw(rows: Iterator[Row], num: int, seed: int) -> list[Row]:
    """Rows drawn at random without knowing how many there are (reservoir sampling), in a random order."""
    generator = random.Random(seed)
    sample: list[Row] = []
    for number, row in enumerate(rows):
        if number < num:
            sample.append(row)
        elif (place := generator.randrange(number + 1)) < num:
            sample[place] = row
    generator.shuffle(sample)
    return sample


@dataclass(frozen=True)
class Audit:
    """What labels say about a job: rates of good captions, of all of them and of those without a flag."""

    num_labels: int
    num_captions: int
    all_captions: Rate
    from_labels_alone: Rate
    without_flags: Rate | None
    num_labels_without_flags: int
    missed: int  # labelled captions that are bad and have no flag
    wrong_flags: int  # labelled captions that are good and have one


def audit(ledger: Ledger, labels: Path, *, confidence: float = 0.95) -> Audit:
    """Raises MmllmError for labels that cannot be read, are too few, or are of other captions."""
    if not 0.5 <= confidence < 1:
        raise MmllmError(f"--confidence must be at least 0.5 and below 1, got {confidence}")
    pairs = [(not is_good, is_flagged) for is_good, is_flagged in _labelled(ledger, labels)]
    if len(pairs) < MIN_LABELS:
        raise MmllmError(
            f"{labels} has {len(pairs)} labels; at least {MIN_LABELS} are needed, and 100 are better: write yes or no "
            "into the column `good`"
        )
    query = "SELECT count(*), coalesce(sum(flags IS NOT NULL), 0) FROM pictures WHERE record IS NOT NULL"
    num_captions, num_flagged = ledger.database.execute(query).fetchone()
    bad = prediction_powered_rate(num_flagged / num_captions, num_captions, pairs, confidence=confidence)
    unflagged = [is_bad for is_bad, is_flagged in pairs if not is_flagged]
    return Audit(
        len(pairs),
        num_captions,
        Rate(1 - bad.value, 1 - bad.high, 1 - bad.low),
        wilson_rate(sum(not is_bad for is_bad, _ in pairs), len(pairs), confidence=confidence),
        wilson_rate(unflagged.count(False), len(unflagged), confidence=confidence) if unflagged else None,
        len(unflagged),
        sum(unflagged),
        sum(is_flagged and not is_bad for is_bad, is_flagged in pairs),
    )


def _labelled(ledger: Ledger, labels: Path) -> Iterator[tuple[bool, bool]]:
    """(is good, is flagged) of each row that a person has filled in. Raises MmllmError."""
    query = "SELECT record, flags FROM pictures WHERE place = ? AND record IS NOT NULL"
    seen = set()
    try:
        with labels.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
                raise MmllmError(
                    f"{labels} has no column {missing[0]}; give the table that `mmllm caption audit LEDGER --out "
                    "FILE.csv` wrote, with its column `good` filled in"
                )
            for number, row in enumerate(reader, 2):
                answer = (row["good"] or "").strip().lower()
                if not answer:
                    continue
                if answer not in (*GOOD, *BAD):
                    raise MmllmError(f"{labels} line {number}: good is {answer!r}; write yes or no, or leave it empty")
                if row["image"] in seen:
                    raise MmllmError(f"{labels} line {number}: {row['image']} is labelled twice; keep one of them")
                seen.add(row["image"])
                found = ledger.database.execute(query, (to_sql(row["image"]),)).fetchone()
                if found is None or json.loads(found["record"])["caption"].strip() != (row["caption"] or "").strip():
                    raise MmllmError(
                        f"{labels} line {number}: {row['image']} has another caption or none in {ledger.path} by now; "
                        "draw a new sample"
                    )
                yield answer in GOOD, found["flags"] is not None
    except csv.Error as error:
        raise MmllmError(f"{labels} is not a CSV table ({error})") from error


def describe_audit(result: Audit, confidence: float) -> str:
    """The audit in sentences."""
    lines = [
        f"{result.num_labels} labels of {result.num_captions:,} captions, intervals of {confidence:.0%} confidence",
        f"good captions in the whole job:     {result.all_captions} (labels and flags, prediction-powered)",
        f"                                    {result.from_labels_alone} (labels alone)",
    ]
    if result.without_flags is not None:
        lines.append(
            f"good captions among those unflagged: {result.without_flags} ({result.num_labels_without_flags} labels)"
        )
    lines.append(f"of the labelled: {result.missed} bad without a flag, {result.wrong_flags} good with one")
    return "\n".join(lines)
