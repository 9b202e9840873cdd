"""A call that ends on the driver alone leaves the other ranks within it: they are ended, and not told to.

The wire is one that notes what it is given. What real processes do is in tests/workflows/test_lost_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sapo.data.messages import Message
from sapo.errors import Interrupted, NonFiniteError, RankError
from sapo.training.collective import Collective
from sapo.training.ranked import RankedTrainers


class NotingWire:
    """Takes messages for ranks that live, and has none of theirs."""

    def __init__(self, gone: tuple[int, ...] = ()) -> None:
        self.gone, self.sent = gone, []

    def send(self, message: Message, to: int) -> None:
        if to in self.gone:
            raise RuntimeError("Connection closed by peer")
        self.sent.append((message.header["call"], to))


class FailingTrainer:
    """Rank 0 of three, whose part of a call fails."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.context, self.updates = error, None, 0
        self.ranks = Collective(0, 3)

    def restore_optimizer(self, directory: Path) -> None:
        raise self.error


def failed(error: BaseException, **options: Any) -> tuple[list[tuple[str, int]], list[bool]]:
    """Return what was sent when the driver's part of a call has failed and the group was closed, and how it ended."""
    wire, told = NotingWire(), []
    trainers = RankedTrainers(FailingTrainer(error), wire, None, on_close=told.append, **options)
    with pytest.raises(RankError if options else type(error)):
        trainers.restore_optimizer(Path("somewhere"))
    trainers.close()
    return wire.sent, told


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("out of memory"), KeyboardInterrupt()]
)
def test_ranks_are_not_told_to_end_when_a_call_has_failed_on_the_driver_alone(error: BaseException) -> None:
    assert failed(error) == ([("restore_optimizer", 1), ("restore_optimizer", 2)], [False])


def test_ranks_are_not_told_to_end_when_one_of_them_has_died() -> None:
    sent, told = failed(RuntimeError("Connection closed by peer"), first_failure=lambda _: "rank 1 ended with code 1")
    assert [call for call, _ in sent] == ["restore_optimizer"] * 2
    assert told == [False]


@pytest.mark.parametrize("error", [NonFiniteError("the loss is not finite"), Interrupted()])
def test_ranks_are_told_to_end_after_what_has_ended_a_call_on_all_of_them(error: Exception) -> None:
    sent, told = failed(error)
    assert sent[2:] == [("close", 1), ("close", 2)]
    assert told == [True]


def test_a_rank_that_is_gone_does_not_keep_the_others_from_being_told() -> None:
    wire, told = NotingWire(gone=(1,)), []
    trainers = RankedTrainers(FailingTrainer(OSError()), wire, None, on_close=told.append)
    trainers.close()
    trainers.close()
    assert (wire.sent, told) == ([("close", 2)], [True])


def test_closing_is_a_call_in_which_a_stall_is_noticed() -> None:
    phases, own = [], FailingTrainer(OSError())
    trainers = RankedTrainers(own, NotingWire(), None, on_close=lambda _: phases.append(own.ranks.progress.phase))
    trainers.close()
    assert phases == ["close"]
