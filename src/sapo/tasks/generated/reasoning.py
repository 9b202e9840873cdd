"""Tasks of reasoning-gym by name: endless generated questions with the package's own scorers (extra `tasks`).

    - {name: reasoning_gym, dataset: chain_sum, min_terms: 2, max_terms: 3}
    - {name: reasoning_gym/mini_sudoku, max_empty: 8, answer_format: tag, template: "{prompt}\\nUse <answer></answer>."}

A hash of the question alone decides whether it is held out, up to the order of commuting terms and numbers where we
know of it. The seed does not decide: with another seed, a small dataset would repeat its questions. Training prompt i
is the first of its own sequence of draws that is not held out, so that prompt 100,000 costs as much as the first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal

from sapo.data import Prompt
from sapo.errors import TaskError
from sapo.tasks.base import JudgedTask, check_index
from sapo.tasks.generated.reasoning_audit import SOUND, check_dataset
from sapo.tasks.generated.reasoning_scoring import ANSWER_FORMATS, AnswerFormat, ReasoningGymJudge
from sapo.tasks.verifiers import Isolated
from sapo.utils.hashing import falls_in_share, hashed_integer
from sapo.utils.names import did_you_mean

# Number of items of a dataset, unless `size` gives another. Most datasets generate each item on demand; a few generate
# all at once, and are slow to start.
DEFAULT_SIZE = 2**17

# A held-out question then costs four draws, and a training question 1.33, of generators that may take 0.2 s.
DEFAULT_HELD_OUT_FRACTION = 0.25

# Draws after which a side without a question is an error.
MAX_DRAWS = 1000

# A question that comes once in 50 draws of its side is missed with probability exp(-10).
PATIENCE = 500


class ReasoningGymTask(JudgedTask):
    """Questions of one dataset of reasoning-gym, judged in worker processes with a deadline.

    Args:
        dataset: name of the dataset in the package.
        answer_format: where the answer stands in a completion: tag (the last `<answer>...</answer>`), boxed (the last
            \\boxed{...}), text (the whole completion), or auto, the first of these that is present.
        template: wording around the question.
        partial_credit: keep the dataset's rewards between 0 and 1; otherwise only a full score counts.
        held_out_fraction: share of the questions that is never trained on, 0.01..0.99. Default 0.25.
        size: number of items of the dataset.
        seed: random seed of the order of questions. The held-out set does not depend on it.
        name: name of the task in logs. Default: the dataset's name.
        knobs: settings of the dataset.

    Raises:
        TaskError: the package, the dataset or a setting does not exist; the dataset is refused (reasoning_audit.py);
            there are too few questions to split.
    """

    def __init__(
        self,
        dataset: str,
        *,
        answer_format: AnswerFormat = "auto",
        template: str = "{prompt}",
        partial_credit: bool = True,
        held_out_fraction: float = DEFAULT_HELD_OUT_FRACTION,
        size: int = DEFAULT_SIZE,
        seed: int = 0,
        name: str | None = None,
        **knobs: Any,
    ) -> None:
        if answer_format not in ANSWER_FORMATS:
            hint = did_you_mean(str(answer_format), ANSWER_FORMATS)
            raise TaskError(f"answer_format must be one of {', '.join(ANSWER_FORMATS)}; got {answer_format!r}{hint}")
        if not isinstance(template, str) or "{prompt}" not in template:
            raise TaskError(f"template must hold {{prompt}}, where the question goes; got {template!r}; write it there")
        if not (isinstance(held_out_fraction, (int, float)) and 0.01 <= held_out_fraction <= 0.99):
            raise TaskError(
                f"held_out_fraction must be between 0.01 and 0.99; got {held_out_fraction!r}; the default is "
                f"{DEFAULT_HELD_OUT_FRACTION}"
            )
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise TaskError(f"size must be a whole number of items, at least 1; got {size!r}; leave it out")
        settings = _settings(dataset, {**knobs, "size": size})
        check_dataset(dataset, settings)
        self.name = name if name is not None else dataset
        self.dataset = dataset
        self.template = template
        self.held_out_fraction = held_out_fraction
        self.size = size
        self.seed = seed
        self._judge = ReasoningGymJudge(dataset, settings, answer_format, partial_credit)
        self.verifier = Isolated(self._judge, self._judge.deadline, self._judge.pure)
        self._held_out: dict[str, int] = {}  # question -> item, in the order of draws
        self._draws = self._barren = 0  # held-out draws: in all, and since the last new question
        self.train_prompt(0)
        if not self.held_out(1):
            raise TaskError(f"{self.name}: both sides must have questions; got no held-out one; {self._way_out}")

    def train_prompt(self, index: int) -> Prompt:
        """Return the prompt of `index`: the first of its own sequence of draws that is not held out.

        Raises:
            TaskError: all of MAX_DRAWS draws were held out.
        """
        check_index(index)
        for attempt in range(MAX_DRAWS):
            item = hashed_integer("train", self.seed, index, attempt) % self.size
            if self._side(item) == "train":
                return self._prompt(item, index)
        raise TaskError(
            f"{self.name}: both sides must have questions; got {MAX_DRAWS} draws all held out; {self._way_out}"
        )

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first `count` of a seeded list of distinct held-out questions, or all that are found.

        The search ends after as many draws without a new question as have PATIENCE held-out ones on average.
        """
        patience = math.ceil(PATIENCE / self.held_out_fraction)
        while len(self._held_out) < count and self._barren < patience:
            item = hashed_integer("held_out", self.seed, self._draws) % self.size
            self._draws += 1
            before = len(self._held_out)
            if self._side(item) == "held_out":
                self._held_out.setdefault(self._key(item), item)
            self._barren = self._barren + 1 if len(self._held_out) == before else 0
        items = list(self._held_out.values())[:count]
        return [self._prompt(item, index) for index, item in enumerate(items)]

    def shots(self, count: int) -> list[tuple[str, str]]:
        """Return `count` distinct training questions with their answers. They do not depend on the seed.

        Raises:
            TaskError: there are fewer.
        """
        found: dict[str, tuple[str, str]] = {}
        for draw in range(MAX_DRAWS):
            if len(found) == count:
                return list(found.values())
            item = hashed_integer("shots", draw) % self.size
            if self._side(item) == "train":
                prompt = self._prompt(item, 0)
                found.setdefault(self._key(item), (prompt.text, str(prompt.answer)))
        raise TaskError(f"{self.name}: {MAX_DRAWS} draws gave {len(found)} training questions; got shots={count}")

    @property
    def _way_out(self) -> str:
        return f"change held_out_fraction={self.held_out_fraction} or ask for larger questions"

    def _side(self, item: int) -> Literal["train", "held_out"] | None:
        """Return the side of an item, or None for an item of codeio whose program failed."""
        metadata = self._judge.entry(item)["metadata"]
        if self.dataset == "codeio" and not metadata["input_data"] and not metadata["output_data"]:
            return None
        return "held_out" if falls_in_share(self._key(item), self.held_out_fraction) else "train"

    def _key(self, item: int) -> str:
        entry = self._judge.entry(item)
        canonical = _CANONICAL.get(self.dataset)
        return str(entry["question"]) if canonical is None else canonical(entry["metadata"])

    def _prompt(self, item: int, index: int) -> Prompt:
        entry = self._judge.entry(item)
        text = self.template.replace("{prompt}", str(entry["question"]))
        metadata = {"dataset": self.dataset, "item": item}
        return Prompt(id=index, task=self.name, text=text, answer=str(entry["answer"]), metadata=metadata)


def canonical_sum(expression: str) -> str:
    """Return one text for all orders of the terms of a chain of sums and differences.

    >>> canonical_sum("4 + 3 - 2") == canonical_sum("4 - 2 + 3"), canonical_sum("4 - 3") == canonical_sum("3 - 4")
    (True, False)
    """
    first, *rest = expression.split()
    terms = [int(first)]
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        terms.append(int(term) if operator == "+" else -int(term))
    return " ".join(map(str, sorted(terms)))


def _canonical_equation(metadata: Mapping[str, Any]) -> str:
    # One equation comes in three wordings and with any letter as the unknown. It has no other letters.
    return re.sub(r"[a-z]", "x", str(metadata["equation"]))


def _canonical_numbers(metadata: Mapping[str, Any]) -> str:
    return " ".join(map(str, [*sorted(metadata["numbers"]), metadata.get("target", "")]))


# Datasets that write one question in several ways, with a function that gives all of them the same text.
_CANONICAL: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "chain_sum": lambda metadata: canonical_sum(metadata["expression"]),
    "gcd": _canonical_numbers,
    "lcm": _canonical_numbers,
    "countdown": _canonical_numbers,
    "simple_equations": _canonical_equation,
}


def _settings(dataset: str, knobs: dict[str, Any]) -> str:
    """Return the dataset's settings as JSON, with a fixed seed so that items do not depend on the run's seed.

    Raises:
        TaskError: the package, the dataset or a setting does not exist.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise TaskError(f"this task needs reasoning-gym; got {error}; add it: pip install 'sapo-rl[tasks]'") from error
    known = reasoning_gym.factory.DATASETS
    if dataset not in known:
        hint = did_you_mean(str(dataset), known)
        raise TaskError(f"reasoning-gym has {len(known)} datasets, such as {', '.join(SOUND)}; got {dataset!r}{hint}")
    names = [field.name for field in fields(known[dataset][1]) if field.name not in ("seed", "size")]
    for knob in knobs:
        if knob != "size" and knob not in names:
            hint = did_you_mean(knob, names)
            raise TaskError(f"reasoning-gym's {dataset} takes the settings {', '.join(names)}; got {knob!r}{hint}")
    try:
        return json.dumps({**knobs, "seed": 0}, sort_keys=True)
    except TypeError as error:
        raise TaskError(f"settings of {dataset} must be plain YAML; got {error}; write numbers or text") from error
