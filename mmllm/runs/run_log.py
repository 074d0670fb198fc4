"""A run's output: a log of JSON lines, experiment trackers, terminal progress, and a plot and a table at the end.

A line of the log is metrics, `{"step": ..., NAME: value ...}`, an alarm, `{"step": ..., "alarm": KIND, "text": ...}`,
or a guard's warning, `{"step": ..., "warning": TEXT ...}`.
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
    """The rows of a run's log, without a line that was cut off. Empty if there is no log yet."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def metric_curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Every curve of a log: metric -> [(step, value), ...], in the order in which the metrics first appear."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if "warning" in row or "alarm" in row:
            continue
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


_SHOWN = {  # how the terminal shows frequent metrics; the others are shown as `name value`
    "learning_rate": "lr {:.4g}", "tokens_per_second": "{:,.0f} tokens/s", "samples_per_second": "{:.3g} samples/s",
    "padding": "padding {:.0%}", "data_wait": "waiting {:.0%}", "mfu": "MFU {:.1%}", "hfu": "", "grad_norm": "",
}  # fmt: skip


def shown_figure(name: str, value: float) -> str:
    return _SHOWN.get(name, f"{name} {{:.4g}}").format(value)


class RunLog:
    """Writes a run's log, trackers and terminal output, on the main process alone.

    A resumed run drops the rows after the step that it resumes from; a new run drops all rows. Values of dropped rows
    are not sent again to trackers, except to TensorBoard, which hides the old ones.
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
        """Prints a line, above the progress bar if there is one."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def warn(self, row: Mapping[str, Any]) -> None:
        """Writes a row with a `warning` and its details to the log, and prints the warning."""
        if not self.is_main:
            return
        self._write(dict(row))
        self.say(f"warning: {row['warning']}")

    def log(self, step: int, values: Mapping[str, float], *, seconds_left: float | None = None) -> None:
        """Writes one row of metrics to the log, the trackers and the terminal."""
        if not self.is_main:
            return
        self._write({"step": step, **{name: float(f"{value:.6g}") for name, value in values.items()}})
        fresh = {name: float(value) for name, value in values.items() if (step, name) not in self._sent}
        for tracker in self._trackers:
            takes_repeats = tracker.name == "tensorboard"  # it hides earlier values of these steps
            if new_values := values if takes_repeats else fresh:
                tracker.log(dict(new_values), step=step)
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
        """Writes an alarm to the log and prints it in bold red, so that nobody overlooks it."""
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
        """Stops the progress bar, draws `train_loss.png` and prints the first and last value of each metric."""
        self.close()
        if not self.is_main or not self.rows:
            return
        plot_losses(self.rows, self.out / "train_loss.png")
        table = Table(title=str(self.out), title_justify="left")
        table.add_column("metric")
        table.add_column("first", justify="right")
        table.add_column("last", justify="right")
        for name, curve in metric_curves(self.rows).items():
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
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(7, 4))  # fixed margins: a computed layout takes as long as the drawing
    axes = figure.add_axes((0.15, 0.13, 0.82, 0.83))
    curves = {name: metric_curves(rows).get(name, []) for name in ("loss", "val_loss")}
    for name, points in curves.items():
        if points:
            style = "-" if name == "loss" else "o-"
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), linewidth=1, markersize=3)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per supervised token or pair (nats)")
    losses = [loss for points in curves.values() for _, loss in points]
    if losses and max(losses) > 5 * min(losses) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")  # 0.1 is read and drawn sooner than 10^-1
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
