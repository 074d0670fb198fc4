"""The config files that come with the project, and what every setting is: configs, configs copy, configs show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from mmllm.cli.options import path, user_errors

commands = typer.Typer(help="List the config files that come with the project, copy one, or show what a setting is.")
FOLDER = Path(__file__).resolve().parents[2] / "configs"  # of a checkout; an installed package has none


@commands.callback(invoke_without_command=True)
def list_configs(context: typer.Context) -> None:
    if context.invoked_subcommand is not None:
        return
    with user_errors():
        files = _shipped()
        width = max(map(len, files))
        for name, file in files.items():
            print(f"{name:{width}}  {_command(file)}")


@commands.command("copy")
def copy(
    name: Annotated[str, typer.Argument(help="One that `mmllm configs` lists, such as tiny/stage2.")],
    to: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(parser=path, help="The new file, or a folder for it; default: its own name, here."),
    ] = None,
) -> None:
    """Copy a config file, to change it and train with it. Never overwrites."""
    with user_errors():
        from mmllm.config import ConfigError

        files = _shipped()
        plain = name.removeprefix("configs/").removesuffix(".yaml")
        if plain not in files:
            raise ConfigError(f"there is no config {name!r}; there are {', '.join(files)}")
        file = files[plain]
        target = to or Path(file.name)
        target = target / file.name if target.is_dir() else target
        if target.exists():
            raise ConfigError(f"{target} exists; remove it, or name another file: mmllm configs copy {plain} FILE")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text(encoding="utf-8").replace(f"configs/{plain}.yaml", str(target), 1))
        print(f"{target}: {_command(target)}")


@commands.command("show")
def show(
    key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="A setting such as compute.batch_size, or a section; default: all settings."),
    ] = None,
) -> None:
    """Print what a setting is: its type, its default, whether it may change on resume, and what it does."""
    with user_errors():
        from mmllm.config.reference import settings_text

        print(settings_text(key), end="")


def _shipped() -> dict[str, Path]:
    """The config files of the checkout by their names, `tiny/stage2`. Raises ConfigError where there is no checkout."""
    from mmllm.config import ConfigError

    files = {file.relative_to(FOLDER).with_suffix("").as_posix(): file for file in sorted(FOLDER.glob("*/*.yaml"))}
    if not files:
        raise ConfigError("the configs are not part of the installed package: clone the repository and run it there")
    return files


def _command(file: Path) -> str:
    """The command that runs it, which stands on its first line."""
    with file.open(encoding="utf-8") as lines:
        return lines.readline().strip().removeprefix("# ")
