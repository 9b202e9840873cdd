"""The display of a run under way: one live bar on a terminal, plain lines elsewhere.

A plain log has a line of every step, but no more than one in ten seconds; the first and the last step always have one.
Everything shown that came from a model or a file is printed as plain text, never as markup.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from sapo.config import RunConfig
from sapo.config.summary import free_sentence, replay_sentence
from sapo.diagnostics.titles import shown_figures
from sapo.front.lines import GLOSSARY, duration, end_lines, evaluation_line, sample_lines, step_figures
from sapo.training.checkpoint import Checkpoint
from sapo.utils.text import visible
from sapo.workflows.coldstart import ColdStartProgress

SECONDS_BETWEEN_LINES = 10.0
"""Least time between two lines of steps in a plain log."""

PHASES = {
    "generate": "sampling completions",
    "score": "scoring",
    "wait": "waiting for completions",
    "old_logprobs": "computing log-probabilities",
    "reference": "computing the reference's log-probabilities",
    "diagnose": "measuring",
    "update": "updating",
    "evaluate": "evaluating",
    "checkpoint": "saving",
}
"""Phase of a step -> what is shown while it goes on."""


class Display:
    """Listens to a run and shows it.

    Args:
        console: where to print; a live bar is drawn only if it is a terminal.
        clock: gives the seconds by which the lines of a plain log are spaced.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self._clock = clock
        self._began: tuple[float, int] | None = None
        self._last_line = float("-inf")
        self._explained = False
        self._graded = False  # rewards other than 0 and 1 were seen
        self._figures = ""
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
        if config.rollout.schedule == "free":
            self.say(free_sentence(config))

    def say(self, text: str) -> None:
        """Print a line of plain text above the bar, with control characters escaped."""
        self.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    def show(self, table: RenderableType) -> None:
        """Print a table."""
        self.console.print(table)

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
            self._graded |= not record.get("binary", True)
            self.say(evaluation_line(record))
        elif kind == "rollback":
            self.say(
                f"step {record['step']}: rollback {record['rollbacks']} to the weights of step {record['to']}, "
                f"learning rate times {record['learning_rate_scale']:g} from here on"
            )
        elif kind == "step":
            self._step(record)

    def _step(self, record: Mapping[str, Any]) -> None:
        """Show the figures of a step: in the bar of a terminal, or as a line of a plain log where one is due."""
        self._graded |= "pass@1" in record and "pass@1" not in shown_figures(record, ("pass@1",))
        step, figures = record["step"], step_figures(record, graded=self._graded)
        now = self._clock()
        self._began = self._began or (now - record["timing"].get("seconds", 0.0), step - 1)
        if self.console.is_terminal:
            self._explain()
            self._figures = "  ".join(figures)
            self._show("training", step, self.steps, self._figures)
            return
        if step not in (1, self.steps) and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._explain()
        self._last_line = now
        began, before = self._began
        left = (now - began) / (step - before) * ((self.steps or step) - step)
        if left > 0:
            figures.append(f"{duration(left)} left")
        self.say(f"step {step}/{self.steps}: {', '.join(figures)}")

    def _explain(self) -> None:
        """Say once what the words of a step's line mean."""
        if not self._explained:
            self._explained = True
            for line in GLOSSARY:
                self.say(f"  {line}")

    def phase(self, step: int, name: str) -> None:
        """Show on a terminal which phase of a step is under way."""
        if self.console.is_terminal and name in PHASES and self.steps is not None:
            self._show("training", min(step - 1, self.steps), self.steps, self._figures, PHASES[name])

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Print sampled completions with their rewards."""
        for line in sample_lines(step, samples):
            self.say(line)

    def ended(self, run: Any) -> None:
        """Print what a run has come to, and the next commands."""
        self.stop()
        for line in end_lines(run):
            self.say(line)

    def note(self, text: str) -> None:
        """Print what is neither progress nor a warning."""
        self.say(text)

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
        self.say("  log pi_old: log-probability of a sampled token before the step's updates, the denominator of r")
        if "routing_replay" in record:
            who = {"R2": "the trainer records, so this is R2", "R3": "the engine records, so this is R3"}
            self.say(f"routing replay: {who[record['routing_replay']]}")

    def _show(self, description: str, completed: int, total: int | None, figures: str, phase: str = "") -> None:
        if self._progress is None:
            self._progress = _TwoLines(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[phase]}"),
                console=self.console,
            )
            self._task = self._progress.add_task(description, total=total, figures="", phase="")
            self._progress.start()
        self._progress.update(
            self._task, description=description, completed=completed, total=total, figures=figures, phase=phase
        )


class Quiet(Display):
    """Prints warnings and nothing else: `--quiet`."""

    def ended(self, run: Any) -> None:
        """Say nothing."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def show(self, table: RenderableType) -> None:
        """Show nothing."""

    def _show(self, description: str, completed: int, total: int | None, figures: str, phase: str = "") -> None:
        """Show nothing."""


class JsonLines(Quiet):
    """Prints what the run writes to metrics.jsonl, line by line as it comes, and the summary as the last: `--json`.

    Args:
        console: where the lines go; warnings go to `errors`.
    """

    def __init__(self, console: Console, errors: Console) -> None:
        super().__init__(errors)
        self._out = console

    def record(self, record: dict[str, Any]) -> None:
        """Print a line of metrics.jsonl."""
        self._line(record)

    def ended(self, run: Any) -> None:
        """Print the summary, where the run is and whether it was stopped."""
        stopped = None if run.stopped is None else str(run.stopped.checkpoint.path)
        self._line({"kind": "end", "run": str(run.directory), "stopped": stopped, "summary": run.summary})

    def _line(self, record: Mapping[str, Any]) -> None:
        self._out.print(json.dumps(record), markup=False, highlight=False, soft_wrap=True)


class _TwoLines(Progress):
    """Shows the figures on a line of their own: beside a bar they would not fit 80 columns."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield Text(task.fields["figures"])
        yield self.make_tasks_table(self.tasks)
