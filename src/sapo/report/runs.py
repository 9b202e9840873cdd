"""Run directories as a report reads them: settings, figures and rollouts, of runs under way too.

Nothing is locked or written. Settings are taken as they are in config.yaml, without validation, so that a run of
another version of the package can be reported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from sapo.errors import ConfigError

# The loader in C, where it was built, is ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

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
        """Tell whether all steps are done and the summary is written."""
        return self.summary is not None and self.summary.get("steps") == self.planned_steps

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
            told = json.loads((self.path / "failure.json").read_bytes())
            return str(told["reason"])
        except (OSError, ValueError, KeyError, TypeError):
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
                shape = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            return any(shape.get(k) for k in ("num_experts", "num_local_experts", "n_routed_experts"))
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
            plan = yaml.safe_load((path / "comparison.yaml").read_text(encoding="utf-8"))
            planned = len(plan["arms"]) * len(plan["learning_rates"]) * len(plan["seeds"])
        except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
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
    try:
        settings = yaml.load((path / "config.yaml").read_text(encoding="utf-8"), Loader=_LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path / 'config.yaml'} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("objective"), dict):
        raise ConfigError(f"{path / 'config.yaml'} must hold a run's settings with an objective; it does not")
    return ReportedRun(name, path, settings, read_lines(path / "metrics.jsonl"), _read_summary(path / "summary.json"))


def _read_summary(file: Path) -> dict[str, Any] | None:
    try:
        summary = json.loads(file.read_bytes()) if file.is_file() else None
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}; the file was changed or cut") from error
    return summary if isinstance(summary, dict) else None


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
        except ValueError as error:
            raise ConfigError(f"{file}, line {number} is not JSON: {error}; the file was changed or cut") from error
        if not isinstance(record, dict):
            raise ConfigError(f"{file}, line {number} must be an object; got {type(record).__name__}")
        records.append(record)
    return tuple(records)
