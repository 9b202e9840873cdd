"""Verifiers by name, as a recipe writes them: a name, `module:function`, a name with options, or a weighted sum.

verifier: math
verifier: "my_rewards:judge"
verifier: {name: regex, pattern: "<answer>(.*?)</answer>"}
verifier: {name: "my_rewards:judge", deadline: 20}
verifier:
  - {name: math, weight: 0.9}
  - {name: format, pattern: "<think>.*</think>", weight: 0.1}
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.verifiers.base import Verifier, check_deadline, check_machine, deadline_of, is_pure
from sapo.tasks.verifiers.combined import Combined, Term
from sapo.tasks.verifiers.user import DEFAULT_DEADLINE, UserFunction
from sapo.tasks.workers.pool import shared_pool
from sapo.tasks.workers.wire import Home, Job
from sapo.utils.names import did_you_mean

VerifierSpec = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A verifier of ours, which is loaded when a recipe names it."""

    location: str
    """`module:attribute` of the verifier."""
    needs_answer: bool
    """Whether it compares with the prompt's answer."""


_HERE = "sapo.tasks.verifiers"

VERIFIERS: dict[str, Entry] = {
    "exact": Entry(f"{_HERE}.numbers:exact", needs_answer=True),
    "last_number": Entry(f"{_HERE}.numbers:last_number", needs_answer=True),
    "hash_answer": Entry(f"{_HERE}.numbers:hash_answer", needs_answer=True),
    "math": Entry(f"{_HERE}.math:Math", needs_answer=True),
    "boxed_integer": Entry(f"{_HERE}.boxed:BoxedInteger", needs_answer=True),
    "choice": Entry(f"{_HERE}.choice:Choice", needs_answer=True),
    "zebra": Entry(f"{_HERE}.zebra:Zebra", needs_answer=False),
    "code": Entry("sapo.tasks.verifiers.code:code", needs_answer=False),
    "regex": Entry(f"{_HERE}.patterns:Regex", needs_answer=True),
    "format": Entry(f"{_HERE}.patterns:Format", needs_answer=False),
    "json_schema": Entry(f"{_HERE}.patterns:JsonSchema", needs_answer=False),
    "length": Entry(f"{_HERE}.patterns:Length", needs_answer=False),
}


@dataclass(frozen=True)
class TermSpec:
    """One verifier as a recipe writes it: `{name: regex, pattern: x, weight: 0.5}`.

    >>> parse_spec({"name": "length", "limit": 100})
    (TermSpec(name='length', options={'limit': 100}, weight=1.0),)
    """

    name: str
    options: Mapping[str, Any]
    weight: float = 1.0

    @property
    def of_the_user(self) -> bool:
        """Return whether this is a user's `module:function`."""
        return self.name not in VERIFIERS


@dataclass(frozen=True)
class Isolated:
    """A verifier that runs in worker processes of the shared pool, for a batch of completions at once."""

    spec: VerifierSpec | Verifier
    """The verifier as a recipe writes it, or a verifier object of plain values, which is sent to the worker."""
    deadline: float
    """Seconds for one completion."""
    pure: bool
    """Whether equal (text, prompt) always have equal scores. A user's function does not promise that."""
    home: Home | None = None
    """Directory and path in which the user's modules are found."""
    isolated = True

    def job(self, text: str, prompt: Prompt) -> Job:
        """Return the job that scores one completion."""
        return Job(self.spec, text, prompt, self.deadline, self.home)

    def __call__(self, text: str, prompt: Prompt) -> Score:
        return shared_pool().run([self.job(text, prompt)])[0]


def load_verifier(spec: VerifierSpec) -> Verifier:
    """Load the verifier that a recipe names. The top of this file has the ways to write one.

    A user's `module:function` is looked up on sys.path and then in the current directory. It gets those of the keyword
    arguments completion: str, answer: str | None, prompt: str and metadata: Mapping that its signature takes. It may be
    a coroutine function, and returns a number, a bool or a Score. It runs in a worker process, with `deadline` seconds
    by the clock (60 by default) for each completion.

    Raises:
        TaskError: the name, option, module or function does not exist, the function has another signature, or the
            verifier cannot work on this machine.
    """
    terms = parse_spec(spec)
    if any(term.of_the_user for term in terms):
        home = Home.here()
        deadline = _deadline_of_sum(terms)
        # The module is imported only in the worker, since it may load a model of its own, or fail.
        problem = shared_pool().check(Job(spec, "", Prompt(id=0, task="", text=""), deadline, home))
        if problem:
            raise TaskError(problem)
        return Isolated(spec, deadline, pure=False, home=home)
    verifier = build_verifier(spec)
    check_machine(verifier)
    deadline = deadline_of(verifier)
    return Isolated(spec, deadline, is_pure(verifier)) if deadline else verifier


def build_verifier(spec: VerifierSpec) -> Verifier:
    """Build a verifier that runs in this process. Workers call this too."""
    terms = parse_spec(spec)
    if isinstance(spec, (str, Mapping)):
        return _build(terms[0])
    built: list[Term] = []
    for i, term in enumerate(terms):
        # A second verifier of one name, such as another pattern, is called format_2.
        count = sum(other.name == term.name for other in terms[: i + 1])
        built.append(Term(term.name if count == 1 else f"{term.name}_{count}", term.weight, _build(term)))
    return Combined(tuple(built))


def needs_answer(spec: VerifierSpec) -> bool:
    """Return whether a verifier of ours in `spec` compares with the prompt's answer. A user's function need not."""
    return any(VERIFIERS[term.name].needs_answer for term in parse_spec(spec) if not term.of_the_user)


def parse_spec(spec: VerifierSpec) -> tuple[TermSpec, ...]:
    """Parse the verifiers that `spec` names, with their options and weights. Nothing is loaded.

    Raises:
        TaskError: `spec` has another form.
    """
    if isinstance(spec, str):
        return (_term({"name": spec}),)
    if isinstance(spec, Mapping):
        if "weight" in spec:
            raise TaskError(
                f"a weight belongs to a verifier of a list; got {dict(spec)}; write [{{...}}] or leave it out"
            )
        return (_term(spec),)
    if not isinstance(spec, Sequence) or not spec or not all(isinstance(term, Mapping) for term in spec):
        raise TaskError(
            f"a verifier must be a name, {{name: ..., option: ...}} or a list of these with weights; got {spec!r}"
        )
    return tuple(_term(term) for term in spec if isinstance(term, Mapping))


def _term(written: Mapping[str, Any]) -> TermSpec:
    options = {str(key): value for key, value in written.items()}
    name, weight = options.pop("name", None), options.pop("weight", 1.0)
    if not isinstance(name, str):
        raise TaskError(f"a verifier's mapping must have a name; got {dict(written)}; write name: one of {_names()}")
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
        raise TaskError(f"verifier {name!r}: a weight must be a finite number; got {weight!r}")
    module, colon, function = name.partition(":")
    if name not in VERIFIERS and not (module and colon and function):
        raise TaskError(
            f"a verifier must be one of {_names()} or module:function; got {name!r}{did_you_mean(name, VERIFIERS)}"
        )
    if name not in VERIFIERS:
        _check_options(name, options, ["deadline"])
        check_deadline(options.get("deadline", DEFAULT_DEADLINE))
    return TermSpec(name, options, float(weight))


def _build(term: TermSpec) -> Verifier:
    if term.of_the_user:
        return UserFunction(term.name)
    make = _load_entry(term.name)
    if inspect.isclass(make):
        known = [field.name for field in dataclasses.fields(cast(Any, make))]
    else:
        known = [p.name for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
    _check_options(term.name, term.options, known)
    missing = [name for name in _required(make) if name not in term.options]
    if missing:
        raise TaskError(f"verifier {term.name!r} needs the option {missing[0]!r}; got {list(term.options)}; add it")
    if inspect.isclass(make):
        return cast(Verifier, make(**term.options))
    return functools.partial(make, **term.options) if term.options else make


def _load_entry(name: str) -> Callable[..., Any]:
    module, _, attribute = VERIFIERS[name].location.partition(":")
    try:
        entry: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise TaskError(f"verifier {name!r} cannot be loaded here: {error}; pip install 'sapo-rl[tasks]'") from error
    return entry


def _required(make: Callable[..., Any]) -> Sequence[str]:
    required: Sequence[str] = getattr(make, "required", ())
    return required


def _check_options(name: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    for option in options:
        if option not in known:
            takes = f"takes the options {', '.join(known)}" if known else "takes no options"
            raise TaskError(f"verifier {name!r} {takes}; got {option!r}{did_you_mean(option, known)}")


def _deadline_of_sum(terms: Sequence[TermSpec]) -> float:
    """Return the deadline of a sum that includes user's functions: the sum of those of its terms."""
    own = [_build(term) for term in terms if not term.of_the_user]
    users = [term.options.get("deadline", DEFAULT_DEADLINE) for term in terms if term.of_the_user]
    return sum(map(deadline_of, own)) + float(sum(users))


def _names() -> str:
    return ", ".join(VERIFIERS)
