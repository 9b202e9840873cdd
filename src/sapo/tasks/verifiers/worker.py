"""The worker process of verifiers: read jobs from a socket, score them, write the scores. Parent: workers/pool.py.

Requests are pickles from the parent, which is trusted. Answers are JSON, so that nothing from a worker, which may run
any code, is ever unpickled. Each request has a number, which its answers carry, and two answers: `began`, when the
verifier is loaded and the deadline starts, and then the score or the reason why there is none. The first frame of all
is the worker's process id.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sys
from json.encoder import JSONEncoder
from typing import Any

from sapo.tasks.verifiers.limits import ADDRESSES, memory_limit
from sapo.tasks.workers.guard import die_with, stand_guard
from sapo.tasks.workers.wire import MAX_ANSWER, MAX_DETAIL, framed, read_frame, score_to_json
from sapo.utils.signals import ANNOUNCING, ignore, outlive

# A model's text can make exact arithmetic use all memory, so verifiers of ours run with a limit.
MEMORY_LIMIT = 4 * 2**30

# Bound before a user's module may put something else in their place.
_encode = JSONEncoder().encode
_unpickle = pickle.loads


def serve(channel: socket.socket, parent: int) -> None:
    """Score jobs until the parent closes the socket."""
    die_with(parent)
    from sapo.errors import TaskError
    from sapo.tasks.verifiers.base import is_batched, prepare, prepare_prompt
    from sapo.tasks.verifiers.registry import build_verifier

    stream, me = channel.makefile("rb"), os.getpid()
    loaded: dict[bytes, Any] = {}
    _answer(channel, {"worker": me})
    while (frame := read_frame(stream)) is not None:
        ticket, key, text, fields = _unpickle(frame)
        try:
            if key not in loaded:
                spec = _unpickle(key)
                verifier = spec if callable(spec) else build_verifier(spec)
                prepare(verifier)
                loaded[key] = verifier
            prompt = _prompt(_unpickle(fields))
            if text is not None:
                prepare_prompt(loaded[key], prompt)
        except TaskError as error:
            _answer(channel, {"job": ticket, "refused": str(error)})
            continue
        except BaseException as error:
            _answer(channel, {"job": ticket, "refused": _reason(error)})
            continue
        _answer(channel, {"job": ticket, "began": True})
        if text is None:  # the parent only checks that it loads
            _answer(channel, {"job": ticket, "loaded": True, "batched": is_batched(loaded[key])})
            continue
        answer = _judge(loaded[key], text, prompt)
        if os.getpid() != me:  # a child that the verifier forked: only its parent may answer
            os._exit(0)
        _answer(channel, {"job": ticket, **answer}, 1 if isinstance(text, str) else len(text))


def _judge(verifier: Any, text: str | tuple[str, ...], prompt: Any) -> dict[str, Any]:
    from sapo.tasks.verifiers.base import ABSTAINED, score_batch

    # BaseException: a verifier that calls sys.exit() fails on this completion, and the worker goes on.
    try:
        limit = memory_limit(ADDRESSES, MEMORY_LIMIT) if getattr(verifier, "pure", False) else contextlib.nullcontext()
        with limit:
            if isinstance(text, str):
                return _as_json(verifier(text, prompt))
            scores = score_batch(verifier, text, prompt)
            return {"scores": [_as_json(ABSTAINED if score is None else score) for score in scores]}
    except BaseException as error:
        return {"failed": _reason(error)}


def _as_json(score: Any) -> dict[str, Any]:
    from sapo.tasks.base import checked_score

    return score_to_json(checked_score(score))


def _reason(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:MAX_DETAIL]
    except Exception:
        return type(error).__name__


def _prompt(fields: tuple[Any, ...]) -> Any:
    from sapo.data import Prompt

    number, task, text, answer, metadata = fields
    return Prompt(id=number, task=task, text=text, answer=answer, metadata=metadata)


def _answer(channel: socket.socket, answer: dict[str, Any], completions: int = 1) -> None:
    data = _encode(answer).encode()
    if len(data) > MAX_ANSWER * completions:
        failed = f"ValueError: a score must fit into {MAX_ANSWER} bytes; got {len(data)}; give fewer figures"
        data = _encode({"job": answer["job"], "failed": failed}).encode()
    channel.sendall(framed(data))


def main(descriptor: int, parent: int) -> None:
    """Serve on an inherited socket. What user code prints goes to standard error, and its standard input is empty."""
    ignore(*ANNOUNCING)  # in the guard, and in the sandboxes of programs too
    outlive(signal.SIGINT)
    parent = stand_guard(parent, descriptor)
    outlive(signal.SIGINT)  # which a fork undoes
    channel = socket.socket(fileno=descriptor)
    channel.setblocking(True)
    os.set_inheritable(descriptor, False)
    with contextlib.suppress(OSError):
        serve(channel, parent)
    # Not sys.exit(), which would wait for threads that a user's module left running.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
