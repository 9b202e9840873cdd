"""What was drawn and judged, without the tensors: a line of completions.jsonl, and all that a figure is computed from.

An evaluation that was just made and one read back from its files go through the same records, so that their figures
are the same to the bit.
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
    """One completion as it was judged.

    >>> Sample(text="46", reward=1.0, status=Status.SCORED, answer="46", finish_reason="stop", tokens=3).to_json()
    {'text': '46', 'reward': 1.0, 'status': 'scored', 'answer': '46', 'finish_reason': 'stop', 'tokens': 3}
    """

    text: str
    reward: float
    status: Status
    finish_reason: str
    tokens: int
    answer: str | None = None
    """What the verifier took as the answer; None when it found none, or does not say."""
    detail: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, completion: Completion) -> Sample:
        """A scored completion's record. A figure that is no finite number was not measured and is left out."""
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
        """As a JSON value; `detail` and `figures` only where there are any."""
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
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Sample:
        """The inverse of `to_json`."""
        return cls(**{**record, "status": Status(record["status"])})


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
    """Its number in the evaluation, from 0; names its draws to the sampler."""
    prompt: str
    """The task's question."""
    seen: str
    """What the model saw: the question in its prompt format, special tokens and all."""
    answer: str | None
    groups: Mapping[str, tuple[str, ...]]
    """Its values of GROUPINGS, those it has; several where a problem is of two subjects."""
    samples: tuple[Sample, ...]
    greedy: Sample | None = None
    """A completion at temperature 0, where one was asked for."""

    @property
    def key(self) -> str:
        """Names the problem to another evaluation of it, whatever format the question was put in.

        >>> Answered(id=0, prompt="12+34=", seen="", answer="46", groups={}, samples=()).key
        '53c57f690e83f389'
        """
        text = f"{self.prompt}\x00{self.answer}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """A line of completions.jsonl."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "seen": self.seen,
            "answer": self.answer,
            "groups": {name: list(values) for name, values in self.groups.items()},
            "samples": [s.to_json() for s in self.samples],
            "greedy": self.greedy.to_json() if self.greedy else None,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Answered:
        """The inverse of `to_json`."""
        greedy = record["greedy"]
        return cls(
            **{
                **record,
                "groups": {name: tuple(values) for name, values in record["groups"].items()},
                "samples": tuple(Sample.from_json(s) for s in record["samples"]),
                "greedy": Sample.from_json(greedy) if greedy else None,
            }
        )


def groups_of(prompt: Prompt) -> dict[str, tuple[str, ...]]:
    """A prompt's values of GROUPINGS as text.

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
