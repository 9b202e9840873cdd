"""The driver of a training group, and the loop of a rank that serves it.

There is one driver: rank 0, which also trains a share itself. The other ranks keep no state of the run. Each waits for
a call, makes it on its own share together with all others, and answers with what it measured. What ends a call on all
ranks alike (a request to stop, a quantity that is not finite) is not answered: the driver has found the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sapo.data.messages import Message
from sapo.errors import Interrupted, NonFiniteError, RankError, RunFailure
from sapo.model.policy import Policy
from sapo.model.sharding import full_weights, receive_weights
from sapo.objectives import Objective
from sapo.training.optimizer_files import Written, write_index
from sapo.training.ranks import Logprobs, LogprobsOf, Shares
from sapo.training.trainer import Trainer
from sapo.training.update_result import UpdateResult, join_results
from sapo.training.wire import (
    Wire,
    logprobs_message,
    read_logprobs,
    read_result,
    read_share,
    result_message,
    share_message,
)


class RankedTrainers:
    """A training group as the driver sees it: `Trainers` over many processes.

    Args:
        own: the trainer of rank 0, which is this process.
        wire: to the other ranks.
        policy: the driver's, which engines draw with and checkpoints are written of; at the weights that `own` was made
            with.
        first_failure: given the error of a call, says what happened to the first rank that died; None where all live.
        on_close: ends the other processes; given whether they were told to, and end by themselves.
    """

    def __init__(
        self,
        own: Trainer,
        wire: Wire,
        policy: Policy,
        *,
        first_failure: Callable[[Exception], str | None] = lambda _: None,
        on_close: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.own = own
        self._wire = wire
        self._others = range(1, own.ranks.size)
        self._sharing = 1 if own.context is None else own.context.size
        self._answering = [rank for rank in self._others if rank % self._sharing == 0]
        self._first_failure = first_failure
        self._on_close = on_close
        self._sent = (policy, own.updates)
        self._closed = self._broken = False

    @property
    def updates(self) -> int:
        """Updates made: the version of the weights."""
        return self.own.updates

    def update(
        self, shares: Shares, learning_rate: float, should_stop: Callable[[], bool] = lambda: False
    ) -> UpdateResult:
        """Make one step of the optimizer; see `Trainers.update`."""
        with self._together("update"):
            mine = self._deal(shares, call="update", learning_rate=learning_rate)
            result = self.own.update(mine, learning_rate, should_stop)
            return join_results([result, *(read_result(self._wire.receive(rank)) for rank in self._answering)])

    def logprobs(self, shares: Shares, of: LogprobsOf = "policy", record: bool = False) -> Logprobs:
        """Compute log pi at the present weights; see `Trainers.logprobs`."""
        with self._together("logprobs"):
            mine = self._deal(shares, call="logprobs", of=of, record=record)
            parts = [self.own.logprobs(mine, of, record)]
            parts += [read_logprobs(self._wire.receive(rank)) for rank in self._answering]
        experts = tuple(t for part in parts for t in part.experts or ())
        return Logprobs(tuple(t for part in parts for t in part.of_batch), experts if record else None)

    def gradients(
        self, shares: Shares, objectives: Mapping[str, Objective], should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Compare the gradients of other objectives with that of the one in use; see `Trainers.gradients`.

        The ranks were given the objectives when they were started; here they are named by their labels.
        """
        with self._together("gradients"):
            return self.own.gradients(
                self._deal(shares, call="gradients", labels=list(objectives)), objectives, should_stop
            )

    def send_weights(self, to: Policy) -> None:
        """Bring the driver's policy to the present weights; see `Trainers.send_weights`."""
        if self._sent == (to, self.updates):
            return
        with self._together("send_weights"), torch.no_grad():
            self._tell(call="send_weights")
            parameters = dict(to.model.named_parameters())
            for name, tensor in full_weights(self.own.policy):
                parameters[name].copy_(tensor)
                self.own.ranks.progress.passed()
        self._sent = (to, self.updates)

    def take_weights(self, of: Policy) -> None:
        """Train on from the weights of the driver's policy; see `Trainers.take_weights`."""
        with self._together("take_weights"):
            self._tell(call="take_weights")
            receive_weights(self.own.policy, self.own.ranks.group, dict(of.weights()))
        self._sent = (of, self.updates)

    def save_optimizer(self, directory: Path) -> None:
        """Write the state of the optimizer, each rank its own part; see `Trainers.save_optimizer`."""
        with self._together("save_optimizer"):
            self._tell(call="save_optimizer", directory=str(directory.absolute()))
            written = [self.own.save_optimizer(directory)]
            written += [Written(**self._wire.receive(rank).header) for rank in self._others]
        write_index(directory, written)

    def restore_optimizer(self, directory: Path) -> None:
        """Restore the state of the optimizer, each rank its own part; see `Trainers.restore_optimizer`."""
        with self._together("restore_optimizer"):
            self._tell(call="restore_optimizer", directory=str(directory.absolute()))
            self.own.restore_optimizer(directory)

    def close(self) -> None:
        """End the other ranks; see `Trainers.close`.

        They are told to, unless a call has ended on the driver alone. Then they wait within that call, for days, and no
        message would reach them.
        """
        if self._closed:
            return
        self._closed = True
        with self.own.ranks.progress.during("close"):  # a rank that does not take the message is a stall, as in a call
            for rank in () if self._broken else self._others:
                with suppress(RuntimeError):  # one that is gone cannot be told
                    self._wire.send(Message({"call": "close"}), rank)
            self._on_close(not self._broken)

    def _deal(self, shares: Shares, **header: Any) -> Shares:
        """Give the other ranks their shares, which those of a context group have in common; return the driver's own."""
        for rank in self._others:
            self._wire.send(share_message(shares, rank // self._sharing, **header), rank)
        return read_share(share_message(shares, 0), self.own.policy.device)

    def _tell(self, **header: Any) -> None:
        for rank in self._others:
            self._wire.send(Message(header), rank)

    @contextmanager
    def _together(self, call: str) -> Iterator[None]:
        """Within it all ranks make one call. One that died is named in place of the connection that broke."""
        assert not self._broken, "a call has ended on the driver alone, and the other ranks are still within it"
        try:
            with self.own.ranks.progress.during(call):
                yield
        except (Interrupted, NonFiniteError):  # on all ranks alike
            raise
        except BaseException as error:
            self._broken = True
            if not isinstance(error, RuntimeError) or isinstance(error, RunFailure):
                raise
            failure = self._first_failure(error)
            if failure is None:
                raise
            raise RankError(failure) from error


def serve(trainer: Trainer, wire: Wire, objectives: Mapping[str, Objective]) -> None:
    """Answer the driver's calls until it says that there are no more.

    Args:
        trainer: of this rank.
        objectives: those that `gradients` may be asked to compare, by label.
    """
    while (message := wire.receive(0)).header["call"] != "close":
        with suppress(Interrupted, NonFiniteError), trainer.ranks.progress.during(message.header["call"]):
            answer = _answer(trainer, message, objectives)
            if answer is not None:
                wire.send(answer, 0)


def _answer(trainer: Trainer, message: Message, objectives: Mapping[str, Objective]) -> Message | None:
    """Make the call of a message; what it gives is returned where it is not the same on every rank."""
    header, device = message.header, trainer.policy.device
    match header["call"]:
        case "update":
            result = trainer.update(read_share(message, device), header["learning_rate"])
            return result_message(result) if trainer.answers else None
        case "logprobs":
            logprobs = trainer.logprobs(read_share(message, device), header["of"], header["record"])
            return logprobs_message(logprobs) if trainer.answers else None
        case "gradients":
            trainer.gradients(read_share(message, device), {label: objectives[label] for label in header["labels"]})
        case "send_weights":
            for _ in full_weights(trainer.policy):
                trainer.ranks.progress.passed()
        case "take_weights":
            receive_weights(trainer.policy, trainer.ranks.group)
        case "save_optimizer":
            return Message(asdict(trainer.save_optimizer(Path(header["directory"]))))
        case "restore_optimizer":
            trainer.restore_optimizer(Path(header["directory"]))
        case call:
            raise AssertionError(f"the driver called {call!r}, which no rank answers")
    return None
