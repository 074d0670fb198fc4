"""The report of a captioning job: an HTML file with counts, flagged pictures by flag, and pictures at random."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from sqlite3 import Row

from mmllm.captioning.audit import draw
from mmllm.captioning.inputs import read_picture
from mmllm.captioning.ledger import Ledger, from_sql
from mmllm.captioning.quality import FLAGS
from mmllm.captioning.status import count_flags, count_states, describe_status
from mmllm.disk import replaced_file
from mmllm.errors import MmllmError
from mmllm.images import load_image
from mmllm.web_page import png_data_uri, self_contained_page

SIDE_PX = 220
STYLE = """
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; padding: 0 }
.sheet figure { margin: 0; border: 1px solid color-mix(in srgb, currentColor 20%, transparent); border-radius: 6px;
  padding: .6rem; overflow-wrap: anywhere }
.sheet img { max-width: 100%; height: auto; display: block; margin: 0 auto .5rem }
.sheet figcaption { font-size: .9rem }
.sheet small { display: block; opacity: .7; margin-top: .3rem }
.sheet b { font-weight: 600 }
pre { white-space: pre-wrap; overflow-wrap: anywhere }
"""


def write_report(ledger: Ledger, out: Path, *, num_pictures: int, seed: int) -> None:
    """Writes the page, with up to `num_pictures` for each flag and as many at random. Raises MmllmError."""
    if out.is_dir():
        raise MmllmError(f"--out {out} is a folder; give the path of a file")
    if not sum(count_states(ledger).values()):
        raise MmllmError(f"{ledger.path} holds no pictures yet")
    parts = [f"<header><p class=over>Captioning job</p><h1>{escape(ledger.path.name)}</h1></header>\n"]
    parts.append(f"<section><pre>{escape(describe_status(ledger))}</pre></section>\n")
    for flag, count in count_flags(ledger).most_common():
        rows = draw(_with_flag(ledger, flag), num_pictures, seed)
        meaning = escape(FLAGS.get(flag, "a flag of another version"))
        parts.append(_section(f"{escape(flag)} <small>{count:,}: {meaning}</small>", rows))
    rows = draw(ledger.records(with_flagged=True), num_pictures, seed)
    parts.append(_section("At random <small>of all captions</small>", rows))
    page = self_contained_page(f"{escape(ledger.path.name)} - mmllm caption", STYLE, "".join(parts))
    with replaced_file(out) as file:
        file.write(page.encode(errors="backslashreplace"))


def _with_flag(ledger: Ledger, flag: str) -> Iterator[Row]:
    rows = ledger.records(with_flagged=True)
    return (row for row in rows if row["flags"] is not None and flag in json.loads(row["flags"]))


def _section(title: str, rows: Sequence[Row]) -> str:
    figures = "".join(map(_figure, rows)) or "<p>none</p>"
    return f"<section><h2>{title}</h2><div class=sheet>{figures}</div></section>\n"


def _figure(row: Row) -> str:
    record, place = json.loads(row["record"]), from_sql(row["place"])
    try:
        picture = load_image(read_picture(place, row["origin"]), may_shrink=True, name=place)
        shown = f'<img src="{png_data_uri(picture, max_side_px=SIDE_PX)}" alt="">'
    except (MmllmError, OSError) as error:
        shown = f"<p>{escape(str(error))}</p>"
    flags = f"<small><b>{escape(', '.join(json.loads(row['flags'])))}</b></small>" if row["flags"] else ""
    texts = [record["caption"], *record.get("other_captions", [])]
    captions = "<br>".join(escape(text) for text in texts)
    return f"<figure>{shown}<figcaption>{captions}{flags}<small>{escape(place)}</small></figcaption></figure>"
