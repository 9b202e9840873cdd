"""Figure 1 of the paper: value and weight of each gate against the ratio. It needs no run: the gates are those of
sapo.objectives."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from sapo.report.figure import Dash, Figure, Panel, Trace

SHOWN: tuple[tuple[str, str, dict[str, Any], Dash], ...] = (
    ("SAPO, tau {:g} / {:g}", "sapo", {}, "solid"),
    ("GRPO, 0.2 / 0.27", "grpo", {}, "solid"),
    ("GSPO, 3e-4 / 4e-4 (on s)", "gspo", {}, "dash"),
    ("erf gate, tau {:g} / {:g}", "sapo", {"gate": "erf"}, "dot"),
    ("arctan gate", "sapo", {"gate": "arctan"}, "dot"),
    ("softsign gate", "sapo", {"gate": "softsign"}, "dot"),
    ("SAPO, tau 10 / 10.5", "sapo", {"tau_pos": 10.0, "tau_neg": 10.5}, "dash"),
)

# The edges of both clipping bands are among the points, from both sides, so that a step is drawn where it is.
_EDGES = (1 - 0.2, 1 + 0.27, 1 - 3e-4, 1 + 4e-4)
RATIOS = np.unique(np.concatenate([np.linspace(0.0, 4.0, 161)[1:], _EDGES, np.array(_EDGES) * (1 + 1e-6)]))


def objective_of(settings: dict[str, Any]) -> Any:
    """Make the objective of a recipe's section; None where this package does not know it or refuses its settings."""
    from sapo.objectives import OBJECTIVES

    kind = OBJECTIVES.get(str(settings.get("name")))
    if kind is None:
        return None
    own = {f.name: settings[f.name] for f in fields(kind) if f.name in settings}
    try:
        return kind(**own)
    except (TypeError, ValueError):
        return None


def gate_curve(objective: Any, ratios: np.ndarray, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute f(r) and f'(r) of an objective for an advantage of +1 or -1, each ratio in a sequence of its own.

    Args:
        ratios: (K,), positive.

    Returns:
        f and f', (K,) float64.
    """
    import torch

    log_ratio = torch.as_tensor(ratios, dtype=torch.float64).log()
    advantage = torch.full_like(log_ratio, float(sign))
    made = objective.surrogate(log_ratio, advantage, torch.arange(len(ratios)), len(ratios))
    return (made.value_M * sign).detach().numpy(), made.weight_M.numpy()


def gates_figure() -> Figure:
    """Draw four panels: value and weight, for positive and for negative advantages."""
    from sapo.objectives import TAU_NEG, TAU_POS

    panels = []
    for sign, words in ((1, "A > 0"), (-1, "A ≤ 0")):
        for which, y in ((0, "value f(r)"), (1, "weight f'(r)")):
            traces = []
            for color, (label, name, hyper, dash) in enumerate(SHOWN):
                curve = gate_curve(objective_of({"name": name, **hyper}), RATIOS, sign)[which]
                shown = label.format(TAU_POS, TAU_NEG)
                traces.append(
                    Trace("line", tuple(RATIOS.tolist()), tuple(curve.tolist()), name=shown, color=color, dash=dash)
                )
            panels.append(Panel("r", y, tuple(traces), title=words))
    caption = (
        "Value and weight of each gate against the ratio r = π/π_old (the paper's Figure 1), from sapo.objectives; "
        "no run is needed. Every gate weighs 1 at r = 1; a hard clip weighs 1 inside its band and 0 outside, in the "
        "direction the advantage pushes. GSPO gates the ratio s of the whole sequence: its band is narrower than this "
        "figure's line is wide."
    )
    return Figure("fig1", "Fig. 1: the gates", caption, tuple(panels), wide=True)
