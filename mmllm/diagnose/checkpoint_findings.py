"""What `mmllm doctor MODEL` says of a checkpoint: manifest, checksums, weights, golden answers, and one new answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmllm.diagnose.finding import FAILURES, Finding, attempt

QUESTION = "what color is the circle?"


def examine_checkpoint(folder: Path) -> Iterator[Finding]:
    """Examines a checkpoint step by step, and stops after a step that fails. Changed files alone do not stop it."""
    steps: tuple[tuple[str, Callable[[Path, dict[str, Any]], str]], ...] = (
        ("manifest", _read_manifest),
        ("files", _verify_files),
        ("loading", _load_engine),
    )
    loaded: dict[str, Any] = {}
    for name, step in steps:
        finding = attempt("model", name, lambda step=step: step(folder, loaded))  # type: ignore[misc]
        yield finding
        if finding.state == "broken" and name != "files":
            return
    yield attempt("model", "LLM", lambda: _capabilities(loaded["engine"]))
    yield from _golden(folder, loaded["engine"])
    yield attempt("model", "answer", lambda: _answer(loaded["engine"]))


def _read_manifest(folder: Path, loaded: dict[str, Any]) -> str:
    from mmllm.checkpoint.folder import read_manifest

    manifest = read_manifest(folder)
    versions = manifest.get("versions", {})
    based = f"; an adapter on {manifest['base']['source']}" if "base" in manifest else ""
    origin = ", ".join(f"{part}: {source}" for part, source in manifest.get("origin", {}).items()) or "unknown origin"
    written = f"written with transformers {versions.get('transformers', '?')}"
    return f"{folder}: format {manifest['format_version']}; {origin}{based}; {written}"


def _verify_files(folder: Path, loaded: dict[str, Any]) -> str:
    from mmllm.checkpoint.folder import read_manifest, verify_files

    if changed := verify_files(folder):
        raise ValueError(f"changed since they were written: {', '.join(changed)}; copy the folder again")
    return f"{len(read_manifest(folder)['files'])} files match the checksums of the manifest"


def _load_engine(folder: Path, loaded: dict[str, Any]) -> str:
    import torch

    from mmllm.inference.engine import Engine

    engine = loaded["engine"] = Engine.load(folder, verify=False)
    parameters = dict(engine.model.named_parameters())
    not_finite = [name for name, value in parameters.items() if not bool(torch.isfinite(value).all())]
    if not_finite:
        raise ValueError(
            f"not all numbers are finite in {', '.join(not_finite[:3])} ({len(not_finite)} tensors); train it again"
        )
    count = sum(value.numel() for value in parameters.values())
    layout = engine.processor.image_layout
    unit = f"a view ({layout.kind})" if layout.has_newline else "a picture"
    return f"{count / 1e6:,.2f}M parameters, {layout.num_view_tokens} image tokens {unit}; {_dtypes(folder, engine)}"


def _dtypes(folder: Path, engine: Any) -> str:
    """The dtype that each part runs in here, and its stored dtype where the two differ."""
    from mmllm.checkpoint.folder import stored_dtypes

    stored, descriptions = stored_dtypes(folder), []
    for part, dtype in engine.model.part_dtypes().items():
        name, stored_name = (str(value).removeprefix("torch.") for value in (dtype, stored[part]))
        descriptions.append(f"{part} in {name}" + (f" (stored in {stored_name})" if stored_name != name else ""))
    return ", ".join(descriptions)


def _capabilities(engine: Any) -> str:
    """What the LLM can do with the libraries that are installed here."""
    from mmllm.model.capabilities import find_capabilities

    language_model = engine.model.language_model
    found = find_capabilities(language_model).describe()
    return f"{language_model.config.model_type}: {found}; {engine.describe_batching()}"


def _golden(folder: Path, engine: Any) -> Iterator[Finding]:
    """Whether prompts, pictures and answers still match those saved with the checkpoint, one line each."""
    from mmllm.checkpoint.golden import verify_golden

    try:
        checks = verify_golden(engine.model, engine.processor, folder)
    except FAILURES as error:
        yield Finding("model", "golden answers", "broken", str(error) or type(error).__name__)
        return
    for check in checks:
        yield Finding("model", f"golden {check.part}", "ok" if check.holds else "broken", check.text)
    if not checks:
        text = "none: it was saved by an older version, so only the checksums of its files show whether it has changed"
        yield Finding("model", "golden answers", "note", text)


def _answer(engine: Any) -> str:
    """Asks one question about a drawn picture. Whether the answer is right is left to `mmllm eval`."""
    from mmllm.chat.conversation import Conversation
    from mmllm.checkpoint.golden import draw_golden_picture
    from mmllm.inference.sampling import Sampling

    picture = draw_golden_picture(0)  # a red circle
    reply = engine.reply(Conversation().ask(QUESTION, [picture]), Sampling(max_new_tokens=16))
    if not reply.num_new_tokens:
        raise ValueError(f"the model gave no token for {QUESTION!r}")
    speed = reply.num_new_tokens / max(reply.seconds, 1e-9)
    return (
        f"{QUESTION!r} about a drawn red circle: {reply.text!r}, "
        f"{speed:.0f} tokens a second; `mmllm eval` measures how often a model is right"
    )
