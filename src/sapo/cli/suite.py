"""`sapo eval --suite`: a model on the benchmarks of a suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sapo.cli.terminal import console, say, stop_signals


def evaluate_suite(
    model: Path,
    suite: str,
    overrides: Sequence[str],
    given: dict[str, Any],
    *,
    seed: int | None,
    dtype: str | None,
    device: str,
    out: Path | None,
) -> None:
    """Evaluate a model on a suite, print one table and write one file of results.

    Args:
        given: what options of the command set in place of the suite's own settings; None for what they do not.
    """
    from sapo.cli.tables import Progress, measured, suite_table
    from sapo.evaluation import Evaluation
    from sapo.tasks import notices_of
    from sapo.workflows.evaluate import EvaluatedModel
    from sapo.workflows.suite import plan_suite, suite_directory

    planned = plan_suite(suite, overrides, model=model, seed=seed, **given)
    subject = EvaluatedModel.load(model, dtype, device)
    asked = planned.ask(subject.policy)
    directory, note = (out, None) if out is not None else suite_directory(model, subject, planned, asked)
    for line in [*([note] if note else []), *notices_of([p.task for p in planned.benchmarks.values()])]:
        say(f"note: {line}")
    for label, benchmark in planned.benchmarks.items():
        say(f"note: {benchmark.extent(asked[label])}")
    bars = {label: Progress(console, f"problems of {label}") for label in planned.benchmarks}

    def show_progress(label: str, done: int, total: int) -> None:
        bars[label](done, total)
        if done == total:
            bars[label].close()

    def show_done(label: str, done: Evaluation) -> None:
        mean = measured(None if done.mean is None else done.mean.value)
        say(f"{label}: mean@{done.samples} {mean} in {done.seconds:.0f} s")

    with stop_signals() as stop:
        try:
            results = planned.run(
                subject,
                asked,
                directory,
                should_stop=stop,
                on_progress=show_progress,
                on_done=show_done,
                report=lambda text: say(f"note: {text}"),
            )
        finally:
            for bar in bars.values():
                bar.close()
    console.print(suite_table(planned.name, results))
    say(f"wrote {directory}/results.json, and the completions of each benchmark to its directory there")
