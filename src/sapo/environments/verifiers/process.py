"""The process that plays a verifiers taskset, in verifiers' own Python: JSON lines over its standard input and output.

It loads the taskset once and forks for every episode (worker.py), so that one that blocks, crashes or fills its memory
costs its episode alone. An episode is ordered by a line and answered by a line; the model's turns go another way, over
the endpoint.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import queue
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sapo.environments.clock import off_the_clock
from sapo.environments.failures import EpisodeError
from sapo.errors import TaskError

LOAD_SECONDS = 300.0
"""Seconds that verifiers and a taskset may take to be loaded."""

READY_SECONDS = 120.0
"""Seconds that the renderer of a tokenizer may take to be made."""

BEGIN_SECONDS = 120.0
"""Seconds that verifiers may take to set itself up in the process of an episode."""

PASSED = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "TERM"),
    *("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "HF_HUB_OFFLINE", "UV_CACHE_DIR", "OMP_NUM_THREADS"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
)
"""Environment variables that it has beside those the recipe names: where things are, and no secrets."""

_WORKER = Path(__file__).with_name("worker.py")
_TAIL = 40


class WorkerDiedError(EpisodeError):
    """The process ended; what it was playing is lost."""


class VerifiersProcess:
    """One process. `start` it, `prepare` it for a model, `play` episodes, `close` it.

    Args:
        python: interpreter in whose environment verifiers is installed.
        load: what it is told first: taskset, options and harness.
        path: directories where it finds modules of the user's.
        variables: names of environment variables that it is given.
    """

    def __init__(
        self, python: str, load: Mapping[str, Any], path: Sequence[str] = (), variables: Sequence[str] = ()
    ) -> None:
        self._python, self._load, self._path, self._variables = python, dict(load), list(path), list(variables)
        self._process: subprocess.Popen[str] | None = None
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Event, asyncio.Future[dict[str, Any]]]] = {}
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._number = 0
        self._errors: collections.deque[str] = collections.deque(maxlen=_TAIL)

    @property
    def lives(self) -> bool:
        """Return whether it runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> list[dict[str, Any]]:
        """Start it, and return the tasks of the taskset.

        Raises:
            TaskError: it cannot be started, or verifiers or the taskset cannot be loaded.
        """
        try:
            self._process = subprocess.Popen(
                [self._python, "-u", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=self._environment(),
                start_new_session=True,  # ^C is for the run, which ends it in order
            )
        except OSError as error:
            raise TaskError(
                f"python must be the interpreter of an environment with verifiers; got {self._python!r:.120}: "
                f"{error.strerror}"
            ) from error
        self._said = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self._process, self._said), daemon=True).start()
        threading.Thread(target=self._read_errors, args=(self._process,), daemon=True).start()
        tasks = self._ask(self._load, "tasks", LOAD_SECONDS)
        return [dict(task) for task in tasks]

    def prepare(self, model: Mapping[str, Any]) -> None:
        """Tell it where the model answers, and with what tokenizer.

        Raises:
            TaskError: it cannot use them.
        """
        self._ask({"model": model}, "ready", READY_SECONDS)

    async def play(self, task: int, seat: int, seed: int) -> dict[str, Any]:
        """Play an episode and return what became of it. One that is cancelled is ended there.

        Until verifiers is set up in the episode's process, its time to reply does not run.

        Raises:
            EpisodeError: it did not begin.
            WorkerDiedError: the process ended meanwhile.
        """
        loop = asyncio.get_running_loop()
        began = asyncio.Event()
        answer: asyncio.Future[dict[str, Any]] = loop.create_future()
        answer.add_done_callback(lambda _: began.set())
        with self._lock:
            self._number += 1
            number = self._number
            self._waiting[number] = loop, began, answer
        try:
            self._send({"play": number, "task": task, "seat": seat, "seed": seed})
            with off_the_clock():
                await asyncio.wait_for(began.wait(), BEGIN_SECONDS)
            return await answer
        except TimeoutError:
            with suppress(WorkerDiedError):
                self._send({"cancel": number})
            raise EpisodeError(f"verifiers did not begin the episode within {BEGIN_SECONDS:g} s") from None
        except asyncio.CancelledError:
            with suppress(WorkerDiedError):
                self._send({"cancel": number})
            raise
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def close(self) -> None:
        """End it with all that it plays."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(OSError):
            assert process.stdin is not None, "it is piped"
            process.stdin.close()  # at which it ends
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _environment(self) -> dict[str, str]:
        found = {name: os.environ[name] for name in (*PASSED, *self._variables) if name in os.environ}
        own = os.path.dirname(os.path.abspath(self._python)) if os.sep in self._python else ""
        return {
            **found,
            "PATH": os.pathsep.join(filter(None, (own, found.get("PATH", os.defpath)))),
            "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in self._path),
            "PYTHONHASHSEED": "0",
            "TOKENIZERS_PARALLELISM": "false",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def _ask(self, order: Mapping[str, Any], key: str, seconds: float) -> Any:
        try:
            self._send(order)
            said = self._said.get(timeout=seconds)
        except queue.Empty:
            self.close()
            raise TaskError(
                f"the worker of verifiers gave no answer within {seconds:g} s{self._last_words()}"
            ) from None
        except WorkerDiedError:
            said = None
        if said is None:
            self.close()
            raise TaskError(f"the worker of verifiers ended{self._last_words()}")
        if "refused" in said:
            self.close()
            raise TaskError(f"the worker of verifiers, in {self._python}: {said['refused']}")
        return said[key]

    def _last_words(self) -> str:
        words = [line for line in self._errors if line.strip()]
        return f"; it said at last: {words[-1].strip()[:300]}" if words else ""

    def _send(self, line: Mapping[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None:
            raise WorkerDiedError("the worker of verifiers has ended")
        try:
            with self._writing:
                process.stdin.write(json.dumps(line) + "\n")
                process.stdin.flush()
        except (OSError, ValueError) as error:
            raise WorkerDiedError("the worker of verifiers has ended") from error

    def _read(self, process: subprocess.Popen[str], said: queue.SimpleQueue[dict[str, Any] | None]) -> None:
        """Hand its lines to those who wait for them."""
        assert process.stdout is not None, "it is piped"
        with suppress(ValueError, OSError):
            for line in process.stdout:
                try:
                    message = json.loads(line)
                except ValueError:
                    break  # what wrote there is not ours: nothing after it can be trusted
                if not isinstance(message, dict):
                    break
                if "began" in message:
                    self._begin(message["began"])
                elif "played" in message:
                    self._settle(message.pop("played"), message)
                else:
                    said.put(message)
        with suppress(OSError):
            process.kill()
        process.wait()
        said.put(None)
        with self._lock:
            lost = list(self._waiting)
        for number in lost:
            self._settle(number, None)

    def _begin(self, number: Any) -> None:
        with self._lock:
            loop, began, _ = self._waiting.get(number, (None, None, None))
        if loop is not None and began is not None:
            with suppress(RuntimeError):  # its loop is closed
                loop.call_soon_threadsafe(began.set)

    def _settle(self, number: Any, message: dict[str, Any] | None) -> None:
        with self._lock:
            loop, _, answer = self._waiting.pop(number, (None, None, None))
        if loop is None or answer is None:
            return

        def settle() -> None:
            if answer.done():
                return
            if message is None:
                answer.set_exception(WorkerDiedError(f"the worker of verifiers ended{self._last_words()}"))
            else:
                answer.set_result(message)

        with suppress(RuntimeError):  # its loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle)

    def _read_errors(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None, "it is piped"
        with suppress(ValueError, OSError):
            for line in process.stderr:
                self._errors.append(line[:2000])
