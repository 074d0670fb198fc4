"""What README, site and scripts say is true: commands are taken, configs are valid, files are there, links lead on."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.exceptions import ClickException
from typer.main import get_command

import mmllm
from mmllm.cli import app
from mmllm.config.file import load_config
from mmllm.config.reference import all_settings

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "configs" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
STORY = ROOT / "configs" / "llava-1.5-7b" / "run.sh"
OF_CONFIGS = ("train", "check", "plan", "explain")
# A program that writes down how it was called: a line of words, each ended by a zero byte.
RECORDER = '#!/usr/bin/env bash\nprintf "%s\\0" "$(basename "$0")" "$@" >>"$CALLS"; printf "\\n" >>"$CALLS"\n'


def indented_commands(page: Path, program: str) -> Iterator[list[str]]:
    """The calls of a program in a page's blocks of code, as words."""
    for line in re.findall(rf"^    ({program} .*)$", page.read_text(encoding="utf-8"), re.M):
        words = shlex.split(line, comments=True)
        yield words[1:]


def parse(words: list[str]) -> dict[str, Any]:
    """The parameters of a call of `mmllm`, as the command itself takes them, without running it."""
    command: Any = get_command(app)
    while hasattr(command, "commands") and (words or not command.invoke_without_command):
        words = command.with_default(words) if hasattr(command, "with_default") else words
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, list(words))
    return {**context.params, "overrides": [*(context.params.get("overrides") or []), *context.args]}


@pytest.fixture(scope="module")
def written_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `configs/` and the configs that pages of the site tell people to write."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for page in PAGES:
        for name, text in re.findall(
            r"^```yaml\n# (configs/\S+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S
        ):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_taken_with_its_settings(
    page: Path, written_configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(written_configs)
    for words in indented_commands(page, "mmllm"):
        try:
            given = parse(words)
        except ClickException as error:
            pytest.fail(f"{page}: mmllm {shlex.join(words)}: {error.format_message()}")
        if words[0] in OF_CONFIGS and str(given["config"]).startswith("configs/"):
            load_config(given["config"], given["overrides"])
    targets = {*re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)}
    assert {words[0] for words in indented_commands(page, "make")} <= targets


def test_make_demo_trains_either_model_and_no_other(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "tests").mkdir()
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "tests/parts.txt"):
        shutil.copy(ROOT / name, tmp_path / name)

    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", "-n", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    for arguments, folder in ((["demo"], "tiny"), (["demo", "MODEL=smollm2"], "smollm2-135m")):
        told = make(*arguments).stdout
        steps = [told.index(f"configs/{folder}/stage{number}.yaml --processes") for number in (1, 2)]
        assert steps == sorted(steps)
        assert f"mmllm demo runs/{folder}/stage2" in told
    (tmp_path / "runs/tiny/stage2").mkdir(parents=True)
    (tmp_path / "runs/tiny/stage2/manifest.json").touch()
    assert "mmllm train" not in make("demo").stdout, "what is trained is not trained again"
    wrong = make("demo", "MODEL=llava")
    assert wrong.returncode != 0
    assert "MODEL=llava cannot be trained by `make demo`; allowed: tiny, smollm2" in wrong.stderr


def test_every_config_that_a_page_tells_to_write_is_valid(written_configs: Path) -> None:
    found = sorted((written_configs / "configs" / "mine").glob("*.yaml"))
    assert [path.name for path in found] == ["parts.yaml", "stage1.yaml", "stage2.yaml"]
    for path in found:
        load_config(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {*re.findall(r"`((?:mmllm|projector|demo|tests|train|bench|weights|docs)/[\w/.-]*)`", text)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    links = {*re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)}
    made = {"settings.md", "python.md", "configs.md", "changelog.md", "compatibility.md"}  # by docs/generated.py
    assert [link for link in sorted(links) if not (page.parent / link).exists() and Path(link).name not in made] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; strict, so that a link that leads nowhere ends the build."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = [*site.rglob("*.html")]
    assert len(pages) >= len([*(ROOT / "docs").rglob("*.md")]) + 4
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\">\s]+)", text)
        loaded += re.findall(
            r"<link\b[^>]*\brel=\"?(?:stylesheet|icon|preconnect|preload)[^>]*\bhref=\"?([^\">\s]+)", text
        )
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_site_has_every_setting_and_every_public_name(site: Path) -> None:
    settings = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    names = {one.path.rpartition(".")[2] for one in all_settings()}
    assert {"train", "vision_lora", "guides[]"} <= names
    assert [name for name in sorted(names) if f"<code>{name}</code>" not in settings] == []
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert [name for name in mmllm.__all__ if name != "__version__" and f"mmllm.{name}" not in python] == []


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_files_for_the_host_are_yaml_and_ci_runs_what_people_run(path: Path) -> None:
    held = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.parent.name == "workflows":
        assert {"run": ".ci/run"} in held["jobs"]["checks"]["steps"]
    elif path.name != "config.yml":
        assert {"name", "description", "body"} <= held.keys()


def test_the_changelog_and_the_citation_name_this_version() -> None:
    assert f"\n## {mmllm.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == mmllm.__version__


def story_calls(checkout: Path, num_gpus: int) -> list[list[str]]:
    """What the script of LLaVA-1.5-7B starts, in order, where every program only writes down how it was called."""
    programs, calls = checkout / ".venv" / "bin", checkout / "calls"
    programs.mkdir(parents=True)
    for name in ("mmllm", "accelerate", "hf", "unzip"):
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    shutil.copytree(STORY.parent, checkout / "configs" / STORY.parent.name)
    for folder in (
        "coco/train2017",
        "gqa/images",
        "ocr_vqa/images",
        "textvqa/train_images",
        "vg/VG_100K",
        "vg/VG_100K_2",
    ):
        (checkout / "data" / folder).mkdir(parents=True)
    environment = {**os.environ, "CALLS": str(calls), "NUM_GPUS": str(num_gpus)}
    script = checkout / "configs" / STORY.parent.name / STORY.name
    subprocess.run(["bash", str(script)], env=environment, check=True, capture_output=True, text=True)
    return [line.split("\0")[:-1] for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("num_gpus", [8, 2])
def test_the_story_of_llava_calls_what_there_is_with_the_batches_of_the_paper(num_gpus: int, tmp_path: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    subprocess.run(["bash", "-n", str(STORY)], check=True)
    calls = story_calls(tmp_path, num_gpus)
    assert {words[0] for words in calls} == {"mmllm", "accelerate", "hf", "unzip"}
    for words in calls:
        if words[0] == "mmllm":
            given = parse(words[1:])
            if words[1] in OF_CONFIGS:
                load_config(ROOT / given["config"], given["overrides"])
    launches = [launch_command_parser().parse_args(words[2:]) for words in calls if words[0] == "accelerate"]
    batches = {}
    for launch in launches:
        assert (ROOT / launch.config_file).is_file()
        config = load_config(ROOT / launch.training_script_args[0], launch.training_script_args[1:])
        assert launch.training_script == f"train/{config.stage}.py"
        batches[config.stage] = config.compute.batch_size * config.compute.accumulate_steps * launch.num_processes
    assert batches == {"stage1": 256, "stage2": 128}
