"""What tells the sampler from the trainer: the precision of its weights, and their age.

Precision. The sampler's weights are the policy's, rounded anew for each batch (model/rounding.py); the trainer and the
evaluation have the policy's own.

Age. A run that trains on batches k updates old is an asynchronous system in lockstep: the sampler is ahead, and its
batches wait in a queue. Batch s is sampled once s M - k updates have been made (M updates a step), or at the start,
whichever is later. Nothing else of the run changes: its prompts, their order and its noise are those of k = 0. After
the last step the queue is still full, so that a run that is given more steps goes on as one that had them from the
start.

What has to be kept is the queue: tokens and log-probabilities of ceil(k / M) batches, all of which the run needs
anyway, against as many copies of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from sapo.config import ExperimentsConfig
from sapo.model.rounding import Rounding, rounded_weights
from sapo.rollout.engine import Weights


def sampler_weights(weights: Weights, experiments: ExperimentsConfig, step: int) -> Weights:
    """Yield the weights that the sampler of step 0, 1, ... reads, made from the policy's."""
    dtype = experiments.sampler_dtype_at(step)
    rounding = None if dtype is None else Rounding(dtype, experiments.sampler_scaling, experiments.sampler_vectors)
    return rounded_weights(weights, rounding)


@dataclass(frozen=True)
class Staleness:
    """Batches `updates` updates old, in a run of `minibatches` updates a step.

    With batches 2 updates old and 4 updates a step, batch 1 is sampled before the third update of step 0:

    >>> age = Staleness(updates=2, minibatches=4)
    >>> [age.num_due(step=0, update=u) for u in range(4)]
    [1, 1, 2, 2]
    """

    updates: int
    minibatches: int

    def num_due(self, step: int, update: int) -> int:
        """Return the batches that must be sampled before an update (0, 1, ...) of a step (0, 1, ...)."""
        ahead = -(-self.updates // self.minibatches)
        after = ahead * self.minibatches - self.updates  # updates of a step before it samples
        return step + ahead + (update >= after)
