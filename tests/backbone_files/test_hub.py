"""Sources of backbones that are not there, not allowed or not whole: each is named, explained and refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmllm.backbone_files.hub import check_source
from mmllm.config import ConfigError, LanguageConfig
from mmllm.model.language import load_language

SETTING = "model.language.source"


@pytest.fixture
def folder(tiny_parts: Path, tmp_path: Path) -> Path:
    """The tiny LLM in a folder that a test may damage."""
    return Path(shutil.copytree(tiny_parts / "language", tmp_path / "language"))


def refused(source: Path | str, revision: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_language(LanguageConfig(source=str(source), revision=revision))
    return str(caught.value)


def shard(folder: Path) -> list[Path]:
    """The folder's weights as two files with an index, as large models are stored."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    files = [folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = [dict(list(tensors.items())[number::2]) for number in (0, 1)]
    for path, part in zip(files, parts, strict=True):
        save_file(part, path, {"format": "pt"})
    where = {name: path.name for path, part in zip(files, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return files


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing") == f"{SETTING}: there is no folder {tmp_path / 'nothing'}"
    assert refused("./nothing") == f"{SETTING}: there is no folder ./nothing"


def test_a_revision_of_a_folder(folder: Path) -> None:
    assert "is a folder, which has no revisions; leave out revision main" in refused(folder, "main")


def test_a_folder_with_a_shard_missing(folder: Path) -> None:
    files = shard(folder)
    load_language(LanguageConfig(source=str(folder)))
    files[1].unlink()
    assert refused(folder) == (
        f"{SETTING}: {folder} is half downloaded: it lacks {files[1].name}, 1 of the 2 files that "
        "model.safetensors.index.json lists; download it again"
    )
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has a damaged model.safetensors.index.json" in refused(folder)


def test_a_folder_with_a_file_that_was_cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "has a model.safetensors that is not whole, download it again" in refused(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "has a model.safetensors that is a Git LFS pointer, run `git lfs pull`" in refused(folder)


def test_a_folder_without_config_or_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has a config.json but no weights; looked for model.safetensors, " in refused(folder)
    (folder / "config.json").unlink()
    assert "has no config.json, so transformers cannot load it" in refused(folder)


def test_weights_that_lack_a_tensor_or_do_not_fit_the_config(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if "norm" not in name}, path, {"format": "pt"})
    assert f"the weights of {folder} lack model.layers.0.input_layernorm.weight, " in refused(folder)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"][:-1].clone()}, path, {"format": "pt"})
    assert f"cannot load {folder}" in refused(folder)


def test_an_unknown_architecture_and_one_that_brings_its_own_code(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "model_type": "never-heard-of"}))
    assert "its architecture 'never-heard-of' is unknown to transformers" in refused(folder)
    own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    path.write_text(json.dumps({**values, "model_type": "own", "auto_map": own}))
    assert "brings code of its own, which is never run: its architecture 'own'" in refused(folder)
    path.write_text("{")
    assert "has a config.json that cannot be used" in refused(folder)


@pytest.mark.parametrize("kind", ["t5", "clip", "gemma3"])
def test_a_model_that_is_no_llm_by_itself(folder: Path, kind: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    assert f"is a {kind}, which is not a plain causal LM" in refused(folder)


def test_a_pickle_is_read_as_tensors_and_code_in_it_never_runs(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model, _ = load_language(LanguageConfig(source=str(folder)))
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])

    trace = tmp_path / "code-ran"

    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (trace,)

    torch.save({**tensors, "lm_head.weight": Code()}, folder / "pytorch_model.bin")
    assert "Code in it is never run: convert it to safetensors" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Code()))
    assert "Code in it is never run: convert it to safetensors" in refused(folder)
    assert not trace.exists()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert f"cannot load {folder}" in refused(folder)


def test_a_hub_name_that_is_not_in_the_cache_while_the_hub_is_switched_off() -> None:
    assert refused("someone/llm", "v1") == (
        f"{SETTING}: someone/llm at revision v1 is no folder here and not in the hub's cache, and HF_HUB_OFFLINE is "
        "set; run `hf download someone/llm --revision v1` where there is a network, or give a folder that holds it"
    )
    assert "is neither a folder nor a name of the hub" in refused("some one")


def test_a_hub_name_that_is_in_the_cache_whole_or_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    cache = folder.parent / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--someone--llm"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = Path(shutil.copytree(folder, repository / "snapshots" / commit))
    check_source("someone/llm", None, setting=SETTING)
    check_source("someone/llm", commit, setting=SETTING)
    shard(snapshot)[0].unlink()
    with pytest.raises(ConfigError, match="someone/llm is half downloaded: it lacks model-00001-of-00002"):
        check_source("someone/llm", None, setting=SETTING)


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for what cannot be had: the code that tells why stands in a header."""

    CODES = {"gated": (403, "GatedRepo"), "absent": (401, "RepoNotFound"), "old": (404, "RevisionNotFound")}

    def do_HEAD(self) -> None:
        status, code = self.CODES.get(self.path.split("/")[2], (404, "EntryNotFound"))
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "Access is restricted")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


REFUSALS = {
    "someone/gated": "someone/gated is gated; accept its terms at https://huggingface.co/someone/gated, run `hf auth",
    "someone/absent": "someone/absent is no folder here and no repository of the hub, or a private one; check the name",
    "someone/old": "someone/old has no revision v9; give a commit, tag or branch",
    "someone/empty": "someone/empty at revision v9 has no config.json, so transformers cannot load it",
}


def test_repositories_that_are_gated_absent_or_empty(hub: str, tmp_path: Path) -> None:
    """The real client asks a hub of our own; it reads where the hub is when it is imported, so in a process apart."""
    code = (
        "import sys\nfrom mmllm.backbone_files.hub import check_source\nfrom mmllm.config import ConfigError\n"
        "for source in sys.argv[1:]:\n"
        "    try:\n        check_source(source, None if 'a' in source[8:] else 'v9', setting='model.language.source')\n"
        "    except ConfigError as error:\n        print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}
    run = [sys.executable, "-c", code, *REFUSALS]
    said = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, expected in zip(said, REFUSALS.values(), strict=True):
        assert line.startswith(f"{SETTING}: {expected}")
    run = [*run[:2], f"import time\ntime.sleep = lambda seconds: None  # between its five tries\n{code}", "someone/llm"]
    unreachable = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    said = subprocess.run(run, env=unreachable, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "is no folder here and not in the hub's cache, and the hub cannot be reached; run `hf download" in said[0]
