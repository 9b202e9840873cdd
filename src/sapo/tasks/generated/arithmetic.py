"""Arithmetic with written working: endless prompts, exact verification, and a held-out set disjoint by construction.

Three operations share one alphabet of 17 characters:

    add             1234+5678=      4+8+0=12;3+7+1=11;2+6+1=09;1+5+0=06;#6912
    multiply        12*34=          12*4=48;12*30=360;48+360=408;#408
    modular_chain   3+4*2-5%7=      3+4=0;0*2=0;0-5=2;#2

Addition starts at the least significant digit: digit + digit + carry = a total of two digits, the first of which is
the next carry. Multiplication writes the partial product of each digit of the second operand, the least significant
first, then the running sums. A modular chain is evaluated strictly from left to right, without precedence, and every
step is reduced to 0..modulus-1; `%7` gives the modulus of the whole chain.

A hash of the problem alone, up to the order of commuting operands, decides whether it is held out. The seed does not:
a model that is cold-started with one seed and trained with another has seen none of the held-out set. Only the answer
after the last `#` is verified: a right answer with wrong working is rewarded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, get_args

from sapo.data import Prompt, Score, Status
from sapo.errors import TaskError
from sapo.tasks.base import check_index
from sapo.utils.hashing import falls_in_share, hashed_integer
from sapo.utils.names import did_you_mean

ALPHABET = "0123456789+-*%=;#"

Operation = Literal["add", "multiply", "modular_chain"]

# A number of HASH_BITS = 512 bits reduced to a space of at most this many bits has a bias below 2**-64.
MAX_SPACE_BITS = 448

# Spaces up to this size are listed in full for the held-out set, in about half a second. Larger ones are sampled.
MAX_LISTED_PROBLEMS = 2**17

_CANONICAL_INTEGER = re.compile(r"0|-?[1-9][0-9]*")
_TERM = re.compile(r"([-+*%]?)([0-9]+)")


class ArithmeticTask:
    """Problems of one operation, drawn uniformly from all of them.

    Args:
        operation: add, multiply or modular_chain.
        digits: digits of both operands of add and multiply; 1 means 0..9. Default 4.
        terms: operations in a modular chain. Default 3.
        modulus: modulus of a modular chain, whose operands are 0..modulus-1. Default 7.
        held_out_fraction: share of the problems that is never trained on, 0.01..0.99.
        seed: random seed of the order of problems. The held-out set does not depend on it.
        name: name of the task in logs. Default: add4, multiply2, modular_chain3_mod7 and so on.

    Raises:
        TaskError: an option is out of range or belongs to another operation, or there are too few problems to split.

    >>> prompt, response = ArithmeticTask(digits=2, seed=0).worked_example(0)
    >>> prompt.text + response
    '23+92=3+2+0=05;2+9+0=11;#115'
    """

    def __init__(
        self,
        *,
        operation: Operation = "add",
        digits: int | None = None,
        terms: int | None = None,
        modulus: int | None = None,
        held_out_fraction: float = 1 / 16,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        known = get_args(Operation)
        if operation not in known:
            hint = did_you_mean(str(operation), known)
            raise TaskError(f"operation must be one of {', '.join(known)}; got {operation!r}{hint}")
        if operation == "modular_chain":
            foreign: dict[str, int | None] = {"digits": digits}
        else:
            foreign = {"terms": terms, "modulus": modulus}
        for option, value in foreign.items():
            if value is not None:
                raise TaskError(f"{option} is no option of operation {operation}; got {option}={value!r}; leave it out")
        if not (isinstance(held_out_fraction, (int, float)) and 0.01 <= held_out_fraction <= 0.99):
            raise TaskError(
                f"held_out_fraction must be between 0.01 and 0.99; got {held_out_fraction!r}; the default is 1/16"
            )
        self.operation = operation
        self.digits = _whole("digits", digits, default=4, minimum=1)
        self.terms = _whole("terms", terms, default=3, minimum=1)
        self.modulus = _whole("modulus", modulus, default=7, minimum=2)
        self.held_out_fraction = held_out_fraction
        self.seed = seed
        sizes = f"{self.terms}_mod{self.modulus}" if operation == "modular_chain" else f"{self.digits}"
        self.name = name if name is not None else f"{operation}{sizes}"
        self.num_problems = self._count_problems()
        self._listed: list[str] | None = None
        self._check_both_sides_exist()

    def train_prompt(self, index: int) -> Prompt:
        """Return the prompt of `index`: the first of its own sequence of draws that is not held out."""
        check_index(index)
        attempt = 0
        while True:
            text = self._problem(hashed_integer("train", self.seed, index, attempt) % self.num_problems)
            if not self.is_held_out(text):
                return self._prompt(text, index)
            attempt += 1

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first `count` of a seeded list of held-out problems, all distinct up to commutation.

        Raises:
            TaskError: there are too many problems to list, and `count` is nearly all of the held-out ones.
        """
        if self.num_problems <= MAX_LISTED_PROBLEMS:
            texts = self._list_held_out()[:count]
        else:
            texts = self._draw_held_out(count)
        return [self._prompt(text, index) for index, text in enumerate(texts)]

    def verify(self, text: str, prompt: Prompt) -> Score:
        """Give reward 1 where the integer after the last `#` is the answer. The working before it is not scored.

        The integer must be canonical: ASCII digits, no leading zero, no plus sign. So values are compared as text, and
        int() never runs on a number as long as the model likes.
        """
        if prompt.answer is None:
            raise ValueError(f"an arithmetic prompt needs its answer; got none for {prompt.text!r}")
        _, mark, answer = text.rpartition("#")
        answer = answer.strip()
        if not mark:
            return Score(0.0, Status.UNPARSEABLE, "no '#' in the completion")
        if not _CANONICAL_INTEGER.fullmatch(answer):
            return Score(0.0, Status.UNPARSEABLE, f"no integer after the last '#': {answer[:40]!r}")
        return Score(float(answer == prompt.answer), answer=answer)

    def worked_example(self, index: int) -> tuple[Prompt, str]:
        """Return the training prompt of `index` and its full solution, as the file header shows."""
        prompt = self.train_prompt(index)
        return prompt, worked_text(prompt.text)

    def is_held_out(self, prompt_text: str) -> bool:
        """Return whether a problem is held out: a pure function of its canonical form."""
        return falls_in_share(canonical(prompt_text), self.held_out_fraction)

    def _prompt(self, text: str, index: int) -> Prompt:
        return Prompt(id=index, task=self.name, text=text, answer=worked_text(text).rpartition("#")[2])

    def _count_problems(self) -> int:
        if self.operation == "modular_chain":
            bits = (self.terms + 1) * self.modulus.bit_length() + 2 * self.terms
            sizes = f"terms={self.terms} and modulus={self.modulus}"
        else:
            bits = 2 * 4 * self.digits
            sizes = f"digits={self.digits}"
        # An upper bound is checked first, since the power itself might be too large to compute.
        if bits > 2 * MAX_SPACE_BITS or (size := self._space()).bit_length() > MAX_SPACE_BITS:
            raise TaskError(f"there must be at most 2**{MAX_SPACE_BITS} problems; got {sizes}; use smaller problems")
        return size

    def _space(self) -> int:
        if self.operation == "modular_chain":
            return int(self.modulus ** (self.terms + 1) * 3**self.terms)
        return self._num_operands**2

    @property
    def _num_operands(self) -> int:
        return 10 if self.digits == 1 else 9 * int(10 ** (self.digits - 1))

    def _problem(self, number: int) -> str:
        """Return the text of problem `number` in 0..num_problems-1."""
        if self.operation == "modular_chain":
            number, operand = divmod(number, self.modulus)
            text = str(operand)
            for _ in range(self.terms):
                number, operator = divmod(number, 3)
                number, operand = divmod(number, self.modulus)
                text += f"{'+-*'[operator]}{operand}"
            return f"{text}%{self.modulus}="
        lowest = 0 if self.digits == 1 else 10 ** (self.digits - 1)
        a, b = divmod(number, self._num_operands)
        return f"{lowest + a}{'+' if self.operation == 'add' else '*'}{lowest + b}="

    def _check_both_sides_exist(self) -> None:
        sides = set()
        for number in range(self.num_problems):
            sides.add(self.is_held_out(self._problem(number)))
            if len(sides) == 2:
                return
        missing = "training" if True in sides else "held-out"
        raise TaskError(
            f"a task must have training and held-out problems; got no {missing} problem among the {self.num_problems} "
            f"of {self.operation} with held_out_fraction={self.held_out_fraction}; use larger problems or change it"
        )

    def _list_held_out(self) -> list[str]:
        if self._listed is None:
            texts = map(self._problem, range(self.num_problems))
            distinct = {canonical(text): text for text in texts if self.is_held_out(text)}
            ordered = sorted(distinct, key=lambda key: hashed_integer("held_out", self.seed, key))
            self._listed = [distinct[key] for key in ordered]
        return self._listed

    def _draw_held_out(self, count: int) -> list[str]:
        distinct: dict[str, str] = {}
        # To find a share x of all problems takes -ln(1 - x) / x hits for each: 3 is enough up to x = 0.94.
        limit = int(3 * count / self.held_out_fraction) + 1000
        for draw in range(limit):
            if len(distinct) >= count:
                return list(distinct.values())
            text = self._problem(hashed_integer("held_out", self.seed, draw) % self.num_problems)
            if self.is_held_out(text):
                distinct.setdefault(canonical(text), text)
        raise TaskError(
            f"held_out must ask for clearly fewer problems than there are; got {count}, and {limit} draws gave "
            f"{len(distinct)} of {self.num_problems} problems; ask for fewer"
        )


def canonical(prompt_text: str) -> str:
    """Return one text for all the ways to write a problem: commuting operands are sorted.

    In a chain, neighbouring additions and subtractions commute as signed terms, and neighbouring multiplications
    commute. The first operand belongs to the run that follows it.

    >>> canonical("34+12="), canonical("12+34=")
    ('+12+34', '+12+34')
    >>> canonical("4+3*2-5%7=") == canonical("3+4*2-5%7="), canonical("3*4-5%7=") == canonical("3-4*5%7=")
    (True, False)
    """
    operators, operands, modulus = _parse(prompt_text)
    runs = [[f"{'*' if operators[0] == '*' else '+'}{operands[0]}"]]
    for previous, operator, operand in zip(operators[:1] + operators, operators, operands[1:], strict=False):
        if (previous == "*") != (operator == "*"):
            runs.append([])
        runs[-1].append(f"{operator}{operand}")
    return "|".join("".join(sorted(run)) for run in runs) + (f"%{modulus}" if modulus else "")


def worked_text(prompt_text: str) -> str:
    """Return the working and, after `#`, the answer of a problem, in the formats of the file header.

    >>> worked_text("12*34=")
    '12*4=48;12*30=360;48+360=408;#408'
    """
    operators, operands, modulus = _parse(prompt_text)
    if modulus:
        return _work_chain(operators, operands, modulus)
    if operators == ["+"]:
        return _work_sum(*operands)
    return _work_product(*operands)


def check_disjoint(task: ArithmeticTask, train_indices: Iterable[int], held_out_count: int = 1024) -> None:
    """Check that no training prompt is a held-out prompt, up to commutation, by comparing the prompts themselves.

    Raises:
        AssertionError: a problem is on both sides.
    """
    held_out = {canonical(prompt.text): prompt.text for prompt in task.held_out(held_out_count)}
    for index in train_indices:
        text = task.train_prompt(index).text
        twin = held_out.get(canonical(text))
        if twin is not None:
            raise AssertionError(f"training prompt {index} {text!r} is held out as {twin!r}")


def _parse(prompt_text: str) -> tuple[list[str], list[int], int]:
    """Return the operators, the operands and the modulus, 0 for none, of a problem such as `3+4*2-5%7=`."""
    terms = _TERM.findall(prompt_text)
    modulus = int(terms.pop()[1]) if terms[-1][0] == "%" else 0
    return [operator for operator, _ in terms[1:]], [int(operand) for _, operand in terms], modulus


def _work_sum(a: int, b: int) -> str:
    steps, carry = [], 0
    for digit_a, digit_b in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(digit_a) + int(digit_b) + carry
        steps.append(f"{digit_a}+{digit_b}+{carry}={total:02d};")
        carry = total // 10
    return f"{''.join(steps)}#{a + b}"


def _work_product(a: int, b: int) -> str:
    factors = [int(digit) * 10**place for place, digit in enumerate(reversed(str(b)))]
    steps = [f"{a}*{factor}={a * factor};" for factor in factors]
    total = a * factors[0]
    for factor in factors[1:]:
        steps.append(f"{total}+{a * factor}={total + a * factor};")
        total += a * factor
    return f"{''.join(steps)}#{total}"


def _work_chain(operators: list[str], operands: list[int], modulus: int) -> str:
    steps, value = [], operands[0]
    for operator, operand in zip(operators, operands[1:], strict=True):
        exact = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
        steps.append(f"{value}{operator}{operand}={exact % modulus};")
        value = exact % modulus
    return f"{''.join(steps)}#{value}"


def _whole(option: str, value: int | None, *, default: int, minimum: int) -> int:
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise TaskError(f"{option} must be a whole number, {minimum} or more; got {value!r}; the default is {default}")
    return value
