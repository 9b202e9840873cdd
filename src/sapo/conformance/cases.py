"""Small batches that a loss is judged on, as plain numbers, so that a counterexample can be made smaller and printed.

A token is its log-ratio and the level of its response: log pi = level + min(log r, 0), log pi_old = level -
max(log r, 0). Both are then at most 0, however large the log-ratio.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEVELS = (-0.125, -1.0, -3.0)
"""Levels of random responses: the likelier of pi and pi_old is 0.88, 0.37 or 0.05."""
SPREADS = (0.0002, 0.05, 0.4, 1.5)
"""Standard deviations of log-ratios in random cases: sequence clips are 3e-4 wide, token clips 0.2."""


@dataclass(frozen=True)
class Response:
    """A response: its advantage and the log-ratio of each of its tokens.

    >>> print(Response(advantage=-1.0, log_ratios=(2.0, 0.0)))
    A = -1, log r = [2, 0]
    """

    advantage: float
    log_ratios: tuple[float, ...]
    level: float = -1.0
    """The larger of log pi and log pi_old."""

    def __str__(self) -> str:
        ratios = ", ".join(_short(z) for z in self.log_ratios)
        level = "" if self.level == -1.0 else f", log pi <= {_short(self.level)}"
        return f"A = {_short(self.advantage)}, log r = [{ratios}]{level}"


@dataclass(frozen=True)
class Case:
    """A mini-batch of responses with its padding.

    >>> print(Case((Response(1.0, (0.5,)),), padding=1, filler=100.0))
    A = 1, log r = [0.5]; 1 padded place with log r = 100
    """

    responses: tuple[Response, ...]
    padding: int = 0
    """Number of columns beyond the longest response."""
    filler: float = 0.0
    """Log-ratio at padded places: log pi is -1 there and log pi_old less by this; NaN makes both NaN."""

    def __str__(self) -> str:
        text = " | ".join(str(response) for response in self.responses)
        if self.filler != 0:
            places = sum(self.width - len(r.log_ratios) for r in self.responses)
            text += f"; {places} padded place{'s' * (places != 1)} with log r = {_short(self.filler)}"
        return text

    @property
    def width(self) -> int:
        """Return the number of columns of the padded batch, at least one."""
        return max(1, *(len(r.log_ratios) for r in self.responses)) + self.padding

    @property
    def num_tokens(self) -> int:
        """Return the number of response tokens."""
        return sum(len(r.log_ratios) for r in self.responses)

    def tensors(self, dtype: torch.dtype) -> Batch:
        """Return the batch as a loss takes it; `logp_BT` is a leaf that collects gradient."""
        rows, width = len(self.responses), self.width
        old_BT = torch.full((rows, width), -1.0 - self.filler, dtype=torch.float64)
        logp_BT = torch.where(old_BT.isnan(), old_BT, -1.0)
        mask_BT = torch.zeros(rows, width, dtype=torch.bool)
        for i, response in enumerate(self.responses):
            for t, z in enumerate(response.log_ratios):
                logp_BT[i, t] = response.level + min(z, 0.0)
                old_BT[i, t] = response.level - max(z, 0.0)
                mask_BT[i, t] = True
        advantages_B = torch.tensor([r.advantage for r in self.responses], dtype=dtype)
        return Batch(logp_BT.to(dtype).requires_grad_(), old_BT.to(dtype), advantages_B, mask_BT)


@dataclass(frozen=True)
class Batch:
    """A case as tensors.

    One response of two tokens beside one of one: mask_BT = [[1, 1], [1, 0]], advantages_B = [0.5, -0.5].
    """

    logp_BT: Tensor
    logp_old_BT: Tensor
    advantages_B: Tensor
    mask_BT: Tensor


def single_tokens(log_ratios: tuple[float, ...], advantages: tuple[float, ...] = (1.0, -1.0)) -> list[Case]:
    """Return one case of one token for each pair of a log-ratio and an advantage."""
    return [Case((Response(a, (z,)),)) for z in log_ratios for a in advantages]


def random_cases(count: int, *, responses: tuple[int, int] = (1, 3), seed: int = 0) -> Iterator[Case]:
    """Yield ragged batches of moderate log-ratios, the same in every run.

    Args:
        responses: least and greatest number of responses; each has tokens.
    """
    draw = random.Random(seed)
    for _ in range(count):
        rows = []
        for _ in range(draw.randint(*responses)):
            spread = draw.choice(SPREADS)
            ratios = tuple(round(draw.gauss(0, spread), 5) for _ in range(draw.randint(1, 4)))
            rows.append(Response(draw.choice((1.0, -1.0, 0.5, -1.5)), ratios, draw.choice(LEVELS)))
        yield Case(tuple(rows))


def shrink(case: Case, still_broken: Callable[[Case], bool], *, budget: int = 400) -> Case:
    """Return a smaller case that is still broken: fewer responses and tokens, rounder and smaller numbers.

    The search is greedy. It takes the first simpler neighbour that is still broken, until there is none or `budget`
    trials are made.
    """
    while True:
        for simpler in _simpler(case):
            if budget <= 0:
                return case
            budget -= 1
            if still_broken(simpler):
                case = simpler
                break
        else:
            return case


def _simpler(case: Case) -> Iterator[Case]:
    """Yield neighbours of a case, the greatest simplification first."""
    rows = case.responses
    if len(rows) > 1:
        yield from (replace(case, responses=rows[:i] + rows[i + 1 :]) for i in range(len(rows)))
    if case.padding > 1:
        yield replace(case, padding=1)
    if case.padding == 1:
        yield replace(case, padding=0)
    for filler in _simpler_numbers(case.filler) if case.filler else ():
        yield replace(case, filler=filler)
    for i, row in enumerate(rows):
        for smaller in _simpler_responses(row):
            yield replace(case, responses=(*rows[:i], smaller, *rows[i + 1 :]))


def _simpler_responses(row: Response) -> Iterator[Response]:
    """Yield simpler responses: a token fewer, then rounder numbers."""
    ratios = row.log_ratios
    if len(ratios) > 1:
        yield from (replace(row, log_ratios=ratios[:t] + ratios[t + 1 :]) for t in range(len(ratios)))
    if row.level != -1.0:
        yield replace(row, level=-1.0)
    if row.advantage not in (0.0, 1.0, -1.0):
        yield replace(row, advantage=math.copysign(1.0, row.advantage))
    for t, z in enumerate(ratios):
        for simpler in _simpler_numbers(z):
            yield replace(row, log_ratios=(*ratios[:t], simpler, *ratios[t + 1 :]))


def _simpler_numbers(x: float) -> Iterator[float]:
    """Yield 0, then x rounded, then whole numbers nearer to 0 by halving and by one."""
    if x == 0:
        return
    yield 0.0
    if not math.isfinite(x):
        return
    for digits in range(5):
        if (rounded := round(x, digits)) != x and rounded != 0:
            yield rounded
    if abs(x) > 1 and x == round(x):
        for smaller in (math.trunc(x / 2), math.trunc(x - math.copysign(8, x)), x - math.copysign(1, x)):
            if 0 < abs(smaller) < abs(x) and smaller * x > 0:
                yield float(smaller)


def _short(x: float) -> str:
    """Format a number with six digits."""
    return f"{x:.6g}"
