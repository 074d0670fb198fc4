"""Checkpoint directories: written whole or not at all, and refused with the reason where something is wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm.checkpoint.folder import (
    MANIFEST,
    CheckpointError,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
    verify_files,
    write_manifest,
)
from mmllm.disk import file_hash
from mmllm.fault_points import KILL_AT

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    return str(caught.value)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Other weights, with a manifest that vouches for them."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_manifest(folder)


def name_of_projector(folder: Path) -> str:
    return next(
        name for name in load_file(folder / WEIGHTS) if name.startswith("projector.") and name.endswith("weight")
    )


def test_a_missing_tensor_is_named_and_never_made_up(copy: Path) -> None:
    name = name_of_projector(copy)
    edit(copy, lambda tensors: tensors.pop(name))
    assert refused(copy) == f"{copy} does not fit its config, missing keys: {name}"


def test_many_missing_tensors_are_named_and_counted(copy: Path) -> None:
    edit(copy, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("language_model.")])
    assert "missing keys: language_model." in refused(copy)
    assert " more" in refused(copy)


def test_a_tensor_too_many_is_named(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.update({"projector.extra.weight": torch.zeros(2)}))
    assert refused(copy) == f"{copy} does not fit its config, unexpected keys: projector.extra.weight"


def test_a_tensor_of_another_shape_is_named(copy: Path) -> None:
    name = name_of_projector(copy)
    edit(copy, lambda tensors: tensors.update({name: tensors[name][:1].clone()}))
    assert refused(copy) == f"{copy} does not fit its config, mismatched keys: {name} [1] for [128]"


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    assert refused(copy) == f"{copy} lacks tokenizer.json, which its manifest lists; copy the folder again"


def test_what_is_no_checkpoint_is_not_taken_for_one(copy: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert f"no model at {nowhere}: there is no such folder" in refused(nowhere)
    (copy / MANIFEST).unlink()
    assert refused(copy) == f"{copy} is not a finished checkpoint: it has no manifest.json."
    (copy / "state").mkdir()
    assert "A run was begun there and not finished; start it again to continue it." in refused(copy)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"kind": ', "is damaged: "),
        ("[1, 2]", "does not describe a vision-language-model"),
        ('{"kind": "image-generator"}', "does not describe a vision-language-model"),
        ('{"kind": "vision-language-model", "format_version": 99, "files": {}}', "has checkpoint format 99, this version reads 1"),  # noqa: E501
        ('{"kind": "vision-language-model", "format_version": 1}', "lists no files"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_used_says_why(copy: Path, text: str, expected: str) -> None:
    (copy / MANIFEST).write_text(text)
    assert expected in refused(copy)


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json", "processor_config.json"])
def test_a_damaged_file_is_named(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2])
    assert verify_files(copy) == [name]
    assert f"{copy} is damaged: {name} does not match its checksum in the manifest; copy the folder again" in refused(
        copy
    )


def test_the_manifest_vouches_for_every_file(tiny_checkpoint: Path) -> None:
    manifest = read_manifest(tiny_checkpoint)
    files = {str(path.relative_to(tiny_checkpoint)) for path in tiny_checkpoint.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {MANIFEST}
    assert {WEIGHTS, "config.json", "tokenizer.json", "chat_template.jinja", "processor_config.json"} <= files
    assert {"golden.json", "golden/picture_1.png"} <= files, "those in folders too"
    assert verify_files(tiny_checkpoint) == []


def test_a_save_that_fails_leaves_the_old_checkpoint_as_it_was(copy: Path) -> None:
    model, processor, manifest = load_checkpoint(copy)
    with torch.no_grad():
        next(model.projector.parameters()).add_(1)
    with pytest.raises(TypeError):
        save_checkpoint(copy, model, processor, card="", figures=object())
    assert json.loads((copy / MANIFEST).read_text()) == manifest
    assert verify_files(copy) == []
    assert not (copy / "checkpoint.part").exists()
    save_checkpoint(copy, model, processor, card="new")
    assert (copy / "README.md").read_text() == "new"
    assert torch.equal(*(next(m.projector.parameters()) for m in (model, load_checkpoint(copy)[0])))


def test_a_new_checkpoint_leaves_nothing_of_the_old_one(copy: Path) -> None:
    model, processor, _ = load_checkpoint(copy)
    (copy / "samples").mkdir()
    (copy / "log.jsonl").write_text("{}")
    save_checkpoint(copy, model, processor, card="", files={"notes/one.txt": b"1"})
    assert not (copy / "golden").exists()
    assert not (copy / "golden.json").exists()
    assert (copy / "log.jsonl").is_file(), "what is not the checkpoint's stays"
    assert read_manifest(copy)["files"]["notes/one.txt"] == file_hash(copy / "notes" / "one.txt")
    assert sorted(path.name for path in copy.iterdir() if path.name.startswith("checkpoint.")) == []


def save_elsewhere(out: Path, source: Path, number: int, *, kill_at: str = "") -> multiprocessing.Process:
    """A process that saves `source` changed into `out` six times, or once, and is killed at this point."""

    def work() -> None:
        model, processor, _ = load_checkpoint(source)
        with torch.no_grad():
            next(model.projector.parameters()).add_(number)
        os.environ[KILL_AT] = kill_at
        for _ in range(1 if kill_at else 6):
            save_checkpoint(out, model, processor, card=str(number), files={"golden/x": bytes(number)})

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process  # type: ignore[return-value]


@pytest.mark.parametrize(
    "moment", ["before it is written", "before it is moved in", "0 of its files in place", "3 of its files in place"]
)
def test_a_save_that_is_killed_leaves_the_old_checkpoint_or_one_that_is_not_finished(copy: Path, moment: str) -> None:
    process = save_elsewhere(copy, copy, 1, kill_at=f"checkpoint {copy.name}: {moment}")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if moment.startswith("before"):
        assert verify_files(copy) == []
        assert load_checkpoint(copy)[2]["origin"]
    else:
        assert "is not a finished checkpoint: it has no manifest.json" in refused(copy)


def test_of_two_processes_that_save_at_once_one_is_whole(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [save_elsewhere(out, tiny_checkpoint, number) for number in (1, 2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert verify_files(out) == []
    model = load_checkpoint(out)[0]
    number = int((out / "README.md").read_text())
    added = next(model.projector.parameters()) - next(load_checkpoint(tiny_checkpoint)[0].projector.parameters())
    torch.testing.assert_close(added, torch.full_like(added, number), atol=1e-5, rtol=0)
    assert sorted(path.name for path in out.iterdir() if path.name.startswith("checkpoint.")) == []


def test_weights_are_read_in_the_precision_that_is_asked_for(tiny_checkpoint: Path) -> None:
    model, _, _ = load_checkpoint(tiny_checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    stored = load_checkpoint(tiny_checkpoint)[0]
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float32}
    for name, parameter in stored.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.bfloat16())
