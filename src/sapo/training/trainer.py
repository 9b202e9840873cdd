"""The update: one mini-batch of packed groups to one step of the optimizer.

`update` is the whole method on one screen: hidden states of a shared-prefix micro-batch, the policy head with the
objective's closed-form slope (both in training/forward.py), gradients summed over micro-batches, one clipped step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from sapo.data import PackedBatch
from sapo.errors import Interrupted, NonFiniteError
from sapo.model.adapters import adapter_off
from sapo.model.context import ContextGroup
from sapo.model.head import HeadOutput
from sapo.model.policy import Policy
from sapo.model.routing import Recording, Replay, Routers
from sapo.objectives import Objective, Surrogate
from sapo.training.collective import Collective
from sapo.training.forward import loss_and_surrogate, response_logprobs
from sapo.training.gradients import Gradient, compare_gradients
from sapo.training.optimizer import PolicyOptimizer
from sapo.training.optimizer_files import OptimizerFiles, Written, write_own_rows
from sapo.training.ranks import Logprobs, LogprobsOf, Shares
from sapo.training.settings import TrainerSettings
from sapo.training.update_result import (
    Output,
    UpdateResult,
    collect_result,
    first_nonfinite,
    nonfinite_causes,
    skipped_result,
)
from sapo.utils.spans import span


class Trainer:
    """Updates a policy by an objective: all `Trainers` there are, in one process; or one rank of a training group.

    A rank is given its own share, in `Shares` of one, and makes the same calls as all others.

    Args:
        policy: changed in place.
        optimizer: over the policy's parameters.
        settings: of the loss.
        reference: the frozen policy that `logprobs(of="reference")` is of.
        routers: the policy's, for routing replay: batches that carry recorded experts are run through these. None
            without it.
        ranks: the training group, whose ranks have sharded the policy among them.
        context: the ranks among them that share each micro-batch.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: PolicyOptimizer,
        settings: TrainerSettings,
        *,
        reference: Policy | None = None,
        routers: Routers | None = None,
        ranks: Collective | None = None,
        context: ContextGroup | None = None,
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.settings = settings
        self.reference = reference
        self.routers = routers
        self.ranks = ranks or Collective()
        self.context = context
        self.updates = 0
        self._updating = False
        if settings.activation_checkpointing:
            policy.enable_checkpointing()

    def update(
        self, shares: Shares, learning_rate: float, should_stop: Callable[[], bool] = lambda: False
    ) -> UpdateResult:
        """Make one step of the optimizer; see `Trainers.update`."""
        (share,) = shares.of_rank
        if not share:
            return skipped_result()
        outputs: list[Output] = []
        replays: list[Replay | None] = []
        with self._training():
            for batch in share:
                if self.ranks.any(should_stop):
                    raise Interrupted
                with self.replaying(batch) as replay:
                    loss, head, surrogate = self._forward(batch, self.settings)
                    with span("backward"):
                        loss.backward()
                self.optimizer.collect_gradients()
                self.ranks.progress.passed()
                outputs.append((batch, head, surrogate))
                replays.append(replay if batch.num_targets else None)
            total = self.ranks.sum(sum(head.loss.item() for _, head, _ in outputs))
            norm = self.optimizer.gradient_norm()
            self._check_finite(total, norm, outputs)
        with span("optimizer"):
            self.optimizer.step(learning_rate, norm)
        self.updates += 1
        self.ranks.progress.updates = self.updates
        return collect_result(total, norm.item(), outputs, replays, self.settings)

    @property
    def answers(self) -> bool:
        """Return whether this rank tells the driver what was measured: one of those that share a micro-batch does."""
        return self.context is None or self.context.rank == 0

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Set the model up for the passes of an update; drop the gradients if the block ends in an exception."""
        # transformers checkpoints only in training mode; dropout is off
        self.policy.checkpoint_activations(self.settings.activation_checkpointing)
        self._updating = True
        try:
            yield
        except BaseException:
            self.optimizer.zero_grad()
            raise
        finally:
            self._updating = False
            self.policy.model.eval()

    @contextmanager
    def replaying(self, batch: PackedBatch) -> Iterator[Replay | None]:
        """Send one forward pass over a batch, and its backward pass, through the experts it carries, if any."""
        if batch.experts_Nlk is None:
            yield None
            return
        assert self.routers is not None, "the groups carry experts and the trainer was given no routers"
        recomputed = self.settings.activation_checkpointing and self._updating
        with self.routers.replay(batch.experts_Nlk, recomputed) as replay:
            yield replay

    def _forward(self, batch: PackedBatch, settings: TrainerSettings) -> tuple[Tensor, HeadOutput, Surrogate]:
        self._check_replaying(batch)
        return loss_and_surrogate(self.policy, batch, settings, self.context)

    def _check_replaying(self, batch: PackedBatch) -> None:
        replayed = self.routers is not None and isinstance(self.routers.active, Replay)
        assert replayed == (batch.experts_Nlk is not None), "a batch that carries experts is run within `replaying`"

    @torch.no_grad()
    def logprobs(self, shares: Shares, of: LogprobsOf = "policy", record: bool = False) -> Logprobs:
        """Compute log pi at the present weights; see `Trainers.logprobs`."""
        policy = self.reference if of == "reference" else self.policy
        assert policy is not None, "log pi_ref was asked for and the trainer was given no reference policy"
        (share,) = shares.of_rank
        logprobs, experts = [], []
        with adapter_off(policy) if of == "adapter_off" else nullcontext():
            for batch in share:
                with self.replaying(batch), self._recording(record) as recording:
                    self._check_replaying(batch)
                    logprobs.append(
                        response_logprobs(policy, batch, self.settings.temperature, self.context).float().cpu()
                    )
                    self.ranks.progress.passed()
                    if recording is not None:
                        experts.append(recording.take().cpu())
        return Logprobs(tuple(logprobs), tuple(experts) if record else None)

    @contextmanager
    def _recording(self, record: bool) -> Iterator[Recording | None]:
        if not record:
            yield None
            return
        assert self.routers is not None, "a record was asked for and the trainer was given no routers"
        with self.routers.recording() as recording:
            yield recording

    def gradients(
        self, shares: Shares, objectives: Mapping[str, Objective], should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Compare the gradients of other objectives with that of the one in use; see `Trainers.gradients`."""
        (share,) = shares.of_rank
        if not share:
            return {}

        def gradient_of(settings: TrainerSettings) -> Gradient:
            self.optimizer.zero_grad()
            for batch in share:
                if self.ranks.any(should_stop):
                    raise Interrupted
                with self.replaying(batch):
                    self._forward(batch, settings)[0].backward()
                self.optimizer.collect_gradients()
                self.ranks.progress.passed()
            return self.optimizer.gradients()

        try:
            with self._training():
                return compare_gradients(gradient_of, self.settings, objectives)
        finally:
            self.optimizer.zero_grad()

    def send_weights(self, to: Policy) -> None:
        """Do nothing: the driver's policy is the one trained; see `Trainers.send_weights`."""
        assert to is self.policy, "in one process the driver and the trainer share the policy"

    def take_weights(self, of: Policy) -> None:
        """Do nothing: the driver's policy is the one trained; see `Trainers.take_weights`."""
        assert of is self.policy, "in one process the driver and the trainer share the policy"

    def save_optimizer(self, directory: Path) -> Written:
        """Write the state of the optimizer; see `Trainers.save_optimizer`.

        Returns:
            What this rank wrote, for the index that several ranks need.
        """
        return write_own_rows(directory, self.optimizer.state_tensors(), self.ranks.rank, self.ranks.size)

    def restore_optimizer(self, directory: Path) -> None:
        """Restore the state of the optimizer; see `Trainers.restore_optimizer`."""
        parameters = dict(zip(self.optimizer.names, self.optimizer.masters, strict=True))
        self.optimizer.load_state_tensors(OptimizerFiles(directory).read(parameters))

    def close(self) -> None:
        """Do nothing: there are no other processes; see `Trainers.close`."""

    def _check_finite(self, loss: float, norm: Tensor, outputs: Sequence[Output]) -> None:
        if torch.isfinite(norm) and loss == loss and abs(loss) != float("inf"):
            return  # both are of all ranks, so that these agree
        causes, names = [*nonfinite_causes(self.settings)], self.optimizer.names
        cause = self.ranks.least(first_nonfinite(outputs, self.settings))
        parameter = self.ranks.least(self.optimizer.first_nonfinite_gradient())
        found = "the gradient norm" if parameter == len(names) else f"the gradient of {names[parameter]}"
        if cause < len(causes):
            found = causes[cause]
        raise NonFiniteError(f"{found} is not finite (loss {loss}, gradient norm {norm.item()})")
