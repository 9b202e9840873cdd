"""The plan of a comparison: arms x learning rates x seeds of one base recipe, and the run of each combination."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo.config import RunConfig
from sapo.config.recipes import parse_recipe, resolve_recipe
from sapo.errors import ConfigError

# Settings that all runs of a comparison share, or that it sets itself, with the reason. An arm that changed one would
# not have the same budget, prompts or problems.
SHARED_KEYS = {
    "run_dir": "runs are written below the comparison's directory (--out)",
    "seed": "seeds sets it for every arm",
    "train.learning_rate": "learning_rates sets it for every arm",
    "train.steps": "the budget is that of settings",
    "train.stop_when": "the budget is that of settings",
    "rollout.prompts_per_step": "the budget is that of settings",
    "rollout.samples_per_prompt": "the budget is that of settings",
    "tasks": "all arms are asked the same prompts, those of settings",
    "prompt": "all arms are asked the same prompts, those of settings",
    "rollout.max_new_tokens": "evaluations have it too, and all arms are evaluated alike",
    "rollout.stop_token_ids": "evaluations have it too, and all arms are evaluated alike",
    "rollout.top_p": "evaluations have it too, and all arms are evaluated alike",
    "rollout.top_k": "evaluations have it too, and all arms are evaluated alike",
    "rollout.min_p": "evaluations have it too, and all arms are evaluated alike",
    "eval": "all arms are evaluated alike, as settings say",
    "threads": "another number of threads rounds differently; set it in settings, for all",
    "device": "another device rounds differently; set it in settings, for all",
}

_ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison.

    `PlannedRun("grpo-lr2e-4-seed0", "grpo", 2e-4, 0, config).directory` is comparisons/mine/runs/grpo-lr2e-4-seed0.
    """

    name: str
    arm: str
    learning_rate: float
    seed: int
    config: RunConfig

    @property
    def directory(self) -> Path:
        """Return its run directory."""
        assert self.config.run_dir is not None
        return Path(self.config.run_dir)


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison, resolved and checked. Made by `load_comparison`, or by `ComparisonPlan.of` from its parts.

    >>> base = {"model": {"path": "m"}, "tasks": [{"name": "arithmetic"}], "train": {"steps": 1}}
    >>> arms = {"sapo": {"objective.name": "sapo"}, "grpo": {"objective.name": "grpo"}}
    >>> plan = ComparisonPlan.of("mine", base, arms, learning_rates=[1e-4], seeds=[0, 1])
    >>> [run.name for run in plan.runs(Path("c"))]
    ['sapo-lr1e-4-seed0', 'grpo-lr1e-4-seed0', 'sapo-lr1e-4-seed1', 'grpo-lr1e-4-seed1']
    """

    name: str
    base: RunConfig
    """Settings that all runs share; its seed and learning rate are not used."""
    arms: Mapping[str, Mapping[str, Any]]
    """Arms by name, each with the dotted keys in which it differs from the base."""
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    baseline: str
    """The arm that the others are compared with."""

    @classmethod
    def of(
        cls,
        name: str,
        base: RunConfig | Mapping[str, Any],
        arms: Mapping[str, Mapping[str, Any]],
        *,
        learning_rates: list[float],
        seeds: list[int],
        baseline: str | None = None,
    ) -> ComparisonPlan:
        """Check the parts and put them together.

        Raises:
            ConfigError: with one line for the first mistake.
        """
        base = base if isinstance(base, RunConfig) else parse_recipe(dict(base))
        # With a process for each run, more than one thread each would compete for the cores.
        base = base.model_copy(update={"run_dir": None, "provenance": None, "threads": base.threads or 1})
        flat = {arm: flatten(settings) for arm, settings in arms.items()}
        baseline = next(iter(flat), "") if baseline is None else baseline
        plan = cls(name, base, flat, tuple(learning_rates), tuple(seeds), baseline)
        plan._check()
        plan.runs(Path())  # refuses a combination that is no valid recipe
        return plan

    def runs(self, directory: Path) -> list[PlannedRun]:
        """Return all runs, seed by seed, so that a stopped comparison has some of each arm."""
        return [
            self._run(directory, arm, rate, seed)
            for seed in self.seeds
            for rate in self.learning_rates
            for arm in self.arms
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the content of comparison.yaml, which is a comparison recipe itself."""
        return {
            "recipe": self.base.model_dump(mode="json", exclude={"run_dir", "provenance"}),
            "arms": {arm: dict(settings) for arm, settings in self.arms.items()},
            "learning_rates": list(self.learning_rates),
            "seeds": list(self.seeds),
            "baseline": self.baseline,
        }

    def _run(self, directory: Path, arm: str, rate: float, seed: int) -> PlannedRun:
        name = f"{arm}-lr{format_rate(rate)}-seed{seed}"
        own = {**self.arms[arm], "train.learning_rate": rate, "seed": seed}
        base = self.base.model_dump(mode="json", exclude={"run_dir", "provenance"})
        try:
            config = resolve_recipe(base, as_overrides(own), f"arm {arm}")
        except ConfigError as error:
            raise ConfigError("\n".join(f"arm {arm}: {line}" for line in str(error).splitlines())) from error
        config = config.model_copy(update={"run_dir": str(directory / "runs" / name)})
        return PlannedRun(name, arm, rate, seed, config)

    def _check(self) -> None:
        if not self.arms:
            raise ConfigError("a comparison needs arms; got none; arms: {sapo: {objective.name: sapo}, ...} has one")
        if self.base.train.stop_when is not None:
            raise ConfigError(
                "the runs of a comparison have one budget of steps; got train.stop_when, which ends each at another; "
                "leave it out"
            )
        for arm, settings in self.arms.items():
            if not _ARM_NAME.fullmatch(arm):
                raise ConfigError(f"an arm's name becomes a directory's: letters, digits and ._+=- ; got {arm!r}")
            for key in settings:
                _refuse_shared(arm, key)
            if "rollout.temperature" in settings and self.base.eval.temperature is None:
                raise ConfigError(
                    f"arm {arm} must not set rollout.temperature while evaluations take theirs from it "
                    "(eval.temperature is null); settings: {eval.temperature: 1.0} evaluates all arms alike"
                )
        if self.baseline not in self.arms:
            raise ConfigError(f"baseline must be one of the arms ({', '.join(self.arms)}); got {self.baseline!r}")
        for what, values in (("seeds", self.seeds), ("learning_rates", self.learning_rates)):
            if not values:
                raise ConfigError(f"a comparison needs {what}; got none; {what}: [{_EXAMPLES[what]}] has some")
            if len(set(map(format_rate, values) if what == "learning_rates" else values)) < len(values):
                raise ConfigError(f"{what} must differ from each other; got {list(values)}")
        if min(self.seeds) < 0:
            raise ConfigError(f"seeds must be 0 or more; got {min(self.seeds)}")


_EXAMPLES = {"seeds": "0, 1, 2", "learning_rates": "1.0e-4, 2.0e-4"}


def _refuse_shared(arm: str, key: str) -> None:
    for shared, reason in SHARED_KEYS.items():
        if key == shared or key.startswith(shared + "."):
            raise ConfigError(f"arm {arm} must not set {key}, which all runs of a comparison share: {reason}")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted keys; a list is a value.

    >>> flatten({"objective": {"name": "grpo", "eps_low": 0.2}, "model.routing_replay": True})
    {'objective.name': 'grpo', 'objective.eps_low': 0.2, 'model.routing_replay': True}
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Return dotted keys as `key=value`.

    >>> as_overrides({"objective.name": "grpo", "train.learning_rate": 0.0002})
    ['objective.name="grpo"', 'train.learning_rate=0.0002']
    """
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def format_rate(rate: float) -> str:
    """Format a learning rate as people write it.

    >>> format_rate(0.0001), format_rate(2.5e-4), format_rate(1.0)
    ('1e-4', '2.5e-4', '1e0')
    """
    mantissa, _, exponent = f"{rate:e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
