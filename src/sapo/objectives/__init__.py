"""Floor 0: the objectives, as pure functions of tensors. It needs torch and nothing else of this package.

One surrogate, several gates: J = mean_i mean_t f(r_it) A_i with grad J = mean_i mean_t f'(r_it) r_it A_i grad log pi.
`gates` holds f and f', `token`, `sequence` and `probability` the objectives made of them, `normalizers` the two means
and their alternatives, `advantages` A_i, `theory` the bound between token and sequence gates, `registry` all of it by
name.
"""

from sapo.objectives.advantages import ADVANTAGES, group_advantages
from sapo.objectives.gates import GATES, Gate
from sapo.objectives.kl import KL_ESTIMATORS, KLPenalty
from sapo.objectives.mismatch import TIS, TIS_CAPS, MismatchWeights
from sapo.objectives.normalizers import NORMALIZERS, sequence_weights
from sapo.objectives.probability import DPPO, MASPO
from sapo.objectives.registry import OBJECTIVES, gate_weight, make_objective, policy_loss
from sapo.objectives.sequence import GMPO, GSPO, LUSPO, RLOO, VESPO, GSPOToken, SAPOSequence
from sapo.objectives.surrogates import LOG_RATIO_LIMIT, Objective, Surrogate
from sapo.objectives.theory import (
    discrepancy_bound,
    effective_tokens,
    effective_update_ratio,
    gate_discrepancy,
    sequence_gate,
    sequence_mean,
    variance,
)
from sapo.objectives.token import CISPO, DAPO, GRPO, SAPO, DrGRPO, MiniRL, Reinforce

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
    "LUSPO",
    "MASPO",
    "NORMALIZERS",
    "OBJECTIVES",
    "RLOO",
    "SAPO",
    "TIS",
    "TIS_CAPS",
    "VESPO",
    "DrGRPO",
    "GSPOToken",
    "Gate",
    "KLPenalty",
    "MiniRL",
    "MismatchWeights",
    "Objective",
    "Reinforce",
    "SAPOSequence",
    "Surrogate",
    "discrepancy_bound",
    "effective_tokens",
    "effective_update_ratio",
    "gate_discrepancy",
    "gate_weight",
    "group_advantages",
    "make_objective",
    "policy_loss",
    "sequence_gate",
    "sequence_mean",
    "sequence_weights",
    "variance",
]
