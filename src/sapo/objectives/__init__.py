"""The objectives, as pure functions of tensors. They need torch, and of this package only errors and `sapo.utils`.

One surrogate, several gates: J = mean_i mean_t f(r_it) A_i with grad J = mean_i mean_t f'(r_it) r_it A_i grad log pi.
`gates` holds f and f'. `token`, `sequence` and `probability` are the objectives made of them, on the base class in
`surrogates`. `normalizers` holds the two means and their alternatives, `advantages` A_i, `theory` the bound between
token and sequence gates. `registry` finds an objective by name, `plugins` one of your own by `module:Class`.
"""

from sapo.objectives.advantages import ADVANTAGES, group_advantages, turn_advantages
from sapo.objectives.gates import GATES, TAU_NEG, TAU_POS, Gate
from sapo.objectives.kl import KL_ESTIMATORS, KLPenalty
from sapo.objectives.mismatch import LONG_TRAJECTORY, TIS, TIS_CAPS, MismatchWeights
from sapo.objectives.normalizers import NORMALIZERS, sequence_weights
from sapo.objectives.plugins import is_plugin
from sapo.objectives.probability import DPPO, MASPO
from sapo.objectives.registry import OBJECTIVES, find_objective, gate_weight, make_objective, policy_loss
from sapo.objectives.sequence import GMPO, GSPO, LUSPO, RLOO, VESPO, GSPOToken, SAPOSequence, SequenceObjective
from sapo.objectives.surrogates import LOG_RATIO_LIMIT, Factors, Objective, Ratios, Surrogate, Tokens
from sapo.objectives.theory import (
    discrepancy_bound,
    effective_tokens,
    effective_update_ratio,
    gate_discrepancy,
    sequence_gate,
    sequence_mean,
    variance,
)
from sapo.objectives.token import CISPO, DAPO, GRPO, SAPO, DrGRPO, MiniRL, Reinforce, TokenObjective

__all__ = [
    "ADVANTAGES",
    "CISPO",
    "DAPO",
    "DPPO",
    "GATES",
    "GMPO",
    "GRPO",
    "GSPO",
    "KL_ESTIMATORS",
    "LOG_RATIO_LIMIT",
    "LONG_TRAJECTORY",
    "LUSPO",
    "MASPO",
    "NORMALIZERS",
    "OBJECTIVES",
    "RLOO",
    "SAPO",
    "TAU_NEG",
    "TAU_POS",
    "TIS",
    "TIS_CAPS",
    "VESPO",
    "DrGRPO",
    "Factors",
    "GSPOToken",
    "Gate",
    "KLPenalty",
    "MiniRL",
    "MismatchWeights",
    "Objective",
    "Ratios",
    "Reinforce",
    "SAPOSequence",
    "SequenceObjective",
    "Surrogate",
    "TokenObjective",
    "Tokens",
    "discrepancy_bound",
    "effective_tokens",
    "effective_update_ratio",
    "find_objective",
    "gate_discrepancy",
    "gate_weight",
    "group_advantages",
    "is_plugin",
    "make_objective",
    "policy_loss",
    "sequence_gate",
    "sequence_mean",
    "sequence_weights",
    "turn_advantages",
    "variance",
]
