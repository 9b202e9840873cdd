"""The parameters of reward functions in four projects, by which a function is recognised and called.

| project | parameters | called with | returns |
|---|---|---|---|
| sapo | completion; answer, prompt, metadata, and columns by name | one completion | a number or a Score |
| TRL, ms-swift | completions; prompts, **columns | the completions of a prompt | a list of numbers; None abstains |
| verl | solution_str; data_source, ground_truth, extra_info | one completion | a number, or a dict with `score` |
| verl, batched | solution_strs; the same in the plural | the completions of a prompt | a list of these |
| OpenRLHF | queries; prompts, labels | the completions of a prompt | numbers, or a dict with `rewards` |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.base import LARGEST_REWARD, checked_reward

USER_PARAMETERS = ("completion", "answer", "prompt", "metadata")

REFERENCE_NAMES = ("answer", "solution", "ground_truth", "label", "labels", "target")
"""Parameters of a function of TRL's that mean the reference answer, where the rows have no such column."""

Given = dict[str, Any]
Scores = list[Score | None]


@dataclass(frozen=True)
class Convention:
    """How a project calls reward functions."""

    name: str
    mark: str
    """The parameter by which a function of this project is known."""
    batched: bool
    """Whether a call has all completions of a prompt."""
    arguments: Callable[[Sequence[str], Prompt], Given]
    """Function of completions and their prompt that returns all arguments there are."""
    scores: Callable[[Any, int], Scores]
    """Function of what a call returned, and of the number of completions, that returns their scores; None abstains."""
    open: bool = False
    """Whether the columns of the rows are arguments too, so that only a row tells which there are."""


def convention_of(parameters: Sequence[str]) -> Convention:
    """Return the convention of a function with these parameters: ours unless it has another's mark.

    >>> convention_of(["completions", "solution", "kwargs"]).name, convention_of(["completion"]).name
    ('TRL', 'sapo')
    """
    return next((found for found in _OTHERS if found.mark in parameters), OURS)


@dataclass(frozen=True)
class Signature:
    """Which arguments a function takes, and the convention it follows."""

    convention: Convention
    accepted: tuple[str, ...]
    takes_all: bool
    required: tuple[str, ...]

    @classmethod
    def of(cls, spec: str, function: Callable[..., Any]) -> Signature:
        """Read the signature of a reward function.

        Raises:
            TaskError: it follows no convention.
        """
        rule = (
            f"verifier {spec!r} must take completion and may take {', '.join(USER_PARAMETERS[1:])}, by keyword, or the "
            "parameters of a reward function of TRL, verl or OpenRLHF"
        )
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise TaskError(
                f"{rule}; got a function without a readable signature; wrap it in one of your own"
            ) from error
        by_keyword = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        convention = convention_of(by_keyword)
        required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        known = convention.arguments([], Prompt(id=0, task="", text="", answer=""))
        unmet = [
            p.name for p in required if p.kind is p.POSITIONAL_ONLY or (p.name not in known and not convention.open)
        ]
        if unmet or not (convention.mark in by_keyword or takes_all):
            got = f"required {unmet}" if unmet else f"parameters {[p.name for p in parameters]}"
            raise TaskError(f"{rule}; got {got}; rename them or give defaults")
        return cls(convention, tuple(by_keyword), takes_all, tuple(p.name for p in required))

    def arguments(self, texts: Sequence[str], prompt: Prompt) -> Given:
        """Return the keyword arguments of a call.

        Raises:
            TypeError: the function needs one that there is not.
        """
        there = self.convention.arguments(texts, prompt)
        if self.convention.open:
            reference = [prompt.answer] * len(texts)
            there |= {name: reference for name in REFERENCE_NAMES if name in self.accepted and name not in there}
            if self.takes_all and not there.keys() & set(REFERENCE_NAMES):
                there["answer"] = reference  # the column it was taken from by default
        missing = [name for name in self.required if name not in there]
        if missing:
            raise TypeError(
                f"the function needs {', '.join(missing)}, and a row of task {prompt.task!r} has {', '.join(there)}"
            )
        everything = self.takes_all and self.convention is not OURS
        names = there if everything else [*self.accepted, *(USER_PARAMETERS if self.takes_all else ())]
        return {name: there[name] for name in names if name in there}


# ---------------------------------------------------------------------------------------------------------- arguments


def _ours(texts: Sequence[str], prompt: Prompt) -> Given:
    text = texts[0] if texts else ""
    own = {"completion": text, "answer": prompt.answer, "prompt": prompt.text, "metadata": prompt.metadata}
    return {**prompt.metadata, **own}


def _trl(texts: Sequence[str], prompt: Prompt) -> Given:
    number, messages = len(texts), prompt.metadata.get("messages")
    columns = {name: [value] * number for name, value in prompt.metadata.items() if name != "messages"}
    if messages is None:
        return {**columns, "prompts": [prompt.text] * number, "completions": list(texts)}
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    return {**columns, "prompts": [[dict(m) for m in messages]] * number, "completions": turns}


def _verl(texts: Sequence[str], prompt: Prompt) -> Given:
    model, extra = prompt.metadata.get("reward_model"), prompt.metadata.get("extra_info")
    return {
        "data_source": prompt.metadata.get("data_source", prompt.task),
        "solution_str": texts[0] if texts else "",
        "ground_truth": model.get("ground_truth", prompt.answer) if isinstance(model, Mapping) else prompt.answer,
        "extra_info": dict(extra) if isinstance(extra, Mapping) else dict(prompt.metadata),
    }


def _verl_batched(texts: Sequence[str], prompt: Prompt) -> Given:
    one = _verl(texts, prompt)
    return {
        "data_sources": [one["data_source"]] * len(texts),
        "solution_strs": list(texts),
        "ground_truths": [one["ground_truth"]] * len(texts),
        "extra_infos": [dict(one["extra_info"]) for _ in texts],
    }


def _openrlhf(texts: Sequence[str], prompt: Prompt) -> Given:
    return {
        "queries": [prompt.text + text for text in texts],
        "prompts": [prompt.text] * len(texts),
        "labels": [prompt.answer or ""] * len(texts),
    }


# ------------------------------------------------------------------------------------------------------------- scores


def _one(returned: Any, number: int) -> Scores:
    return [_score(returned)]


def _listed(returned: Any, number: int) -> Scores:
    values = _as_list(returned)
    if not isinstance(values, list | tuple) or len(values) != number:
        got = f"{len(values)} values" if isinstance(values, list | tuple) else type(returned).__name__
        raise ValueError(f"the function must return a list with a reward for each of {number} completions; got {got}")
    return [None if value is None else _score(value) for value in values]


def _with_logs(returned: Any, number: int) -> Scores:
    if not isinstance(returned, Mapping):
        return _listed(returned, number)
    if "rewards" not in returned:
        raise ValueError(f"a dict of rewards must have the key rewards; got {list(returned)}")
    scores = _listed(returned["rewards"], number)
    logs = {str(name): _as_list(values) for name, values in (returned.get("extra_logs") or {}).items()}
    whole = {name: values for name, values in logs.items() if isinstance(values, list) and len(values) == number}
    return [
        score and Score(score.reward, figures=_figures({name: values[i] for name, values in whole.items()}))
        for i, score in enumerate(scores)
    ]


def _as_list(values: Any) -> Any:
    """Return a tensor or an array as a list, and anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def _score(returned: Any) -> Score:
    if isinstance(returned, Score):
        return returned
    if isinstance(returned, Mapping):
        if "score" not in returned:
            raise ValueError(f"a dict that scores a completion must have the key score; got {list(returned)}")
        rest = {str(name): value for name, value in returned.items() if name != "score"}
        answer = rest.get("pred")
        return Score(
            _number(returned["score"]),
            answer=answer if isinstance(answer, str) else None,
            figures=_figures(rest),
        )
    return Score(_number(returned))


def _number(value: Any) -> float:
    return checked_reward(value.item() if hasattr(value, "item") else value)


def _figures(values: Mapping[str, Any]) -> dict[str, float]:
    """Return those of the values that may be figures of a score: numbers within LARGEST_REWARD."""
    numbers = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    return {name: float(v) for name, v in numbers.items() if isinstance(v, int | float) and abs(v) <= LARGEST_REWARD}


OURS = Convention("sapo", "completion", batched=False, arguments=_ours, scores=_one, open=True)
_OTHERS = (
    Convention("TRL", "completions", batched=True, arguments=_trl, scores=_listed, open=True),
    Convention("verl", "solution_str", batched=False, arguments=_verl, scores=_one),
    Convention("verl, batched", "solution_strs", batched=True, arguments=_verl_batched, scores=_listed),
    Convention("OpenRLHF", "queries", batched=True, arguments=_openrlhf, scores=_with_logs),
)
