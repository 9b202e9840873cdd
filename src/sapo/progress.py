"""What a person sees while a run goes on: one live display on a terminal, a few plain lines elsewhere.

Everything shown that came from a model or a file is printed as plain text, never as markup.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sapo.coldstart import ColdStartProgress
from sapo.config import RunConfig
from sapo.training.checkpoint import Checkpoint

COLUMNS = (
    ("reward", "reward/mean", "{:.3f}"),
    ("pass@1", "pass@1", "{:.3f}"),
    ("entropy", "update/entropy", "{:.3f}"),
    ("EUR", "update/gate/eur", "{:.4f}"),
)


class Display:
    """Listens to a run and shows it.

    Args:
        console: where to print; a live bar is drawn only if it is a terminal.
        steps: of the whole run, None while that is not known.
    """

    def __init__(self, console: Console, steps: int | None = None) -> None:
        self.console = console
        self.steps = steps
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the live bar down; what it said last stays."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def start(self, config: RunConfig) -> None:
        """Say what will happen."""
        self.steps = config.train.steps
        self.say(config.batch_sentence())

    def say(self, text: str) -> None:
        """Print a line of plain text above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def coldstart(self, progress: ColdStartProgress) -> None:
        """An evaluation of the cold start."""
        if self.console.is_terminal:
            self._show(
                "cold start",
                None,
                f"update {progress.update}  loss {progress.loss:.3f}  pass@1 {progress.pass_at_1:.3f}",
            )
        elif progress.update % 100 == 0:
            self.say(f"cold start: update {progress.update}, loss {progress.loss:.3f}, pass@1 {progress.pass_at_1:.3f}")

    def coldstart_done(self, last: ColdStartProgress) -> None:
        """The cold start reached its target."""
        self.stop()
        self.say(f"cold start: pass@1 {last.pass_at_1:.3f} after {last.update} updates, {last.seconds:.0f} s")

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl was written."""
        kind = record["kind"]
        if kind == "self_check":
            self._self_check(record)
        elif kind == "eval":
            k1 = record.get("pass@1", record[f"mean@{record['samples']}"])
            interval = f" [{record['pass@1/low']:.3f}, {record['pass@1/high']:.3f}]" if "pass@1/low" in record else ""
            self.say(
                f"step {record['step']}: held-out pass@1 {k1:.3f}{interval} on {record['task']} "
                f"({record['problems']} problems x {record['samples']} samples), "
                f"{record['status/truncated']} truncated, {record['status/unparseable']} unparseable"
            )
        elif kind == "step" and self.console.is_terminal:
            figures = [f"{name} {text.format(record[key])}" for name, key, text in COLUMNS if key in record]
            if "tokens_per_second" in record["timing"]:
                figures.append(f"{record['timing']['tokens_per_second']:,.0f} tok/s")
            self._show("training", record["step"], "  ".join(figures))

    def warning(self, text: str) -> None:
        """Something the user should know."""
        self.console.print(f"[yellow]warning:[/yellow] {escape(text)}", highlight=False, soft_wrap=True)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """A checkpoint was written: nothing to show, the last one is named at the end."""

    def resumed(self, checkpoint: Checkpoint) -> None:
        """The run goes on from a checkpoint."""
        self.say(f"resuming from {checkpoint.path} ({checkpoint.label})")

    def _self_check(self, record: dict[str, Any]) -> None:
        worst = record["log_ratio/max_abs"]
        source = (
            "the engine's, which the self-check found equal to the trainer's"
            if record["old_logprobs"] == "engine" and record["equal"]
            else "the engine's, by train.old_logprobs=engine"
            if record["old_logprobs"] == "engine"
            else "recomputed by the trainer at the weights that sampled"
        )
        self.say(f"log pi_old is {source} (largest |log r| on policy {worst:.1e})")

    def _show(self, description: str, completed: int | None, figures: str) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task(description, total=self.steps if completed else None, figures="")
            self._progress.start()
        self._progress.update(self._task, description=description, completed=completed, figures=figures)
