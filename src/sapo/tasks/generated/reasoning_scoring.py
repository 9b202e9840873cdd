r"""Score answers to reasoning-gym questions: find the answer in a completion and call the dataset's own scorer.

No scorer that evaluates the answer as code is ever called. Of the datasets in `reasoning_audit.SOUND` only countdown
has one, which passes the answer to sympy's parse_expr and so to eval. Its rule is computed here instead, with exact
fractions on a grammar of digits, + - * / and brackets. Two more rules depart from the package. spell_backward takes 0.2
off for letters after the right word, but rounding loses this for words of 9 letters, which then score above 1: here
they score at most 0.8. codeio compares trees in time quadratic in the answer: here an answer much longer than the
reference is not compared.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

from sapo.data import Prompt, Score, Status
from sapo.errors import TaskError
from sapo.tasks.verifiers.extract import last_boxed

AnswerFormat = Literal["auto", "text", "tag", "boxed"]
ANSWER_FORMATS: tuple[str, ...] = get_args(AnswerFormat)

# Far longer than the reference of any dataset, and short enough for every audited scorer to be quick.
MAX_ANSWER_LENGTH = 10_000

# Python would compute the number in full: Fraction("1e999999999") takes a gigabyte.
_HUGE_EXPONENT = re.compile(r"[eE][-+]?[0-9_]{4,}")

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TERM = re.compile(r"\s*([0-9]+|[-+*/()])")


@dataclass(frozen=True)
class ReasoningGymJudge:
    """A verifier for the items of one dataset.

    It holds plain values, so that it can be sent to worker processes: a scorer may take long on an odd answer. A prompt
    carries only the number of its item, from which the item is generated again.

    >>> judge = ReasoningGymJudge("chain_sum", knobs='{"max_terms": 2, "seed": 0, "size": 500}')
    >>> prompt = Prompt(id=0, task="chain_sum", text="", metadata={"item": 3})
    >>> judge(f"<answer>{judge.entry(3)['answer']}</answer>", prompt).reward, judge("Hm.", prompt).reward
    (1.0, 0.0)
    """

    dataset: str
    knobs: str
    """The dataset's settings as JSON."""
    answer_format: AnswerFormat = "auto"
    partial_credit: bool = True
    """Whether the dataset's rewards between 0 and 1 are kept; otherwise only a full score counts."""
    deadline: float = 10.0
    """Seconds allowed for scoring one completion."""
    isolated: ClassVar[bool] = True
    pure: ClassVar[bool] = True

    def prepare(self) -> None:
        """Load the package and make the dataset."""
        make_dataset(self.dataset, self.knobs)

    def prepare_prompt(self, prompt: Prompt) -> None:
        """Generate the item of a prompt, which takes seconds in a few datasets."""
        self.entry(int(prompt.metadata["item"]))

    def __call__(self, text: str, prompt: Prompt) -> Score:
        answer = extract_answer(text, self.answer_format)
        if not answer:
            return Score(0.0, Status.UNPARSEABLE, f"no answer in the format {self.answer_format!r}")
        if len(answer) > MAX_ANSWER_LENGTH or _HUGE_EXPONENT.search(answer):
            return Score(0.0, Status.UNPARSEABLE, f"the answer is too long or too large: {answer[:40]!r}")
        entry = self.entry(int(prompt.metadata["item"]))
        # Any exception: the scorer works on the reference, so it could not read this answer.
        try:
            value = score_answer(self.dataset, self._made, answer, entry)
        except Exception as error:
            return Score(0.0, Status.UNPARSEABLE, f"the scorer failed on the answer: {type(error).__name__}: {error}")
        reward = value if self.partial_credit or value >= 1 else 0.0
        return Score(reward, answer=answer)

    def entry(self, item: int) -> Mapping[str, Any]:
        """Return the question, answer and metadata of an item."""
        return generate_entry(self.dataset, self.knobs, item)

    @property
    def _made(self) -> Any:
        return make_dataset(self.dataset, self.knobs)


def extract_answer(text: str, answer_format: AnswerFormat) -> str | None:
    r"""Return the answer in a completion without blanks around it, or None where the format is not kept.

    tag is the last `<answer>...</answer>`, boxed the last \boxed{...}, text the whole completion, and auto the first of
    these that is present. Text before the last `</think>` is ignored.

    >>> [extract_answer(t, "auto") for t in ("<answer> 7 </answer>.", r"So \boxed{\{7\}}", " 7\n", "<think>7</think>8")]
    ['7', '\\{7\\}', '7', '8']
    >>> extract_answer("7", "tag") is None
    True
    """
    text = text.rpartition("</think>")[2]
    if answer_format in ("auto", "tag"):
        tags = _TAG.findall(text)
        if tags or answer_format == "tag":
            return tags[-1].strip() if tags else None
    if answer_format in ("auto", "boxed"):
        boxed = last_boxed(text)
        if boxed is not None or answer_format == "boxed":
            return boxed
    return text.strip()


def score_answer(name: str, dataset: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """Return the dataset's score of an answer in 0..1, with the departures listed at the top of this file."""
    if name == "countdown":
        return _score_countdown(answer, entry["metadata"])
    if name == "codeio" and len(answer) > 2 * len(entry["answer"]) + 200:
        return 0.01  # the score of an answer unlike the reference
    value = float(dataset.score_answer(answer, entry))
    if name == "spell_backward" and answer.lower() != entry["answer"].lower():
        value = min(value, 0.8)
    return min(max(value, 0.0), 1.0)


@lru_cache(maxsize=64)
def make_dataset(name: str, knobs: str) -> Any:
    """Make a dataset of the package, once per process.

    Raises:
        TaskError: the dataset refuses its settings.
    """
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(name, **json.loads(knobs))
    # Any exception: the datasets check their settings by assert, and some only by failing.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TaskError(f"reasoning-gym's {name} refuses its settings {knobs}: {reason}; change them") from error


@lru_cache(maxsize=8192)
def generate_entry(name: str, knobs: str, item: int) -> Mapping[str, Any]:
    """Generate one item, the same in every process: the global random generators are seeded by the item.

    Items are cached, since a training question is scored once for each of its completions.
    """
    dataset = make_dataset(name, knobs)
    # codeio runs programs of the package to make its questions, some of which print, warn or fail.
    with _global_generators_seeded(item), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entry: Mapping[str, Any] = dataset[item]
    return entry


@contextlib.contextmanager
def _global_generators_seeded(seed: int) -> Iterator[None]:
    import numpy

    states = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def _score_countdown(answer: str, metadata: Mapping[str, Any]) -> float:
    """Return 1 for an expression of the given numbers with the target value, 0.05 for another, 0.01 for none."""
    try:
        value = evaluate(answer)
    except (ValueError, ZeroDivisionError):
        return 0.01
    used = sorted(int(number) for number in re.findall(r"[0-9]+", answer))
    right = used == sorted(metadata["numbers"]) and value == metadata["target"]
    return 1.0 if right else 0.05


def evaluate(expression: str) -> Fraction:
    """Compute the exact value of an expression of whole numbers, + - * / and brackets, by the usual precedence.

    >>> evaluate("2 + 3*(4 - -1)/5")
    Fraction(5, 1)

    Raises:
        ValueError: the text is no such expression, or longer than 500 characters.
        ZeroDivisionError: the expression divides by zero.
    """
    tokens, position = [], 0
    while position < len(expression.rstrip()):
        match = _TERM.match(expression, position)
        if match is None or len(expression) > 500:
            raise ValueError(f"an expression must have digits, + - * / and brackets only; got {expression[:40]!r}")
        tokens.append(match[1])
        position = match.end()
    value, rest = _sum(tokens, 0, depth=0)
    if rest != len(tokens):
        raise ValueError(f"an expression must end where it ends; got {tokens[rest]!r} in {expression[:40]!r}")
    return value


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _product(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "+-":
        operator = tokens[at]
        term, at = _product(tokens, at + 1, depth)
        value = value + term if operator == "+" else value - term
    return value, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _factor(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "*/":
        operator = tokens[at]
        factor, at = _factor(tokens, at + 1, depth)
        value = value * factor if operator == "*" else value / factor
    return value, at


def _factor(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    if at >= len(tokens) or depth > 100:
        raise ValueError("an expression must be whole, with at most 100 brackets or signs in each other")
    token = tokens[at]
    if token in "+-":
        value, at = _factor(tokens, at + 1, depth + 1)
        return (-value if token == "-" else value), at
    if token == "(":
        value, at = _sum(tokens, at + 1, depth + 1)
        if at >= len(tokens) or tokens[at] != ")":
            raise ValueError("an expression must close its brackets")
        return value, at + 1
    if not token.isdigit():
        raise ValueError(f"an expression must have a number here; got {token!r}")
    return Fraction(int(token)), at + 1
