"""One evaluation from its plan to its files: the model, the task, how much is drawn, where it is kept."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sapo.config import RolloutConfig
from sapo.config.rollout import TurnsConfig
from sapo.data import Prompt
from sapo.environments import is_environment
from sapo.errors import ConfigError
from sapo.evaluation import Evaluation, EvaluationStore, Results, ask, best_constant, examine, write_page
from sapo.evaluation.examination import InMemoryStore, ProgressStore
from sapo.model.policy import Policy
from sapo.rollout.episodes.joining import joiners_for
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat, apply_limit
from sapo.rollout.registry import make_engine, require
from sapo.rollout.weights import loaded
from sapo.run.machine import DECIDING_BITS, provenance
from sapo.run.models import load_model
from sapo.tasks import Task

CHUNK_SEQUENCES = 256
"""Sequences drawn, judged and stored together: as many as the engine decodes at once. A kill loses at most one chunk.
The price is waiting for the last sequence of each chunk while part of the rows is idle."""

GENERATED_PROBLEMS = 256
"""Problems of a task that generates them, where no number is asked for. Of rows, all are evaluated."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How many problems and samples are drawn, and how.

    >>> EvaluationSettings(samples=16, ks=(1, 4, 16)).samples
    16
    """

    problems: int | None = None
    """None: all rows of a task that has rows, and GENERATED_PROBLEMS of one that generates them."""
    samples: int = 4
    ks: tuple[int, ...] = (1,)
    threshold: float = 1.0
    greedy: bool = False
    constant: bool = False
    engine: str = "local"
    """What draws, as `rollout.engine` names it."""
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=64))
    turns: TurnsConfig = field(default_factory=TurnsConfig)
    """Limits of the episodes of an environment."""

    def __post_init__(self) -> None:
        for name in ("problems", "samples"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be 1 or more; got {number}")
        if not math.isfinite(self.threshold):
            raise ConfigError(f"--threshold must be a finite reward; got {self.threshold}; 1 counts full rewards")
        if not self.ks or min(self.ks) < 1 or max(self.ks) > self.samples:
            text = ",".join(map(str, self.ks))
            raise ConfigError(f"every k must lie in 1..samples ({self.samples}); got {text}; raise --samples")


@dataclass(frozen=True)
class EvaluatedModel:
    """The model that is evaluated."""

    policy: Policy
    path: str
    """Its name in the record."""
    weights: str
    """Fingerprint of its weights, independent of where they lie."""

    @classmethod
    def load(cls, model: str | Path | Policy, dtype: str | None = None, device: str = "auto") -> EvaluatedModel:
        """Load a model directory, or the newest whole checkpoint of a run.

        Args:
            dtype: that of a run's own recipe, else float32, when None.

        Raises:
            ConfigError, ModelError: it cannot be used.
        """
        if isinstance(model, Policy):
            return cls(model, "a loaded policy", model.fingerprint())
        policy, directory = load_model(model, dtype, device)
        return cls(policy, str(directory), policy.fingerprint())

    def about(self) -> dict[str, Any]:
        """Return what the record says of the model, as a JSON value."""
        return {
            "path": self.path,
            "weights": self.weights,
            "dtype": str(self.policy.dtype).removeprefix("torch."),
            "parameters": self.policy.num_parameters,
        }


@dataclass(frozen=True)
class PlannedEvaluation:
    """An evaluation that is planned: a task, how its questions are asked, and how much is drawn."""

    task: Task
    prompt_format: PromptFormat
    settings: EvaluationSettings
    task_about: Mapping[str, Any]
    """Content of the record's task section."""

    def run(
        self,
        subject: EvaluatedModel,
        prompts: Sequence[Prompt] | None = None,
        *,
        out: str | Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        report: Callable[[str], None] = lambda text: None,
    ) -> Results:
        """Evaluate, or resume what `out` keeps, and write the results there.

        Args:
            prompts: from `ask`; None calls it.
            on_progress: called with the problems done, and all of them.
            report: called with a sentence on what `out` held already, on how a model runs that runs slowly, and on
                completions that failed to be judged.

        Raises:
            ConfigError: `out` holds another evaluation.
            Interrupted: `should_stop` returned true.
        """
        policy = subject.policy
        prompts = self.ask(policy) if prompts is None else prompts
        about = self._about(subject)
        machine = {**provenance(str(policy.device)), "threads": torch.get_num_threads()}
        if out is None:
            evaluation = self._evaluate(policy, prompts, InMemoryStore(), should_stop, on_progress, report)
            return Results({**about, "machine": machine}, evaluation)
        with EvaluationStore(Path(out), self._asked(about, prompts), machine) as store:
            _report_kept_work(store, len(prompts), machine, report)
            torch.set_num_threads(store.machine["threads"])  # another number of threads rounds differently
            evaluation = self._evaluate(policy, prompts, store, should_stop, on_progress, report)
            results = Results({**about, "machine": store.machine}, evaluation)
            store.finish(results.to_json())
            write_page(results, Path(out) / "index.html", (picture for p in prompts for picture in p.pictures))
        return results

    def _evaluate(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        keeper: ProgressStore,
        should_stop: Callable[[], bool],
        on_progress: Callable[[int, int], None],
        report: Callable[[str], None],
    ) -> Evaluation:
        settings = self.settings
        made = make_engine(policy, RolloutConfig(engine=settings.engine))
        for text in policy.notices:
            report(text)
        policy.notices.clear()  # each is said once, however many tasks are evaluated
        with closing(made) as engine, loaded(engine, policy.weights(), version=0):
            examine(
                policy,
                engine,
                self.task,
                prompts,
                keeper,
                chunk=self._chunk,
                samples=settings.samples,
                params=self._params(policy),
                greedy=settings.greedy,
                turns=settings.turns,
                joiners=joiners_for(policy, self.task, self.prompt_format, prompts[0]),
                should_stop=should_stop,
                on_progress=on_progress,
            )
        best = None
        if settings.constant and not is_environment(self.task):
            best = best_constant(self.task, prompts, threshold=settings.threshold, should_stop=should_stop)
        evaluation = Evaluation.of(
            self.task.name,
            keeper.answered,
            ks=settings.ks,
            threshold=settings.threshold,
            constant=best,
            clock=keeper.clock,
        )
        if (failures := evaluation.failure(settings.turns.max_environment_errors)) is not None:
            report(failures)
        return evaluation

    @property
    def _chunk(self) -> int:
        return max(1, CHUNK_SEQUENCES // self.settings.samples)

    def _params(self, policy: Policy) -> SamplingParams:
        params = self.settings.params
        return replace(params, stop_token_ids=params.stop_token_ids | policy.stop_token_ids)

    def asked(self, subject: EvaluatedModel, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return what identifies this evaluation to its directory."""
        return self._asked(self._about(subject), prompts)

    def ask(self, policy: Policy) -> list[Prompt]:
        """Return the held-out problems as the model will see them.

        Raises:
            ConfigError: one leaves no room for a completion, or ends in a way that the engine cannot.
        """
        if self.prompt_format.stop:
            require(self.settings.engine, "stop_strings", "prompt.stop", "leave it out")
        apply_limit(policy, self.task, self.prompt_format)
        prompts = ask(policy, self.task, self._problems, self.prompt_format)
        longest, room = max(prompts, key=lambda p: len(p.token_ids)), self.settings.params.max_new_tokens
        if policy.max_length is not None and len(longest.token_ids) + room > policy.max_length:
            raise ConfigError(
                f"--max-new-tokens must leave room for the prompt; got {room} with a prompt of "
                f"{len(longest.token_ids)} tokens ({longest.text[:32]!r}) in a model of {policy.max_length}"
            )
        return prompts

    def extent(self, prompts: Sequence[Prompt]) -> str:
        """Say how many problems are evaluated, of how many.

        Args:
            prompts: from `ask`.
        """
        name, count, there = self.task.name, len(prompts), held_out_rows(self.task)
        if there is None:
            return f"{name}: {count:,} generated problems; --problems sets how many"
        asked = self.settings.problems or 0
        more = f"; {asked:,} were asked for" if asked > there else ""
        left = f"; --problems {there} takes all" if count < there else ""
        copies = getattr(self.task, "held_out_copies", 0)
        repeated = f" (besides {copies:,} rows that repeat one)" if copies else ""
        return f"{name}: {count:,} of {there:,} held-out problems{repeated}{more or left}"

    @property
    def _problems(self) -> int:
        if self.settings.problems is not None:
            return self.settings.problems
        return held_out_rows(self.task) or GENERATED_PROBLEMS

    def _about(self, subject: EvaluatedModel) -> dict[str, Any]:
        sampling = asdict(self._params(subject.policy))
        return {
            "model": subject.about(),
            "task": dict(self.task_about),
            "held_out_rows": held_out_rows(self.task),
            "prompt": asdict(self.prompt_format),
            "sampling": {**sampling, "stop_token_ids": sorted(sampling["stop_token_ids"])},
            **({} if self.settings.engine == "local" else {"engine": self.settings.engine}),
        }

    def _asked(self, about: Mapping[str, Any], prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return all that changes a completion or its judgement. Where the model lies, and what is counted at the end,
        are not in it."""
        model = about["model"]
        return {
            "samples": self.settings.samples,
            "greedy": self.settings.greedy,
            "sampling": about["sampling"],
            **({"engine": about["engine"]} if "engine" in about else {}),
            **({"turns": self.settings.turns.model_dump(mode="json")} if is_environment(self.task) else {}),
            "task": about["task"],
            "prompt": about["prompt"],
            "problems": {"count": len(prompts), "rows": _digest(prompts)},
            "model": {"dtype": model["dtype"], "weights": model["weights"]},
            "chunk": self._chunk,
        }


def held_out_rows(task: Task) -> int | None:
    """Return how many held-out problems a task of rows has; None of a task that generates them."""
    return getattr(task, "num_held_out", None)


def _digest(prompts: Sequence[Prompt]) -> str:
    """Return a name of the rows that changes with any row, answer, picture, tokenizer or prompt format."""
    digest = hashlib.sha256()
    for p in prompts:
        # repr for values that JSON does not have: rows from Parquet hold dates and decimals.
        parts = [p.id, p.text, p.answer, p.token_ids, p.stop, dict(p.metadata), *(shown.sha256 for shown in p.pictures)]
        row = json.dumps(parts, sort_keys=True, default=repr)
        digest.update(row.encode() + b"\n")
    return digest.hexdigest()[:16]


def _report_kept_work(
    store: EvaluationStore, problems: int, machine: Mapping[str, Any], report: Callable[[str], None]
) -> None:
    if store.finished:
        report(f"{store.path} is finished already; its figures are computed again")
    elif store.answered:
        report(f"{store.path} has {len(store.answered)} of {problems} problems already; resuming")
    for key in DECIDING_BITS:
        if not store.finished and key in store.machine and store.machine[key] != machine.get(key):
            report(f"{key}: {store.machine[key]} before, {machine.get(key)} now: resumed, but not bit for bit")
