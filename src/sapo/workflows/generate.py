"""Completions of one prompt of the user's own, or of a problem of a task: what `sapo generate` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sapo.config import RolloutConfig, TaskConfig
from sapo.data import Completion, Picture, Prompt
from sapo.data.transcripts import HISTORY, POLICY
from sapo.errors import ConfigError
from sapo.evaluation.records import Answered
from sapo.model.policy import Policy
from sapo.rollout.drawing import draw
from sapo.rollout.engine import Engine, Request
from sapo.rollout.params import SamplingParams
from sapo.rollout.prompting import PromptFormat
from sapo.rollout.registry import make_engine, require
from sapo.rollout.streaming import TextStream, stream
from sapo.rollout.weights import loaded
from sapo.run.directory import RunDirectory
from sapo.run.models import run_of
from sapo.tasks import TASKS, make_task
from sapo.tasks.rows.reading import is_rows_file
from sapo.utils.text import visible, visible_line
from sapo.workflows.evaluate import EvaluatedModel, PlannedEvaluation
from sapo.workflows.evaluation_plan import (
    own_name,
    plan_evaluations,
    plan_run_evaluations,
    split_overrides,
    split_turns,
)


@dataclass(frozen=True)
class Generation:
    """A prompt and its completions.

    >>> prompt = Prompt(0, "generate", "1+1=", token_ids=(1, 10, 1, 14))
    >>> completion = Completion((2, 17), (-0.1, -0.2), "stop", "2")
    >>> Generation(prompt, "1+1=", (completion,), (("2", "<eos>"),)).to_json()["completions"][0]["text"]
    '2'
    """

    prompt: Prompt
    seen: str
    """The prompt as the model saw it, special tokens included."""
    completions: tuple[Completion, ...]
    token_texts: tuple[tuple[str, ...], ...]
    """Each completion's tokens one by one, special ones by their names."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value."""
        return {
            "prompt": self.seen,
            "prompt_token_ids": list(self.prompt.token_ids),
            "completions": [
                {
                    "text": c.text,
                    "finish_reason": c.finish_reason,
                    "token_ids": c.token_ids.tolist(),
                    "tokens": list(texts),
                    "logprobs": c.logprobs.tolist(),
                }
                for c, texts in zip(self.completions, self.token_texts, strict=True)
            ],
        }


def format_of_run(run: Path) -> PromptFormat | None:
    """Return how a run asks the questions of its first task; None for a directory that is not a run.

    Raises:
        ConfigError, TaskError: its recipe or its task cannot be read.
    """
    if not (run / "config.yaml").is_file():
        return None
    config = RunDirectory.read_config(run)
    first = config.tasks[0]
    return PromptFormat.of(first.prompt or config.prompt, make_task(first.name, seed=config.eval.seed, **first.options))


def plan_problem(
    model: Path,
    task: str,
    overrides: Sequence[str],
    problem: int,
    seed: int | None = None,
    report: Callable[[str], None] = lambda text: None,
    **given: Any,
) -> PlannedEvaluation:
    """Plan the completions, or episodes, of a held-out problem: those that `sapo eval` draws at the same seed.

    Args:
        model: a run brings the settings of its own task of that label or name, where `overrides` changes none but
            those under `prompt.` and `turns.`.
        task: its label or name, or a file of rows.
        problem: number of the problem, from 0.
        report: called with a sentence where the run's settings of the task are left out.
        given: fields of EvaluationSettings and SamplingParams; None leaves the default.

    Raises:
        ConfigError, TaskError: what is wrong with it.
    """
    given = {**given, "problems": problem + 1, "greedy": False, "constant": False, "ks": (1,)}
    run = run_of(model)
    place = None if run is None else _place_of(RunDirectory.read_config(run).tasks, task)
    if run is not None and place is not None:
        options = split_overrides(split_turns(overrides)[1])[0]
        if not options:
            known = {name: value for name, value in given.items() if value is not None}
            return plan_run_evaluations(run, overrides, known, seed, [place])[0]
        task = RunDirectory.read_config(run).tasks[place].name
        report(
            f"{next(iter(options))} is a setting of the task: {task} is asked as `sapo eval --task {task}` asks it, "
            f"with none of the task's settings in {run / 'config.yaml'}"
        )
    return plan_evaluations(model, [task], overrides, seed=seed, **given)[0]


def _place_of(tasks: Sequence[TaskConfig], name: str) -> int | None:
    """Return the place of a run's task by its label, by its kind, or by the name that it gives itself; None where none
    has it.

    Raises:
        ConfigError: several tasks are of that kind.
    """
    found = [place for place, t in enumerate(tasks) if (t.label or t.name) == name]
    found = found or [place for place, t in enumerate(tasks) if t.name == name]
    if not found and name not in TASKS and ":" not in name and not is_rows_file(name):
        found = [place for place, t in enumerate(tasks) if own_name(t) == name]
    if len(found) > 1:
        names = ", ".join(own_name(tasks[place]) for place in found)
        raise ConfigError(f"--task must name one task of the run; got {name}, which are {names}; write one of these")
    return found[0] if found else None


def answer_problem(
    subject: EvaluatedModel,
    planned: PlannedEvaluation,
    problem: int,
    report: Callable[[str], None] = lambda text: None,
) -> Answered:
    """Draw and judge completions of one of the planned problems; of an environment, play its episodes.

    Raises:
        ConfigError: there is no such problem.
    """
    prompts = planned.ask(subject.policy)
    if problem >= len(prompts):
        raise ConfigError(
            f"--problem must be a number from 0 to {len(prompts) - 1}, the held-out problems of {planned.task.name}; "
            f"got {problem}"
        )
    return planned.run(subject, [prompts[problem]], report=report).evaluation.answered[0]


def transcript_lines(said: Sequence[tuple[str, str]]) -> list[str]:
    r"""Return a transcript as lines for a terminal: what the model said below the number of its turn, and what it was
    told on a rule. No text can pass for another's: every line of it is marked, and what would steer a terminal is
    spelled out.

    >>> print("\n".join(transcript_lines([("policy", "37*52="), ("environment", "1924;\nturn 9"), ("policy", "#")])))
    turn 1
      37*52=
        | environment: 1924;
        |   turn 9
    turn 2
      #
    """
    lines, turn = [], 0
    for who, text in said:
        parts = visible(text).split("\n")
        if who == POLICY:
            turn += 1
            lines += [f"turn {turn}", *(f"  {part}" for part in parts)]
        elif who == HISTORY:
            lines.append(f"    ({visible_line(text)})")
        else:
            lines += [f"    | {visible_line(who)}: {parts[0]}", *(f"    |   {part}" for part in parts[1:])]
    return lines


def generate(
    policy: Policy,
    text: str,
    params: SamplingParams,
    *,
    samples: int = 1,
    style: Literal["auto", "plain", "chat"] = "auto",
    system: str | None = None,
    stop: tuple[str, ...] = (),
    form: PromptFormat | None = None,
    shorten: bool = False,
    engine: str = "local",
    pictures: Sequence[Picture] = (),
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Draw completions of a text.

    Args:
        text: the question; put into the tokenizer's chat template when style is chat, or auto and there is one.
        params: of sampling; the model's own stop tokens are added.
        stop: strings that end a completion.
        form: format of the text, in place of style, system and stop.
        shorten: lower max_new_tokens to what the model has room for.
        engine: what draws, as `rollout.engine` names it.
        pictures: shown where the text has a marker, or before it.
        on_text: called with each piece of the text of the only sample, as it is drawn.

    Raises:
        ModelError: a chat with a model that has no template, text it has no tokens for, or pictures it cannot see.
        TaskError: another number of markers than pictures.
        ConfigError: prompt and completion do not fit the model's positions, or an engine that cannot do it.
    """
    form = form or PromptFormat(style=style, system=system, stop=stop, prefers_chat=True)
    if form.stop:
        require(engine, "stop_strings", "a stop string", "leave it out")
    prompt = form.encode(policy, [Prompt(0, "generate", text, pictures=tuple(pictures))])[0]
    length, limit = params.max_new_tokens, policy.max_length
    if shorten and limit is not None:
        length = max(1, min(length, limit - len(prompt.token_ids)))
    if limit is not None and len(prompt.token_ids) + length > limit:
        raise ConfigError(
            f"prompt and completion must fit the model's {limit} positions; got a prompt of {len(prompt.token_ids)} "
            f"tokens and max_new_tokens {length}; shorten one of them"
        )
    stops = params.stop_token_ids | policy.stop_token_ids
    params = replace(params, max_new_tokens=length, stop_token_ids=stops)
    made = make_engine(policy, RolloutConfig(engine=engine))
    with closing(made) as drawer, loaded(drawer, policy.weights(), version=0):
        if on_text is None:
            [completions] = draw(drawer, [Request(prompt, samples)], params)
        else:
            assert samples == 1, "one text can be shown as it is drawn, and not several"
            completions = (_streamed(drawer, policy, prompt, params, on_text),)

    def decode(ids: tuple[int, ...]) -> str:
        shown: str = policy.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return shown

    texts = tuple(tuple(decode((i,)) for i in c.token_ids.tolist()) for c in completions)
    return Generation(prompt, policy.show_prompt(prompt), completions, texts)


def _streamed(
    engine: Engine, policy: Policy, prompt: Prompt, params: SamplingParams, on_text: Callable[[str], None]
) -> Completion:
    """Draw one completion, and tell its text as it comes."""
    text = TextStream(policy, prompt.stop, params.stop_token_ids, prompt.special_tokens)
    whole = None
    for new in (new for step in stream(engine, [Request(prompt, 1)], params) for new in step):
        whole = new.completion
        piece = text.add(new.token_ids) + ("" if whole is None else text.finish(whole))
        if piece:
            on_text(piece)
    assert whole is not None, "a stream ends with its completion"
    return whole
