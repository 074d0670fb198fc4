"""What SECURITY.md says is so: files of others run no code, and the page is for this machine alone."""

from __future__ import annotations

import inspect
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo.app import HOST, launch, serving
from mmllm.checkpoint.folder import MANIFEST, CheckpointError, load_checkpoint
from mmllm.disk import file_hash
from mmllm.images import MAX_PIXELS, ImageError, load_image
from mmllm.interop.parts import read_tensors
from mmllm.runs.state import STATE_FILE, StateError, _read


class Attack:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_checkpoint_whose_weights_are_a_pickle_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    weights, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    torch.save(load_file(weights), pickled)  # which transformers would read, were it let
    weights.unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][weights.name]
    manifest["files"][pickled.name] = file_hash(pickled)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_checkpoint(folder)


def test_code_in_a_pickle_of_weights_or_in_a_saved_state_is_not_run(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    (tmp_path / "weights.bin").write_bytes(pickle.dumps({"weight": Attack(harm)}))
    with pytest.raises(ValueError, match="was not run"):
        read_tensors(tmp_path / "weights.bin")
    torch.save({"step": 1, "settings": Attack(harm)}, tmp_path / STATE_FILE)
    with pytest.raises(StateError, match="cannot be read"):
        _read(tmp_path)
    assert not harm.exists()


def test_a_picture_is_read_from_the_disk_alone_and_not_above_the_limit() -> None:
    with pytest.raises(ImageError, match="from disk"):
        load_image("https://example.org/a.png")
    assert MAX_PIXELS < 90_000_000


def test_the_page_binds_to_this_machine_and_takes_no_other_address() -> None:
    assert HOST == "127.0.0.1"
    for function in (serving, launch):
        assert not {"host", "server_name", "share"} & inspect.signature(function).parameters.keys()
