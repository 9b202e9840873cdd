"""A second implementation of the objectives, one token at a time, in plain Python: the reference of the laws.

It follows the formulas in the docstrings of sapo.objectives with loops and the math module, without tensors, autograd
or limits. It has slopes only, d value / d log pi, for log-ratios of moderate size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sapo.conformance.cases import Case, Response


def gradient(case: Case, objective: Any, normalizer: str, max_length: int) -> list[list[float]]:
    """Compute d loss / d log pi of every response token, minus weight times slope; one list for each response."""
    rows = []
    for response in case.responses:
        weight = token_weight(case, response, normalizer, max_length)
        rows.append([-weight * slope for slope in slopes(objective, response)])
    return rows


def token_weight(case: Case, response: Response, normalizer: str, max_length: int) -> float:
    """Compute the weight of each token of a response in the loss of the case."""
    sequences, length = len(case.responses), len(response.log_ratios)
    if not length:
        return 0.0
    return {
        "sequence_mean": 1 / (length * sequences),
        "token_mean": 1 / max(case.num_tokens, 1),
        "constant_length": 1 / (max_length * sequences),
        "sequence_sum": 1 / sequences,
    }[normalizer]


def slopes(objective: Any, response: Response) -> list[float]:
    """Compute the slope of each token of a response, the coefficient on its grad log pi.

    Raises:
        KeyError: an objective without a reference.
    """
    if not response.log_ratios:
        return []
    return SLOPES[objective.name](objective, response)


def _of_each_token(weight: Callable[[Any, float, float, float], float]) -> Callable[[Any, Response], list[float]]:
    """Return a function for slopes w(r) r A, where w depends on the token's own ratio r, A and pi_old."""

    def slopes_of(o: Any, response: Response) -> list[float]:
        found = []
        for z in response.log_ratios:
            r, old = math.exp(z), math.exp(response.level - max(z, 0.0))
            found.append(weight(o, r, response.advantage, old) * r * response.advantage)
        return found

    return slopes_of


def _of_the_response(slope: Callable[[Any, list[float], float], float]) -> Callable[[Any, Response], list[float]]:
    """Return a function that gives every token of a response the same slope."""

    def slopes_of(o: Any, response: Response) -> list[float]:
        one = slope(o, list(response.log_ratios), response.advantage)
        return [one] * len(response.log_ratios)

    return slopes_of


def _inside(r: float, a: float, low: float, high: float) -> float:
    """Return 1 inside the band of a clip, edges included, and 0 outside."""
    return float(r <= 1 + high if a > 0 else r >= 1 - low)


def _soft(o: Any, r: float, a: float, _: float) -> float:
    """Compute the weight of SAPO's gates."""
    if o.side == "drift" and not (r > 1 if a > 0 else r < 1):
        return 1.0
    x = (o.tau_pos if a > 0 else o.tau_neg) * (r - 1)
    if o.gate == "sigmoid":
        return 4 * math.exp(-abs(x)) / (1 + math.exp(-abs(x))) ** 2
    weights: dict[str, float] = {
        "erf": math.exp(-x * x / 2),
        "arctan": 1 / (1 + x * x),
        "softsign": (1 + x * x) ** -1.5,
    }
    return weights[o.gate]


def _maspo(o: Any, r: float, a: float, old: float) -> float:
    """Compute the weight of MASPO's gate."""
    if not (r > 1 if a > 0 else r < 1):
        return 1.0
    trust = 1 + o.beta_pos * a if a > 0 else 1 / (1 - o.beta_neg * a)
    width = min(max(o.sigma * old**-o.alpha, o.sigma), o.sigma_max) * min(max(trust, 0.1), 10.0)
    return math.exp(-((r - 1) ** 2) / (2 * width**2))


def _dppo(o: Any, r: float, a: float, old: float) -> float:
    """Compute the weight of DPPO's gate."""
    moved = old * r - old
    kept = moved <= o.tv_high if a > 0 else moved >= -o.tv_low
    return kept * min(1.0, o.ratio_cap / r)


def _gspo(o: Any, z: list[float], a: float) -> float:
    s = math.exp(sum(z) / len(z))
    return _inside(s, a, o.eps_low, o.eps_high) * s * a


def _rloo(o: Any, z: list[float], a: float) -> float:
    w = math.exp(sum(z))
    return _inside(w, a, o.eps_low, o.eps_high) * w * a


def _sapo_sequence(o: Any, z: list[float], a: float) -> float:
    return a / math.cosh((o.tau_pos if a > 0 else o.tau_neg) / 2 * sum(z) / len(z)) ** 2


def _vespo(o: Any, z: list[float], a: float) -> float:
    k, rate = (o.k_pos, o.lambda_pos) if a >= 0 else (o.k_neg, o.lambda_neg)
    w = math.exp(sum(z))
    return w**k * math.exp(rate * (1 - w)) * a


def _gmpo(o: Any, response: Response) -> list[float]:
    a = response.advantage
    cut = [min(z, o.log_high) if a > 0 else max(z, -o.log_low) for z in response.log_ratios]
    mean = math.exp(sum(cut) / len(cut))
    return [mean * a * (c == z) for c, z in zip(cut, response.log_ratios, strict=True)]


_grpo = _of_each_token(lambda o, r, a, _: _inside(r, a, o.eps_low, o.eps_high))
_gspo_slopes = _of_the_response(_gspo)

SLOPES: dict[str, Callable[[Any, Response], list[float]]] = {
    "sapo": _of_each_token(_soft),
    "grpo": _grpo,
    "dr_grpo": _grpo,
    "dapo": _grpo,
    "minirl": _grpo,
    "reinforce": _of_each_token(lambda o, r, a, _: 1.0),
    "cispo": _of_each_token(lambda o, r, a, _: min(1.0, o.ratio_cap / r)),
    "maspo": _of_each_token(_maspo),
    "dppo_tv": _of_each_token(_dppo),
    "gspo": _gspo_slopes,
    "gspo_token": _gspo_slopes,
    "luspo": _gspo_slopes,
    "sapo_seq": _of_the_response(_sapo_sequence),
    "rloo": _of_the_response(_rloo),
    "vespo": _of_the_response(_vespo),
    "gmpo": _gmpo,
}
"""Slopes by the name of the objective."""
