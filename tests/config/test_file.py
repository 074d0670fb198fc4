"""Settings: every mistake fails before anything is loaded, with the dotted path, what was given and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmllm.config import CONFIGS, ConfigError, StageConfig
from mmllm.config.file import dump_config, load_config
from mmllm.distributed.launch import launched_strategy
from mmllm.runs.state import settings_differences

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")
LAUNCHED = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def settings(**changes: Any) -> dict[str, Any]:
    """The settings of a stage as YAML holds them; `section__key=value` changes one of them."""
    tree: dict[str, Any] = {
        "stage": "stage2",
        "out": "runs/x",
        "train": ["projector", "language"],
        "model": {
            "vision": {"source": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"},
            "projector": {"kind": "downsample", "options": {"factor": 2}},
            "language": {"source": "some/llm"},
            "template": "chatml",
        },
        "data": {"train": [{"path": "a.json"}]},
        "optim": {"learning_rates": {"projector": 0.001, "language": 0.0001}, "max_steps": 10},
        "compute": {"batch_size": 4},
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        section = tree
        for parent in parents:
            section = section[parent]
        section[key] = value
    return tree


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(tree: Any, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    return write_file


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_is_one_that_a_run_takes(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, CONFIGS[config.stage])


@pytest.mark.parametrize("path", LAUNCHED, ids=lambda path: path.stem)
def test_every_shipped_launch_asks_for_a_strategy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    given = launch_command_parser().parse_args(["--config_file", str(path), "train/stage2.py"])
    launch, *_ = _validate_launch_command(given)
    if launch.use_fsdp:
        for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
            monkeypatch.setenv(name, prepare_multi_gpu_env(launch)[name])
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", str(launch.use_deepspeed))
    kind = next((kind for kind in ("fsdp2", "zero") if path.stem.startswith(kind)), "ddp")
    assert launched_strategy() == kind
    assert launch.multi_gpu == (path.stem == "ddp")
    assert str(getattr(launch, "zero_stage", None)) == (path.stem[-1] if kind == "zero" else "None")


def test_an_unknown_key_is_named_with_its_path_and_the_allowed_keys(write: Any) -> None:
    text = refused(write(settings(compute__batchsize=8)))
    assert "compute.batchsize: unknown key (given: 8)" in text
    assert "allowed: batch_size, accumulate_steps, precision, gradient_checkpointing," in text
    assert "data.train.0.file: unknown key (given: 'b')" in refused(
        write(settings(data__train=[{"path": "a", "file": "b"}]))
    )
    assert "allowed: path, images, prompt, max_examples, weight, streaming" in refused(
        write(settings(data__train=[{"path": "a", "file": "b"}]))
    )
    assert "lorra: unknown key" in refused(write(settings(lorra={"rank": 4})))
    text = refused(write(settings()), "model.vision.layers=3")
    assert "model.vision.layers: unknown key (given: 3); allowed: source, pretrained, revision, feature_layer, " in text


def test_all_problems_are_told_at_once(write: Any) -> None:
    text = refused(write(settings(optim__max_steps="many", compute__batch_size=0, data__nothing=1)))
    for problem in ("optim.max_steps:", "compute.batch_size:", "data.nothing:"):
        assert problem in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"optim__max_steps": "many"}, "optim.max_steps: Input should be a valid integer"),
        ({"optim__max_steps": "many"}, "(given: 'many')"),
        ({"optim__max_steps": 2.5}, "optim.max_steps: Input should be a valid integer"),
        ({"optim": 3}, "optim: Input should be a valid dictionary"),
        ({"train": "projector"}, "train: Input should be a valid tuple"),
        ({"out": False}, "out: Input should be a valid string (given: False)"),
        ({"compute__batch_size": 0}, "compute.batch_size: Input should be greater than 0 (given: 0)"),
        (
            {"optim__warmup_fraction": 1.5},
            "optim.warmup_fraction: Input should be less than or equal to 1 (given: 1.5)",
        ),
        (
            {"optim__learning_rates": {"projector": -1, "language": 1}},
            "optim.learning_rates.projector: Input should be",
        ),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0 (given: -1)"),
        (
            {"model__vision__feature_layer": 0},
            "model.vision.feature_layer: layers are counted from the last: -1, -2 ..., or a list of such numbers",
        ),
        (
            {"model__vision__image_mode": "square"},
            "model.vision.image_mode: Input should be 'stretch', 'pad', 'crop', 'anyres' or 'native' (given: 'square')",
        ),
        (
            {"optim__kind": "sgd"},
            "'adamw', 'muon', 'adamw8bit', 'paged_adamw' or 'paged_adamw8bit' (given: 'sgd')",
        ),
        ({"lora": {"dropout": 1.0}}, "lora.dropout: Input should be less than 1"),
        ({"train": []}, "train: Tuple should have at least 1 item"),
        ({"train": ["projector", "decoder"]}, "train.1: Input should be 'vision', 'projector' or 'language'"),
    ],
)
def test_a_wrong_type_or_range_says_what_was_given_and_what_is_allowed(
    write: Any, change: dict[str, Any], expected: str
) -> None:
    assert expected in refused(write(settings(**change)))


def test_what_has_no_default_must_be_given(write: Any) -> None:
    tree = settings()
    del tree["optim"]["max_steps"], tree["data"]
    text = refused(write(tree))
    assert "optim.max_steps: missing, and it has no default" in text
    assert "data: missing, and it has no default" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"train": ["projector"]},
            "optim.learning_rates has ['language', 'projector'] but this run trains ['projector']",
        ),
        (
            {"train": ["projector"], "optim__learning_rates": {"projector": 1}, "lora": {"rank": 2}},
            "lora adapts the LLM, but train does not list language",
        ),
        (
            {
                "train": ["vision"],
                "optim__learning_rates": {"vision": 1},
                "data__cache_features": True,
            },
            "data.cache_features keeps the frozen tower's output, but train lists vision",
        ),
        ({"model__checkpoint": "runs/y"}, "model: checkpoint already holds vision, projector, language"),
        (
            {"model": {"vision": {"source": "x"}}},
            "model: needs vision, projector, language and template, or checkpoint",
        ),
        ({"model": {}}, "got nothing"),
        (
            {"model__vision": {"source": "local-dir:x", "pretrained": "y"}},
            "model.vision: local-dir:x holds its own weights, so pretrained (y) must be left out",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(write: Any, change: dict[str, Any], expected: str) -> None:
    assert expected in refused(write(settings(**change)))


@pytest.mark.parametrize("name", ["warmup_vision", "warmup_language"])
def test_a_warm_up_without_its_learning_rate_is_refused(name: str) -> None:
    path = ROOT / "configs" / "tiny" / f"{name}.yaml"
    part = name.removeprefix("warmup_")
    text = refused(path, "optim.learning_rates.other=0.1")
    assert f"but this run trains ['{part}']; give one rate a part" in text


@pytest.mark.parametrize(
    "language", ["{}", "{hidden_size: 8}", "{source: x, model_type: llama}", "{source: x, atention: eager}"]
)
def test_a_warm_up_says_what_its_language_model_needs(language: str, tmp_path: Path) -> None:
    text = (ROOT / "configs" / "tiny" / "warmup_language_pairs.yaml").read_text()
    lines = [f"language: {language}" if line.startswith("language:") else line for line in text.splitlines()]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert "language: needs a model_type and its options, or source" in refused(tmp_path / "config.yaml")


def test_a_file_that_cannot_be_read_is_named(write: Any, tmp_path: Path) -> None:
    assert "no config file at nowhere.yaml" in refused(Path("nowhere.yaml"))
    assert f"no config file at {tmp_path}" in refused(tmp_path)
    assert "is not readable YAML" in refused(write("optim: {max_steps: 1"))
    assert "found duplicate key" in refused(write("seed: 1\nseed: 2\n"))
    for text in ("", "- a\n- b\n"):
        assert "must hold sections with keys" in refused(write(text))
    assert "is not readable YAML" in refused(write("3"))
    assert "stage: missing; allowed: stage1, stage2, warmup_vision" in refused(write("only a word"))
    (tmp_path / "latin.yaml").write_bytes("stage: größe".encode("latin-1"))
    assert "latin.yaml is not readable YAML" in refused(tmp_path / "latin.yaml")
    assert "stage: 'stage9' is not known; allowed: stage1, stage2, warmup_vision" in refused(
        write(settings(stage="stage9"))
    )


def test_a_config_extends_one_other_and_no_more(write: Any) -> None:
    write(settings(), "base.yaml")
    child = write({"extends": "base.yaml", "optim": {"max_steps": 20}, "data": {"train": [{"path": "b.json"}]}})
    config = load_config(child)
    assert isinstance(config, StageConfig)
    assert (config.optim.max_steps, config.compute.batch_size) == (20, 4)
    assert [source.path for source in config.data.train] == ["b.json"], "a list replaces a list"
    grandchild = write({"extends": "config.yaml"}, "grandchild.yaml")
    assert "extends config.yaml, which extends another file; one level is allowed" in refused(grandchild)
    assert "no config file at" in refused(write({"extends": "gone.yaml"}))
    assert "extends must name one file" in refused(write({"extends": ["base.yaml"]}))


def test_another_kind_does_not_keep_the_options_of_the_old_one(write: Any) -> None:
    path = write(settings(), "base.yaml")

    def projector(config: Any) -> tuple[str, dict[str, Any]]:
        return config.model.projector.kind, config.model.projector.options

    assert projector(load_config(path)) == ("downsample", {"factor": 2})
    assert projector(load_config(path, ["model.projector.kind=mlp"])) == ("mlp", {})
    assert projector(load_config(path, ["model.projector.kind=downsample"])) == ("downsample", {"factor": 2})
    overrides = ["model.projector.options.depth=3", "model.projector.kind=mlp"]
    assert projector(load_config(path, overrides)) == ("mlp", {"depth": 3})
    child = write({"extends": "base.yaml", "model": {"projector": {"kind": "resampler", "options": {"depth": 1}}}})
    assert projector(load_config(child)) == ("resampler", {"depth": 1})


@pytest.mark.parametrize("override", ["optim.max_steps", "=3", "", "optim.max_steps=[1", "optim=[1, 2"])
def test_an_override_that_cannot_be_read_is_quoted(write: Any, override: str) -> None:
    text = refused(write(settings()), override)
    assert repr(override) in text
    assert "is not of the form section.key=value" in text or "cannot be read" in text


def test_numbers_in_yaml_and_overrides_are_numbers(write: Any) -> None:
    text = yaml.safe_dump(settings()).replace("projector: 0.001", "projector: 1e-3")
    assert "1e-3" in text
    path = write(text)
    assert load_config(path).optim.learning_rates["projector"] == 0.001
    overrides = [
        "optim.learning_rates.language=2e-5",
        "validation.num_samples=0",
        "compute.gradient_checkpointing=true",
    ]
    config = load_config(path, overrides)
    assert config.optim.learning_rates["language"] == 2e-5
    assert isinstance(config.optim.learning_rates["language"], float)
    assert config.validation.num_samples == 0
    assert config.compute.gradient_checkpointing == ("language",)
    assert load_config(path, ["out=runs/a=b"]).out == "runs/a=b"


def test_settings_cannot_be_changed_once_they_are_checked(write: Any) -> None:
    config = load_config(write(settings()))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_dumped_settings_run_the_same_run(write: Any) -> None:
    config = load_config(write(settings()), ["optim.learning_rates.language=1e-7", "lora.rank=4"])
    again = load_config(write(dump_config(config), "again.yaml"))
    assert again == config
    assert settings_differences(dump_config(config), dump_config(again)) == []


def test_settings_of_two_runs_are_told_apart_by_what_decides_the_weights(write: Any) -> None:
    path = write(settings())
    here = dump_config(load_config(path))
    overrides = ["seed=1", "data.train=[{path: b.json}]", "lora.rank=8"]
    told = settings_differences(here, dump_config(load_config(path, overrides)))
    assert "seed: 0 there, 1 here" in told
    assert any(line.startswith("data.train: ") and "b.json" in line for line in told)
    assert "lora.rank: nothing there, 8 here" in told
    free = [
        "out=runs/moved",
        "log.every_steps=3",
        "compute.num_threads=2",
        "compute.batch_size=2",
        "compute.accumulate_steps=2",
    ]
    assert settings_differences(here, dump_config(load_config(path, free))) == []


def test_settings_from_before_a_setting_was_there_are_those_of_its_default(write: Any) -> None:
    here = dump_config(load_config(write(settings(data__train=[{"path": "a"}]))))
    tree = yaml.safe_load(here)
    del tree["data"]["replay"], tree["data"]["train"][0]["weight"], tree["seed"]
    assert settings_differences(yaml.safe_dump(tree), here) == []
    tree["data"]["max_length_tokens"] = 7
    assert settings_differences(yaml.safe_dump(tree), here) == ["data.max_length_tokens: 7 there, 2048 here"]


def test_dumped_settings_of_a_warm_up_run_it_again(write: Any) -> None:
    config = load_config(ROOT / "configs" / "tiny" / "warmup_language_pairs.yaml", ["out=runs/again"])
    assert load_config(write(dump_config(config))) == config
