"""Callbacks of a run: functions and objects of the user's that are told of its steps, and may stop it.

    class Patience:
        def on_step(self, step, metrics): ...           # every step; metrics as in metrics.jsonl
        def on_evaluation(self, step, metrics): ...     # every evaluation of a task
        def on_checkpoint(self, step, path): ...        # every checkpoint

Each is optional. One that returns True stops the run at the next safe point, with everything saved. A plain function is
called as on_step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sapo.config import RunConfig
from sapo.errors import ConfigError
from sapo.run.listener import Listener, note, tell_phase, tell_samples
from sapo.training.checkpoint import Checkpoint
from sapo.utils.names import did_you_mean

HOOKS = ("on_step", "on_evaluation", "on_checkpoint")


class Callbacks:
    """Listens to a run for the callbacks of its user, and says whether one of them asked to stop.

    Raises:
        ConfigError: one is neither a function nor an object with one of HOOKS, or has a method of a similar name.
    """

    def __init__(self, callbacks: Iterable[Any] | Callable[..., Any]) -> None:
        given = [callbacks] if callable(callbacks) or not isinstance(callbacks, Iterable) else list(callbacks)
        self.hooks: dict[str, list[Callable[..., Any]]] = {name: [] for name in HOOKS}
        self.asked = False
        """Whether a callback has asked to stop."""
        for callback in given:
            self._take(callback)

    def _take(self, callback: Any) -> None:
        if isinstance(callback, type):
            raise ConfigError(f"a callback must be an object; got the class {callback.__name__}; write it with ()")
        own = [name for name in dir(callback) if name.startswith("on_") and callable(getattr(callback, name))]
        for name in own:
            if name not in HOOKS:
                raise ConfigError(
                    f"a callback may have {', '.join(HOOKS)}; got {type(callback).__name__}.{name}"
                    f"{did_you_mean(name, HOOKS)}"
                )
            self.hooks[name].append(getattr(callback, name))
        if not own and callable(callback):
            self.hooks["on_step"].append(callback)
        elif not own:
            raise ConfigError(
                f"a callback must be a function of (step, metrics), or have {', '.join(HOOKS)}; got a "
                f"{type(callback).__name__}"
            )

    def _call(self, hook: str, step: int, argument: Any) -> None:
        for function in self.hooks[hook]:
            if function(step, argument) is True:
                self.asked = True

    def started(self, config: RunConfig) -> None:
        """Say nothing."""

    def record(self, record: dict[str, Any]) -> None:
        """Call on_step and on_evaluation."""
        hook = {"step": "on_step", "eval": "on_evaluation"}.get(record["kind"])
        if hook is not None:
            self._call(hook, record["step"], {k: v for k, v in record.items() if k not in ("kind", "step")})

    def warning(self, text: str) -> None:
        """Say nothing."""

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Call on_checkpoint."""
        self._call("on_checkpoint", checkpoint.step, checkpoint.path)

    def resumed(self, checkpoint: Checkpoint) -> None:
        """Say nothing."""


class Listeners:
    """Several listeners as one."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners

    def started(self, config: RunConfig) -> None:
        """Tell all of them."""
        for listener in self.listeners:
            listener.started(config)

    def record(self, record: dict[str, Any]) -> None:
        """Tell all of them."""
        for listener in self.listeners:
            listener.record(record)

    def warning(self, text: str) -> None:
        """Tell all of them."""
        for listener in self.listeners:
            listener.warning(text)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Tell all of them."""
        for listener in self.listeners:
            listener.checkpoint(checkpoint)

    def resumed(self, checkpoint: Checkpoint) -> None:
        """Tell all of them."""
        for listener in self.listeners:
            listener.resumed(checkpoint)

    def note(self, text: str) -> None:
        """Tell those who take notes."""
        for listener in self.listeners:
            note(listener, text)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Tell those who show samples."""
        for listener in self.listeners:
            tell_samples(listener, step, samples)

    def phase(self, step: int, name: str) -> None:
        """Tell those who show phases."""
        for listener in self.listeners:
            tell_phase(listener, step, name)
