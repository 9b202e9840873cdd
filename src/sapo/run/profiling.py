"""A profile of a run (`profile=true`): seconds by phase and part, and a Chrome trace of a step.

The seconds are in metrics.jsonl step by step and summed in summary.json, parts as "update/backward". The trace has
every operator of the steps asked for; chrome://tracing and https://ui.perfetto.dev open the file as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sapo.config import ProfileConfig, RunConfig
from sapo.utils.spans import SpanRecorder


class Profiler:
    """Times the phases of a run; with `profile` in its recipe their parts too, and traces some steps.

    Args:
        config: of the run.
        directory: of the run; traces go to its profile/.
        seconds: gives the mapping that the seconds are added to.
        on_phase: called with the name of every phase that begins.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: Path,
        seconds: Callable[[], MutableMapping[str, float]],
        on_phase: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings: ProfileConfig | None = config.profile
        self.directory = directory / "profile"
        self._cuda = config.device.startswith("cuda")
        if self.settings is None:
            self._recorder = SpanRecorder(seconds)
        else:
            synchronize = torch.cuda.synchronize if self._cuda else lambda: None
            self._recorder = SpanRecorder(seconds, record_function, synchronize)
        self._on_phase = on_phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase of the run."""
        self._on_phase(name)
        with self._recorder.measure(name):
            yield

    @contextmanager
    def run(self) -> Iterator[None]:
        """Time the parts of phases while the run goes on, if a profile was asked for."""
        if self.settings is None:
            yield
            return
        with self._recorder.listening():
            yield

    @contextmanager
    def beside(self, seconds: MutableMapping[str, float]) -> Iterator[SpanRecorder]:
        """Time the work of another thread, which is no part of the run's phases; called in that thread.

        Args:
            seconds: what it takes is added here, by phase; their parts too if a profile was asked for.
        """
        recorder = SpanRecorder(lambda: seconds)
        with recorder.listening() if self.settings is not None else nullcontext():
            yield recorder

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Trace one step, 1-based, when it is one of those asked for; one that ends in an exception leaves no trace."""
        if not self._traced(step):
            yield
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        with profile(activities=activities) as trace:
            yield
        self.directory.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(self.directory / f"step-{step:06d}.json.gz"))

    def _traced(self, step: int) -> bool:
        settings = self.settings
        return settings is not None and settings.first_step <= step < settings.first_step + settings.steps


def phases(seconds: MutableMapping[str, float]) -> dict[str, float]:
    """Return the phases alone, which add up to the run's time, without their parts.

    >>> phases({"update": 2.0, "update/head": 0.5})
    {'update': 2.0}
    """
    return {name: value for name, value in seconds.items() if "/" not in name}
