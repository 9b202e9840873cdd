"""The worker's side of an engine elsewhere: it holds a policy and an engine of it, and answers calls.

It knows nothing of how messages travel: a child process (process.py), or an actor of a cluster, hands them to it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import asdict

import torch

from sapo.data.messages import Message
from sapo.errors import Interrupted
from sapo.model.policy import Policy
from sapo.rollout.engine import Engine, max_length_of
from sapo.rollout.experts import ExpertLog
from sapo.rollout.remote.building import build_engine, build_policy
from sapo.rollout.remote.calls import completions_message, error_message, read_requests


class EngineWorker:
    """Answers the calls of one `RemoteEngine`: hello first, then those of an engine."""

    def __init__(self) -> None:
        self._policy: Policy | None = None
        self._engine: Engine | None = None

    def handle(self, message: Message, should_stop: Callable[[], bool] = lambda: False) -> Message:
        """Make the call of a message, and return its answer; an exception is an answer too.

        Args:
            should_stop: asked by the engine between two tokens.
        """
        try:
            return self._answer(message, should_stop)
        except Interrupted:
            return Message({"interrupted": True})
        except Exception as error:
            return error_message(error)

    def close(self) -> None:
        """Close the engine, if there is one."""
        if self._engine is not None:
            self._engine.close()

    def _answer(self, message: Message, should_stop: Callable[[], bool]) -> Message:
        match message.header["call"]:
            case "hello":
                return self._hello(message)
            case "weights":
                self._take(message)
            case "set_weights":
                self.engine.set_weights(self.policy.weights(), message.header["version"])
            case "generate":
                return self._generate(message, should_stop)
            case "sleep":
                self.engine.sleep()
            case "wake":
                self.engine.wake()
            case "close":
                self.close()
            case call:
                raise AssertionError(f"the run called {call!r}, which no worker answers")
        return Message({})

    @property
    def policy(self) -> Policy:
        """Return the worker's own policy."""
        assert self._policy is not None, "the first call is hello"
        return self._policy

    @property
    def engine(self) -> Engine:
        """Return the engine that draws here."""
        assert self._engine is not None, "the first call is hello"
        return self._engine

    def _hello(self, message: Message) -> Message:
        self._policy = build_policy(message)
        self._engine = build_engine(message, self._policy)
        return Message(
            {
                "capabilities": asdict(self.engine.capabilities),
                "max_length": max_length_of(self.engine),
                "host": socket.gethostname(),
                "process": os.getpid(),
            }
        )

    def _take(self, message: Message) -> None:
        """Take some of the weights, by their names in the policy."""
        parameters = dict(self.policy.model.named_parameters())
        with torch.no_grad():
            for name, tensor in message.tensors.items():
                parameters[name].copy_(tensor)

    def _generate(self, message: Message, should_stop: Callable[[], bool]) -> Message:
        requests, params = read_requests(message)
        if not message.header["record_experts"]:
            return completions_message(self.engine.generate(requests, params, should_stop), None)
        experts = ExpertLog()
        return completions_message(self.engine.generate(requests, params, should_stop, experts), experts)
