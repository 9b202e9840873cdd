"""Keyword arguments as settings of a recipe: `learning_rate=1e-4`, `train__steps=20`, `train={"steps": 20}`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sapo.config import RunConfig
from sapo.config.recipes import FEW_BITS, few_bits_refusal, read_recipe
from sapo.errors import ConfigError
from sapo.utils.names import nearest_name

SHORT = ("train", "rollout", "objective", "model", "eval", "checkpoint", "log")
"""Sections whose settings may be given by their own name alone, where only one of them has it."""


def section_of(key: str) -> type[BaseModel] | None:
    """Return the class of a section of a recipe, None where the key is no section."""
    annotation: Any = RunConfig.model_fields[key].annotation
    for option in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def short_names() -> dict[str, list[str]]:
    """Return the settings that may be given by their own name: name -> the keys that have it.

    >>> short_names()["learning_rate"], short_names()["every"]
    (['train.learning_rate'], ['eval.every', 'checkpoint.every'])
    """
    found: dict[str, list[str]] = {}
    for key in SHORT:
        section = section_of(key)
        assert section is not None
        for name in section.model_fields:
            if name not in RunConfig.model_fields:
                found.setdefault(name, []).append(f"{key}.{name}")
    return found


def as_changes(given: Mapping[str, Any], verb: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Return keyword arguments as changes of a recipe: dotted keys with values.

    Args:
        given: names with values. A name is a key of the recipe, with dots or with `__` for dots, or the last part of
            one that no other section has.
        verb: function of the package that was called, for the message.

    Raises:
        ConfigError: a name is unknown; the message has the nearest.

    >>> as_changes({"steps": 20, "eval__every": 0, "seed": 1}, short_names)
    [('train.steps', 20), ('eval.every', 0), ('seed', 1)]
    """
    return [change for name, value in given.items() for change in _change(name, value, verb)]


def _change(name: str, value: Any, verb: Callable[..., Any]) -> list[tuple[str, Any]]:
    key, short = name.replace("__", "."), short_names()
    if isinstance(value, Path):
        value = str(value)
    if key.partition(".")[0] in RunConfig.model_fields:
        return [(key, _plain(value))]
    if len(short.get(key, ())) == 1:
        return [(short[key][0], _plain(value))]
    if key in short:
        ways = " or ".join(f"{k.replace('.', '__')}=..." for k in short[key])
        raise ConfigError(f"{name} is a setting of several sections: {', '.join(short[key])}; got {name}; write {ways}")
    raise ConfigError(few_bits_refusal(name) if name in FEW_BITS else unknown_argument(verb, name))


def unknown_argument(verb: Callable[..., Any], name: str) -> str:
    """Say that a function has no such argument, and which one may have been meant."""
    own = [p.name for p in inspect.signature(verb).parameters.values() if p.kind is not p.VAR_KEYWORD]
    dotted = [f"{key}__{field}" for key in SHORT for field in (getattr(section_of(key), "model_fields", ()))]
    close = nearest_name(name, [*own, *RunConfig.model_fields, *short_names(), *dotted])
    hint = f"; did you mean {close}?" if close else f"; it takes {', '.join(own)} and the keys of a recipe"
    return f"sapo.{verb.__name__} takes no argument {name!r}{hint}"


def refuse_unknown(given: Mapping[str, Any], verb: Callable[..., Any]) -> None:
    """Refuse arguments of a function that takes no settings of a recipe.

    Raises:
        ConfigError: there are any; the message has the name nearest to the first.
    """
    for name in given:
        own = [p.name for p in inspect.signature(verb).parameters.values() if p.kind is not p.VAR_KEYWORD]
        close = nearest_name(name, own)
        hint = f"; did you mean {close}?" if close else f"; it takes {', '.join(own)}"
        raise ConfigError(f"sapo.{verb.__name__} takes no argument {name!r}{hint}")


def _plain(value: Any) -> Any:
    """Return a value without objects of the configuration, which a caller may have taken apart."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def read_settings(recipe: str | Path | Mapping[str, Any] | RunConfig | None) -> tuple[dict[str, Any], str | None]:
    """Return the settings of a recipe before any change, and its name where a file has given it one.

    Raises:
        ConfigError: no such recipe, or one of a comparison.
    """
    if recipe is None:
        return {}, None
    if isinstance(recipe, RunConfig):
        return recipe.model_dump(mode="json", exclude={"provenance"}), None
    if isinstance(recipe, Mapping):
        return {str(k): _plain(v) for k, v in recipe.items()}, None
    if not isinstance(recipe, str | Path):
        raise ConfigError(
            "a recipe must be a name, a file, a dict of settings or a RunConfig; got a "
            f"{type(recipe).__name__}; a model is given as model="
        )
    path, raw = read_recipe(recipe)
    if "arms" in raw:
        raise ConfigError(f"{path} is a comparison of runs, not a run; sapo.compare({str(recipe)!r}) makes them")
    return raw, path.stem
