"""A suite of benchmarks from its plan to its files: one model, one directory, one table.

evals/NAME/aime25/ ...     each benchmark, kept as an evaluation alone is, so that the same command resumes it
           results.json    the figures of all of them; docs/evaluation.md has its schema
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.config.recipes import parse_prompt, parse_settings
from sapo.config.rollout import TurnsConfig
from sapo.config.section import Section
from sapo.config.suites import BenchmarkConfig, BenchmarkSettings, SuiteConfig, load_suite
from sapo.data import Prompt
from sapo.errors import ConfigError, UserError
from sapo.evaluation import Evaluation, Results
from sapo.evaluation.store import difference
from sapo.model.policy import Policy
from sapo.tasks import TASKS
from sapo.tasks.rows.reading import is_rows_file, name_of
from sapo.utils.files import write_whole
from sapo.utils.hashing import seed_for
from sapo.workflows.evaluate import EvaluatedModel, PlannedEvaluation
from sapo.workflows.evaluation_plan import (
    DEFAULT_SEED,
    changed_turns,
    evaluated_name,
    make_settings,
    named_task,
    plan_options,
    refuse_turns_of_no_environment,
    split_overrides,
    split_turns,
    turns_of,
)

SCHEMA = "sapo.suite/1"
RESULTS = "results.json"
_OF_EACH_PROBLEM = ("per_problem", "slices")


@dataclass(frozen=True)
class PlannedSuite:
    """Benchmarks that are planned."""

    name: str
    benchmarks: Mapping[str, PlannedEvaluation]
    labels: frozenset[str]
    """Names of all benchmarks of the suite, of those left out too: directories they may have."""

    def ask(self, policy: Policy) -> dict[str, list[Prompt]]:
        """Return the held-out problems of each benchmark as the model will see them.

        All are asked before the first is drawn, so that a benchmark which cannot be asked costs no hours.

        Raises:
            ConfigError, ModelError, TaskError: one cannot be asked; the benchmark is named.
        """
        asked = {}
        for label, planned in self.benchmarks.items():
            with naming(label):
                asked[label] = planned.ask(policy)
        return asked

    def run(
        self,
        subject: EvaluatedModel,
        asked: Mapping[str, Sequence[Prompt]],
        out: Path,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[str, int, int], None] = lambda label, done, total: None,
        on_done: Callable[[str, Evaluation], None] = lambda label, evaluation: None,
        report: Callable[[str], None] = lambda text: None,
    ) -> dict[str, Evaluation]:
        """Evaluate the benchmarks one after the other, or resume what `out` keeps, and write the results there.

        Args:
            asked: from `ask`.
            on_progress: called with a benchmark, its problems done, and all of them.
            on_done: called with the figures of a benchmark when it is done.
            report: called with a sentence on what `out` held already.

        Raises:
            ConfigError: `out` holds something else.
            Interrupted: `should_stop` returned true.
        """
        held = self.difference(out, subject, asked)
        if held is not None:
            raise ConfigError(f"{out} holds {held}; name another directory with --out")
        done: dict[str, Results] = {}
        for label, planned in self.benchmarks.items():

            def progress(n: int, total: int, label: str = label) -> None:
                on_progress(label, n, total)

            with naming(label):
                done[label] = planned.run(
                    subject,
                    asked[label],
                    out=out / label,
                    should_stop=should_stop,
                    on_progress=progress,
                    report=report,
                )
            on_done(label, done[label].evaluation)
        record = self._record(subject, done)
        write_whole(out / RESULTS, json.dumps(record, indent=1, allow_nan=False) + "\n")
        return {label: results.evaluation for label, results in done.items()}

    def difference(self, out: Path, subject: EvaluatedModel, asked: Mapping[str, Sequence[Prompt]]) -> str | None:
        """Describe what a directory holds in place of this suite; None when it holds this one, or nothing yet."""
        if not out.exists():
            return None
        if not out.is_dir():
            return "no suite: it is a file"
        strangers = sorted({p.name for p in out.iterdir() if not p.name.startswith(".")} - self.labels - {RESULTS})
        if strangers:
            return f"no suite of benchmarks but {strangers[0]}"
        if not any((out / label).is_dir() for label in self.labels) and (out / RESULTS).exists():
            return f"no suite of benchmarks but {RESULTS}"
        for label, planned in self.benchmarks.items():
            found = difference(out / label, planned.asked(subject, asked[label]))
            if found is not None:
                return f"in {label} {found}"
        return None

    def _record(self, subject: EvaluatedModel, done: Mapping[str, Results]) -> dict[str, Any]:
        """Return the results of all benchmarks as a JSON value; what each problem came to is in their directories."""
        benchmarks = {}
        for label, results in done.items():
            record = results.to_json()
            figures = {k: v for k, v in record["results"].items() if k not in _OF_EACH_PROBLEM}
            kept = {name: record[name] for name in ("task", "sampling", "machine")}
            benchmarks[label] = {"directory": label, **kept, "results": figures, "timing": record["timing"]}
        return {"schema": SCHEMA, "suite": self.name, "model": subject.about(), "benchmarks": benchmarks}


def plan_suite(
    name_or_path: str,
    overrides: Sequence[str] = (),
    *,
    model: Path | None = None,
    seed: int | None = None,
    **given: Any,
) -> PlannedSuite:
    """Plan the benchmarks of a suite, each made and checked.

    Args:
        name_or_path: a suite's file, or the name of one that ships.
        overrides: `NAME.KEY=VALUE` for a benchmark's settings and those of its task, `NAME=null` to leave one out,
            `prompt.KEY=VALUE` for all, `turns.KEY=VALUE` for the episodes of all environments, and `path=DIRECTORY`
            for a directory with the rows of each.
        model: what is evaluated; a run's own limits of episodes hold where the suite has none.
        seed: of the draws and of the choice of problems.
        given: fields of EvaluationSettings and SamplingParams, in place of the suite's; None leaves the suite's own.

    Raises:
        ConfigError, TaskError: what is wrong with it; the benchmark is named.
    """
    name, suite = load_suite(name_or_path)
    given = {key: value for key, value in given.items() if value is not None}
    seed = DEFAULT_SEED if seed is None else seed
    asked = _Overrides.of(overrides, list(suite.benchmarks))
    own_turns = turns_of(model)
    planned = {}
    for label in suite.benchmarks:
        if label not in asked.left_out:
            with naming(label):
                planned[label] = _plan_benchmark(label, suite, asked, given, seed, own_turns)
    if not planned:
        raise ConfigError(f"a suite must keep a benchmark; all of {name} were left out")
    refuse_turns_of_no_environment(list(planned.values()), asked.of_turns)
    return PlannedSuite(name, planned, frozenset(suite.benchmarks))


def suite_directory(
    model: Path, subject: EvaluatedModel, planned: PlannedSuite, asked: Mapping[str, Sequence[Prompt]]
) -> tuple[Path, str | None]:
    """Choose the directory of a suite; return it with a note on the choice.

    It is evals/MODEL-SUITE or, where that holds something else, the first of -2, -3, ... that does not.
    """
    first = Path("evals") / f"{evaluated_name(model)}-{planned.name}"
    candidate, number, reason = first, 1, None
    while (found := planned.difference(candidate, subject, asked)) is not None:
        reason = reason or f"{first} holds {found}"
        number += 1
        candidate = first.with_name(f"{first.name}-{number}")
    return candidate, reason and f"{reason}; this one is written to {candidate}"


@contextmanager
def naming(label: str) -> Iterator[None]:
    """Have a user's mistake within the block name the benchmark it is in."""
    try:
        yield
    except UserError as error:
        raise type(error)("\n".join(f"{label}: {line}" for line in str(error).splitlines())) from error


@dataclass(frozen=True)
class _Overrides:
    """Settings of a command line, sorted by the benchmark they are for."""

    of_benchmark: Mapping[str, Sequence[str]]
    of_prompts: Sequence[str]
    of_turns: Mapping[str, Any]
    rows: Path | None
    """Directory with the rows of each benchmark."""
    left_out: frozenset[str]

    @classmethod
    def of(cls, overrides: Sequence[str], labels: Sequence[str]) -> _Overrides:
        """Sort overrides; see `plan_suite`."""
        of_benchmark: dict[str, list[str]] = {label: [] for label in labels}
        of_prompts, rows, left_out = [], None, set()
        of_turns, others = split_turns(overrides)
        for override in others:
            key, _, value = override.partition("=")
            label, dot, _ = key.partition(".")
            if label in of_benchmark and dot:
                of_benchmark[label].append(override.removeprefix(f"{label}."))
            elif label in of_benchmark and value == "null":
                left_out.add(label)
            elif label == "prompt" and dot:
                of_prompts.append(override)
            elif key == "path" and value:
                rows = Path(value)
            else:
                raise ConfigError(
                    f"a setting of a suite must be written BENCHMARK.KEY=VALUE, BENCHMARK=null to leave one out, "
                    f"prompt.KEY=VALUE, turns.KEY=VALUE or path=DIRECTORY; got {override!r}; its benchmarks are "
                    f"{', '.join(labels)}"
                )
        return cls(of_benchmark, of_prompts, of_turns, rows, frozenset(left_out))


def _plan_benchmark(
    label: str, suite: SuiteConfig, asked: _Overrides, given: Mapping[str, Any], seed: int, turns: TurnsConfig
) -> PlannedEvaluation:
    changes, others = split_turns(asked.of_benchmark[label])
    options, own_prompt = split_overrides(others)
    common_prompt = split_overrides(asked.of_prompts)[1]
    shared, written = suite.settings, suite.benchmarks[label]
    config = parse_settings(BenchmarkConfig, {**_written(shared), **_written(written), **options})
    prompt = parse_prompt(_joined(shared.prompt, written.prompt, common_prompt, own_prompt))
    written_turns = _joined(written.turns, changes)
    limits = changed_turns(turns, {**_joined(shared.turns), **written_turns, **asked.of_turns, **changes})
    kind, task_options = named_task(config.task or label, config.options)
    if asked.rows is not None and "path" not in task_options and _takes_rows(kind):
        task_options["path"] = str(find_rows(asked.rows, label))
    settings = make_settings(
        {"constant": True, "turns": limits},
        {"seed": seed_for(seed, "evaluation"), "max_new_tokens": 64},
        {**_drawn(config), **given},
    )
    planned = plan_options(kind, task_options, seed, prompt, settings)
    refuse_turns_of_no_environment([planned], written_turns)
    return planned


def _joined(*parts: Section | Mapping[str, Any] | None) -> dict[str, Any]:
    """Join what several parts set, the later ones over those before."""
    joined: dict[str, Any] = {}
    for part in parts:
        joined |= part.model_dump(exclude_unset=True) if isinstance(part, Section) else part or {}
    return joined


def _written(config: BenchmarkSettings) -> dict[str, Any]:
    """Return the settings that a suite's file has for a benchmark, those of prompts and episodes aside."""
    return {k: v for k, v in config.model_dump(exclude_unset=True).items() if k not in ("prompt", "turns")}


def _drawn(config: BenchmarkConfig) -> dict[str, Any]:
    """Return what is set of EvaluationSettings and SamplingParams."""
    names = set(BenchmarkSettings.model_fields) - {"prompt", "turns", "k"}
    found = {name: value for name in sorted(names) if (value := getattr(config, name)) is not None}
    return found if config.k is None else {**found, "ks": tuple(config.k)}


def _takes_rows(kind: str) -> bool:
    return kind in TASKS and "path" in inspect.signature(TASKS[kind]).parameters


def find_rows(directory: Path, label: str) -> Path:
    """Return the rows of a benchmark in a directory: LABEL.jsonl, LABEL_anything.jsonl, or a folder of such a name.

    Raises:
        ConfigError: there are none, or several.
    """
    if not directory.is_dir():
        raise ConfigError(
            f"path must be a directory with the rows of each benchmark; got {directory}; the rows of one benchmark are "
            f"{label}.path=FILE"
        )
    rows = [p for p in sorted(directory.iterdir()) if is_rows_file(p) or p.is_dir()]
    found = [p for p in rows if name_of(p) == label] or [p for p in rows if name_of(p).startswith(f"{label}_")]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ConfigError(
            f"path must have one file of rows {label}.jsonl, or one whose name begins with {label}_; "
            f"got {names} in {directory}; give {label}.path=FILE, or leave it out with {label}=null"
        )
    return found[0]
