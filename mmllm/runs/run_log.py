"""What a run tells: JSON lines, trackers where asked, progress on the terminal, a plot and a table at the end.

A line of the log is `{"step": ..., NAME: figure ...}`, an alarm, `{"step": ..., "alarm": KIND, "text": ...}`, or a
guard's warning, `{"step": ..., "warning": TEXT ...}`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mmllm.runs.experiment_trackers import close_trackers, open_trackers
from mmllm.runs.folder import RunFolder


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without one that was cut off. None where there is no log yet."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def figures_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Every curve of a log: name -> (step, value) ..., in the order in which they first stand there."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if "warning" in row or "alarm" in row:
            continue
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


_SHOWN = {  # how the terminal shows figures of each log line; what has none here is `name value`
    "learning_rate": "lr {:.4g}", "tokens_per_second": "{:,.0f} tokens/s", "samples_per_second": "{:.3g} samples/s",
    "padding": "padding {:.0%}", "data_wait": "waiting {:.0%}", "mfu": "MFU {:.1%}", "hfu": "", "grad_norm": "",
}  # fmt: skip


def shown_figure(name: str, value: float) -> str:
    return _SHOWN.get(name, f"{name} {{:.4g}}").format(value)


class Tracker:
    """The voice of a run's main process.

    Lines behind the step that a resumed run starts from are dropped, all of them where it starts anew. Trackers got
    them already, and so do not get them again.
    """

    def __init__(
        self,
        out: Path,
        *,
        max_steps: int,
        first_step: int,
        is_main: bool,
        trackers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ):
        self.out, self.max_steps, self.is_main = out, max_steps, is_main
        self.console = Console(stderr=False, quiet=not is_main)
        self.rows: list[dict[str, Any]] = []
        self.num_dropped = 0
        self._started = time.monotonic()
        self._trackers: list[Any] = []
        self._sent: set[tuple[int, str]] = set()
        self._progress: Progress | None = None
        if not is_main:
            return
        out.mkdir(parents=True, exist_ok=True)
        self.path = RunFolder(out).log
        lines = read_log(self.path)
        self.rows = [row for row in lines if first_step and row["step"] <= first_step]
        self.num_dropped = len(lines) - len(self.rows)
        self._sent = {(row["step"], name) for row in lines if row["step"] > first_step for name in row}
        self._rewrite()
        self._trackers = open_trackers(trackers, out, settings=dict(settings or {}), first_step=first_step)
        if sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
            self._progress = Progress(
                *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console
            )
            self._task = self._progress.add_task("training", total=max_steps, completed=first_step)
            self._progress.start()

    def _rewrite(self) -> None:
        partial = self.path.with_suffix(".part")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        partial.replace(self.path)

    def say(self, text: str) -> None:
        """A line for people, above the progress bar where there is one."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def warn(self, row: Mapping[str, Any]) -> None:
        """A row with a `warning` and whatever it is about: in the log, and on the terminal."""
        if not self.is_main:
            return
        self._write(dict(row))
        self.say(f"warning: {row['warning']}")

    def log(self, step: int, values: Mapping[str, float], *, seconds_left: float | None = None) -> None:
        """One row of the log; the same numbers on the terminal."""
        if not self.is_main:
            return
        self._write({"step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}})
        fresh = {name: float(value) for name, value in values.items() if (step, name) not in self._sent}
        for tracker in self._trackers:
            shows_again = tracker.name == "tensorboard"  # it hides what it was told of these steps
            if told := values if shows_again else fresh:
                tracker.log(dict(told), step=step)
        shown = "  ".join(filter(None, (shown_figure(name, value) for name, value in values.items())))
        if self._progress and "loss" in values:
            self._progress.update(
                self._task,
                completed=step,
                description=f"loss {values['loss']:.3f}  {values.get('tokens_per_second', 0):.0f} tok/s",
            )
        else:
            left = "" if seconds_left is None else f"  left {seconds_left / 60:.1f} min"
            self.say(f"step {step}/{self.max_steps}  {shown}{left}")

    def alarm(self, step: int, kind: str, text: str) -> None:
        """What must not be overlooked: a loud line, and a record of the log."""
        if not self.is_main:
            return
        self._write({"step": step, "alarm": kind, "text": text})
        self.console.print(
            f"ALARM at step {step}: {text}", style="bold red", highlight=False, markup=False, soft_wrap=True
        )

    @property
    def alarms(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "alarm" in row]

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

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
        for name, curve in figures_of(self.rows).items():
            if name != "grad_norm":
                table.add_row(name.replace("_", " "), f"{curve[0][1]:.4g}", f"{curve[-1][1]:.4g}")
        table.add_row("steps", "", str(self.rows[-1]["step"]))
        table.add_row("minutes of this start", "", f"{(time.monotonic() - self._started) / 60:.1f}")
        self.console.print(table)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
        close_trackers(self._trackers)
        self._trackers = []


def plot_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """Training and validation loss over steps as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("val_loss", "o-")):
        if points := figures_of(rows).get(name):
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), linewidth=1, markersize=3)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per supervised token or pair (nats)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
