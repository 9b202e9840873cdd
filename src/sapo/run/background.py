"""A rollout batch that is drawn in a thread while the run goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundWork(Generic[T]):
    """Work in a thread of its own, begun at once.

    Args:
        work: is given a function that says whether to leave it; it then raises, or returns all the same.

    >>> BackgroundWork(lambda should_stop: 2 + 2).result()
    4
    """

    def __init__(self, work: Callable[[Callable[[], bool]], T]) -> None:
        self._left = threading.Event()
        self._done = threading.Event()
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="sapo-rollout", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait until the work is done, but no longer than so many seconds; return whether it is."""
        return self._done.wait(seconds)

    def result(self) -> T:
        """Wait for the work and return what it gave; an error of it is raised here, with the thread's traceback."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]

    def leave(self) -> None:
        """Have the work left as soon as it can be, and wait for its thread; what it gave or raised is forgotten."""
        self._left.set()
        self._thread.join()

    def _run(self, work: Callable[[Callable[[], bool]], T]) -> None:
        try:
            self._found.append(work(self._left.is_set))
        except BaseException as error:  # whatever it is, it belongs to whoever asks for the result
            self._error = error
        finally:
            self._done.set()
