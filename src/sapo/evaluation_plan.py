"""From what was asked to finished evaluations: which model, which problems, put how, drawn how, kept where.

The Python surface (`sapo.evaluate`) and `sapo eval` both come through here. A run directory brings its own plan: its
tasks, prompt formats and sampling, so that its newest weights are judged as the run judged itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from sapo.config import ConfigError, PromptConfig, parse_override, parse_prompt
from sapo.data import Prompt
from sapo.evaluation import EvaluationStore, Results, ask, best_constant, examine, write_page
from sapo.evaluation.examination import Keeper, Memory
from sapo.evaluation.figures import Evaluation
from sapo.evaluation.store import difference
from sapo.model.policy import Policy, load_policy
from sapo.preflight import seed_for
from sapo.prompting import PromptFormat
from sapo.rollout.local import LocalEngine
from sapo.rollout.sampling import SamplingParams
from sapo.run_directory import RunDirectory
from sapo.session import newest_model, provenance, resolve_device
from sapo.tasks import Task, make_task

CHUNK_SEQUENCES = 256
"""Sequences that are drawn, judged and kept together: as many as the engine decodes at once, so that a kill loses no more
than that. The price is waiting for the last sequence of each chunk with part of the rows idle."""

DEFAULT_SEED = 12345

FILES = (".jsonl", ".json", ".parquet")

# Settings of a prompt that are text: on a command line they are taken as they stand, which YAML would not do with the
# colon and braces of "Q: {prompt}".
_TEXTS = ("prompt.system", "prompt.template", "prompt.answer_template")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is drawn, and how.

    >>> Settings(samples=16, ks=(1, 4, 16)).problems
    256
    """

    problems: int = 256
    samples: int = 4
    ks: tuple[int, ...] = (1,)
    threshold: float = 1.0
    greedy: bool = False
    constant: bool = False
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=64))

    def __post_init__(self) -> None:
        for name in ("problems", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more; got {getattr(self, name)}")
        if not self.ks or min(self.ks) < 1 or max(self.ks) > self.samples:
            text = ",".join(map(str, self.ks))
            raise ConfigError(f"every k must lie in 1..samples ({self.samples}); got {text}; raise --samples")


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """One task to evaluate a model on.

    >>> plan = EvaluationPlan(kind="arithmetic", options={"digits": 2}, task_seed=12345)
    >>> plan.order().task.held_out(1)[0].text
    '98+97='
    """

    kind: str
    """A name of TASKS."""
    options: Mapping[str, Any] = field(default_factory=dict)
    task_seed: int
    prompt: PromptConfig = field(default_factory=PromptConfig)
    settings: Settings = field(default_factory=Settings)

    def order(self) -> Order:
        """With the task made and its examples asked for.

        Raises:
            TaskError, ConfigError: what is wrong with it.
        """
        task = make_task(self.kind, seed=self.task_seed, **self.options)
        about = {"name": task.name, "kind": self.kind, "options": dict(self.options), "seed": self.task_seed}
        return Order(task, PromptFormat.of(self.prompt, task), self.settings, about)


def orders(
    model: Path,
    tasks: Sequence[str],
    overrides: Sequence[str],
    *,
    greedy: bool = False,
    constant: bool = False,
    threshold: float = 1.0,
    **given: Any,
) -> list[Order]:
    """What a command asks for: the tasks named, or a run's own, each made and checked.

    Args:
        model: the model; a run directory, or a checkpoint in one, brings tasks where none are named.
        tasks: names of TASKS, or files.
        overrides: `key=value`; those of `prompt.` say how questions are put, others are the tasks' own.
        given: of Settings and SamplingParams; None where nothing was said.

    Raises:
        ConfigError, TaskError: what is wrong with it.
    """
    given = {name: value for name, value in given.items() if value is not None}
    given.update(greedy=greedy, constant=constant, threshold=threshold)
    if tasks:
        settings = _settings({}, {"seed": DEFAULT_SEED, "max_new_tokens": 64}, given)
        return [plan_task(name, overrides, settings).order() for name in tasks]
    run = run_of(model)
    if run is None:
        raise ConfigError(f"{model} is no run that would bring its own tasks; name one with --task")
    return [plan.order() for plan in plan_run(run, overrides, given)]


def run_of(model: Path) -> Path | None:
    """The run directory that a path is, or is a checkpoint of."""
    checkpoint_of = model.resolve().parent.parent if model.resolve().parent.name == "checkpoints" else None
    return next((d for d in (model, checkpoint_of) if d is not None and (d / "config.yaml").is_file()), None)


def plan_task(name: str, overrides: Sequence[str], settings: Settings) -> EvaluationPlan:
    """A task by its name, or a file, with its settings and those of its prompts.

    >>> plan = plan_task("arithmetic", ["digits=2", "prompt.template=Q: {prompt}\\nA:"], Settings())
    >>> plan.options, plan.prompt.template
    ({'digits': 2}, 'Q: {prompt}\nA:')

    Raises:
        ConfigError: an override that is none.
    """
    options, prompt = split_overrides(overrides)
    if Path(name).suffix in FILES:
        name, options = "file", {"path": name, **options}
    return EvaluationPlan(
        kind=name, options=options, task_seed=settings.params.seed, prompt=parse_prompt(prompt), settings=settings
    )


def plan_run(run: Path, overrides: Sequence[str], given: Mapping[str, Any]) -> list[EvaluationPlan]:
    """The tasks of a run as it evaluates them itself, but for what is given.

    Raises:
        ConfigError: no run, or an override of a task's own settings.
    """
    config = RunDirectory.read_config(run)
    options, prompt = split_overrides(overrides)
    if options:
        raise ConfigError(
            f"the settings of a run's tasks are in its config.yaml; got {next(iter(options))}=...; name the task with "
            "--task to evaluate it otherwise, or change prompt.* only"
        )
    asked, rollout = config.eval, config.rollout
    sampling = {
        "max_new_tokens": rollout.max_new_tokens,
        "temperature": rollout.temperature if asked.temperature is None else asked.temperature,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "min_p": rollout.min_p,
        "seed": seed_for(asked.seed, "evaluation"),
        "stop_token_ids": frozenset(rollout.stop_token_ids),
    }
    # With fewer samples than the run drew, its own k are taken as far as they go.
    ks = tuple(k for k in asked.k if k <= given.get("samples", asked.samples)) or (1,)
    settings = _settings({"problems": asked.problems, "samples": asked.samples, "ks": ks}, sampling, given)
    return [
        EvaluationPlan(
            kind=t.name,
            options=t.options,
            task_seed=given.get("seed", asked.seed),
            prompt=parse_prompt({**(t.prompt or config.prompt).model_dump(), **prompt}),
            settings=settings,
        )
        for t in config.tasks
    ]


def _settings(own: Mapping[str, Any], sampling: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """Settings and SamplingParams from their defaults and what is given for either."""
    names = {f.name for f in fields(SamplingParams)}
    try:
        params = SamplingParams(**{**sampling, **{k: v for k, v in given.items() if k in names}})
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('_', '-', 1)}") from error
    return Settings(**{**own, **{k: v for k, v in given.items() if k not in names}}, params=params)


def split_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a task, and those of how its questions are put (`prompt.`), which come without the prefix.

    >>> split_overrides(["path=sums.jsonl", "prompt.style=chat", "prompt.thinking=true", 'prompt.stop=["\\\\n"]'])
    ({'path': 'sums.jsonl'}, {'style': 'chat', 'thinking': True, 'stop': ['\\n']})
    """
    options: dict[str, Any] = {}
    prompt: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if key in _TEXTS and separator and not text.startswith(('"', "'")) and text != "null":
            value: Any = text.replace("\\n", "\n").replace("\\t", "\t")
        else:
            key, value = parse_override(override)
        if key.startswith("prompt."):
            prompt[key.removeprefix("prompt.")] = value
        else:
            options[key] = value
    return options, prompt


def evaluate(
    model: str | Path | Policy,
    task: Task,
    *,
    problems: int = 256,
    samples: int = 4,
    ks: tuple[int, ...] = (1,),
    threshold: float = 1.0,
    greedy: bool = False,
    constant: bool = False,
    params: SamplingParams | None = None,
    max_new_tokens: int = 64,
    prompt_format: PromptFormat | PromptConfig | None = None,
    dtype: str = "float32",
    device: str = "auto",
    out: str | Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Evaluate a model directory, a run's newest weights or a loaded policy on a task's held-out problems.

    Args:
        problems: how many; all there are, when there are fewer.
        samples: n, completions of each problem.
        ks: which pass@k to estimate, each at most `samples`.
        threshold: smallest reward that counts as correct.
        greedy: draw one more completion of each problem, at temperature 0.
        constant: judge the best constant answer as well.
        params: of sampling; temperature 1 and `max_new_tokens` when None. The model's own stop tokens are added.
        prompt_format: how the questions are put; as they are when None.
        out: a directory to keep it in, so that a killed one goes on, with results.json, completions.jsonl and index.html
            in the end.

    Raises:
        ConfigError, ModelError, TaskError: it cannot be done as asked.
        Interrupted: `should_stop` said so; what `out` keeps is kept.
    """
    settings = Settings(
        problems=problems,
        samples=samples,
        ks=tuple(ks),
        threshold=threshold,
        greedy=greedy,
        constant=constant,
        params=params or SamplingParams(max_new_tokens=max_new_tokens),
    )
    if not isinstance(prompt_format, PromptFormat):
        prompt_format = PromptFormat.of(prompt_format or PromptConfig(), task)
    subject = Subject.load(model, dtype, device)
    order = Order(task, prompt_format, settings, {"name": task.name})
    return order.carry_out(subject, out=out, should_stop=should_stop).evaluation


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated."""

    policy: Policy
    path: str
    """How the record names it."""
    weights: str
    """Names its weights, wherever they lie."""

    @classmethod
    def load(cls, model: str | Path | Policy, dtype: str = "float32", device: str = "auto") -> Subject:
        """A model directory, or the newest whole checkpoint of a run.

        Raises:
            ConfigError, ModelError: it cannot be used.
        """
        if isinstance(model, Policy):
            return cls(model, "a loaded policy", model.fingerprint())
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"--dtype must be float32 or bfloat16; got {dtype!r}")
        directory = newest_model(Path(model))
        policy = load_policy(directory, dtype, resolve_device(device))
        return cls(policy, str(directory), policy.fingerprint())

    def about(self) -> dict[str, Any]:
        """As a JSON value."""
        return {
            "path": self.path,
            "weights": self.weights,
            "dtype": str(self.policy.dtype).removeprefix("torch."),
            "parameters": self.policy.num_parameters,
        }


@dataclass(frozen=True)
class Order:
    """A task to be evaluated on, as `evaluate` takes it in many arguments."""

    task: Task
    prompt_format: PromptFormat
    settings: Settings
    task_about: Mapping[str, Any]
    """What the record says of the task."""

    def carry_out(
        self,
        subject: Subject,
        *,
        out: str | Path | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_warning: Callable[[str], None] = lambda text: None,
    ) -> Results:
        """Evaluate, or go on with what `out` keeps, and write what came of it there.

        Raises:
            ConfigError: `out` holds another evaluation.
            Interrupted: `should_stop` said so.
        """
        policy, settings = subject.policy, self.settings
        prompts = ask(policy, self.task, settings.problems, self.prompt_format)
        about = self._about(subject)
        machine = {**provenance(), "threads": torch.get_num_threads()}
        if out is None:
            evaluation = self._evaluate(policy, prompts, Memory(), should_stop, on_progress)
            return Results({**about, "machine": machine}, evaluation)
        with EvaluationStore(Path(out), self._asked(about, prompts), machine) as store:
            _warn_of_another_machine(store.machine, machine, on_warning)
            torch.set_num_threads(store.machine["threads"])  # another count is another rounding
            evaluation = self._evaluate(policy, prompts, store, should_stop, on_progress)
            results = Results({**about, "machine": store.machine}, evaluation)
            store.finish(results.to_json())
            write_page(results, Path(out) / "index.html")
        return results

    def _evaluate(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        keeper: Keeper,
        should_stop: Callable[[], bool],
        on_progress: Callable[[int, int], None],
    ) -> Evaluation:
        settings = self.settings
        examine(
            policy,
            LocalEngine(policy),
            self.task,
            prompts,
            keeper,
            chunk=self._chunk,
            samples=settings.samples,
            params=self._params(policy),
            greedy=settings.greedy,
            should_stop=should_stop,
            on_progress=on_progress,
        )
        best = None
        if settings.constant:
            best = best_constant(self.task, prompts, threshold=settings.threshold, should_stop=should_stop)
        return Evaluation.of(
            self.task.name,
            keeper.answered,
            ks=settings.ks,
            threshold=settings.threshold,
            constant=best,
            clock=keeper.clock,
        )

    @property
    def _chunk(self) -> int:
        return max(1, CHUNK_SEQUENCES // self.settings.samples)

    def _params(self, policy: Policy) -> SamplingParams:
        params = self.settings.params
        return replace(params, stop_token_ids=params.stop_token_ids | policy.stop_token_ids)

    def asked(self, subject: Subject) -> dict[str, Any]:
        """What names this evaluation to its directory."""
        prompts = ask(subject.policy, self.task, self.settings.problems, self.prompt_format)
        return self._asked(self._about(subject), prompts)

    def _about(self, subject: Subject) -> dict[str, Any]:
        sampling = asdict(self._params(subject.policy))
        return {
            "model": subject.about(),
            "task": dict(self.task_about),
            "prompt": asdict(self.prompt_format),
            "sampling": {**sampling, "stop_token_ids": sorted(sampling["stop_token_ids"])},
        }

    def _asked(self, about: Mapping[str, Any], prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What changes a completion or its judgement. Not where the model lies, nor what is counted in the end."""
        model = about["model"]
        return {
            "samples": self.settings.samples,
            "greedy": self.settings.greedy,
            "sampling": about["sampling"],
            "task": about["task"],
            "prompt": about["prompt"],
            "problems": {"count": len(prompts), "rows": _digest(prompts)},
            "model": {"dtype": model["dtype"], "weights": model["weights"]},
            "chunk": self._chunk,
        }


def place(model: Path, subject: Subject, order: Order, out: Path | None, *, alone: bool) -> tuple[Path, str | None]:
    """The directory of an evaluation, and what to tell of the choice.

    `out` is the user's and taken as it is, with a directory for each task below it where there are several. Without it
    the directory is evals/MODEL-TASK or, where that holds another evaluation, the first of -2, -3, ... that does not.
    """
    task = re.sub(r"[^\w.-]+", "_", order.task.name)
    if out is not None:
        return (out if alone else out / task), None
    run = run_of(model)
    name = model.resolve().name
    if run is not None and run.resolve() != model.resolve():
        name = f"{run.resolve().name}-{name}"
    first = Path("evals") / f"{name}-{task}"
    asked = order.asked(subject)
    candidate, number, reason = first, 1, None
    while (found := difference(candidate, asked)) is not None:
        reason = reason or f"{first} holds {found}"
        number += 1
        candidate = first.with_name(f"{first.name}-{number}")
    return candidate, reason and f"{reason}; this one goes to {candidate}"


def _digest(prompts: Sequence[Prompt]) -> str:
    """Names the rows: another row, answer, tokenizer or prompt format is another name."""
    digest = hashlib.sha256()
    for p in prompts:
        # repr of what JSON does not know: rows from Parquet hold dates and decimals.
        row = json.dumps([p.id, p.text, p.answer, p.token_ids, p.stop, dict(p.metadata)], sort_keys=True, default=repr)
        digest.update(row.encode() + b"\n")
    return digest.hexdigest()[:16]


def _warn_of_another_machine(
    before: Mapping[str, Any], now: Mapping[str, Any], on_warning: Callable[[str], None]
) -> None:
    for key in ("versions", "cpu_capability", "mkl_cbwr"):
        if before.get(key) != now[key]:
            on_warning(f"{key} were {before.get(key)} and are {now[key]}: the evaluation goes on, but not bit for bit")
