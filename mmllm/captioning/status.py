"""How far a captioning job is, read from its ledger, which may be in use."""

from __future__ import annotations

import json
import time
from collections import Counter

from mmllm.captioning.ledger import Ledger
from mmllm.captioning.lookalikes import describe_repeats
from mmllm.captioning.quality import FLAGS
from mmllm.captioning.workers import LEASE_SECONDS

MAX_REASONS = 5
STATES = ("done", "flagged", "failed", "waiting", "taken")


def count_states(ledger: Ledger) -> dict[str, int]:
    """The number of pictures of each of STATES."""
    rows = ledger.database.execute("SELECT state, count(*) FROM pictures GROUP BY state")
    counts = dict(tuple(row) for row in rows)
    return {state: counts.get(state, 0) for state in STATES}


def count_flags(ledger: Ledger) -> Counter[str]:
    """The number of captions with each flag; one may have several."""
    counts: Counter[str] = Counter()
    query = "SELECT flags, count(*) FROM pictures WHERE record IS NOT NULL AND flags IS NOT NULL GROUP BY flags"
    for flags, count in ledger.database.execute(query):
        counts.update(dict.fromkeys(json.loads(flags), count))
    return counts


def describe_status(ledger: Ledger) -> str:
    """The state of a job in lines for a terminal."""
    counts = count_states(ledger)
    total = sum(counts.values())
    lines = [f"{total:,} pictures in {ledger.path}"]
    lines += [f"  {state:8} {count:>11,}  {count / total:6.1%}" for state, count in counts.items() if count]
    lines += [f"    {flag:10} {count:,} ({FLAGS.get(flag, 'a flag of another version')})" for flag, count in
              count_flags(ledger).most_common()]  # fmt: skip
    query = (
        "SELECT reason, count(*) AS number FROM pictures WHERE state = 'failed' GROUP BY reason "
        "ORDER BY number DESC, reason LIMIT ?"
    )
    lines += [f"    failed: {reason}" + (f" ({number:,} times)" if number > 1 else "")
              for reason, number in ledger.database.execute(query, (MAX_REASONS,))]  # fmt: skip
    if counts["failed"] > MAX_REASONS:
        lines.append("    ... OUT.failed.jsonl lists all that failed")
    edited = ledger.database.execute("SELECT count(*) FROM pictures WHERE edited").fetchone()[0]
    lines += [f"{edited:,} captions edited by a person"] if edited else []
    lines += describe_repeats(ledger.database)
    for settings, number in ledger.database.execute(
        "SELECT settings, (SELECT count(*) FROM pictures WHERE made_by = jobs.key) FROM jobs"
    ):
        values = json.loads(settings)
        lines.append(f"{number:,} captions by {values['model']} ({values['model_hash']}), prompt {values['prompt']!r}")
    return "\n".join([*lines, *_describe_workers(ledger)])


def _describe_workers(ledger: Ledger) -> list[str]:
    lines = []
    for row in ledger.database.execute("SELECT * FROM workers ORDER BY host, process"):
        age = time.time() - row["seen_at"]
        alive = "at work" if age < LEASE_SECONDS else "gone: the next job takes over what it had"
        lines.append(f"process {row['process']} on {row['host']}: {alive}, last seen {age:.0f} s ago")
    return lines or ["no process works on it now"]
