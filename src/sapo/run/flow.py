"""The drawing side of the free schedule: a thread that draws groups all the time, from the newest weights it was given.

It begins prompts in waves, one call of the engine each, and takes newer weights between two waves. A prompt is begun
only if its group can still be young enough when its turn comes (`Room`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sapo.data import Group
from sapo.errors import Interrupted
from sapo.rollout.engine import Weights
from sapo.run.line import Line, Room, oldest


@dataclass(frozen=True)
class Offer:
    """Weights to draw from: a copy, or made for this."""

    weights: Callable[[], Weights]
    version: int
    record_experts: bool


Wave = tuple[list[Group], dict[str, float]]
"""Groups, in the order of their prompts, and the seconds that drawing them took, by phase."""
DrawWave = Callable[[Sequence[int], Offer, Callable[[], bool]], Wave]
"""Draws the groups of numbered prompts, and raises Interrupted when asked to leave them."""


class Flow:
    """Draws in a thread of its own, from `offer` on until `leave`.

    Args:
        line: to go on from.
        step: the next that takes groups up.
        wave: most prompts of one call of the engine.
    """

    def __init__(self, line: Line, room: Room, step: int, wave: int, draw: DrawWave) -> None:
        line = line.resumed()
        self._room = room
        self._step = step
        self._wave = wave
        self._draw = draw
        self._ready = list(line.ready)
        self._again = list(line.again)
        self._drawing: list[int] = []
        self._next = line.next
        self._discarded, self._redrawn = line.discarded, line.redrawn
        self._seconds: dict[str, float] = {}
        self._offer: Offer | None = None
        self._held = self._left = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sapo-rollout", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int | None:
        """Return the version of the weights offered last; None before the first."""
        return None if self._offer is None else self._offer.version

    def offer(self, offer: Offer) -> None:
        """Give newer weights, which the next wave is drawn from, and go on if held."""
        with self._changed:
            self._offer, self._held = offer, False
            self._changed.notify_all()

    def hold(self) -> None:
        """Begin no further wave; one that is being drawn goes on, see `idle`."""
        with self._changed:
            self._held = True

    def go_on(self) -> None:
        """Begin waves again."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def idle(self, timeout: float) -> bool:
        """Wait until no wave is being drawn, but no longer than some seconds; return whether none is.

        Raises:
            what the thread raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._drawing or self._error is not None, timeout)
            self._raise()
            return not self._drawing

    def take(self, count: int, version: int, timeout: float) -> list[Group] | None:
        """Take the first groups that are done, once there are so many; None where there are not within some seconds.

        Groups that are too old leave the line, and their prompts are drawn before all others.

        Args:
            version: updates made by the present weights.

        Raises:
            what the thread raised.
        """
        with self._changed:
            self._discard(version)
            self._changed.wait_for(lambda: len(self._ready) >= count or self._error is not None, timeout)
            self._raise()
            self._discard(version)
            if len(self._ready) < count:
                return None
            taken, self._ready = self._ready[:count], self._ready[count:]
            self._step += 1
            return taken

    def line(self) -> Line:
        """Return where all prompts are at this moment."""
        with self._changed:
            places = tuple(self._ready), tuple(self._again), tuple(self._drawing)
            return Line(*places, self._next, self._discarded, self._redrawn)

    def seconds(self) -> dict[str, float]:
        """Return what drawing has taken since the last call, by phase."""
        with self._changed:
            found, self._seconds = self._seconds, {}
            return found

    def leave(self) -> Line:
        """End the thread as soon as can be, and return where all prompts are."""
        with self._changed:
            self._left = True
            self._changed.notify_all()
        self._thread.join()
        return self.line()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _discard(self, version: int) -> None:
        too_old = [g for g in self._ready if version - oldest(g) > self._room.bound]
        if too_old:
            self._ready = [g for g in self._ready if version - oldest(g) <= self._room.bound]
            self._again += [number_of(g.prompt.id, self._room.prompts) for g in too_old]
            self._discarded += len(too_old)
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while self._begin():
                assert self._offer is not None
                self._finish(*self._draw(self._drawing, self._offer, lambda: self._left))
        except Interrupted:
            pass  # the prompts stay unfinished
        except BaseException as error:  # whatever it is, it belongs to the run's own thread
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _begin(self) -> bool:
        """Wait until there is something to draw, and choose it; return False when the work is to be left."""
        with self._changed:
            self._changed.wait_for(lambda: self._left or (not self._held and self._free() > 0))
            if self._left:
                return False
            count = min(self._wave, self._free())
            again, self._again = self._again[:count], self._again[count:]
            self._drawing = again + list(range(self._next, self._next + count - len(again)))
            self._next += count - len(again)
            return True

    def _free(self) -> int:
        return 0 if self._offer is None else self._room.free(self._step, self._offer.version, len(self._ready))

    def _finish(self, groups: list[Group], seconds: dict[str, float]) -> None:
        with self._changed:
            self._ready += groups
            self._drawing = []
            for name, value in seconds.items():
                self._seconds[name] = self._seconds.get(name, 0.0) + value
            self._changed.notify_all()


def number_of(prompt_id: int, prompts: int) -> int:
    """Return the number of a prompt from its id, which names its batch of so many prompts and its place there.

    >>> number_of(2 << 32 | 3, prompts=8)
    19
    """
    return (prompt_id >> 32) * prompts + (prompt_id & 0xFFFFFFFF)
