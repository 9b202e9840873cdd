"""Records of judged completions without their tensors: the lines of completions.jsonl, from which all figures are
computed.

A new evaluation and one read from its files go through the same records, so that their figures are equal bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from sapo.data import Completion, Prompt, Status

GROUPINGS = ("subject", "level", "difficulty")
"""Fields of a prompt's metadata by which figures are broken down."""


@dataclass(frozen=True)
class Sample:
    """One judged completion.

    >>> Sample(text="46", reward=1.0, status=Status.SCORED, answer="46", finish_reason="stop", tokens=3).to_json()
    {'text': '46', 'reward': 1.0, 'status': 'scored', 'answer': '46', 'finish_reason': 'stop', 'tokens': 3}
    """

    text: str
    reward: float
    status: Status
    finish_reason: str
    tokens: int
    answer: str | None = None
    """The answer that the verifier read; None when it found none or does not name it."""
    detail: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    transcript: tuple[tuple[str, str], ...] = ()
    """Of several turns: who said what, in order: "policy", "environment", "tool NAME", or "history": how much of
    what came before the model no longer sees. `text` is that of the last turn."""

    @classmethod
    def of(cls, completion: Completion) -> Sample:
        """Make the record of a scored completion; a figure that is not a finite number is left out."""
        score = completion.score
        return cls(
            text=completion.text,
            reward=score.reward,
            status=score.status,
            finish_reason=completion.finish_reason,
            tokens=len(completion),
            answer=score.answer,
            detail=score.detail,
            figures={k: float(v) for k, v in score.figures.items() if isinstance(v, Real) and math.isfinite(v)},
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value; `detail`, `figures` and `transcript` only where there are any."""
        record: dict[str, Any] = {
            "text": self.text,
            "reward": self.reward,
            "status": self.status.value,
            "answer": self.answer,
            "finish_reason": self.finish_reason,
            "tokens": self.tokens,
        }
        if self.detail:
            record["detail"] = self.detail
        if self.figures:
            record["figures"] = dict(self.figures)
        if self.transcript:
            record["transcript"] = [list(said) for said in self.transcript]
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Sample:
        """Read what `to_json` made."""
        transcript = tuple((who, text) for who, text in record.get("transcript", ()))
        return cls(**{**record, "status": Status(record["status"]), "transcript": transcript})


@dataclass(frozen=True)
class Answered:
    """One problem with its judged completions.

    >>> sample = Sample(text="46", reward=1.0, status=Status.SCORED, finish_reason="stop", tokens=3)
    >>> problem = Answered(id=0, prompt="12+34=", seen="12+34=", answer="46", groups={"level": ("2",)},
    ...     samples=(sample,))
    >>> Answered.from_json(problem.to_json()) == problem
    True
    """

    id: int
    """Its number in the evaluation, from 0; the sampler's draws depend on it."""
    prompt: str
    """The task's question."""
    seen: str
    """The prompt as the model saw it: the question in its format, special tokens included."""
    answer: str | None
    groups: Mapping[str, tuple[str, ...]]
    """The values of GROUPINGS that it has; several where a problem has two subjects."""
    samples: tuple[Sample, ...]
    greedy: Sample | None = None
    """A completion at temperature 0, where one was asked for."""
    pictures: tuple[str, ...] = ()
    """Hashes of the pictures it shows."""

    @property
    def reward_mean(self) -> float | None:
        """Return the mean reward of its judged samples; None where there is none."""
        rewards = [s.reward for s in self.samples if not s.status.failed]
        return sum(rewards) / len(rewards) if rewards else None

    @property
    def key(self) -> str:
        """Return a name that the problem has in every evaluation of it, in whatever format it was asked.

        >>> Answered(id=0, prompt="12+34=", seen="", answer="46", groups={}, samples=()).key
        '53c57f690e83f389'
        """
        text = "\x00".join([self.prompt, str(self.answer), *self.pictures])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return a line of completions.jsonl."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "seen": self.seen,
            "answer": self.answer,
            "groups": {name: list(values) for name, values in self.groups.items()},
            "samples": [s.to_json() for s in self.samples],
            "greedy": self.greedy.to_json() if self.greedy else None,
            **({"pictures": list(self.pictures)} if self.pictures else {}),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Answered:
        """Read what `to_json` made."""
        greedy = record["greedy"]
        return cls(
            **{
                **record,
                "groups": {name: tuple(values) for name, values in record["groups"].items()},
                "samples": tuple(Sample.from_json(s) for s in record["samples"]),
                "greedy": Sample.from_json(greedy) if greedy else None,
                "pictures": tuple(record.get("pictures", ())),
            }
        )


def groups_of(prompt: Prompt) -> dict[str, tuple[str, ...]]:
    """Return a prompt's values of GROUPINGS as text.

    >>> groups_of(Prompt(id=0, task="t", text="?", metadata={"subject": ["Algebra", "Geometry"], "level": 3}))
    {'subject': ('Algebra', 'Geometry'), 'level': ('3',)}
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in GROUPINGS:
        value = prompt.metadata.get(name)
        values = value if isinstance(value, list | tuple) else [value]
        texts = dict.fromkeys(str(v) for v in values if v is not None and str(v).strip())
        if texts:
            found[name] = tuple(texts)
    return found
