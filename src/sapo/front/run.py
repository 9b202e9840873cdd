"""A run as Python has it: its metrics and samples as tables, its report inline in a notebook, its model."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapo.errors import ConfigError
from sapo.run.directory import RunDirectory
from sapo.run.models import newest_model
from sapo.utils.names import did_you_mean
from sapo.utils.reading import read_json
from sapo.workflows import train as training

if TYPE_CHECKING:
    from pandas import DataFrame

ARRAYS = ("prompt_token_ids", "token_ids", "logprobs", "old_logprobs", "log_ratio", "gate_weight", "entropy")
"""Columns of a sample with a value for each token."""


@dataclass(frozen=True)
class Run(training.Run):
    """A run that has ended or was stopped, by its directory.

    >>> Run.__mro__[1].__name__
    'Run'
    """

    @classmethod
    def of(cls, run: training.Run) -> Run:
        """Return what `workflows.train` returned with the methods of this class."""
        return cls(run.directory, run.config, run.summary, run.stopped)

    @classmethod
    def open(cls, directory: str | Path) -> Run:
        """Open the directory of a run, which may be going on.

        Raises:
            ConfigError: it is not the directory of a run.
        """
        path = Path(directory)
        config = RunDirectory.read_config(path)
        summary = path / "summary.json"
        return cls(path, config, read_json(summary, "a run's summary") if summary.is_file() else {}, None)

    def metrics(self, kind: str = "step") -> DataFrame:
        """Return lines of metrics.jsonl as a DataFrame, one row for each; docs/metrics.md has the columns.

        Args:
            kind: step, update, eval, warning or another kind of line; all for every kind.

        Raises:
            ConfigError: the run has no lines of that kind, or pandas is not installed.
        """
        lines = self._lines(self.directory / "metrics.jsonl")
        kinds = sorted({line["kind"] for line in lines})
        chosen = lines if kind == "all" else [line for line in lines if line["kind"] == kind]
        if lines and not chosen:
            raise ConfigError(
                f"kind must be one of {', '.join(kinds)} or all; got {kind!r}{did_you_mean(kind, [*kinds, 'all'])}"
            )
        return _pandas().DataFrame([_flat(line) for line in chosen])

    def samples(self, step: int | None = None, *, tokens: bool = False) -> DataFrame:
        """Return the completions of a step as a DataFrame, one row for each.

        Args:
            step: one that was logged (log.rollouts_every); the newest when None.
            tokens: also the columns that have a value for each token.

        Raises:
            ConfigError: none were logged, or not those of this step.
        """
        files = {int(f.stem.removeprefix("step-")): f for f in (self.directory / "rollouts").glob("step-*.jsonl")}
        if not files:
            raise ConfigError(
                f"{self.directory} has no completions; log.rollouts_every=N writes those of every N steps"
            )
        if step is None:
            step = max(files)
        if step not in files:
            logged = ", ".join(map(str, sorted(files)))
            raise ConfigError(f"step must be one whose completions were logged: {logged}; got {step}")
        dropped = () if tokens else ARRAYS
        lines = [{k: v for k, v in line.items() if k not in dropped} for line in self._lines(files[step])]
        return _pandas().DataFrame([{"step": step, **line} for line in lines])

    def report(self, out: str | Path | None = None) -> Report:
        """Write the page of the run, and return it; a notebook shows it inline.

        Args:
            out: the file; report.html in the run directory when None.

        Raises:
            ConfigError: Plotly is not installed, or no file can be written under that name.
            StorageError: the disk is full or cannot be written to.
        """
        from sapo.report import make_report, write_page

        path = self.directory / "report.html" if out is None else Path(out)
        return Report(write_page(make_report([self.directory]), path))

    @property
    def model_directory(self) -> Path:
        """Return the Hugging Face directory of the newest weights.

        Raises:
            ConfigError: the run has no whole checkpoint yet.
        """
        return newest_model(self.directory)

    def load_model(self) -> tuple[Any, Any]:
        """Return the trained model and its tokenizer, of transformers.

        Raises:
            ConfigError: the run has no whole checkpoint yet.
        """
        from sapo.model.loading import load_policy

        policy = load_policy(self.model_directory, self.config.model.dtype)
        return policy.adapter or policy.model, policy.tokenizer

    def _lines(self, file: Path) -> list[dict[str, Any]]:
        if not file.is_file():
            return []
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in self._figures()
        )
        return f"<b>run {html.escape(str(self.directory))}</b><table>{rows}</table>"

    def __repr__(self) -> str:
        figures = ", ".join(f"{name}: {value}" for name, value in self._figures())
        return f"Run({str(self.directory)!r}, {figures})"

    def _figures(self) -> list[tuple[str, str]]:
        """Return the figures that a person wants to see first, by name."""
        start, final = self.summary.get("start") or {}, self.summary.get("final") or {}
        found = [("steps", f"{self.summary.get('steps', 0)} of {self.config.train.steps}")]
        found += [
            (f"held-out {title}", f"{start[key]:.3f} -> {final[key]:.3f}")
            for key, title in (("pass@1", "pass@1"), ("reward/mean", "mean reward"))
            if key in start and key in final
        ]
        if self.stopped is not None:
            found.append(("stopped at", self.stopped.checkpoint.label))
        return found


@dataclass(frozen=True)
class Report:
    """The page of a run."""

    path: Path

    def _repr_html_(self) -> str:
        """Return the page in a frame: its scripts and styles are its own."""
        page = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        style = "width:100%;height:720px;border:0"
        return f'<iframe title="report of the run" style="{style}" srcdoc="{page}"></iframe>'

    def __repr__(self) -> str:
        return f"Report({str(self.path)!r})"


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line with the figures of `timing` as columns."""
    timing = {f"timing/{name}": value for name, value in (line.get("timing") or {}).items()}
    return {**{k: v for k, v in line.items() if k != "timing"}, **timing}


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ConfigError("a table of a run needs pandas, which is not installed; pip install pandas") from error
    return pandas
