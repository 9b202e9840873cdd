"""What OpenAI's clients send and get: requests checked, answers, streamed events and errors.

https://platform.openai.com/docs/api-reference/chat and /completions. Of what is not the protocol's, requests may have
`top_k`, `min_p` and `chat_template_kwargs`, as vLLM takes them. Unsupported fields are refused by name.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sapo.data import Prompt
from sapo.utils.names import did_you_mean
from sapo.workflows.serving.served import MOST_SEED, Order, Piece, ServedModel, Token
from sapo.workflows.serving.tools import OfferedTools

MOST_SAMPLES = 128
"""Completions of one prompt."""
MOST_CHOICES = 256
"""Completions of one request, over all its prompts."""
COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions where a request gives none, as OpenAI's."""


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
    "top_logprobs": ((0,), "the log-probability of the drawn token alone is known; leave it out"),
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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(_Section):
    """Options of a streamed answer."""

    include_usage: bool = False
    """Send the numbers of tokens before the end."""
    include_obfuscation: bool = False


class TextPart(_Section):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(_Section):
    """The function of a call that an earlier answer made."""

    name: str
    arguments: str

    def value(self) -> dict[str, Any]:
        """Return the call as chat templates take it.

        Raises:
            ApiError: the arguments are no JSON object.
        """
        try:
            arguments = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ApiError(400, f"messages: arguments of a call must be a JSON object; got {self.arguments[:80]!r}")
        return {"name": self.name, "arguments": arguments}


class GivenCall(_Section):
    """A call that an earlier answer made, given back by the client."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class OfferedFunction(_Section):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None
    """True would bind what is drawn to the schema, which no engine here does."""


class Offer(_Section):
    """A tool that a client offers."""

    type: Literal["function"]
    function: OfferedFunction


class Message(_Section):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    # What clients send along when they give back an answer, empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[GivenCall] | None = None
    annotations: list[None] | None = None

    def turn(self) -> dict[str, Any]:
        """Return the turn as chat templates take it.

        Raises:
            ApiError: it gives back a call that is none.
        """
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        made: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            made["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function.value()} for call in self.tool_calls
            ]
        if self.role == "tool":
            made |= {k: v for k, v in (("tool_call_id", self.tool_call_id), ("name", self.name)) if v is not None}
        return made


class TemplateOptions(_Section):
    """Switches of the chat template."""

    enable_thinking: bool | None = None


class _Sampling(_Section):
    """What chats and completions have in common."""

    model: str
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-MOST_SEED, le=MOST_SEED)
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if "" in stops:
            raise ApiError(400, "stop must not hold an empty string; leave it out", param="stop")
        return tuple(stops)

    @property
    def sends_usage(self) -> bool:
        """Tell whether a streamed answer ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _fields(self) -> dict[str, Any]:
        given = {"temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p}
        # Without a seed every request draws anew; with one it draws the same whenever it is asked.
        seed = secrets.randbelow(MOST_SEED) if self.seed is None else self.seed % 2**64
        return {name: value for name, value in given.items() if value is not None} | {
            "samples": self.n or 1,
            "top_k": max(self.top_k or 0, 0),
            "seed": seed,
            "stop": self.stops(),
        }


class ChatRequest(_Sampling):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    tools: list[Offer] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    """False gives the first call of an answer alone."""

    @property
    def wants_logprobs(self) -> bool:
        """Tell whether the answer has log-probabilities."""
        return bool(self.logprobs)

    @property
    def offered(self) -> OfferedTools | None:
        """Return the tools that the model is shown; None where there are none."""
        if not self.tools or self.tool_choice == "none":
            return None
        schemas = [tool.model_dump(exclude_none=True) for tool in self.tools]
        return OfferedTools(schemas, parallel=self.parallel_tool_calls is not False)

    def order(self) -> Order:
        """Return what is to be drawn."""
        offered = self.offered
        schemas = None if offered is None else offered.schemas
        turns = [message.turn() for message in self.messages]
        thinking = None if self.chat_template_kwargs is None else self.chat_template_kwargs.enable_thinking
        return Order(
            prompts=lambda served: [served.chat_prompt(turns, thinking, schemas)],
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            **self._fields(),
        )


class CompletionRequest(_Sampling):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0)

    @property
    def wants_logprobs(self) -> bool:
        """Tell whether the answer has log-probabilities."""
        return self.logprobs is not None

    @property
    def texts(self) -> Sequence[Any]:
        """Return the prompts, each a text or token ids."""
        prompt = self.prompt
        single = isinstance(prompt, str) or all(isinstance(part, int) for part in prompt)
        return [prompt] if single else prompt

    def order(self) -> Order:
        """Return what is to be drawn."""
        texts = self.texts

        def prompts(served: ServedModel) -> list[Prompt]:
            return [served.plain_prompt(text) for text in texts]

        return Order(prompts=prompts, max_new_tokens=self.max_tokens or COMPLETION_TOKENS, **self._fields())


Asked = TypeVar("Asked", bound=_Sampling)


def parse(kind: type[Asked], body: bytes, served: str) -> Asked:
    """Check the body of a request.

    Args:
        served: name of the model that is here.

    Raises:
        ApiError: with the field at fault.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body must be JSON; {type(error).__name__} in what came") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object; got {type(value).__name__}")
    known = {*kind.model_fields, *IGNORED}
    kept = {}
    for name, given in value.items():
        if name in IGNORED:
            continue
        if name in NOT_HAD and name not in kind.model_fields:
            allowed, reason = NOT_HAD[name]
            if given is not None and given not in allowed:
                raise ApiError(400, f"{name} cannot be had: {reason}", param=name, code="unsupported_parameter")
        elif name not in known:
            message = f"unknown field {name!r}{did_you_mean(name, known)}"
            raise ApiError(400, message, param=name, code="unknown_parameter")
        else:
            kept[name] = given
    try:
        asked = kind.model_validate(kept)
    except (ValidationError, RecursionError) as error:
        raise _error_of(error) from error
    if isinstance(asked, CompletionRequest) and asked.logprobs:
        raise ApiError(
            400,
            f"logprobs must be 0: the log-probability of the drawn token alone is known; got {asked.logprobs}",
            param="logprobs",
            code="unsupported_parameter",
        )
    if isinstance(asked, CompletionRequest) and (choices := len(asked.texts) * (asked.n or 1)) > MOST_CHOICES:
        raise ApiError(
            400,
            f"prompts times n must be at most {MOST_CHOICES}; got {len(asked.texts)} times {asked.n or 1}, {choices}; "
            "send several requests",
            param="prompt",
        )
    if asked.model != served:
        raise ApiError(
            404, f"there is no model {asked.model!r} here; the one served is {served!r}", code="model_not_found"
        )
    return asked


def _error_of(error: ValidationError | RecursionError) -> ApiError:
    """Say the first fault of a body."""
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply")
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    # Alternatives of a type stand in the place too; the path to the value is what a client wrote.
    named = [part for part in place if part.isidentifier() or part.isdigit()]
    got = json.dumps(first.get("input"), default=str)[:80]
    return ApiError(400, f"{'.'.join(named)}: {first['msg']}; got {got}", param=named[0] if named else None)


def new_id(prefix: str) -> str:
    """Return an identifier that no other answer has."""
    return f"{prefix}-{secrets.token_hex(12)}"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the numbers of tokens of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _finish(drawn: str | None, calls: Sequence[Any]) -> str | None:
    """Return why an answer ended. One that was cut at its length is not said to be whole, calls or none."""
    return "tool_calls" if calls and drawn == "stop" else drawn


class ChatAnswers:
    """The shapes of answers to a chat.

    Args:
        tools: those that were offered. The text of an answer then waits until it is whole: it may become a call.
    """

    def __init__(self, model: str, logprobs: bool, tools: OfferedTools | None = None) -> None:
        self.logprobs, self.tools = logprobs, tools
        self._held: dict[int, str] = {}
        self.head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": model}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Return the first events of a stream: whose turn it is."""
        turn = {"role": "assistant", "content": ""}
        return [self._event(number, turn, None, None) for number in range(choices)]

    def event(self, piece: Piece) -> dict[str, Any]:
        """Return the event of a piece."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        finish = piece.finish
        if self.tools is not None:
            text = self._held.pop(piece.choice, "") + piece.text
            if finish is None:
                self._held[piece.choice], delta = text, {}
            else:
                said, calls = self.tools.split(text)
                delta = {"content": said} if said else {}
                if calls:
                    delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
                finish = _finish(finish, calls)
        return self._event(piece.choice, delta, self._logprobs(piece.tokens), finish)

    def _event(self, choice: int, delta: Mapping[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        made = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self.head, "object": "chat.completion.chunk", "choices": [made]}

    def whole(self, choices: Sequence[Sequence[Piece]], used: Mapping[str, int]) -> dict[str, Any]:
        """Return an answer in one."""
        made = [self._choice(number, pieces) for number, pieces in enumerate(choices)]
        return {**self.head, "object": "chat.completion", "choices": made, "usage": used}

    def _choice(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        said: str | None = "".join(p.text for p in pieces)
        calls: list[dict[str, Any]] = []
        if self.tools is not None:
            said, calls = self.tools.split(said or "")
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        return {
            "index": number,
            "message": {**message, "tool_calls": calls} if calls else message,
            "logprobs": self._logprobs(t for p in pieces for t in p.tokens),
            "finish_reason": _finish(pieces[-1].finish, calls),
        }

    def last(self, used: Mapping[str, int]) -> dict[str, Any]:
        """Return the event that has the numbers of tokens."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": used}

    def _logprobs(self, tokens: Iterable[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        content = [
            {
                "token": token.text,
                "logprob": token.logprob,
                # A token may be part of a character, whose bytes its text does not have.
                "bytes": None if "\N{REPLACEMENT CHARACTER}" in token.text else list(_bytes(token.text)),
                "top_logprobs": [],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionAnswers:
    """The shapes of answers to /v1/completions."""

    def __init__(self, model: str, logprobs: bool) -> None:
        self.logprobs = logprobs
        self.head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": model}
        self._offsets: dict[int, int] = {}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """Return no events."""
        return []

    def event(self, piece: Piece) -> dict[str, Any]:
        """Return the event of a piece."""
        return {**self.head, "choices": [self._choice(piece.choice, [piece])]}

    def whole(self, choices: Sequence[Sequence[Piece]], used: Mapping[str, int]) -> dict[str, Any]:
        """Return an answer in one."""
        made = [self._choice(number, pieces) for number, pieces in enumerate(choices)]
        return {**self.head, "choices": made, "usage": used}

    def last(self, used: Mapping[str, int]) -> dict[str, Any]:
        """Return the event that has the numbers of tokens."""
        return {**self.head, "choices": [], "usage": used}

    def _choice(self, number: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {
            "index": number,
            "text": "".join(p.text for p in pieces),
            "logprobs": self._logprobs(number, [t for p in pieces for t in p.tokens]),
            "finish_reason": pieces[-1].finish,
        }

    def _logprobs(self, choice: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        offsets, at = [], self._offsets.get(choice, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        self._offsets[choice] = at
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": None,
            "text_offset": offsets,
        }


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
