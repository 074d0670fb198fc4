"""What a run tells: JSON lines, TensorBoard where asked, progress on the terminal, a plot and a table at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

LOG_FILE = "log.jsonl"


class Tracker:
    """The voice of a run's main process. Lines behind the step that a resumed run starts from are dropped."""

    def __init__(self, out: Path, *, max_steps: int, first_step: int, tensorboard: bool, is_main: bool):
        self.out, self.max_steps, self.is_main = out, max_steps, is_main
        self.console = Console(stderr=False, quiet=not is_main)
        self.rows: list[dict[str, Any]] = []
        self.warnings: list[dict[str, Any]] = []  # rows of the log as well, but no figures
        self.num_dropped = 0
        self._started = time.monotonic()
        self._board: Any = None
        self._progress: Progress | None = None
        if not is_main:
            return
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / LOG_FILE
        if self.path.is_file():
            lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [row for row in lines if row["step"] <= first_step]
            self.rows = [row for row in kept if "warning" not in row]
            self.warnings = [row for row in kept if "warning" in row]
            self.num_dropped = len(lines) - len(kept)
        self._rewrite()
        if tensorboard:
            self._board = _open_tensorboard(out)
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self._progress = Progress(
                *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console
            )
            self._task = self._progress.add_task("training", total=max_steps, completed=first_step)
            self._progress.start()

    def _rewrite(self) -> None:
        partial = self.path.with_suffix(".part")
        rows = sorted([*self.rows, *self.warnings], key=lambda row: int(row["step"]))
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(self.path)

    def say(self, text: str) -> None:
        """A line for people, above the progress bar where there is one."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def warn(self, row: Mapping[str, Any]) -> None:
        """A row with a `warning` and whatever it is about: in the log, and on the terminal."""
        if not self.is_main:
            return
        self.warnings.append(dict(row))
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.say(f"warning: {row['warning']}")

    def log(self, step: int, values: Mapping[str, float], *, seconds_left: float | None = None) -> None:
        """One row of the log; the same numbers on the terminal."""
        if not self.is_main:
            return
        row = {"step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "grad_norm")
        if self._progress and "loss" in values:
            self._progress.update(
                self._task,
                completed=step,
                description=f"loss {values['loss']:.3f}  {values.get('tokens_per_second', 0):.0f} tok/s",
            )
        else:
            left = "" if seconds_left is None else f"  left {seconds_left / 60:.1f} min"
            self.say(f"step {step}/{self.max_steps}  {shown}{left}")

    def finish(self) -> None:
        """Stops the bar, draws `train_loss.png` and prints the table of what the run reached."""
        self.close()
        if not self.is_main or not self.rows:
            return
        plot_losses(self.rows, self.out / "train_loss.png")
        table = Table(title=str(self.out), title_justify="left")
        table.add_column("measure")
        table.add_column("first", justify="right")
        table.add_column("last", justify="right")
        for name in dict.fromkeys(name for row in self.rows for name in row if name not in ("step", "grad_norm")):
            values = [row[name] for row in self.rows if name in row]
            table.add_row(name.replace("_", " "), f"{values[0]:.4g}", f"{values[-1]:.4g}")
        table.add_row("steps", "", str(self.rows[-1]["step"]))
        table.add_row("minutes of this start", "", f"{(time.monotonic() - self._started) / 60:.1f}")
        self.console.print(table)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
        if self._board:
            self._board.close()
            self._board = None


def _open_tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("log.tensorboard needs the extra `track`: pip install 'mmllm[track]'") from error
    return SummaryWriter(str(out / "tensorboard"))


def plot_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """Training and validation loss over steps as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("val_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), linewidth=1, markersize=3)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per supervised token or pair (nats)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
