"""The ledger of a captioning job: one result a picture, whoever is killed, and whoever works on it beside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmllm.captioning import workers
from mmllm.captioning.inputs import FoundPicture
from mmllm.captioning.ledger import JobSettings, Ledger, Outcome, ledger_path
from mmllm.cli import app
from mmllm.fault_points import KILL_AT
from tests.builders.caption_ledgers import SETTINGS, found, outcomes, record, states, write_pictures
from tests.builders.launches import command, commanded

Job = tuple[object, ...]
OPTIONS = ("--max-new-tokens", 3, "--batch-size", 2)
MOMENTS = (
    "caption batch 1: taken",
    "caption batch 2: taken",
    "caption batch 1: before commit",
    "caption batch 2: before commit",
    "caption batch 3: committed",
    "captions written: before rename",
)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "a.ledger", may_create=True) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "in")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "captions.jsonl"


@pytest.fixture
def job(tiny_checkpoint: Path, folder: Path, out: Path) -> Job:
    """The command that captions `folder` into `out`."""
    return ("caption", tiny_checkpoint, folder, "--out", out, *OPTIONS)


@pytest.fixture
def ended_job(job: Job) -> Job:
    """The same, once it has captioned all."""
    assert caption(*job)[0] == 0
    return job


def caption(*arguments: object) -> tuple[int, str]:
    """(exit status, stdout) of the command in this process, which is quicker than one of its own."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], bytes]:
    """What a job that nothing disturbs writes for a folder."""

    def write(folder: Path) -> bytes:
        out = tmp_path_factory.mktemp("whole") / "captions.jsonl"
        assert caption("caption", tiny_checkpoint, folder, "--out", out, *OPTIONS)[0] == 0
        return out.read_bytes()

    return write


def test_a_job_killed_at_each_moment_in_turn_ends_as_one_never_disturbed(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path, undisturbed: Callable[[Path], bytes]
) -> None:
    out = tmp_path / "captions.jsonl"
    for moment in (MOMENTS[0], MOMENTS[2], MOMENTS[-1]):
        killed = commanded("caption", tiny_checkpoint, folder, "--out", out, *OPTIONS, environment={KILL_AT: moment})
        assert killed.returncode == -signal.SIGKILL, moment
    assert caption("caption", tiny_checkpoint, folder, "--out", out, *OPTIONS)[0] == 0
    assert out.read_bytes() == undisturbed(folder)


@pytest.mark.parametrize("moment", MOMENTS[3:5])
def test_a_job_killed_at_any_one_moment_loses_and_doubles_nothing(
    job: Job, folder: Path, out: Path, undisturbed: Callable[[Path], bytes], moment: str
) -> None:
    assert commanded(*job, environment={KILL_AT: moment}).returncode == -signal.SIGKILL
    status, said = caption(*job)
    assert status == 0, said
    assert out.read_bytes() == undisturbed(folder)


def test_two_jobs_at_once_share_the_work(
    tiny_checkpoint: Path, tiny_scenes: Path, tmp_path: Path, undisturbed: Callable[[Path], bytes]
) -> None:
    folder, out = tiny_scenes / "train" / "images", tmp_path / "captions.jsonl"
    arguments = ("caption", tiny_checkpoint, folder, "--out", out, *OPTIONS)
    with command(*arguments) as first, command(*arguments) as second:
        assert (first.wait(), second.wait()) == (0, 0), first.read("err") + second.read("err")
        said = first.read() + second.read()
    assert out.read_bytes() == undisturbed(folder)
    counts = [int(line.split()[0]) for line in said.splitlines() if "pictures captioned" in line]
    assert sum(counts) == 24  # and none twice
    with Ledger(ledger_path(out)) as ledger:
        attempts = [row["attempts"] for row in ledger.database.execute("SELECT attempts FROM pictures")]
    assert attempts == [1] * 24


def test_what_a_killed_job_had_taken_the_one_beside_it_takes_over(ledger: Ledger) -> None:
    ledger.add(found("abcd"), SETTINGS, max_new_tokens=9)
    with Ledger(ledger.path) as dying:
        dying.add(found("abcd"), SETTINGS, max_new_tokens=9)
        taken = dying.take(SETTINGS, 2)
        assert [picture.place for picture in ledger.take(SETTINGS, 9)] == ["c", "d"]
        assert ledger.take(SETTINGS, 9) == []
        assert ledger.num_taken_by_others() == 2
        ledger.database.execute("UPDATE workers SET seen_at = 0 WHERE name = ?", (dying.worker.name,))
        again = ledger.take(SETTINGS, 9)
        assert [picture.place for picture in again] == ["a", "b"]
        ledger.finish(outcomes(again, "ours"), SETTINGS)
        dying.finish(outcomes(taken, "theirs"), SETTINGS)  # it had only slept
    assert {json.loads(row["record"])["caption"] for row in ledger.records(with_flagged=True)} == {"ours"}


def _work_through(path: Path, names: list[str]) -> None:
    """What a process does that shares a ledger, to its end."""
    with Ledger(path, may_create=True) as ledger:
        ledger.add(found(names), SETTINGS, max_new_tokens=9)
        while taken := ledger.take(SETTINGS, 3):
            ledger.finish(outcomes(taken), SETTINGS)


def test_processes_that_make_a_new_ledger_at_once_share_it(tmp_path: Path) -> None:
    names = [f"{number:02d}" for number in range(30)]
    for round_number in range(8):
        path = tmp_path / f"{round_number}.ledger"
        children = []
        for _ in range(4):
            children.append(os.fork())
            if not children[-1]:
                try:
                    _work_through(path, names)
                    os._exit(0)
                finally:
                    os._exit(1)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
        with Ledger(path) as ledger:
            query = "SELECT state, attempts, count(*) FROM pictures GROUP BY state, attempts"
            assert [tuple(row) for row in ledger.database.execute(query)] == [("done", 1, 30)]


def test_a_process_that_is_gone_is_dead_at_once_and_one_that_signs_lives(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.add(found("ab"), SETTINGS, max_new_tokens=9)
    child = os.fork()
    if not child:  # another process takes one, and ends without a word
        with Ledger(ledger.path) as other:
            other.add(found("ab"), SETTINGS, max_new_tokens=9)
            other.take(SETTINGS, 1)
            os._exit(0)
    os.waitpid(child, 0)
    assert states(ledger) == {"a": "taken", "b": "waiting"}
    assert [picture.place for picture in ledger.take(SETTINGS, 2)] == ["b"]
    assert [picture.place for picture in ledger.take(SETTINGS, 2)] == ["a"]
    monkeypatch.setattr(workers, "SECONDS_BETWEEN_SIGNS", 0.01)
    with Ledger(ledger.path) as living:
        living.add(found("ef"), SETTINGS, max_new_tokens=9)
        living.take(SETTINGS, 1)
        living.database.execute("UPDATE workers SET seen_at = 0 WHERE name = ?", (living.worker.name,))
        living.worker._signs.join(0.3)
        query = "SELECT seen_at FROM workers WHERE name = ?"
        assert living.database.execute(query, (living.worker.name,)).fetchone()[0] > 0


def test_a_job_that_ends_gives_back_what_it_had_taken(ledger: Ledger) -> None:
    with Ledger(ledger.path) as other:
        other.add(found("ab"), SETTINGS, max_new_tokens=9)
        other.take(SETTINGS, 1)
        assert states(ledger) == {"a": "taken", "b": "waiting"}
    assert states(ledger) == {"a": "waiting", "b": "waiting"}


def test_a_changed_file_is_redone_a_touched_and_a_renamed_one_are_not(ended_job: Job, folder: Path, out: Path) -> None:
    before = {row["image"]: row for row in lines(out)}
    shutil.copy(folder / "5.png", folder / "0.png")  # other content, the same name
    os.utime(folder / "1.png", (0, 0))
    (folder / "sub").mkdir()
    (folder / "2.png").rename(folder / "sub" / "renamed.png")
    status, said = caption(*ended_job)
    assert status == 0, said
    assert "1 pictures captioned" in said
    assert "1 renamed files keep the caption" in said
    assert "1 files have a new date and the same content" in said
    assert "2 pictures have the same bytes as another (1 groups" in said
    after = {row["image"]: row for row in lines(out)}
    assert after[f"{folder}/0.png"]["caption"] == before[f"{folder}/5.png"]["caption"]
    moved = {**before[f"{folder}/2.png"], "image": f"{folder}/sub/renamed.png"}
    assert after[f"{folder}/sub/renamed.png"] == moved
    assert f"{folder}/2.png" not in after
    assert len(after) == 6


def test_a_file_that_is_broken_later_fails_until_it_is_whole_again(ended_job: Job, folder: Path, out: Path) -> None:
    before, whole = lines(out), (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[:42])
    for _ in range(2):
        assert caption(*ended_job)[0] == 1
        assert lines(out) == before[1:]  # the caption was of another content
    (folder / "0.png").write_bytes(whole)
    assert caption(*ended_job)[0] == 0
    assert lines(out) == before


def test_one_caption_moves_to_one_of_two_copies_and_a_kill_on_the_way_moves_nothing(
    ended_job: Job, folder: Path, out: Path
) -> None:
    before = {row["image"]: row for row in lines(out)}
    shutil.copy(folder / "2.png", folder / "copy 1.png")
    (folder / "2.png").rename(folder / "copy 2.png")
    killed = commanded(*ended_job, environment={KILL_AT: "caption moved: before commit"})
    assert killed.returncode == -signal.SIGKILL
    _, said = caption(*ended_job)
    assert "1 pictures captioned" in said
    assert "1 renamed files keep the caption" in said
    texts = [row["caption"] for row in lines(out) if "copy" in row["image"]]
    assert texts == [before[f"{folder}/2.png"]["caption"]] * 2
    assert len(lines(out)) == 7


def test_classes_of_pictures_are_redone_where_asked_for(ledger: Ledger) -> None:
    ledger.add(found("abcd"), SETTINGS, max_new_tokens=9)
    cut, flagged, failed, fine = ledger.take(SETTINGS, 4)
    ledger.finish(
        [
            Outcome(cut, "1", None, {**record(cut), "finish": "length", "flags": ["cut"]}),
            Outcome(flagged, "2", None, {**record(flagged), "flags": ["refusal"]}),
            Outcome(failed, "3", reason="it is broken"),
            *outcomes([fine]),
        ],
        SETTINGS,
    )
    assert states(ledger) == {"a": "flagged", "b": "flagged", "c": "failed", "d": "done"}

    def waiting(settings: JobSettings = SETTINGS, limit: int = 9, redo: tuple[str, ...] = ()) -> str:
        ledger.database.execute("BEGIN")  # undone below
        ledger.database.execute("SAVEPOINT before")
        ledger.database.execute("COMMIT")
        kept = ledger.database.execute("SELECT id, state, waits_for, job FROM pictures").fetchall()
        ledger.add(found("abcd"), settings, max_new_tokens=limit, redo=redo)
        names = "".join(name for name, state in states(ledger).items() if state == "waiting")
        ledger.database.executemany(
            "UPDATE pictures SET state = ?2, waits_for = ?3, job = ?4 WHERE id = ?1", map(tuple, kept)
        )
        return names

    assert waiting() == "c"  # what failed is tried again by every job
    assert waiting(limit=10) == "ac"
    assert waiting(redo=("cut",)) == "ac"
    assert waiting(redo=("flagged",)) == "abc"
    assert waiting(redo=("failed",)) == "c"
    other = JobSettings("model", "hash", "another prompt")
    assert waiting(other) == "c"
    assert waiting(other, redo=("other",)) == "abcd"


def test_a_line_that_a_person_edited_stays_and_one_that_is_removed_comes_back(
    ended_job: Job, folder: Path, out: Path
) -> None:
    rows = lines(out)
    rows[0]["caption"] = "what I see in it"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    _, said = caption(*ended_job, "--redo", "cut")
    assert "1 lines of" in said
    assert lines(out)[0]["caption"] == "what I see in it"
    assert len(lines(out)) == 6
    (folder / "0.png").write_bytes((folder / "3.png").read_bytes())  # then the edit is of another picture
    caption(*ended_job)
    assert lines(out)[0]["caption"] == lines(out)[3]["caption"]


def test_old_lines_go_on_without_their_pictures_being_captioned(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "captions.jsonl"
    old = [{"image": f"{folder}/{number}.png", "caption": f"old {number}", "finish": "end"} for number in range(4)]
    out.write_text("".join(json.dumps(row) + "\n" for row in [*old, {**old[0], "caption": "newer"}]))
    _, said = caption("caption", tiny_checkpoint, folder, "--out", out, *OPTIONS)
    assert "4 of 6 pictures have a caption" in said
    assert "2 pictures captioned" in said
    assert [row["caption"] for row in lines(out)][:4] == ["newer", "old 1", "old 2", "old 3"]


def test_names_that_are_no_utf8_are_kept(ledger: Ledger) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    ledger.add(found([name, "b.png"]), SETTINGS, max_new_tokens=9)
    taken = ledger.take(SETTINGS, 2)
    assert {picture.place for picture in taken} == {name, "b.png"}
    ledger.finish([Outcome(picture, reason=f"{picture.place} is broken") for picture in taken], SETTINGS)
    assert [row["reason"] for row in ledger.failures()] == ["b.png is broken", "caf\\udce9.png is broken"]
    ledger.add(found([name, "b.png"]), SETTINGS, max_new_tokens=9)
    ledger.finish(outcomes(ledger.take(SETTINGS, 2)), SETTINGS)
    assert {json.loads(row["record"])["image"] for row in ledger.records(with_flagged=True)} == {name, "b.png"}


def test_what_a_batch_asks_the_ledger_is_answered_by_its_indexes(ledger: Ledger) -> None:
    ledger.add(found("ab"), SETTINGS, max_new_tokens=9)
    queries: list[str] = []
    ledger.database.set_trace_callback(queries.append)
    taken = ledger.take(SETTINGS, 1)
    ledger.captions_of(["x", "y"])
    ledger.num_taken_by_others()
    ledger.finish(outcomes(taken), SETTINGS)
    ledger.database.set_trace_callback(None)
    asked = [query for query in queries if "pictures" in query]
    assert len(asked) >= 5
    for query in asked:
        plan = " ".join(row["detail"] for row in ledger.database.execute(f"EXPLAIN QUERY PLAN {query}"))
        assert "SCAN pictures" not in plan, query
        if "json_each" in query:
            assert "pictures_by_content" in plan


def test_the_memory_of_a_ledger_does_not_grow_with_its_pictures(tmp_path: Path) -> None:
    peaks = []
    for count in (2_000, 8_000):
        tracemalloc.start()
        with Ledger(tmp_path / f"{count}.ledger", may_create=True) as ledger:
            ledger.add((FoundPicture(f"folder/{n:08d}.png", "a") for n in range(count)), SETTINGS, max_new_tokens=9)
            num_done = 0
            while taken := ledger.take(SETTINGS, 250):
                ledger.finish(outcomes(taken), SETTINGS)
                num_done += len(taken)
            assert num_done == sum(1 for _ in ledger.records(with_flagged=True)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0], peaks
