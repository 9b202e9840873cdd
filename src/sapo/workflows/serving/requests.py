"""What OpenAI's clients send: the bodies of requests, checked, and what they order.

https://platform.openai.com/docs/api-reference/chat and /completions. Of what is not the protocol's, requests may have
`top_k`, `min_p` and `chat_template_kwargs`, as vLLM takes them. Unsupported fields are refused by name.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sapo.data import Prompt
from sapo.utils.names import did_you_mean
from sapo.workflows.serving.refusals import IGNORED, NOT_HAD, ApiError
from sapo.workflows.serving.served import MOST_SEED, Order, ServedModel
from sapo.workflows.serving.tools import OfferedTools

MOST_SAMPLES = 128
"""Completions of one prompt."""
MOST_CHOICES = 256
"""Completions of one request, over all its prompts."""
MOST_LIKELIEST = 20
"""Likeliest tokens that are shown beside each drawn one."""
COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions where a request gives none, as OpenAI's."""


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

    @property
    def likeliest(self) -> int:
        """Return how many of the likeliest tokens the answer shows beside each drawn one."""
        raise NotImplementedError

    def _fields(self) -> dict[str, Any]:
        given = {"temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p}
        # Without a seed every request draws anew; with one it draws the same whenever it is asked.
        seed = secrets.randbelow(MOST_SEED) if self.seed is None else self.seed % 2**64
        return {name: value for name, value in given.items() if value is not None} | {
            "samples": self.n or 1,
            "top_k": max(self.top_k or 0, 0),
            "seed": seed,
            "stop": self.stops(),
            "top_logprobs": self.likeliest,
        }


class ChatRequest(_Sampling):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LIKELIEST)
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
    def likeliest(self) -> int:
        """See `_Sampling.likeliest`."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return self.top_logprobs or 0

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
    logprobs: int | None = Field(None, ge=0, le=MOST_LIKELIEST)

    @property
    def wants_logprobs(self) -> bool:
        """Tell whether the answer has log-probabilities."""
        return self.logprobs is not None

    @property
    def likeliest(self) -> int:
        """See `_Sampling.likeliest`."""
        return self.logprobs or 0

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
