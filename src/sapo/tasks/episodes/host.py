"""A process that has loaded one environment and forks a player for every episode. Parent: episodes/pool.py.

Every episode so begins with the environment as it was loaded: what one does to its module, its files or its memory
reaches no other. The host itself runs code of the environment only while it loads it. It ends players that nobody waits
for any more, tells how each ended, and ends what they leave behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import resource
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from json.encoder import JSONEncoder
from pathlib import Path
from typing import Any, NoReturn

from sapo.environments import toolkit
from sapo.tasks.episodes.player import play_one
from sapo.tasks.episodes.wire import ENDED, ENDING, GRACE, LOST
from sapo.tasks.workers.guard import children, die_with, stand_guard
from sapo.tasks.workers.wire import MAX_DETAIL, framed, read_frame
from sapo.utils.signals import ANNOUNCING, ignore, outlive
from sapo.utils.text import name_error

_PR_SET_CHILD_SUBREAPER = 36

_LEFT = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


@dataclass
class _Player:
    pid: int
    channel: socket.socket
    """Its end of the socket, to write how it ended."""
    until: float | None = None
    """When it is killed, once nobody waits for it."""


class Stage:
    """The loop of a host.

    Args:
        channel: brings the sockets of episodes.
        environment: as it was loaded.
    """

    def __init__(self, channel: socket.socket, environment: Any) -> None:
        self._channel, self._environment = channel, environment
        self._limit = _allow_sockets()
        self._players: dict[int, _Player] = {}
        self._kept = set(children())
        """What the environment has started while it was loaded."""
        self._poll = select.poll()
        self._wake, wake = socket.socketpair()
        self._wake.setblocking(False)
        wake.setblocking(False)
        self._waker = wake
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self._poll.register(channel, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def run(self) -> None:
        """Play until the run closes the channel."""
        while True:
            for descriptor, event in self._poll.poll(self._patience()):
                if descriptor == self._channel.fileno():
                    if not self._admit():
                        return
                elif descriptor == self._wake.fileno():
                    with contextlib.suppress(BlockingIOError):
                        self._wake.recv(4096)
                elif event & _LEFT:
                    self._leave(descriptor)
            self._reap()
            self._kill_late()

    def _patience(self) -> float | None:
        """Return the milliseconds until the next player is to be killed."""
        late = [p.until for p in self._players.values() if p.until is not None]
        return max(0.0, 1000 * (min(late) - time.monotonic())) + 1 if late else None

    def _admit(self) -> bool:
        """Start a player for each socket that has come; False where none will come any more."""
        data, descriptors, _, _ = socket.recv_fds(self._channel, 64, 64)
        if data and not descriptors:
            with contextlib.suppress(BlockingIOError):  # which many have filled already
                self._channel.send(LOST, socket.MSG_DONTWAIT)
        for descriptor in descriptors:
            channel = socket.socket(fileno=descriptor)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # threads that the environment has started while it was loaded
                try:
                    pid = os.fork()
                except OSError as error:  # no room for a further process
                    with contextlib.suppress(OSError):
                        channel.sendall(_frame({"failed": f"its worker process could not be started: {error}"}))
                    channel.close()
                    continue
            if pid == 0:
                self._become_player(channel)
            self._players[channel.fileno()] = _Player(pid, channel)
            self._poll.register(channel, getattr(select, "POLLRDHUP", 0))
        return bool(data)

    def _become_player(self, channel: socket.socket) -> NoReturn:
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for other in (self._channel, self._wake, self._waker, *(p.channel for p in self._players.values())):
                other.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, self._limit)
            os.setsid()
            die_with(os.getppid())
            with contextlib.suppress(OSError):  # where memory runs out, an episode is to go before the run does
                Path("/proc/self/oom_score_adj").write_text("500")
            play_one(channel, self._environment)
            code = 0
        except BaseException:
            code = 1
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)  # no way back into the host's loop

    def _leave(self, descriptor: int) -> None:
        """Ask a player that nobody waits for to end."""
        self._poll.unregister(descriptor)
        player = self._players[descriptor]
        player.until = time.monotonic() + GRACE
        with contextlib.suppress(ProcessLookupError):
            os.kill(player.pid, signal.SIGTERM)

    def _kill_late(self) -> None:
        now = time.monotonic()
        for player in self._players.values():
            if player.until is not None and now >= player.until:
                player.until = None  # once is enough
                os.kill(player.pid, signal.SIGKILL)  # it cannot be another's: only this process reaps it

    def _reap(self) -> None:
        """Tell how players ended, and end what they left behind."""
        while (ended := _one_that_ended()) is not None:
            player = next((p for p in self._players.values() if p.pid == ended), None)
            if player is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(ended, signal.SIGKILL)  # before it is reaped: the number is still its own
            code = os.waitstatus_to_exitcode(os.waitpid(ended, 0)[1])
            if player is not None:
                self._say_goodbye(player, code)
        if not self._players:
            left: set[int] = set()
            with contextlib.suppress(OSError):  # no file descriptor is free to look with; the next time, one may be
                left = set(children()) - self._kept  # those that left their session, and their parent
            for child in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

    def _say_goodbye(self, player: _Player, code: int) -> None:
        descriptor = player.channel.fileno()
        del self._players[descriptor]
        with contextlib.suppress(KeyError):
            self._poll.unregister(descriptor)
        with contextlib.suppress(OSError):
            player.channel.send(ENDING.pack(ENDED, code))
        with contextlib.suppress(OSError):
            player.channel.shutdown(socket.SHUT_RDWR)  # a process that it left behind may hold it open
        player.channel.close()


def _allow_sockets() -> tuple[int, int]:
    """Let this process hold as many sockets of episodes as the system does, and return what its limit was."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a system that has a limit of its own below that
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, hard


def _one_that_ended() -> int | None:
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if found is None else found.si_pid


def serve(channel: socket.socket) -> None:
    """Load the environment that the run names, and play its episodes."""
    channel.setblocking(True)
    with channel.makefile("rb") as stream:  # which reads too much only where more was sent before our answer
        frame = read_frame(stream)
    if frame is None:
        return
    from sapo.errors import UserError

    try:
        environment = pickle.loads(frame).make()
    except UserError as error:
        channel.sendall(_frame({"refused": str(error)}))
        return
    except BaseException as error:
        channel.sendall(_frame({"refused": name_error(error)[:MAX_DETAIL]}))
        return
    toolkit.share_places()
    gc.collect()
    gc.freeze()  # pages that the collector writes to are copied in every player
    stage = Stage(channel, environment)
    channel.sendall(_frame({"loaded": True, "host": os.getpid()}))
    stage.run()


def _frame(answer: dict[str, Any]) -> bytes:
    return framed(JSONEncoder().encode(answer).encode())


def main(descriptor: int, parent: int) -> None:
    """Serve on an inherited socket. What an environment prints goes to standard error, and its input is empty."""
    ignore(*ANNOUNCING)
    outlive(signal.SIGINT)
    guard = stand_guard(parent, descriptor)
    outlive(signal.SIGINT)  # which a fork undoes
    die_with(guard)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    channel = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    with contextlib.suppress(OSError):
        serve(channel)
    os._exit(0)
