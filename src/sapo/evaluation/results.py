"""Results of an evaluation on disk: results.json with completions.jsonl. docs/evaluation.md has their schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.errors import ConfigError
from sapo.evaluation.figures import Clock, ConstantAnswer, Evaluation
from sapo.evaluation.store import read_completions
from sapo.utils.reading import interpreting, read_json

SCHEMA = "sapo.evaluation/1"


@dataclass(frozen=True)
class Results:
    """An evaluation with the model, task, prompt and sampling it belongs to.

    `Results.read("evals/run-add4").evaluation.mean` is the mean@n that results.json there has.
    """

    about: Mapping[str, Any]
    """model, task, prompt, sampling and machine, as JSON values."""
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """Return results.json; the clock is in "timing" alone."""
        return {
            "schema": SCHEMA,
            **self.about,
            "results": self.evaluation.to_json(),
            "timing": self.evaluation.timing(),
        }

    @classmethod
    def read(cls, directory: str | Path) -> Results:
        """Read a finished evaluation from its directory, completions included.

        Raises:
            ConfigError: it is none.
        """
        directory = Path(directory)
        record = read_results(directory)
        with interpreting(directory / "results.json", "the results.json of an evaluation"):
            figures, timing = record["results"], record["timing"]
            constant = figures["constant"]
            evaluation = Evaluation.of(
                figures["task"],
                read_completions(directory),
                ks=[int(name.removeprefix("pass@")) for name in figures if name.startswith("pass@")],
                threshold=figures["threshold"],
                constant=ConstantAnswer(**constant) if constant else None,
                clock=Clock(timing["generate_seconds"], timing["score_seconds"]),
            )
            about = {k: v for k, v in record.items() if k not in ("schema", "results", "timing")}
            return cls(about, evaluation)


def read_results(path: str | Path) -> dict[str, Any]:
    """Read results.json, by its own path or its directory's.

    Raises:
        ConfigError: there is none, or it is not what an evaluation of this version writes.
    """
    path = Path(path)
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        unfinished = (file.parent / "progress.jsonl").exists()
        state = "it was not finished, and the same `sapo eval` resumes it" if unfinished else "`sapo eval` writes them"
        raise ConfigError(f"no results at {file}; {state}")
    record = read_json(file, "the results.json of an evaluation")
    schema = record.get("schema")
    if schema != SCHEMA:
        raise ConfigError(f"{file} must be of schema {SCHEMA}; got {schema!r}; evaluate again with this version")
    return record
