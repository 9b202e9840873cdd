"""Suites: several benchmarks that one command evaluates, each with its own number of samples.

A suite is YAML. Those in recipes/suites ship with the package and are found by name.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from sapo.config.recipes import parse_settings
from sapo.config.rollout import TurnsConfig
from sapo.config.section import Section
from sapo.config.tasks import PromptConfig
from sapo.errors import ConfigError
from sapo.utils.names import nearest
from sapo.utils.reading import read_yaml
from sapo.utils.shipped import shipped_suites

_LABEL = re.compile(r"[\w-]+")
_TAKEN = ("path", "prompt", "turns")


class BenchmarkSettings(Section):
    """How much is drawn of a benchmark, and how. What is null is as `sapo eval` has it for a single task."""

    problems: int | None = Field(None, ge=1)
    """Largest number of held-out problems; null for all rows, or 256 of a task that generates them."""
    samples: int | None = Field(None, ge=1)
    """Completions of each problem (n)."""
    k: list[int] | None = None
    """The k of pass@k to estimate, each at most `samples`."""
    threshold: float | None = None
    """Smallest reward that counts as right."""
    greedy: bool | None = None
    """Draw one more completion of each problem at temperature 0."""
    constant: bool | None = None
    """Measure the best constant answer."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest completion."""
    temperature: float | None = Field(None, ge=0)
    """0 is greedy."""
    top_p: float | None = None
    """Nucleus sampling: the most likely tokens that together have this probability."""
    top_k: int | None = None
    """Sample from so many of the most likely tokens; 0 for all."""
    min_p: float | None = None
    """Sample from tokens with at least this share of the most likely token's probability."""
    prompt: PromptConfig | None = None
    """How questions are put."""
    turns: TurnsConfig | None = None
    """Limits of the episodes of environments."""


class BenchmarkConfig(BenchmarkSettings):
    """One benchmark of a suite. Further settings are those of its task, checked by it."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    task: str | None = None
    """One of sapo.tasks.TASKS, or a file of rows; the benchmark's own name when null."""

    @property
    def options(self) -> dict[str, Any]:
        """Return the task's own settings."""
        return dict(self.model_extra or {})


class SuiteConfig(Section):
    """Benchmarks that are evaluated together."""

    settings: BenchmarkSettings = BenchmarkSettings()
    """Settings of every benchmark that has none of its own."""
    benchmarks: dict[str, BenchmarkConfig] = Field(min_length=1)
    """By name, which is also the name of the benchmark's directory."""

    @model_validator(mode="after")
    def _names_are_names(self) -> SuiteConfig:
        for name in self.benchmarks:
            if not _LABEL.fullmatch(name) or name in _TAKEN:
                raise ValueError(
                    "the name of a benchmark must be letters, digits, _ and -, and not "
                    f"{', '.join(_TAKEN[:-1])} or {_TAKEN[-1]}; got {name!r}; give the task as "
                    f"`task: {name}` under another name"
                )
        return self


def load_suite(name_or_path: str) -> tuple[str, SuiteConfig]:
    """Read a suite.

    Args:
        name_or_path: a YAML file, or the name of a suite that ships with the package (`paper_fig6`).

    Returns:
        Its name, and what it holds.

    Raises:
        ConfigError: there is none, or it is no suite; with one line per mistake.
    """
    path, suites = Path(name_or_path), shipped_suites()
    if not path.is_file():
        if name_or_path not in suites:
            hint = nearest(name_or_path, list(suites))
            raise ConfigError(f"no file of a suite at {name_or_path!r} and no shipped suite of that name{hint}")
        path = suites[name_or_path]
    raw = read_yaml(path)
    if "benchmarks" not in raw:
        raise ConfigError(f"{path} is no suite: it has no `benchmarks`; docs/evaluation.md has an example")
    return path.stem, parse_settings(SuiteConfig, raw)
