"""An engine in a child process of the run: the channel to it, and what the process does.

The two speak over a pair of sockets. What the process prints goes to RUN/engines/NN.log. It ends when the run does,
however that ends: its standard input is a pipe that nobody writes to, and that closes with the run's process.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sapo.data.messages import Message
from sapo.errors import Interrupted
from sapo.rollout.remote.channel import ChannelError
from sapo.rollout.remote.frames import receive, send, until, waiting
from sapo.rollout.remote.worker import EngineWorker
from sapo.utils.signals import STOPPING, ignore
from sapo.utils.text import last_words

STOPPING_SECONDS = 60.0
"""How long a worker that was told to leave its work may take to do so."""
ENDING_SECONDS = 10.0
"""How long a process that was told to end may take before it is ended."""


class ProcessChannel:
    """A channel to an engine in a child process, which it starts.

    Args:
        number: of the engine, 0, 1, ...: names it and its log.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        file, name = tempfile.mkstemp(prefix=f"sapo-engine-{number:02d}-", suffix=".log")
        os.close(file)
        self._log, self._log_is_ours = Path(name), True
        self._start()

    @property
    def process_id(self) -> int:
        """Return the id of the present process."""
        return self._process.pid

    def call(self, message: Message, timeout: float, should_stop: Callable[[], bool] = lambda: False) -> Message:
        """See `Channel.call`."""
        limit, stopping = until(timeout), False

        def go_on() -> None:
            """Go on waiting for the worker, and ask it to stop when that was asked for."""
            nonlocal limit, stopping
            if self._process.poll() is not None:
                raise EOFError
            if limit():
                what = f"did not leave its work within {STOPPING_SECONDS:g} s" if stopping else "did not answer"
                raise ChannelError(f"{self._name} {what} to {message.header['call']!r} within {timeout:g} s")
            if not stopping and should_stop():
                stopping, limit = True, until(STOPPING_SECONDS)
                send(self._socket, Message({"call": "stop"}))

        try:
            send(self._socket, message, go_on)
            answer = receive(self._socket, go_on)
        except (OSError, EOFError) as error:
            raise ChannelError(self._how_it_ended()) from error
        if stopping:
            raise Interrupted
        return answer

    def restart(self) -> None:
        """See `Channel.restart`."""
        self._end(0.0)
        self._start()

    def close(self) -> None:
        """See `Channel.close`."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)  # the worker reads an end, closes its engine, and ends
        self._end(ENDING_SECONDS)
        if self._log_is_ours:
            self._log.unlink(missing_ok=True)

    def log_to(self, directory: Path) -> None:
        """Move the log to a directory: that of the run, once it is there."""
        directory.mkdir(parents=True, exist_ok=True)
        file, before = directory / f"{self.number:02d}.log", self._log
        with file.open("ab") as log:
            log.write(before.read_bytes())
        self.call(Message({"call": "log", "file": str(file.absolute())}), STOPPING_SECONDS)
        self._log, self._log_is_ours = file, False
        before.unlink()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs, self._log.open("ab") as log:
            # A session of its own: a Ctrl-C in the terminal is the run's to answer.
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._name = f"engine {self.number} (process {self._process.pid})"

    def _end(self, seconds: float) -> None:
        """Wait for the process to end, and end it and all that it started after some seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return f"{self._name} has closed its connection"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"{self._name} {how}; {last_words(self._log)}"


def serve_process() -> None:
    """Be an engine's process, until the run ends."""
    ignore(*STOPPING)  # whether a run stops is the run's to say
    threading.Thread(target=_end_with_parent, daemon=True).start()
    worker = EngineWorker()
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        with suppress(EOFError, OSError):
            while True:
                message = receive(channel)
                if (answer := _answer(worker, channel, message)) is not None:
                    send(channel, answer)
        worker.close()


def _answer(worker: EngineWorker, channel: socket.socket, message: Message) -> Message | None:
    """Answer a message of the run; None for a stop, which comes too late when nothing is under way."""
    match message.header["call"]:
        case "stop":
            return None
        case "log":
            _print_to(Path(message.header["file"]))
            return Message({})
    stopped = False

    def should_stop() -> bool:
        nonlocal stopped
        if not stopped and waiting(channel):
            assert receive(channel).header["call"] == "stop", "a call is made when the one before is answered"
            stopped = True
        return stopped

    return worker.handle(message, should_stop)


def _print_to(file: Path) -> None:
    """Have what this process prints go to another file."""
    sys.stdout.flush()
    sys.stderr.flush()
    with file.open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)


def _end_with_parent() -> None:
    """End this process and all that it started as soon as the run's has ended, whatever is under way."""
    os.read(0, 1)  # returns when the run's process has ended; one that closes its engine waits for it before
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    serve_process()
