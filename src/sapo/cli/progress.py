"""The display of a run under way: one live bar on a terminal, a few plain lines elsewhere.

Everything shown that came from a model or a file is printed as plain text, never as markup.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from sapo.config import RunConfig
from sapo.config.summary import replay_sentence
from sapo.data import Status
from sapo.diagnostics.titles import metric_title
from sapo.training.checkpoint import Checkpoint
from sapo.utils.text import visible
from sapo.workflows.coldstart import ColdStartProgress

COLUMNS = (
    ("reward/mean", "{:.3f}"),
    ("pass@1", "{:.3f}"),
    ("update/entropy", "{:.3f}"),
    ("update/gate/eur", "{:.4f}"),
)
"""Metrics of a step that the live display shows, with their formats."""


class Display:
    """Listens to a run and shows it.

    Args:
        console: where to print; a live bar is drawn only if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.steps: int | None = None
        self._progress: Progress | None = None
        self._task: Any = None
        self._coldstart: ColdStartProgress | None = None
        self._resumed: Checkpoint | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the live bar down; the lines above it stay."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def started(self, config: RunConfig) -> None:
        """Print what the run will do, when its loop begins or resumes."""
        self._end_coldstart()
        self.steps = config.train.steps
        if self._resumed is not None and self._resumed.step >= self.steps:
            steps = f"{self.steps} step{'s' * (self.steps > 1)}"
            self.say(
                f"no step is left: the run has made its {steps}; to train on: sapo resume {config.run_dir} "
                f"train.steps=N, N above {self.steps}"
            )
            return
        self.say(config.batch_sentence())
        if (replay := replay_sentence(config)) is not None:
            self.say(replay)

    def say(self, text: str) -> None:
        """Print a line of plain text above the bar, with control characters escaped."""
        self.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    def coldstart(self, progress: ColdStartProgress) -> None:
        """Show an evaluation of the cold start."""
        if self._coldstart is None and not self.console.is_terminal:
            self.say("cold start: making the starting model; later runs of the recipe on as many threads reuse it")
        self._coldstart = progress
        if self.console.is_terminal:
            self._show(
                "cold start",
                progress.update,
                None,
                f"update {progress.update}  loss {progress.loss:.3f}  pass@1 {progress.pass_at_1:.3f}",
            )
        elif progress.update % 100 == 0:
            self.say(f"cold start: update {progress.update}, loss {progress.loss:.3f}, pass@1 {progress.pass_at_1:.3f}")

    def _end_coldstart(self) -> None:
        """Print once what the cold start reached, when the run begins."""
        if self._coldstart is not None:
            last, self._coldstart = self._coldstart, None
            self.stop()
            self.say(f"cold start: reached pass@1 {last.pass_at_1:.3f}, {last.update} updates, {last.seconds:.0f} s")

    def record(self, record: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        kind = record["kind"]
        if kind == "self_check":
            self._self_check(record)
        elif kind == "eval":
            self.say(_evaluation_line(record))
        elif kind == "rollback":
            self.say(
                f"step {record['step']}: rollback {record['rollbacks']} to the weights of step {record['to']}, "
                f"learning rate times {record['learning_rate_scale']:g} from here on"
            )
        elif kind == "step" and self.console.is_terminal:
            figures = [
                f"{metric_title('step', name).title} {text.format(record[name])}"
                for name, text in COLUMNS
                if name in record
            ]
            if "tokens_per_second" in record["timing"]:
                figures.append(f"{record['timing']['tokens_per_second']:,.0f} tok/s")
            self._show("training", record["step"], self.steps, "  ".join(figures))

    def warning(self, text: str) -> None:
        """Print a warning."""
        self.console.print(f"[yellow]warning:[/yellow] {escape(visible(text))}", highlight=False, soft_wrap=True)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Show nothing: the last checkpoint is named at the end."""

    def resumed(self, checkpoint: Checkpoint) -> None:
        """Print which checkpoint the run resumes from."""
        self._resumed = checkpoint
        self.say(f"resuming from {checkpoint.path} ({checkpoint.label})")

    def _self_check(self, record: dict[str, Any]) -> None:
        worst = record["log_ratio/max_abs"]
        source = (
            "the engine's, equal to the trainer's by the self-check"
            if record["old_logprobs"] == "engine" and record["equal"]
            else "the engine's, by train.old_logprobs=engine"
            if record["old_logprobs"] == "engine"
            else "recomputed by the trainer at the weights that sampled"
            if record["old_logprobs"] == "trainer"
            else "recomputed by the trainer at the weights of each batch's first update"
        )
        self.say(f"log pi_old: {source} (largest |log r| {worst:.1e})")
        if "routing_replay" in record:
            who = {"R2": "the trainer records, so this is R2", "R3": "the engine records, so this is R3"}
            self.say(f"routing replay: {who[record['routing_replay']]}")

    def _show(self, description: str, completed: int, total: int | None, figures: str) -> None:
        if self._progress is None:
            self._progress = _TwoLines(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task(description, total=total, figures="")
            self._progress.start()
        self._progress.update(self._task, description=description, completed=completed, figures=figures)


class _TwoLines(Progress):
    """Shows the figures on a line of their own: beside a bar they would not fit 80 columns."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield Text(task.fields["figures"])
        yield self.make_tasks_table(self.tasks)


def _evaluation_line(record: dict[str, Any]) -> str:
    """Write one evaluation in one line: pass@1 with its interval, and completions that could not be scored."""
    pass_at_1 = record[f"mean@{record['samples']}"]  # equal to pass@1, which is there only where k has 1
    line = f"step {record['step']}: {metric_title('eval', 'pass@1').title} {pass_at_1:.3f}"
    if "pass@1/low" in record:
        line += f" [{record['pass@1/low']:.3f}, {record['pass@1/high']:.3f}]"
    line += f" on {record['task']}, {record['problems']} x {record['samples']}"
    line += "".join(
        f", {metric_title('eval', name).title} {record[name]:.3f}" for name in ("greedy", "constant") if name in record
    )
    odd = [s for s in Status if s is not Status.SCORED and record[f"status/{s.value}"]]
    return line + "".join(f", {record[f'status/{s.value}']} {s.value.replace('_', ' ')}" for s in odd)
