"""Settings that have another name now: old YAML files, overrides and runs that were begun go on working."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from mmllm.config import ConfigError
from mmllm.config.file import dump_config, load_config, saved_settings
from mmllm.config.old_names import OLD_NAMES, OLD_VALUES, upgrade
from mmllm.runs.report import write_report
from mmllm.runs.requirements import resolve_precision
from mmllm.runs.state import saved_steps, settings_differences
from mmllm.training.loop import InterruptedRunError
from tests.builders.stopped_runs import assert_same_run, before_step, interrupt
from tests.builders.tiny_runs import train_in_process

# A value of each old setting that is not its default.
VALUES: dict[str, Any] = {
    "num_threads": 3,
    "optim.batch_size": 7,
    "optim.accumulate_steps": 2,
    "optim.precision": "bf16",
    "optim.gradient_checkpointing": ["language"],
    "optim.compile": True,
    "optim.liger": True,
    "optim.loss_chunk_tokens": 600,
    "optim.matrix_learning_rate": 0.004,
    "optim.rates_of": {"language_model.lm_head.*": 0.5},
    "log.validate_every_steps": 5,
    "log.num_samples": 1,
    "log.max_val_examples": 11,
    "log.tasks": ["scenes-val"],
    "log.task_questions": 9,
    "log.text_probe": "text.json",
    "log.max_text_examples": 8,
    "log.keep_best": False,
    "log.min_image_reliance": 0.5,
    "log.reliance_after": 0.1,
    "log.reliance_validations": 2,
    "log.forgetting_budget": 0.7,
    "log.fail_on_alarm": True,
    "log.tensorboard": True,
    "model.vision.fit": "tiles",
    "model.vision.layer": -3,
    "model.vision.fuse_with.layer": -4,
    "model.language.add_tokens": ["<|im_end|>"],
    "language.add_tokens": ["<|im_end|>"],
}


def stage2() -> dict[str, Any]:
    vision = {"source": "ViT-B-32", "fuse_with": {"source": "ViT-B-16"}}
    return {
        "stage": "stage2",
        "out": "runs/x",
        "train": ["projector", "language"],
        "model": {"vision": vision, "projector": {}, "language": {"source": "some/llm"}, "template": "chatml"},
        "data": {"train": [{"path": "a.json"}]},
        "compute": {"batch_size": 4},
        "optim": {"learning_rates": {"projector": 0.001, "language": 0.0001}, "max_steps": 10},
    }


def warmup() -> dict[str, Any]:
    return {
        "stage": "warmup_language",
        "out": "runs/x",
        "language": {"source": "some/llm"},
        "num_descriptions": 10,
        "compute": {"batch_size": 4},
        "optim": {"learning_rates": {"language": 0.0001}, "max_steps": 10},
    }


def tree_for(old: str) -> dict[str, Any]:
    return warmup() if old.startswith("language.") else stage2()


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[key] = value


def take(tree: Any, path: str) -> Any:
    *sections, key = path.split(".")
    for section in sections:
        tree = tree[section]
    return tree.pop(key)


def value_of(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return list(config) if isinstance(config, tuple) else config


def written(folder: Path, tree: dict[str, Any], name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return path


def expected_of(old: str) -> Any:
    value = VALUES[old]
    return OLD_VALUES[old][value] if old in OLD_VALUES else value


def test_every_old_name_is_tried_here_and_leads_to_a_setting_of_today() -> None:
    assert VALUES.keys() == OLD_NAMES.keys()
    assert not OLD_NAMES.keys() & set(OLD_NAMES.values()), "a name that goes on to another one would need two rounds"


@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_name_in_a_file_sets_what_it_always_set(old: str, tmp_path: Path, capsys: Any) -> None:
    tree = tree_for(old)
    if old == "optim.batch_size":
        del tree["compute"]
    put(tree, old, VALUES[old])
    config = load_config(written(tmp_path, tree))
    assert value_of(config, OLD_NAMES[old]) == expected_of(old)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1
    assert notes[0].startswith("note: old names of settings go on working: ")
    assert old in notes[0]
    assert OLD_NAMES[old] in notes[0]


@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_name_as_an_override_wins_over_the_file(old: str, tmp_path: Path, capsys: Any) -> None:
    tree = tree_for(old)
    override = f"{old}={json.dumps(VALUES[old])}"
    config = load_config(written(tmp_path, tree), [override])
    assert value_of(config, OLD_NAMES[old]) == expected_of(old)
    assert len(capsys.readouterr().err.splitlines()) == 1
    put(tree, OLD_NAMES[old], value_of(config, OLD_NAMES[old]))
    again = load_config(written(tmp_path, tree))
    assert again == config
    assert capsys.readouterr().err == "", "today's names need no note"


@pytest.mark.parametrize("old", OLD_NAMES)
def test_both_names_of_one_setting_are_refused(old: str, tmp_path: Path) -> None:
    new, tree = OLD_NAMES[old], tree_for(old)
    put(tree, old, VALUES[old])
    put(tree, new, expected_of(old))
    message = f"{old} and {new} are two names of one setting; leave out {old}, the old name"
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, tree))
    assert str(caught.value) == f"{tmp_path / 'config.yaml'}: {message}"
    overrides = [f"{name}={json.dumps(value)}" for name, value in ((old, VALUES[old]), (new, expected_of(old)))]
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, tree_for(old)), overrides)
    assert str(caught.value) == f"the overrides: {message}"


def test_one_note_lists_what_file_base_and_overrides_say(tmp_path: Path, capsys: Any) -> None:
    base = stage2()
    put(base, "log.num_samples", 1)
    written(tmp_path, base, "base.yaml")
    child = written(tmp_path, {"extends": "base.yaml", "model": {"vision": {"fit": "square"}}})
    config = load_config(child, ["optim.batch_size=2"])
    assert (config.validation.num_samples, config.compute.batch_size) == (1, 2)
    assert config.model.vision.image_mode == "crop"  # type: ignore[attr-defined]
    assert capsys.readouterr().err == (
        "note: old names of settings go on working: log.num_samples is now validation.num_samples, "
        "model.vision.fit=square is now model.vision.image_mode=crop, optim.batch_size is now compute.batch_size\n"
    )


def test_other_processes_than_the_first_print_no_note(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    load_config(written(tmp_path, stage2()), ["optim.batch_size=2"])
    assert capsys.readouterr().err == ""


def test_no_value_but_the_old_ones_is_changed() -> None:
    for mode in ("stretch", "pad", "native", "anything"):
        assert upgrade({"model": {"vision": {"fit": mode}}})[0] == {"model": {"vision": {"image_mode": mode}}}
    assert upgrade({"log": {"tensorboard": False}})[0] == {"log": {"trackers": []}}
    assert upgrade({"log": {"tensorboard": 1}})[0] == {"log": {"trackers": 1}}, "refused later, under today's name"
    assert upgrade({"guides": [{"layer": 2}], "optim": 3}) == ({"guides": [{"layer": 2}], "optim": 3}, {})


def test_a_mistake_under_an_old_name_is_told_under_todays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compute\.batch_size: Input should be greater than 0 \(given: 0\)"):
        load_config(written(tmp_path, stage2()), ["optim.batch_size=0"])
    with pytest.raises(ConfigError, match=r"model\.vision\.image_mode: Input should be 'stretch', 'pad', 'crop'"):
        load_config(written(tmp_path, stage2()), ["model.vision.fit=sqare"])


def test_references_to_old_names_follow_them(tmp_path: Path, capsys: Any) -> None:
    tree = stage2()
    del tree["compute"]
    tree["optim"] |= {"batch_size": 6, "accumulate_steps": "${.batch_size}", "loss_chunk_tokens": "${.max_steps}"}
    tree["data"]["num_workers"] = "${optim.batch_size}"
    tree["validation"] = {"every_steps": "${optim.max_steps}"}
    config = load_config(written(tmp_path, tree))
    assert (config.compute.batch_size, config.compute.accumulate_steps, config.compute.loss_chunk_tokens) == (6, 6, 10)
    assert (config.data.num_workers, config.validation.every_steps) == (6, 10)  # type: ignore[attr-defined]
    assert len(capsys.readouterr().err.splitlines()) == 1


def as_before(text: str) -> str:
    """Dumped settings as they would have been dumped under the old names."""
    tree = yaml.safe_load(text)
    old_values = {old: {str(new): before for before, new in values.items()} for old, values in OLD_VALUES.items()}
    for old, new in OLD_NAMES.items():
        if new != "log.trackers" and OmegaConf.select(OmegaConf.create(tree), new, default="none") != "none":
            value = take(tree, new)
            put(tree, old, old_values.get(old, {}).get(str(value), value))
    return yaml.safe_dump(tree, sort_keys=False)


def test_settings_that_were_saved_under_old_names_are_the_same_settings(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, stage2()), ["model.vision.image_mode=crop", "compute.precision=bf16"])
    here = dump_config(config)
    there = as_before(here)
    assert "matrix_learning_rate" in there
    assert "fit: square" in there
    assert "compute" not in yaml.safe_load(there)["optim"]
    assert settings_differences(there, here) == []
    assert saved_settings(there) == yaml.safe_load(here) | {"alarms": saved_settings(there)["alarms"]}
    changed = dump_config(load_config(written(tmp_path, stage2()), ["model.vision.image_mode=pad"]))
    assert settings_differences(there, changed) == [
        "compute.precision: bf16 there, fp32 here",
        "model.vision.image_mode: crop there, pad here",
    ]
    automatic = load_config(written(tmp_path, stage2()), ["compute.precision=auto"])
    assert resolve_precision(automatic, there).compute.precision == "bf16", "what the run began with"


def test_a_run_that_was_begun_under_old_names_is_resumed_and_ends_the_same(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, overrides = tmp_path / "out", ("log.save_every_steps=3", "optim.max_steps=4")
    with monkeypatch.context() as patch:
        before_step(patch, 2, interrupt)
        with pytest.raises(InterruptedRunError):
            train_in_process(tiny_runs / "stage2.yaml", out, *overrides)
    (state,) = saved_steps(out)
    saved = torch.load(state / "state.pt", weights_only=True)
    torch.save({**saved, "settings": as_before(saved["settings"])}, state / "state.pt")
    (out / "config.yaml").write_text(as_before((out / "config.yaml").read_text()))
    assert "validate_every_steps" in (out / "config.yaml").read_text()
    assert write_report(out).read_text().count("of 4 steps") == 1
    capsys.readouterr()
    train_in_process(out / "config.yaml", out)
    told = capsys.readouterr()
    assert "goes on from step 3" in told.out
    assert "old names" not in told.err, "nobody wrote these names today"
    assert "validate_every_steps" not in (out / "config.yaml").read_text(), "the run writes today's"
    unbroken = train_in_process(tiny_runs / "stage2.yaml", tmp_path / "unbroken", *overrides)
    assert_same_run(out, unbroken)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["settings"] = as_before(manifest["settings"])
    (out / "manifest.json").write_text(json.dumps(manifest))
    train_in_process(tiny_runs / "stage2.yaml", out, *overrides)
    assert f"{out} is finished" in capsys.readouterr().out
