"""The inside of a worker process: reads jobs from its socket, judges, writes scores; the outside is workers/pool.py.

Frames are a length in four bytes and the bytes. A request is a pickle, from a parent that is trusted. Answers are JSON,
so that nothing a worker says, whatever ran in it, is ever unpickled. For each request there are two answers: `began`,
when the verifier is loaded and the deadline starts, and the score or the reason why there is none.
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

# Text of a model can make exact arithmetic ask for all there is; a worker that runs verifiers of ours has its limit.
MEMORY_LIMIT = 4 * 2**30

_PR_SET_PDEATHSIG = 1


def serve(channel: socket.socket, parent: int) -> None:
    """Judge until the parent closes its end."""
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
        if text is None:  # only to see that it loads
            _answer(channel, {"loaded": True})
            continue
        answer = _judge(loaded[key], text, prompt)
        if os.getpid() != me:  # a child that the verifier forked and let return: the answer is its parent's to give
            os._exit(0)
        _answer(channel, answer)


def _judge(verifier: Any, text: str, prompt: Any) -> dict[str, Any]:
    from sapo.tasks.base import checked_score

    # BaseException: a verifier that calls sys.exit() costs its completion, not the worker.
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
    with contextlib.suppress(ValueError, OSError):  # where the system has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _die_with(parent: int, channel: socket.socket) -> None:
    """End when the parent does, however it ends and whatever is being done here."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before this was set
            os._exit(1)
        return

    def watch() -> None:
        # The parent's end of the socket closes with it; looking does not take what it sent.
        while os.getppid() == parent:
            threading.Event().wait(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(descriptor: int, parent: int) -> None:
    """Serve on an inherited socket. What user code prints goes to standard error; it can read nothing."""
    channel = socket.socket(fileno=descriptor)
    channel.setblocking(True)
    os.set_inheritable(descriptor, False)
    with contextlib.suppress(BrokenPipeError, ConnectionError):
        serve(channel, parent)
    # Not sys.exit(): threads that a user's module left running would keep the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
