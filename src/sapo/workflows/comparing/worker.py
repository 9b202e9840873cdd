"""The process of one run: `python -m sapo.workflows.comparing.worker`, started by processes.py.

The recipe comes as a line of JSON on standard input, which then stays open. When standard input ends, because the
comparison was stopped or killed, the run is saved and stopped. Events go out as lines of JSON; anything else that a
library prints goes to standard error, the run's log.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sapo.config import RunConfig
from sapo.config.recipes import parse_recipe
from sapo.errors import (
    CollapseError,
    ConfigError,
    Interrupted,
    MemoryShortage,
    NonFiniteError,
    ParityError,
    RewardError,
    StorageError,
    UserError,
)
from sapo.evaluation.store import differing
from sapo.run.directory import RunDirectory
from sapo.run.inputs import absolute_paths
from sapo.run.listener import Listener
from sapo.run.machine import resolve_device
from sapo.training.checkpoint import Checkpoint
from sapo.utils.signals import STOPPING
from sapo.workflows.train import Run, resume, train


class Reporter:
    """Reports a run's progress line by line; when nobody reads any more, the run is to stop."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._stop = threading.Event()

    def watch_input(self) -> None:
        """Wait in the background for the end of standard input."""

        def wait() -> None:
            while os.read(0, 1):  # not sys.stdin: its lock, held at exit, aborts the interpreter
                pass
            self._stop.set()

        threading.Thread(target=wait, daemon=True).start()
        # A cluster sends these to every process of a job; the comparison hears of them too, and asks for the same.
        for number in STOPPING:
            signal.signal(number, lambda *_: self._stop.set())

    def should_stop(self) -> bool:
        """Tell whether the comparison has ended or asked for a stop."""
        return self._stop.is_set()

    def send(self, event: str, **fields: Any) -> None:
        """Send one line."""
        try:
            self._out.write(json.dumps({"event": event, **fields}) + "\n")
            self._out.flush()
        except OSError:
            self._stop.set()

    def started(self, config: RunConfig) -> None:
        """See `Listener.started`."""
        self.send("started")

    def record(self, record: dict[str, Any]) -> None:
        """See `Listener.record`: steps and evaluations are shown."""
        if record["kind"] == "step":
            self.send("step", step=record["step"], reward=record.get("reward/mean"))
        elif record["kind"] == "eval":
            name = f"mean@{record['samples']}" if record["binary"] else "reward/mean"
            if name in record:  # not where every completion failed
                self.send("eval", step=record["step"], task=record["task"], value=record[name], binary=record["binary"])

    def warning(self, text: str) -> None:
        """See `Listener.warning`; those of the run itself are in its metrics.jsonl."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """See `Listener.checkpoint`."""

    def resumed(self, checkpoint: Checkpoint) -> None:
        """See `Listener.resumed`."""
        self.send("resumed", step=checkpoint.step)


def execute(config: RunConfig, listener: Listener, should_stop: Callable[[], bool]) -> Run:
    """Start a run, or resume it where it was killed or stopped.

    Raises:
        ConfigError: its directory holds another run.
        RunFailure: the run stopped itself; failure.json in its directory says where and why.
    """
    assert config.run_dir is not None
    path = Path(config.run_dir)
    if path.exists() and not (path / "config.yaml").exists():
        shutil.rmtree(path)  # killed before its config.yaml was written: there is nothing in it
    if not path.exists():
        return train(config, listener=listener, should_stop=should_stop)
    check_same_run(path, config)
    return resume(path, listener=listener, should_stop=should_stop)


def check_same_run(path: Path, config: RunConfig) -> None:
    """Refuse a run directory of another recipe than the comparison's.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    resolved = config.model_copy(update={"device": resolve_device(config.device)})
    there, here = (
        absolute_paths(c).model_dump(mode="json", exclude={"provenance", "run_dir"})
        for c in (RunDirectory.read_config(path), parse_recipe(resolved.model_dump(mode="json")))
    )
    for key, (a, b) in differing(there, here):
        raise ConfigError(f"{path} has {key}={a} where the comparison has {b}: it was changed; move it away")


def main() -> None:
    """Read the recipe from standard input, execute its run and report how it ended."""
    reporter = Reporter()
    config = parse_recipe(json.loads(sys.stdin.readline()))
    reporter.watch_input()
    try:
        run = execute(config, reporter, reporter.should_stop)
    except (UserError, StorageError, MemoryShortage, RewardError) as error:
        # For the user to mend: the run is resumed by the next call.
        reporter.send("refused", message=str(error))
    except (NonFiniteError, CollapseError, ParityError) as error:
        # This is a result of the comparison: the run is not repeated.
        reporter.send("failed", reason=str(error))
    except Interrupted:
        reporter.send("stopped")
    else:
        reporter.send("finished" if run.stopped is None else "stopped")


if __name__ == "__main__":
    main()
