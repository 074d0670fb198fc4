"""Finds a backbone's files in a local folder or in a hub repository at a revision, and refuses incomplete ones.

In a folder, and in the hub's cache when offline, the config, the list of shards and the header of each weights file are
checked before any weights are loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from mmllm.config import ConfigError

# What transformers raises for a config, an architecture or a file that it cannot use.
LIBRARY_FAILURES = (
    AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers: its progress bars would break ours, and we report problems ourselves.

    Also keeps DeepSpeed, which saving a model imports if installed, from printing that there is no GPU.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    was_on, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if was_on:
            transformers_logging.enable_progress_bar()


def check_source(source: str, revision: str | None, *, setting: str) -> None:
    """Raises ConfigError, naming `setting`, for a source that is missing, inaccessible or incomplete."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision:
            raise ConfigError(f"{setting}: {source} is a folder, which has no revisions; leave out revision {revision}")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ConfigError(f"{setting}: there is no folder {source}")
    else:
        from huggingface_hub import is_offline_mode

        folder = hub_folder(source, revision, setting)
        if not is_offline_mode():
            return  # transformers downloads what the cache lacks
    try:
        _check_files(folder)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {source} {error}") from error


def hub_folder(source: str, revision: str | None, setting: str) -> Path:
    """The cache folder of this repository; its config is downloaded if needed. Raises ConfigError, naming `setting`."""
    from huggingface_hub import errors, hf_hub_download, is_offline_mode

    repository = f"{source} at revision {revision}" if revision else source
    try:
        return Path(hf_hub_download(source, "config.json", revision=revision)).parent
    except errors.GatedRepoError as error:
        reason = f"is gated; accept its terms at https://huggingface.co/{source}, run `hf auth login`, and start again"
        raise ConfigError(f"{setting}: {repository} {reason}, or give a folder that holds it") from error
    except errors.RepositoryNotFoundError as error:
        reason = "is no folder here and no repository of the hub, or a private one"
        raise ConfigError(f"{setting}: {repository} {reason}; check the name, or run `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{setting}: {source} has no revision {revision}; give a commit, tag or branch") from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub cannot be reached"
        download = f"hf download {source}" + (f" --revision {revision}" if revision else "")
        raise ConfigError(
            f"{setting}: {repository} is no folder here and not in the hub's cache, and {why}; "
            f"run `{download}` where there is a network, or give a folder that holds it"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ConfigError(f"{setting}: {repository} has no config.json, so transformers cannot load it") from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{setting}: {source!r} is neither a folder nor a name of the hub: {error}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"{setting}: {repository} cannot be downloaded: {error}; or give a folder that holds it"
        ) from error


def _check_files(folder: Path) -> None:
    """Raises ConfigError where the config or a weights file is missing, cut off or not in its format."""
    if not (folder / "config.json").is_file():
        raise ConfigError("has no config.json, so transformers cannot load it")
    weights_name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights_name is None:
        raise ConfigError(f"has a config.json but no weights; looked for {', '.join(WEIGHTS)}; download them again")
    names = [weights_name]
    if weights_name.endswith(".index.json"):
        try:
            names = sorted(set(json.loads((folder / weights_name).read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"has a damaged {weights_name}: {error}; download it again") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ConfigError(
                f"is half downloaded: it lacks {', '.join(missing)}, {len(missing)} of the {len(names)} files that "
                f"{weights_name} lists; download it again"
            )
    for name in names:
        if name.endswith(".safetensors"):
            _check_header(folder / name)


def _check_header(path: Path) -> None:
    """Raises ConfigError for a cut-off safetensors file: it is shorter than the tensor offsets in its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        is_pointer = path.open("rb").read(7) == b"version"
        problem = "is a Git LFS pointer, run `git lfs pull`" if is_pointer else "is not whole, download it again"
        raise ConfigError(f"has a {path.name} that {problem} ({error})") from error
