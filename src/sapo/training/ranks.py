"""The door to trainers: what the driver hands over, what it may ask, and what comes back.

The driver (`sapo.run`) samples, scores and packs. Trainers hold the weights and are given packed batches and nothing
else of a rollout. `PackedBatch.weights_B` has the normalizer of the whole mini-batch in it, so the gradient of an
update is the sum over all micro-batches of all ranks, and no trainer computes a normalizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from sapo.data import PackedBatch
from sapo.objectives import Objective
from sapo.training.update_result import UpdateResult

# For the annotation only: what packs batches needs no transformers.
if TYPE_CHECKING:
    from sapo.model.policy import Policy

LogprobsOf = Literal["policy", "reference", "adapter_off"]
"""Whose log-probabilities: of the trained policy, of the reference policy, or of the trained policy without its
adapter, which is the reference where only an adapter is trained."""


@dataclass(frozen=True)
class Shares:
    """Packed groups, dealt out to trainers; of one mini-batch where they are for an update.

    >>> shares = Shares(of_rank=((),), num_sequences=4, num_tokens=90)  # all four were left out
    >>> len(shares.of_rank), shares.microbatches, shares.num_targets
    (1, (), 0)
    """

    of_rank: tuple[tuple[PackedBatch, ...], ...]
    """Micro-batches by rank, as many on each; one rank where training is one process."""
    num_sequences: int
    """Sequences of the mini-batch. Zero-variance groups are counted, since the normalizers are theirs too; masked
    completions are not."""
    num_tokens: int
    """Response tokens of those sequences."""

    @property
    def microbatches(self) -> tuple[PackedBatch, ...]:
        """Return the micro-batches of all ranks, rank by rank."""
        return tuple(batch for share in self.of_rank for batch in share)

    @property
    def num_targets(self) -> int:
        """Count the response tokens that carry a gradient."""
        return sum(b.num_targets for b in self.microbatches)


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of packed batches, in the order of `Shares.microbatches`.

    >>> import torch
    >>> Logprobs(of_batch=(torch.tensor([-0.7, -1.2]),)).experts is None
    True
    """

    of_batch: tuple[Tensor, ...]
    """(M,) log pi of each response token, float32, on the CPU."""
    experts: tuple[Tensor, ...] | None = None
    """(N, l, k) experts that the pass went through at each packed token, uint8 or int16, on the CPU; None where no
    record was asked for."""


class Trainers(Protocol):
    """Everything a driver asks of the processes that train.

    `Trainer` is the implementation in one process, where the driver's policy is the one trained. `RankedTrainers`
    (training/ranked.py) speaks to a training group, whose weights the driver's policy is a copy of.
    """

    @property
    def updates(self) -> int:
        """Return the number of updates made: the version of the weights."""

    def update(
        self, shares: Shares, learning_rate: float, should_stop: Callable[[], bool] = lambda: False
    ) -> UpdateResult:
        """Make one step of the optimizer.

        Raises:
            NonFiniteError: naming the cause; weights and optimizer are as before.
            Interrupted: `should_stop` said so between micro-batches; likewise.
        """

    def logprobs(self, shares: Shares, of: LogprobsOf = "policy", record: bool = False) -> Logprobs:
        """Compute log pi at the present weights, by the forward pass that updates make.

        Args:
            record: return the experts this pass goes through as well; for batches that carry none.
        """

    def gradients(
        self, shares: Shares, objectives: Mapping[str, Objective], should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Compare the gradients of other objectives at the present weights with that of the objective in use.

        Nothing of the run is changed: weights and optimizer stay, no random number is drawn, the gradients are dropped.
        It takes one backward pass for each objective and one for that in use, and the memory of one gradient more. The
        weights of the loss are those of the mini-batch for all; a KL penalty is left out.

        Args:
            objectives: by label.

        Returns:
            `LABEL/cosine` and `LABEL/norm_ratio` (that of the objective over that in use). Empty for a mini-batch
            without a gradient; an objective is left out where one of the two gradients is 0 or not finite.

        Raises:
            Interrupted: `should_stop` said so between micro-batches.
        """

    def send_weights(self, to: Policy) -> None:
        """Bring the driver's policy to the present weights, if it is not there yet."""

    def take_weights(self, of: Policy) -> None:
        """Train on from the weights of the driver's policy, as after a rollback."""

    def save_optimizer(self, directory: Path) -> object:
        """Write the state of the optimizer into a checkpoint's directory, which all ranks can reach.

        The files are those of training/optimizer_files.py.
        """

    def restore_optimizer(self, directory: Path) -> None:
        """Put the state that a checkpoint holds in place of the present one, however many ranks wrote it.

        Raises:
            CheckpointError: of another model or optimizer.
        """

    def close(self) -> None:
        """End the processes that train, for good."""
