"""Games that a tiny model learns: a calculator that it calls, and a number that it guesses from hints.

Both are written in the characters of cold starts (digits and `+-*%=;#`).
"""

from __future__ import annotations

import re

from sapo.data import Prompt, Score, Status
from sapo.environments.base import Ask, Said
from sapo.errors import TaskError
from sapo.utils.hashing import hashed_integer

_CALL = re.compile(r"(\d{1,8})([*+])(\d{1,8})=")
_GUESS = re.compile(r"\d\d;")


def _check_whole(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise TaskError(f"{name} must be a whole number in {low}..{high}; got {value!r}")


class Calculator:
    """A product and a sum, which the model works out by calling a calculator and ends with its answer.

        37*52+18=  the model: 37*52=   the calculator: 1924;
                   the model: 1924+18= the calculator: 1942;
                   the model: #1942

    A turn ends with `=`, which calls the calculator, or with the end token, which ends the episode.

    Args:
        digits: digits of the three numbers.
        calls: most calls that are answered.
        seed: of the training prompts. The held-out problems do not depend on it, and none is a training prompt.
        name: in logs.

    Raises:
        TaskError: an option is out of range.
    """

    stop = ("=",)

    def __init__(self, *, digits: int = 2, calls: int = 3, seed: int = 0, name: str = "calculator") -> None:
        _check_whole("digits", digits, 1, 4)
        _check_whole("calls", calls, 1, 100)
        self.digits, self.calls, self.seed, self.name = digits, calls, seed, name

    def train_prompt(self, index: int) -> Prompt:
        """Return the training prompt of `index`."""
        for draw in range(1000):
            a, b, c = self._numbers("train", self.seed, index, draw)
            if not self._held_out_problem(a, b, c):
                return self._prompt(index, a, b, c)
        raise AssertionError("a quarter of the problems is held out")

    def held_out(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out problems, all distinct."""
        found: dict[tuple[int, int, int], None] = {}
        for draw in range(20 * count):
            if len(found) == count:
                break
            numbers = self._numbers("held_out", draw)
            if self._held_out_problem(*numbers):
                found[numbers] = None
        return [self._prompt(i, *numbers) for i, numbers in enumerate(found)]

    def worked_example(self, index: int) -> tuple[Prompt, list[Said]]:
        """Return the training prompt of `index` and an episode that earns reward 1."""
        prompt = self.train_prompt(index)
        a, b, c = (int(part) for part in re.findall(r"\d+", prompt.text))
        calls: list[Said] = [("policy", f"{a}*{b}="), ("environment", f"{a * b};")]
        calls += [("policy", f"{a * b}+{c}="), ("environment", f"{a * b + c};")]
        return prompt, [*calls, ("policy", f"#{prompt.answer}")]

    async def play(self, prompt: Prompt, ask: Ask) -> Score:
        """Answer calls until the model says something else, and judge that."""
        turn = await ask()
        calls = 0
        while calls < self.calls and (call := _CALL.fullmatch(turn.text)):
            left, right = int(call[1]), int(call[3])
            turn = await ask(f"{left * right if call[2] == '*' else left + right};")
            calls += 1
        answer = turn.text.removeprefix("#") if turn.text.startswith("#") else None
        status = Status.UNPARSEABLE if answer is None else Status.SCORED
        return Score(float(answer == prompt.answer), status, answer=answer, figures={"calls": float(calls)})

    def _numbers(self, *seeds: str | int) -> tuple[int, int, int]:
        low, high = 10 ** (self.digits - 1), 10**self.digits
        drawn = hashed_integer("calculator", self.digits, *seeds)
        a, drawn = drawn % (high - low), drawn // (high - low)
        b, drawn = drawn % (high - low), drawn // (high - low)
        return low + a, low + b, low + drawn % (high - low)

    @staticmethod
    def _held_out_problem(a: int, b: int, c: int) -> bool:
        return hashed_integer("calculator", "side", min(a, b), max(a, b), c) % 4 == 0

    def _prompt(self, index: int, a: int, b: int, c: int) -> Prompt:
        return Prompt(index, self.name, f"{a}*{b}+{c}=", answer=str(a * b + c))


class Guess:
    """A number from 0 to n - 1 to be guessed in a few turns: after each wrong guess the model hears `-` or `+`.

        15=  the model: 07;  hears + (the number is larger)
             the model: 11;  hears - (it is smaller)
             the model: 09;  which is right

    Args:
        n: how many numbers there are.
        turns: how many guesses.
        seed: of the training prompts.
        name: in logs.

    Raises:
        TaskError: an option is out of range.
    """

    stop = (";",)

    def __init__(self, *, n: int = 15, turns: int = 4, seed: int = 0, name: str = "guess") -> None:
        _check_whole("n", n, 2, 100)
        _check_whole("turns", turns, 1, 100)
        self.n, self.turns, self.seed, self.name = n, turns, seed, name

    def train_prompt(self, index: int) -> Prompt:
        """Return the training prompt of `index`, whose number is a function of it."""
        return self._prompt(index, hashed_integer("guess", self.seed, index) % self.n)

    def held_out(self, count: int) -> list[Prompt]:
        """Return `count` prompts whose numbers are 0, 1, ..., and 0 again after n - 1."""
        return [self._prompt(i, i % self.n) for i in range(count)]

    def worked_example(self, index: int) -> tuple[Prompt, list[Said]]:
        """Return the training prompt of `index` and random guesses that end with the right one.

        Each guess is one that the hints before it allow.
        """
        prompt = self.train_prompt(index)
        secret, low, high = int(prompt.answer or 0), 0, self.n - 1
        said: list[Said] = []
        for turn in range(self.turns):
            last = turn == self.turns - 1
            guess = secret if last else low + hashed_integer("guessed", index, turn) % (high - low + 1)
            said.append(("policy", f"{guess:02d};"))
            if guess == secret:
                break
            low, high = (low, guess - 1) if secret < guess else (guess + 1, high)
            said.append(("environment", "-" if secret < guess else "+"))
        return prompt, said

    async def play(self, prompt: Prompt, ask: Ask) -> Score:
        """Answer guesses with hints until one is right or none are left."""
        secret, hint = int(prompt.answer or 0), ""
        for turn in range(self.turns):
            said = (await ask(hint)).text
            if not _GUESS.fullmatch(said):
                return Score(0.0, Status.UNPARSEABLE, f"no guess: {said[:40]!r}")
            guess = int(said[:2])
            if guess == secret:
                return Score(1.0, answer=f"{guess:02d}", figures={"guesses": turn + 1.0})
            hint = "-" if secret < guess else "+"
        return Score(0.0, answer=f"{guess:02d}", figures={"guesses": float(self.turns)})

    def _prompt(self, index: int, secret: int) -> Prompt:
        return Prompt(index, self.name, f"{self.n}=", answer=str(secret))
