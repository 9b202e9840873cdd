"""The lines of a run: its steps, evaluations, samples and end, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sapo.data import Status
from sapo.diagnostics.titles import metric_title, shown_figures
from sapo.run.profiling import phases

COLUMNS = (
    ("reward/mean", "{:.3f}"),
    ("pass@1", "{:.3f}"),
    ("update/entropy", "{:.3f}"),
    ("update/gate/eur", "{:.4f}"),
    ("update/ratio/abs_dev", "{:.2e}"),
)
"""Metrics of a step that are shown, with their formats."""

GLOSSARY = (
    "EUR: effective update ratio, the mean weight that the objective's gate leaves to a token (1: all of it)",
    "|r - 1|: how far the policy has moved from the weights that sampled, r = pi / pi_old, mean over tokens",
    "entropy: of the next token, in nats; falling towards 0, completions become alike",
)
"""What the words in the line of a step mean; printed once, before the first."""


def evaluation_line(record: dict[str, Any]) -> str:
    """Write one evaluation in one line: pass@1 with its interval, the mean reward, and completions without a score.

    Where rewards are others than 0 and 1, the mean reward stands alone.
    """
    line = f"step {record['step']}: "
    if f"mean@{record['samples']}" not in record:
        line += "no held-out completion was judged"
    elif record.get("binary", True):
        pass_at_1 = record[f"mean@{record['samples']}"]  # equal to pass@1, which is there only where k has 1
        line += f"{metric_title('eval', 'pass@1').title} {pass_at_1:.3f}"
        if "pass@1/low" in record:
            line += f" [{record['pass@1/low']:.3f}, {record['pass@1/high']:.3f}]"
        line += ", "
    else:
        line += "held-out "
    if "reward/mean" in record:
        line += f"{metric_title('eval', 'reward/mean').title} {record['reward/mean']:.3f}"
    line = line.removesuffix(", ") + f" on {record['task']}, {record['problems']} x {record['samples']}"
    line += "".join(
        f", {metric_title('eval', name).title} {record[name]:.3f}" for name in ("greedy", "constant") if name in record
    )
    odd = [s for s in Status if s is not Status.SCORED and record.get(f"status/{s.value}")]
    return line + "".join(f", {record[f'status/{s.value}']} {s.value.replace('_', ' ')}" for s in odd)


def step_figures(record: Mapping[str, Any], *, graded: bool = False) -> list[str]:
    """Return the figures of a step in words: those of COLUMNS that were measured, and tokens per second.

    Args:
        record: line of metrics.jsonl.
        graded: whether the run is known to have rewards other than 0 and 1. A step of zeros alone does not tell.
    """
    formats = dict(COLUMNS)
    figures = [
        f"{metric_title('step', name).title} {formats[name].format(record[name])}"
        for name in shown_figures(record, tuple(formats))
        if not (graded and name == "pass@1")
    ]
    if "tokens_per_second" in record["timing"]:
        figures.append(f"{record['timing']['tokens_per_second']:,.0f} tok/s")
    return figures


def duration(seconds: float) -> str:
    """Write a duration as a person would.

    >>> duration(8.2), duration(95), duration(7300)
    ('9 s', '2 min', '2 h 2 min')
    """
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def sample_lines(step: int, samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sampled completions as lines: the question, then each completion with its reward."""
    lines, question = [], None
    for sample in samples:
        if sample["prompt"] != question:
            question = sample["prompt"]
            lines.append(f"  step {step}, {sample['task']}: {brief(question)}")
        lines.append(f"    reward {sample['reward']:.3f}: {brief(sample['text'])}")
    return lines


def brief(text: str, length: int = 200) -> str:
    """Return a text on one line, cut in the middle."""
    line = " ".join(text.split())
    half = (length - 5) // 2
    return line if len(line) <= length else f"{line[:half]} ... {line[-half:]}"


def end_lines(run: Any) -> list[str]:
    """Return what a run has come to as lines: the figures of every task, the seconds, the files, the next commands.

    Args:
        run: of `workflows.train`.
    """
    if run.stopped is not None:
        return [
            f"stopped at {run.stopped.checkpoint.label}, saved in {run.stopped.checkpoint.path}",
            f"next: sapo resume {run.directory}",
            f"      sapo report {run.directory}",
        ]
    summary = run.summary
    lines = [*_task_lines(summary), _seconds_line(summary["seconds"])]
    model = run.directory / "checkpoints" / f"step-{summary['steps']:06d}"
    rollouts = ", rollouts/" if run.config.log.rollouts_every else ""
    lines.append(f"wrote {run.directory}/summary.json, metrics.jsonl{rollouts} and the model in {model}")
    lines += [f"next: sapo eval {run.directory}", f"      sapo report {run.directory}"]
    if run.config.log.tensorboard:
        lines.append(f"      tensorboard --logdir {run.directory}/tensorboard")
    return lines


def _task_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return the figures of the first and the last evaluation, of each task where there are several."""
    start, final, steps = summary["start"], summary["final"], summary["steps"]
    if not (start and final):
        return []
    if "tasks" not in final:
        return _figure_lines(start, final, steps, "")
    before = start.get("tasks") or {}
    tasks = final["tasks"].items()
    return [
        line for name, figures in tasks for line in _figure_lines(before.get(name, {}), figures, steps, f"{name}: ")
    ]


def _figure_lines(start: Mapping[str, Any], final: Mapping[str, Any], steps: int, task: str) -> list[str]:
    lines = []
    if "pass@1" in final and "pass@1" in start and final.get("binary", True):
        title = metric_title("eval", "pass@1").title
        lines.append(f"{task}{title} {start['pass@1']:.3f} -> {final['pass@1']:.3f} in {steps} steps")
        if "greedy" in final and "greedy" in start:
            lines.append(f"         greedy {start['greedy']:.3f} -> {final['greedy']:.3f}")
        if "constant" in final:
            lines.append(f"  best constant {final['constant']:.3f}, one answer for every problem")
    if "reward/mean" in final and "reward/mean" in start:  # earlier versions began without it
        title = metric_title("eval", "reward/mean").title
        before, after = start["reward/mean"], final["reward/mean"]
        lines.append(f"{task}held-out {title} {before:.3f} -> {after:.3f} in {steps} steps")
    return lines


def _seconds_line(seconds: Mapping[str, float]) -> str:
    parts = ", ".join(f"{name} {value:.1f}" for name, value in phases(dict(seconds)).items() if name != "total")
    return f"{seconds['total']:.1f} s: {parts}"
