"""Sums and differences in plain text for a pretrained model, answered by the number alone.

    4 + 3 =      7
    9 - 2 =      7

`arithmetic` has an alphabet and working for tiny models; this text suits any tokenizer. A hash of the problem, up to
commutation, decides whether it is held out, and the seed does not: a model that was trained on 3 + 4 is never evaluated
on 4 + 3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sapo.data import Prompt, Score, Status
from sapo.errors import TaskError
from sapo.tasks.base import check_index
from sapo.utils.hashing import falls_in_share, hashed_integer
from sapo.utils.names import did_you_mean

OPERATIONS = ("add", "subtract")

MAX_DIGITS = 3
"""Limit of `digits`. All problems are listed in memory; with three digits there are 1.2 million."""

_INTEGER = re.compile(r"0|[1-9][0-9]*")


class SumsTask:
    """Problems of one or two operations on non-negative integers; differences are never negative.

    Args:
        digits: digits of both operands; 1 means 0..9.
        operations: add, subtract or both; each comes equally often.
        held_out_fraction: share of the problems that is never trained on.
        seed: random seed of the order of problems. The held-out set does not depend on it.
        name: name of the task in logs. Default: sums1, sums2.

    Raises:
        TaskError: an option is out of range, or one side of the split has no problems.

    >>> task = SumsTask(digits=1)
    >>> prompt = task.train_prompt(0)
    >>> prompt.text, prompt.answer, task.verify(f" {prompt.answer}", prompt).reward
    ('8 + 4 =', '12', 1.0)
    """

    def __init__(
        self,
        *,
        digits: int = 1,
        operations: Sequence[str] = OPERATIONS,
        held_out_fraction: float = 0.25,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        if not isinstance(digits, int) or isinstance(digits, bool) or not 1 <= digits <= MAX_DIGITS:
            raise TaskError(f"digits must be a whole number in 1..{MAX_DIGITS}; got {digits!r}")
        if isinstance(operations, str) or not operations or len(set(operations)) != len(operations):
            raise TaskError(
                f"operations must be a list of distinct names of {', '.join(OPERATIONS)}; got {operations!r}"
            )
        for operation in operations:
            if operation not in OPERATIONS:
                hint = did_you_mean(str(operation), OPERATIONS)
                raise TaskError(f"operations must be of {', '.join(OPERATIONS)}; got {operation!r}{hint}")
        if not (isinstance(held_out_fraction, (int, float)) and 0 < held_out_fraction < 1):
            raise TaskError(
                f"held_out_fraction must be between 0 and 1; got {held_out_fraction!r}; the default is 0.25"
            )
        self.name = name if name is not None else f"sums{digits}"
        self.seed = seed
        low, high = (0, 10) if digits == 1 else (10 ** (digits - 1), 10**digits)
        self._train: list[list[tuple[int, int, str]]] = []
        held_out: dict[str, tuple[int, int, str]] = {}
        for operation in operations:
            train = []
            for a in range(low, high):
                for b in range(low, high if operation == "add" else a + 1):
                    if falls_in_share(canonical(a, b, operation), held_out_fraction):
                        held_out.setdefault(canonical(a, b, operation), (a, b, operation))
                    else:
                        train.append((a, b, operation))
            if not train:
                raise TaskError(f"{operation} of {digits} digits has no training problem; lower held_out_fraction")
            self._train.append(train)
        if not held_out:
            raise TaskError(f"no problem of {digits} digits is held out; raise held_out_fraction")
        ordered = sorted(held_out, key=lambda key: hashed_integer("held_out", seed, key))
        self._held_out = [held_out[key] for key in ordered]

    def train_prompt(self, index: int) -> Prompt:
        """Return the prompt of `index`. The operations alternate."""
        check_index(index)
        problems = self._train[index % len(self._train)]
        return self._prompt(problems[hashed_integer("train", self.seed, index) % len(problems)], index)

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out problems in a seeded order, all distinct up to commutation."""
        return [self._prompt(problem, index) for index, problem in enumerate(self._held_out[:count])]

    def shots(self, count: int) -> list[tuple[str, str]]:
        """Return distinct training examples. The operations alternate, since examples of one kind mislead a model."""
        shots: dict[str, str] = {}
        for draw in range(100 * count):
            if len(shots) == count:
                return list(shots.items())
            problems = self._train[len(shots) % len(self._train)]
            shot = self._prompt(problems[hashed_integer("shots", draw) % len(problems)], 0)
            shots.setdefault(shot.text, str(shot.answer))
        raise TaskError(f"{self.name} has fewer than {count} examples; ask for fewer: prompt.shots")

    def verify(self, text: str, prompt: Prompt) -> Score:
        """Give reward 1 where the text is the answer: canonical digits, with blanks around them allowed."""
        answer = text.strip()
        if not _INTEGER.fullmatch(answer):
            return Score(0.0, Status.UNPARSEABLE, f"not an integer and nothing else: {answer[:40]!r}")
        return Score(float(answer == prompt.answer), answer=answer)

    def _prompt(self, problem: tuple[int, int, str], index: int) -> Prompt:
        a, b, operation = problem
        sign, result = ("+", a + b) if operation == "add" else ("-", a - b)
        return Prompt(
            id=index,
            task=self.name,
            text=f"{a} {sign} {b} =",
            answer=str(result),
            metadata={"subject": operation},
        )


def canonical(a: int, b: int, operation: str) -> str:
    """Return one text for both orders of a sum.

    >>> canonical(4, 3, "add"), canonical(3, 4, "add"), canonical(4, 3, "subtract")
    ('3 + 4', '3 + 4', '4 - 3')
    """
    return f"{min(a, b)} + {max(a, b)}" if operation == "add" else f"{a} - {b}"
