"""The worker process of verifiers: read jobs from a socket, score them, write the scores. Parent: workers/pool.py.

A frame is a length in four bytes and the bytes. Requests are pickles from the parent, which is trusted. Answers are
JSON, so that nothing from a worker, which may run any code, is ever unpickled. Each request has two answers: `began`,
when the verifier is loaded and the deadline starts, and then the score or the reason why there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import signal
import socket
import sys
import threading
from typing import Any

from sapo.tasks.workers.wire import HEADER, MAX_DETAIL

# A model's text can make exact arithmetic use all memory, so verifiers of ours run with a limit.
MEMORY_LIMIT = 4 * 2**30

_PR_SET_PDEATHSIG = 1


def serve(channel: socket.socket, parent: int) -> None:
    """Score jobs until the parent closes the socket."""
    _die_with(parent, channel)
    from sapo.errors import TaskError
    from sapo.tasks.verifiers.base import prepare, prepare_prompt
    from sapo.tasks.verifiers.registry import build_verifier

    stream, me = channel.makefile("rb"), os.getpid()
    loaded: dict[bytes, Any] = {}
    while (frame := _read_frame(stream)) is not None:
        try:
            key, text, prompt_fields = pickle.loads(frame)
            if key not in loaded:
                spec = pickle.loads(key)
                verifier = spec if callable(spec) else build_verifier(spec)
                prepare(verifier)
                loaded[key] = verifier
            prompt = _prompt(prompt_fields)
            if text is not None:
                prepare_prompt(loaded[key], prompt)
        except TaskError as error:
            _answer(channel, {"refused": str(error)})
            continue
        except BaseException as error:
            _answer(channel, {"refused": _reason(error)})
            continue
        _answer(channel, {"began": True})
        if text is None:  # the parent only checks that it loads
            _answer(channel, {"loaded": True})
            continue
        answer = _judge(loaded[key], text, prompt)
        if os.getpid() != me:  # a child that the verifier forked: only its parent may answer
            os._exit(0)
        _answer(channel, answer)


def _judge(verifier: Any, text: str, prompt: Any) -> dict[str, Any]:
    from sapo.tasks.base import checked_score

    # BaseException: a verifier that calls sys.exit() fails on this completion, and the worker goes on.
    try:
        with _memory_limit(getattr(verifier, "pure", False)):
            score = checked_score(verifier(text, prompt))
        return {
            "reward": score.reward,
            "status": str(score.status),
            "detail": str(score.detail)[:MAX_DETAIL],
            "answer": None if score.answer is None else str(score.answer),
            "figures": {str(name): float(value) for name, value in score.figures.items()},
        }
    except BaseException as error:
        return {"failed": _reason(error)}


def _reason(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:MAX_DETAIL]
    except Exception:
        return type(error).__name__


def _prompt(fields: tuple[Any, ...]) -> Any:
    from sapo.data import Prompt

    number, task, text, answer, metadata = fields
    return Prompt(id=number, task=task, text=text, answer=answer, metadata=metadata)


def _read_frame(stream: Any) -> bytes | None:
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (length,) = HEADER.unpack(header)
    frame: bytes = stream.read(length)
    return frame if len(frame) == length else None


def _answer(channel: socket.socket, answer: dict[str, Any]) -> None:
    data = json.dumps(answer).encode()
    channel.sendall(HEADER.pack(len(data)) + data)


@contextlib.contextmanager
def _memory_limit(wanted: bool) -> Any:
    if not wanted or sys.platform == "win32":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    with contextlib.suppress(ValueError, OSError):  # the system has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _die_with(parent: int, channel: socket.socket) -> None:
    """End this process when the parent ends, for whatever reason, even in the middle of a job."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before this was set
            os._exit(1)
        return

    def watch() -> None:
        # Polling the parent's id leaves the data in the socket alone.
        while os.getppid() == parent:
            threading.Event().wait(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(descriptor: int, parent: int) -> None:
    """Serve on an inherited socket. What user code prints goes to standard error, and its standard input is empty."""
    channel = socket.socket(fileno=descriptor)
    channel.setblocking(True)
    os.set_inheritable(descriptor, False)
    with contextlib.suppress(BrokenPipeError, ConnectionError):
        serve(channel, parent)
    # Not sys.exit(), which would wait for threads that a user's module left running.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
