"""How a request is refused: the protocol's errors, and what is not had."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is refused, as the protocol says it.

    Args:
        status: of HTTP.
        param: the field at fault.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {
                "message": message,
                "type": kind or ("invalid_request_error" if status < 500 else "server_error"),
                "param": param,
                "code": code,
            }
        }


# What a client may send and what may be answered by ignoring it, for it changes no completion.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")

NOT_HAD: dict[str, tuple[tuple[Any, ...], str]] = {
    "presence_penalty": ((0,), "penalties would draw from another distribution than the policy's"),
    "frequency_penalty": ((0,), "penalties would draw from another distribution than the policy's"),
    "logit_bias": (({},), "biases would draw from another distribution than the policy's"),
    "top_logprobs": ((0,), "of a completion, logprobs itself is the number; write logprobs"),
    "tools": (([],), "a completion has no turns; /v1/chat/completions takes tools"),
    "tool_choice": (("none", "auto"), "a completion has no turns; /v1/chat/completions takes tools"),
    "parallel_tool_calls": ((True, False), "a completion has no turns; /v1/chat/completions takes it"),
    "functions": (([],), "it is the old form; write tools"),
    "response_format": (({"type": "text"},), "completions are text; leave it out"),
    "echo": ((False,), "log-probabilities of prompts are not served; leave it out"),
    "best_of": ((1,), "ask for n completions and choose"),
    "suffix": (("",), "the model completes what comes before; leave it out"),
    "modalities": ((["text"],), "completions are text; leave it out"),
    "audio": ((), "completions are text; leave it out"),
}
"""Field -> values that ask for nothing, and why others are refused."""
