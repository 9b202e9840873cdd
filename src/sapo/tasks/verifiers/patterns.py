"""Verifiers of form: `regex`, `format`, `json_schema` and `length`.

A pattern can need exponential time on some texts, and a model may learn to write them. So verifiers that match patterns
run in a worker process with a deadline.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.verifiers.base import IsolatedOptions, brief, reference_of, unparseable
from sapo.tasks.verifiers.extract import last_json_object
from sapo.tasks.verifiers.numbers import number_in

_MODES = ("search", "full")


@dataclass(frozen=True)
class _Pattern(IsolatedOptions):
    """A pattern and how it is matched. `.` matches line ends too."""

    deadline: float = 2.0
    pattern: str = ""
    """Regular expression in the syntax of Python's `re`."""
    mode: Literal["search", "full"] = "search"
    """search: anywhere in the completion. full: the whole completion, without blanks around it."""
    ignore_case: bool = False
    """Whether upper and lower case match each other."""
    pure: ClassVar[bool] = True
    required: ClassVar[tuple[str, ...]] = ("pattern",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pattern, str) or not self.pattern:
            raise TaskError(f"a verifier's pattern must be a regular expression; got {self.pattern!r}")
        if self.mode not in _MODES:
            raise TaskError(f"a pattern's mode must be search or full; got {self.mode!r}")
        try:
            self.compiled()
        except (re.error, RecursionError, OverflowError) as error:
            raise TaskError(
                f"a verifier's pattern must be a regular expression; got {self.pattern!r}: {error}"
            ) from error

    def compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.DOTALL | (re.IGNORECASE if self.ignore_case else 0))

    def matches(self, text: str) -> list[re.Match[str]]:
        if self.mode == "search":
            return list(self.compiled().finditer(text))
        match = self.compiled().fullmatch(text.strip())
        return [match] if match else []


@dataclass(frozen=True)
class Format(_Pattern):
    """Gives reward 1 where the pattern matches, else 0. Used as a term of a sum, for the form of a completion.

    >>> Format(pattern=r"<think>.*</think>")("<think>hm</think> 5", Prompt(id=0, task="t", text="?")).reward
    1.0
    """

    def __call__(self, text: str, prompt: Prompt) -> Score:
        if self.mode == "search":  # the first match is enough
            return Score(float(self.compiled().search(text) is not None))
        return Score(float(bool(self.matches(text))))


@dataclass(frozen=True)
class Regex(_Pattern):
    r"""Gives reward 1 where a group of the pattern's last match is the answer.

    Numbers are compared by value, other texts as text. Without a match the completion is unparseable. In a pattern
    without groups, the whole match is compared.

    >>> Regex(pattern=r"<answer>(.*?)</answer>")("<answer> 5.0 </answer>", Prompt(id=0, task="t", text="?", answer="5"))
    Score(reward=1.0, status=<Status.SCORED: 'scored'>, detail='', answer='5', figures={}, turn_rewards=())
    """

    group: int | str | None = None
    """The group that is compared. null: the first, or the whole match where the pattern has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern = self.compiled()
        known = self.group is None or self.group in pattern.groupindex
        if not known and not (type(self.group) is int and 0 <= self.group <= pattern.groups):
            names = [*range(pattern.groups + 1), *pattern.groupindex]
            raise TaskError(f"regex's group must be one of the pattern's, {names}; got {self.group!r}")

    def __call__(self, text: str, prompt: Prompt) -> Score:
        answer = reference_of(prompt).strip()
        found = self.matches(text)
        if not found:
            return unparseable(f"no match of {brief(self.pattern)}")
        group = self.group if self.group is not None else min(1, self.compiled().groups)
        given = found[-1][group]
        if given is None:
            return unparseable(f"group {group!r} of {brief(self.pattern)} captured nothing")
        given = given.strip()
        reference, value = number_in(answer), number_in(given)
        if reference is not None and value is not None:
            return Score(float(reference == value), answer=str(value))
        return Score(float(given == answer), answer=given)


@dataclass(frozen=True)
class JsonSchema(IsolatedOptions):
    """Gives reward 1 where the completion's JSON object fits a schema (JSON Schema, draft 2020-12 by default).

    The object is the whole completion, or in its last ``` fence, or the last {...}. Without one the completion is
    unparseable.

    >>> schema = {"type": "object", "required": ["city"]}
    >>> JsonSchema(schema=schema)('Here: {"city": "Rome"}', Prompt(id=0, task="t", text="?")).reward
    1.0
    """

    deadline: float = 5.0
    schema: Mapping[str, Any] | None = None
    """The schema. null: each prompt's own, in its metadata."""
    schema_field: str = "schema"
    """Field of the prompt's metadata with the schema, an object or its JSON text."""
    pure: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("jsonschema") is None:
            raise TaskError("verifier 'json_schema' needs the package jsonschema; pip install 'sapo-rl[tasks]'")
        if self.schema is not None:
            try:
                _checker(self.schema)
            except ValueError as error:
                raise TaskError(str(error)) from error

    def prepare(self) -> None:
        """Load the package jsonschema."""
        _checker({})

    def check_reference(self, prompt: Prompt) -> None:
        """Read the prompt's own schema, where the option `schema` has none."""
        if self.schema is None:
            self._checker_of(prompt)

    def _checker_of(self, prompt: Prompt) -> Any:
        schema = self.schema if self.schema is not None else prompt.metadata.get(self.schema_field)
        return _checker(json.loads(schema) if isinstance(schema, str) else schema)

    def __call__(self, text: str, prompt: Prompt) -> Score:
        checker = self._checker_of(prompt)
        found = last_json_object(text)
        if found is None:
            return unparseable("no JSON object in the completion")
        first = next(iter(checker.iter_errors(found)), None)
        answer = json.dumps(found, sort_keys=True, separators=(",", ":"))
        if first is None:
            return Score(1.0, answer=answer)
        return Score(0.0, detail=" ".join(f"{first.json_path}: {first.message}".split())[:200], answer=answer)


@dataclass(frozen=True)
class Length:
    """Penalises length: 0 up to `limit - margin` characters, then linear down to -1 at `limit`.

    The soft overlong punishment of DAPO (https://arxiv.org/abs/2503.14476, equation 13), in characters of the text.

    >>> [Length(limit=100, margin=50)("x" * n, Prompt(id=0, task="t", text="?")).reward for n in (50, 75, 100, 500)]
    [0.0, -0.5, -1.0, -1.0]
    """

    limit: int = 0
    """Number of characters at which the penalty is -1."""
    margin: int = 0
    """Characters before the limit over which the penalty falls. 0: no penalty up to the limit, and -1 beyond."""
    required: ClassVar[tuple[str, ...]] = ("limit",)

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("margin", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise TaskError(f"length's {name} must be an integer of at least {least}; got {value!r}")
        if self.margin > self.limit:
            raise TaskError(f"length's margin must not exceed its limit; got {self.margin} > {self.limit}")

    def __call__(self, text: str, prompt: Prompt) -> Score:
        if self.margin == 0:
            return Score(-float(len(text) > self.limit) or 0.0)
        over = (len(text) - (self.limit - self.margin)) / self.margin
        return Score(-min(1.0, over) if over > 0 else 0.0)


def _checker(schema: Any) -> Any:
    """Return a validator that loads no other schemas.

    Raises:
        ValueError: the schema is missing or wrong.
    """
    import jsonschema
    import referencing

    if not isinstance(schema, Mapping):
        raise ValueError(f"json_schema needs a schema, an object; got {schema!r}; set schema: or schema_field:")
    schema = dict(schema)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"json_schema's schema is wrong at {error.json_path}: {error.message}") from error
    return kind(schema, registry=referencing.Registry())
