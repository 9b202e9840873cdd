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
from sapo.run.listener import Listener, Silent, note, tell_phase, tell_samples
from sapo.training.checkpoint import Checkpoint
from sapo.utils.names import did_you_mean

HOOKS = ("on_step", "on_evaluation", "on_checkpoint")


class Callbacks(Silent):
    """Calls the user's callbacks as a run goes on, and knows whether one of them asked to stop.

    Callbacks have no hook for the start, warnings and resumption of a run, of which this listener takes no notice.

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

    def record(self, record: dict[str, Any]) -> None:
        """Call on_step for the figures of a step, on_evaluation for those of an evaluation."""
        hook = {"step": "on_step", "eval": "on_evaluation"}.get(record["kind"])
        if hook is not None:
            self._call(hook, record["step"], {k: v for k, v in record.items() if k not in ("kind", "step")})

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Call on_checkpoint with the step and the directory that was written."""
        self._call("on_checkpoint", checkpoint.step, checkpoint.path)


class Listeners:
    """Passes everything on to several listeners, in the order in which they were given."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners

    def started(self, config: RunConfig) -> None:
        """Tell all listeners that the loop begins, or goes on."""
        for listener in self.listeners:
            listener.started(config)

    def record(self, record: dict[str, Any]) -> None:
        """Give all listeners a line of metrics.jsonl."""
        for listener in self.listeners:
            listener.record(record)

    def warning(self, text: str) -> None:
        """Give all listeners a warning."""
        for listener in self.listeners:
            listener.warning(text)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Tell all listeners that a checkpoint was written."""
        for listener in self.listeners:
            listener.checkpoint(checkpoint)

    def resumed(self, checkpoint: Checkpoint) -> None:
        """Tell all listeners from which checkpoint the run resumes."""
        for listener in self.listeners:
            listener.resumed(checkpoint)

    def note(self, text: str) -> None:
        """Give a note to the listeners that take notes."""
        for listener in self.listeners:
            note(listener, text)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Give sampled completions to the listeners that show them."""
        for listener in self.listeners:
            tell_samples(listener, step, samples)

    def phase(self, step: int, name: str) -> None:
        """Tell the listeners that show phases which one of a step begins."""
        for listener in self.listeners:
            tell_phase(listener, step, name)
