"""Verifiers by name, as a recipe writes them: a name, `module:function`, a name with options, or a weighted sum.

verifier: math
verifier: "my_rewards:judge"
verifier: {name: regex, pattern: "<answer>(.*?)</answer>"}
verifier: {name: "my_rewards:judge", deadline: 20, memory_gb: 4}
verifier: "in_process:judge"          # a function that this process was given (in_process.py)
verifier:
  - {name: math, weight: 0.9}
  - {name: format, pattern: "<think>.*</think>", weight: 0.1}
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sapo.data import Prompt, Score
from sapo.errors import TaskError
from sapo.tasks.base import LARGEST_REWARD
from sapo.tasks.verifiers import thoughts
from sapo.tasks.verifiers.base import Verifier, check_deadline, check_machine, check_reference, deadline_of, is_pure
from sapo.tasks.verifiers.combined import Combined, CombinedHere, Term
from sapo.tasks.verifiers.in_process import is_in_process, load_function, shown
from sapo.tasks.verifiers.user import DEFAULT_DEADLINE, DEFAULT_MEMORY_GB, UserFunction, check_memory
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
    sees_thoughts: bool = False
    """Whether it judges the whole completion, unless the option `thinking_end` is set."""


_HERE = "sapo.tasks.verifiers"

VERIFIERS: dict[str, Entry] = {
    "exact": Entry(f"{_HERE}.numbers:exact", needs_answer=True),
    "last_number": Entry(f"{_HERE}.numbers:last_number", needs_answer=True),
    "hash_answer": Entry(f"{_HERE}.hashes:hash_answer", needs_answer=True),
    "math": Entry(f"{_HERE}.math:Math", needs_answer=True),
    "boxed_integer": Entry(f"{_HERE}.boxed:BoxedInteger", needs_answer=True),
    "choice": Entry(f"{_HERE}.choice:Choice", needs_answer=True),
    "choice_or_math": Entry(f"{_HERE}.choice_or_math:ChoiceOrMath", needs_answer=True),
    "zebra": Entry(f"{_HERE}.zebra:Zebra", needs_answer=False),
    "code": Entry("sapo.tasks.verifiers.code:code", needs_answer=False),
    "regex": Entry(f"{_HERE}.patterns:Regex", needs_answer=True),
    "format": Entry(f"{_HERE}.patterns:Format", needs_answer=False, sees_thoughts=True),
    "json_schema": Entry(f"{_HERE}.patterns:JsonSchema", needs_answer=False),
    "length": Entry(f"{_HERE}.patterns:Length", needs_answer=False, sees_thoughts=True),
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
    batched: bool = False
    """Whether all completions of a prompt are judged in one call."""
    isolated = True

    def job(self, text: str, prompt: Prompt) -> Job:
        """Return the job that scores one completion."""
        return Job(self.spec, text, prompt, self.deadline, self.home)

    def score_many(self, requests: Sequence[tuple[Sequence[str], Prompt]]) -> list[list[Score | None]]:
        """Score the completions of several prompts, in parallel."""
        asked = [(texts, prompt) for texts, prompt in requests if texts]
        found: Iterable[Score]
        if self.batched:
            scores = shared_pool().run_batches([self.batch(texts, prompt) for texts, prompt in asked])
            found = itertools.chain.from_iterable(scores)
        else:
            found = shared_pool().run([self.job(text, prompt) for texts, prompt in asked for text in texts])
        rest = iter(found)
        return [[next(rest) for _ in texts] for texts, _ in requests]

    def batch(self, texts: Sequence[str], prompt: Prompt) -> Job:
        """Return the job that scores several completions of one prompt in one call."""
        return Job(self.spec, tuple(texts), prompt, self.deadline * max(1, len(texts)), self.home)

    def __call__(self, text: str, prompt: Prompt) -> Score:
        return shared_pool().run([self.job(text, prompt)])[0]


def load_verifier(spec: VerifierSpec) -> Verifier:
    """Load the verifier that a recipe names. The top of this file has the ways to write one.

    A user's `module:function` is looked up on sys.path and then in the current directory. It gets those of the keyword
    arguments completion: str, answer: str | None, prompt: str and metadata: Mapping that its signature takes, or is
    called as TRL, verl or OpenRLHF do where it has their parameters (conventions.py). It may be a coroutine function,
    and returns a number, a bool or a Score. It runs in a worker process, with `deadline` seconds by the clock (60 by
    default) for each completion.

    Raises:
        TaskError: the name, option, module or function does not exist, the function has another signature, or the
            verifier cannot work on this machine.
    """
    terms = parse_spec(spec)
    if any(is_in_process(term.name) for term in terms):
        return _load_here(spec, terms)
    if any(term.of_the_user for term in terms):
        home = Home.here()
        deadline = _deadline_of_sum(terms)
        # The module is imported only in the worker, since it may load a model of its own, or fail.
        loaded = shared_pool().load(Job(spec, "", Prompt(id=0, task="", text=""), deadline, home))
        if loaded.problem:
            raise TaskError(loaded.problem)
        return Isolated(spec, deadline, pure=False, home=home, batched=loaded.batched)
    verifier = build_verifier(spec)
    check_machine(verifier)
    deadline = deadline_of(verifier)
    return Isolated(spec, deadline, is_pure(verifier)) if deadline else verifier


def build_verifier(spec: VerifierSpec) -> Verifier:
    """Build a verifier that runs in this process. Workers call this too."""
    terms = parse_spec(spec)
    if isinstance(spec, (str, Mapping)):
        return _build(terms[0])
    return Combined(_named(terms, [_build(term) for term in terms]))


def _load_here(spec: VerifierSpec, terms: Sequence[TermSpec]) -> Verifier:
    """Load a verifier with a function of this process: the others run where they would by themselves."""
    loaded = [
        load_function(term.name, **term.options)
        if is_in_process(term.name)
        else load_verifier({"name": term.name, **term.options})
        for term in terms
    ]
    return loaded[0] if isinstance(spec, (str, Mapping)) else CombinedHere(_named(terms, loaded))


def _named(terms: Sequence[TermSpec], verifiers: Sequence[Verifier]) -> tuple[Term, ...]:
    """Return the terms of a sum. A second verifier of one name, such as another pattern, is called format_2."""
    names = [shown(term.name) if is_in_process(term.name) else term.name for term in terms]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return tuple(
        Term(name if count == 1 else f"{name}_{count}", term.weight, verifier)
        for name, count, term, verifier in zip(names, counts, terms, verifiers, strict=True)
    )


def needs_answer(spec: VerifierSpec) -> bool:
    """Return whether a verifier of ours in `spec` compares with the prompt's answer. A user's function need not."""
    return any(VERIFIERS[term.name].needs_answer for term in parse_spec(spec) if not term.of_the_user)


def reference_check(spec: VerifierSpec) -> Callable[[Prompt], None] | None:
    """Return a function that raises a ValueError where a verifier of `spec` cannot read a prompt's answer.

    None where all are functions of the user's, of which nobody knows.
    """
    own = [_build(term) for term in parse_spec(spec) if not term.of_the_user]
    if not own:
        return None

    def check(prompt: Prompt) -> None:
        for verifier in own:
            check_reference(verifier, prompt)

    return check


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
    if abs(weight) > LARGEST_REWARD:
        raise TaskError(f"verifier {name!r}: a weight must lie within +-{LARGEST_REWARD:g}; got {weight:g}")
    module, colon, function = name.partition(":")
    if name not in VERIFIERS and not (module and colon and function):
        raise TaskError(
            f"a verifier must be one of {_names()} or module:function; got {name!r}{did_you_mean(name, VERIFIERS)}"
        )
    if is_in_process(name):
        _check_options(name, options, ["deadline"])
        check_deadline(options.get("deadline", DEFAULT_DEADLINE))
    elif name not in VERIFIERS:
        _check_options(name, options, ["deadline", "memory_gb"])
        check_deadline(options.get("deadline", DEFAULT_DEADLINE))
        check_memory(options.get("memory_gb", DEFAULT_MEMORY_GB))
    return TermSpec(name, options, float(weight))


def _build(term: TermSpec) -> Verifier:
    if is_in_process(term.name):
        return load_function(term.name, **term.options)
    if term.of_the_user:
        return UserFunction(term.name, **{key: term.options[key] for key in ("memory_gb",) if key in term.options})
    make = _load_entry(term.name)
    options = dict(term.options)
    built = _make_of(make, term.name, {name: value for name, value in options.items() if name not in thoughts.OPTIONS})
    return thoughts.apply_thinking(built, options, by_default=not VERIFIERS[term.name].sees_thoughts)


def _make_of(make: Callable[..., Any], name: str, options: Mapping[str, Any]) -> Verifier:
    if inspect.isclass(make):
        known = [field.name for field in dataclasses.fields(cast(Any, make))]
    else:
        known = [p.name for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
    _check_options(name, options, [*known, *thoughts.OPTIONS])
    missing = [needed for needed in _required(make) if needed not in options]
    if missing:
        raise TaskError(f"verifier {name!r} needs the option {missing[0]!r}; got {list(options)}; add it")
    if inspect.isclass(make):
        return cast(Verifier, make(**options))
    return functools.partial(make, **options) if options else cast(Verifier, make)


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
