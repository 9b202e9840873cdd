"""Where the time goes: named spans, one inside the other, summed by name.

The loop times its phases always. What the engine and the trainer do inside a phase is timed only while a profile is
taken, since a span costs about a microsecond and a decode step has several.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar


class SpanRecorder:
    """Adds the seconds of spans to a mapping, a span inside another under "outer/inner".

    Args:
        seconds: gives the mapping to add to.
        label: puts a name on the span in a trace that is being taken, as `torch.profiler.record_function` does.
        synchronize: called before the clock is read, to wait for a device that works asynchronously.

    >>> seconds = {}
    >>> recorder = SpanRecorder(lambda: seconds)
    >>> with recorder.measure("update"), recorder.measure("head"):
    ...     pass
    >>> sorted(seconds)
    ['update', 'update/head']
    """

    def __init__(
        self,
        seconds: Callable[[], MutableMapping[str, float]],
        label: Callable[[str], AbstractContextManager[object]] = nullcontext,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self._seconds = seconds
        self._label = label
        self._synchronize = synchronize
        self._path: list[str] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time one span; its time counts even when it ends in an exception."""
        self._path.append(name)
        path = "/".join(self._path)
        self._synchronize()
        started = time.perf_counter()
        try:
            with self._label(path):
                yield
        finally:
            self._synchronize()
            seconds = self._seconds()
            seconds[path] = seconds.get(path, 0.0) + time.perf_counter() - started
            self._path.pop()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Have `span` anywhere in the package measured here for the duration of the block, in this thread alone."""
        token = _listener.set(self)
        try:
            yield
        finally:
            _listener.reset(token)


# Of each thread: what is drawn beside the updates is no part of their phases.
_listener: ContextVar[SpanRecorder | None] = ContextVar("listener", default=None)
_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[None]:
    """Time a part of a phase; measured while a profile is taken, free of charge otherwise."""
    listener = _listener.get()
    return _NOTHING if listener is None else listener.measure(name)
