"""What the free schedule keeps between its two sides: lines of groups, and prompts that were discarded."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from sapo.data import Completion, Group, Prompt
from sapo.data.arrays import ArrayReader, FlatArrays
from sapo.run.flow import Flow, Offer
from sapo.run.line import Line, Room


def group(number: int, version: int) -> Group:
    completion = Completion((1,), (-0.5,), "stop", versions=((1, version),))
    return Group(Prompt((number // 4) << 32 | number % 4, "t", "", (1,)), (completion,), (0.0,))


def wait_until(reached: Callable[[], bool]) -> None:
    """Wait for the other thread; where it has died, fail rather than wait for ever."""
    end = time.monotonic() + 600.0
    while not reached():
        assert time.monotonic() < end, "the thread that draws did not get there"
        time.sleep(0.01)


def test_a_line_goes_through_text_and_back() -> None:
    line = Line((group(5, 3), group(4, 2)), again=(1,), unfinished=(6, 7), next=8, discarded=3, redrawn=2)
    arrays = FlatArrays()
    value = json.loads(json.dumps(line.to_json(arrays)))
    assert Line.from_json(value, ArrayReader(arrays.joined())) == line


def test_a_discarded_prompt_is_drawn_before_new_ones() -> None:
    asked: list[list[int]] = []

    def draw(numbers, offer, should_stop):
        asked.append(list(numbers))
        return [group(n, 0 if offer.version < 4 else offer.version) for n in numbers], {"generate": 1.0}

    flow = Flow(Line(), Room(prompts=4, minibatches=1, bound=3, steps=20), step=0, wave=4, draw=draw)
    try:
        flow.offer(Offer(lambda: iter(()), 3, False))  # at version 3 groups say that they are of version 0
        assert flow.take(4, 3, 60.0) is not None
        flow.hold()
        wait_until(lambda: flow.idle(1.0))
        waiting = len(flow.line().ready)
        flow.offer(Offer(lambda: iter(()), 4, False))
        assert (taken := flow.take(4, 4, 60.0)) is not None
        wait_until(lambda: len(asked) > waiting // 4 + 1)
        assert asked[1 + waiting // 4] == [4, 5, 6, 7], "the oldest of those that were discarded"
        assert {c.versions for g in taken for c in g.completions} == {((1, 4),)}
        assert flow.line().discarded == waiting
        assert flow.seconds()["generate"] >= 1.0
        assert flow.seconds() == {}
    finally:
        flow.leave()
