"""Run directories as a report reads them: settings, figures and rollouts, of runs under way too.

Nothing is locked or written. Settings are taken as they are in config.yaml, without validation, so that a run of
another version of the package can be reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sapo.errors import ConfigError
from sapo.model.mixtures import num_experts
from sapo.utils.reading import is_whole, read_json, read_yaml

MOST_POINTS = 1500
"""Largest number of points of one curve of one run. Of a longer one every second, third, ... point is drawn, no
average."""


@dataclass(frozen=True)
class ReportedRun:
    """One run. Made by `read_run`.

    >>> step = {"kind": "step", "step": 1, "pass@1": 0.5}
    >>> run = ReportedRun("q", Path("runs/q"), {"train": {"steps": 2}}, (step,), None)
    >>> run.series("pass@1")
    ((1,), (0.5,))
    >>> run.finished, run.steps
    (False, 1)
    """

    name: str
    """The last part of its path, or its whole path where two runs share the last part."""
    path: Path
    settings: dict[str, Any]
    """config.yaml."""
    records: tuple[dict[str, Any], ...]
    """metrics.jsonl."""
    summary: dict[str, Any] | None
    """summary.json, once there is one."""

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of a kind, in the order they were written."""
        return self._by_kind.get(kind, [])

    @cached_property
    def _by_kind(self) -> dict[str, list[dict[str, Any]]]:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for record in self.records:
            kinds.setdefault(str(record.get("kind")), []).append(record)
        return kinds

    def series(self, metric: str, kind: str = "step") -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return steps and values of a metric where it was logged; every n-th of a very long run (`MOST_POINTS`)."""
        return thinned([(r["step"], r[metric]) for r in self.of_kind(kind) if metric in r])

    @cached_property
    def last_updates(self) -> list[dict[str, Any]]:
        """Return the last update of each step that moved the weights: the farthest off policy."""
        last = {r["step"]: r for r in self.of_kind("update") if not r.get("skipped")}
        return list(last.values())

    @property
    def steps(self) -> int:
        """Return the number of whole steps done."""
        return max((r["step"] for r in self.of_kind("step")), default=0)

    @property
    def planned_steps(self) -> int | None:
        """Return train.steps."""
        return self.setting("train.steps")

    @property
    def finished(self) -> bool:
        """Tell whether the summary is written of all steps, or of those until train.stop_when ended the run."""
        return has_finished(self.settings, self.summary, self.steps)

    @property
    def ended(self) -> bool:
        """Tell whether the run is over: finished, or stopped by itself."""
        return self.finished or self.failure is not None

    @property
    def failure(self) -> str | None:
        """Return why a run stopped itself, from its failure.json; None where it did not, or finished since."""
        if self.finished:
            return None
        try:
            return str(read_json(self.path / "failure.json", "why a run stopped")["reason"])
        except (ConfigError, KeyError):
            return None

    def setting(self, key: str) -> Any:
        """Return a dotted key of config.yaml; None where there is none."""
        value: Any = self.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def is_mixture_of_experts(self) -> bool:
        """Tell it from the cold start's architecture, or from the config.json of the newest checkpoint."""
        if (architecture := self.setting("model.coldstart.architecture")) is not None:
            return "moe" in str(architecture)
        for checkpoint in reversed(self.checkpoints):
            try:
                shape = read_json(checkpoint / "config.json", "a model's settings")
            except ConfigError:
                continue
            return num_experts(shape) > 0
        return "moe" in str(self.setting("model.path")).lower()

    @property
    def checkpoints(self) -> list[Path]:
        """Return the directories of checkpoints, the newest last."""
        return sorted((self.path / "checkpoints").glob("step-*"))

    @property
    def rollouts(self) -> dict[int, Path]:
        """Return step -> file of its completions."""
        files = sorted((self.path / "rollouts").glob("step-*.jsonl"))
        return {int(f.stem.removeprefix("step-")): f for f in files if f.stem.removeprefix("step-").isdigit()}


def has_finished(settings: Mapping[str, Any], summary: Mapping[str, Any] | None, steps: int) -> bool:
    """Tell whether a run has made all steps, or was ended by its own rule, train.stop_when.

    The summary of a run that a resume has taken further is of an earlier end.

    Args:
        settings: config.yaml.
        summary: summary.json, once there is one.
        steps: whole steps done, by metrics.jsonl.
    """
    train = settings.get("train")
    if summary is None or not isinstance(train, dict):
        return False
    if summary.get("ended_early") is not None and train.get("stop_when") is not None:
        return summary.get("steps") == steps
    return summary.get("steps") == train.get("steps")


def thinned(points: Sequence[tuple[int, Any]]) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Split points into x and y; where there are too many keep every n-th and the last."""
    every = -(-len(points) // MOST_POINTS) or 1
    kept = [*points[::every]]
    if points and (len(points) - 1) % every:
        kept.append(points[-1])
    return tuple(x for x, _ in kept), tuple(y for _, y in kept)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return run directories in the order given: a run itself, the runs of a comparison (DIR/runs/*), or those in a
    directory.

    Raises:
        ConfigError: nothing is there, or no run is in it.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"no run directory at {path}; a report is made of what `sapo train RECIPE` wrote")
        if is_run(path):
            inside = [path]
        else:
            inside = [p for d in (path / "runs", path) if d.is_dir() for p in sorted(d.iterdir()) if is_run(p)]
        if not inside:
            raise ConfigError(
                f"{path} has no config.yaml, and no directory in it has: it is neither a run nor a directory of runs; "
                "name one that `sapo train` or `sapo compare` wrote"
            )
        found += inside
    return list({p.resolve(): p for p in found}.values())


def to_come(paths: Sequence[Path]) -> int:
    """Count the runs of comparisons among these paths that have no directory yet."""
    missing = 0
    for path in paths:
        try:
            plan = read_yaml(path / "comparison.yaml")
            planned = len(plan["arms"]) * len(plan["learning_rates"]) * len(plan["seeds"])
        except (ConfigError, KeyError, TypeError):
            continue  # no comparison, or one whose plan cannot be read
        missing += max(0, planned - sum(is_run(p) for p in (path / "runs").glob("*")))
    return missing


def is_run(path: Path) -> bool:
    """Tell whether a directory is a run's."""
    return (path / "config.yaml").is_file()


def read_runs(paths: Sequence[Path]) -> list[ReportedRun]:
    """Read the runs at these directories, under names that tell them apart.

    Raises:
        ConfigError: a file of one is not what a run writes.
    """
    names = [p.resolve().name for p in paths]
    clear = len(set(names)) == len(names)
    return [read_run(p, name if clear else str(p)) for p, name in zip(paths, names, strict=True)]


def read_run(path: Path, name: str) -> ReportedRun:
    """Read one run.

    Raises:
        ConfigError: a file of it is not what a run writes.
    """
    settings = read_yaml(path / "config.yaml", "a run's settings with an objective", quick=True)
    if not isinstance(settings.get("objective"), dict):
        raise ConfigError(f"{path / 'config.yaml'} must hold a run's settings with an objective; it does not")
    records = read_lines(path / "metrics.jsonl")
    for number, record in enumerate(records, 1):
        if type(record.get("kind")) is not str or not is_whole(record.get("step")):
            raise ConfigError(
                f"{path / 'metrics.jsonl'}, line {number} must have a kind and a step; the file was changed"
            )
    return ReportedRun(name, path, settings, records, _read_summary(path / "summary.json"))


def _read_summary(file: Path) -> dict[str, Any] | None:
    return (
        read_json(file, "JSON, the summary of a run", way_out="the file was changed or cut") if file.is_file() else None
    )


def read_lines(file: Path) -> tuple[dict[str, Any], ...]:
    """Read the records of a file of JSON lines; a last line that is still being written is left out.

    Raises:
        ConfigError: another line is no record.
    """
    if not file.is_file():
        return ()
    lines = file.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}, line {number} is not JSON: {error}; the file was changed or cut") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{file}, line {number} must be an object; got {type(record).__name__}")
        records.append(record)
    return tuple(records)
