"""Tasks by name, as a recipe writes them. Any object with the methods of `Task` works without an entry here."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sapo.environments import is_environment
from sapo.environments.adapters import adapted
from sapo.environments.games import Calculator, Guess
from sapo.environments.tool_task import WithTools
from sapo.environments.tools import load_tools
from sapo.environments.wrapping import SamePrompt
from sapo.errors import TaskError
from sapo.tasks.base import Task
from sapo.tasks.episodes.origin import Origin, has_code_of_others, note_origin
from sapo.tasks.generated.arithmetic import ArithmeticTask
from sapo.tasks.generated.drawn import PictureBarsTask, PictureDigitsTask, PictureShapesTask
from sapo.tasks.generated.picture_sums import PictureSumsTask
from sapo.tasks.generated.reasoning import ReasoningGymTask
from sapo.tasks.generated.sums import SumsTask
from sapo.tasks.rows.datasets import DatasetTask
from sapo.tasks.rows.presets import ALIASES, PRESETS
from sapo.tasks.rows.task import FileTask
from sapo.tasks.verifiers.in_process import PREFIX, is_in_process
from sapo.utils.fingerprints import fingerprint_function
from sapo.utils.names import did_you_mean
from sapo.utils.plugins import import_named

TASKS: dict[str, Callable[..., Any]] = {
    "arithmetic": ArithmeticTask,
    "calculator": Calculator,
    "guess": Guess,
    "file": FileTask,
    "jsonl": FileTask,
    "parquet": FileTask,
    "sums": SumsTask,
    "picture_sums": PictureSumsTask,
    "picture_digits": PictureDigitsTask,
    "picture_bars": PictureBarsTask,
    "picture_shapes": PictureShapesTask,
    "dataset": DatasetTask,
    "reasoning_gym": ReasoningGymTask,
    "same_prompt": SamePrompt,
    **PRESETS,
    **{alias: PRESETS[name] for alias, name in ALIASES.items()},
}


_given: dict[str, Task] = {}


def keep_task(task: Task) -> str:
    """Make a task object known in this process, and return how a recipe names it.

    Raises:
        TaskError: it has not the methods of a task.
    """
    if not isinstance(task, Task):
        raise TaskError(
            "a task must have name, train_prompt, held_out and verify (sapo.tasks.Task), or be a task's name or its "
            f"settings; got a {type(task).__name__}"
        )
    name = f"{task.name}@{_fingerprint_task(task)}"
    _given[name] = task
    return PREFIX + name


def _fingerprint_task(task: Task) -> str:
    """Tell task objects of one name apart, which may be those of other runs: by how they judge and what they ask."""
    prompts = task.held_out(8)
    with suppress(TaskError):  # all of its rows are held out
        prompts = [*prompts, *(task.train_prompt(index) for index in range(8))]
    asked = [(prompt.identity, prompt.answer) for prompt in prompts]
    return hashlib.sha256(repr((fingerprint_function(task.verify), asked)).encode()).hexdigest()[:16]


def make_task(kind: str, /, *, seed: int, **options: Any) -> Task:
    """Make a task of TASKS with its options. The option `name` is its name in logs.

    `module:Class` is a task of the user's own, which is given its options, and the seed where it takes one.
    `reasoning_gym/chain_sum` is the task reasoning_gym with dataset=chain_sum.

    Any task may have these options too, and is then an environment of several turns:

        tools: functions that the model may call before it answers, names of ours or `module:function`.
        calls: how it writes calls (sapo.environments.calls).
        environment: `trl:module:Class`, `skyrl:name`, `openenv:module:Client` or `verifiers:taskset`, or an object with
            this as `name` and the adapter's options; it plays the task's prompts.

    Raises:
        TaskError: the task or an option is unknown, or an option is missing or wrong. The nearest known name is given.

    >>> make_task("arithmetic", seed=0, digits=2).train_prompt(0).text
    '23+92='
    """
    if is_in_process(kind):
        return _given_task(kind.removeprefix(PREFIX), options)
    played = {name: options.pop(name) for name in _OF_EPISODES if name in options}
    if played:
        made = as_environment(make_task(kind, seed=seed, **options), **played)
        if has_code_of_others(played.get("environment"), played.get("tools")):
            cut = bool(getattr(made, "score_truncated", False))
            note_origin(made, Origin(made.name, seed, played=played, score_truncated=cut))
        return made
    if ":" in kind and kind not in TASKS:
        task = _made(kind, import_named(kind, what="task", noun="class", error=TaskError), seed, options)
        if is_environment(task):
            note_origin(task, Origin(kind, seed, options))
        return task
    kind, slash, dataset = kind.partition("/")
    if slash and kind == "reasoning_gym":
        options = {"dataset": dataset, **options}
    elif slash:
        kind = f"{kind}/{dataset}"
    if kind not in TASKS:
        raise TaskError(f"a task must be one of {', '.join(TASKS)}; got {kind!r}{did_you_mean(kind, TASKS)}")
    return _made(kind, TASKS[kind], seed, options)


def _made(kind: str, make: Callable[..., Any], seed: int, options: dict[str, Any]) -> Task:
    """Make a task by its class or function, after a check of its options."""
    parameters = inspect.signature(make).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for option in options:
        if option not in parameters and not takes_more:
            known = [name for name in parameters if name != "seed"]
            raise TaskError(
                f"task {kind!r} takes the options {', '.join(known)}; got {option!r}{did_you_mean(option, known)}"
            )
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD and name not in options:
            raise TaskError(f"task {kind!r} needs the option {name!r}; got {list(options)}; add {name}=...")
    for option, value in options.items():
        if option in parameters:
            _check_type(kind, option, value, str(parameters[option].annotation))
    if missing := sorted(getattr(make, "__abstractmethods__", ())):
        raise TaskError(f"task {kind!r} must have the methods {', '.join(missing)}; write them in its class")
    seeded = {"seed": seed} if takes_more or "seed" in parameters else {}
    made: Task = make(**seeded, **options)
    return made


def _given_task(name: str, options: dict[str, Any]) -> Task:
    if name not in _given:
        plain = name.partition("@")[0]
        others = any(given.partition("@")[0] == plain for given in _given)
        raise TaskError(
            f"the task {plain!r} was an object of the Python session that began the run; got a process "
            f"{'where it is another' if others else 'without it'}; go on from Python with the same one: "
            "sapo.resume(RUN, tasks=[...])"
        )
    if options:
        raise TaskError(f"the task object {name!r} takes no options; got {', '.join(options)}; set them on the object")
    return _given[name]


_OF_EPISODES = ("tools", "calls", "environment")


def as_environment(task: Any, *, environment: Any = None, tools: Any = None, calls: str = "auto") -> Any:
    """Return a task that is played in episodes: with tools, or by an environment of another project.

    Raises:
        TaskError: it cannot be.
    """
    if environment is None:
        return WithTools(task, load_tools([] if tools is None else tools), calls)
    named = {"name": environment} if isinstance(environment, str) else environment
    if not (isinstance(named, Mapping) and isinstance(named.get("name"), str)):
        raise TaskError(f"environment must be a name, or an object with a name; got {environment!r:.60}")
    options = {str(key): value for key, value in named.items() if key != "name"}
    given = {} if tools is None else {"tools": tools}
    return adapted(named["name"], task, **options, **given, **({} if calls == "auto" else {"calls": calls}))


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "Path": (Path,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "None": (type(None),),
}
_IN_WORDS = {"str": "a text", "Path": "a path", "int": "a whole number", "float": "a number", "bool": "true or false"}
_LARGEST = 10**9


def _check_type(kind: str, option: str, value: Any, declared: str) -> None:
    """Refuse a value of another type than an option declares, where that is made of texts, numbers and truth values.

    Raises:
        TaskError: it is of another, or a number that is not finite or beyond 10^9.
    """
    names = [name.strip() for name in declared.split("|")]
    if not set(names) <= set(_TYPES):
        return
    fits = any(isinstance(value, _TYPES[name]) and (type(value) is not bool or name == "bool") for name in names)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not fits or (number and not -_LARGEST <= value <= _LARGEST):
        words = " or ".join(_IN_WORDS[name] for name in names if name in _IN_WORDS and name != "Path")
        raise TaskError(f"task {kind!r}: {option} must be {words}{' of at most 1e9' * number}; got {value!r:.60}")
