"""Recipes: found by name or path, read, overridden, checked; each mistake explained in one line.

A recipe is YAML; any key can be overridden as `key=value` on the command line. An unknown key is refused with the
nearest known name.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import KeyValidationError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from sapo.config import ObjectiveConfig, PromptConfig, RunConfig
from sapo.config.objective import known_objective
from sapo.config.rollout import TurnsConfig
from sapo.errors import ConfigError
from sapo.utils.names import nearest
from sapo.utils.reading import parse_yaml, read_yaml
from sapo.utils.shipped import shipped_recipes
from sapo.utils.text import first_line

Settings = TypeVar("Settings", bound=BaseModel)
Part = TypeVar("Part", bound=BaseModel)

_ARMS = re.compile(r"^arms:", re.MULTILINE)


def known_recipes() -> dict[str, Path]:
    """Return name -> file of the shipped recipes of a run."""
    return {
        name: file for name, file in shipped_recipes().items() if not _ARMS.search(file.read_text(encoding="utf-8"))
    }


def known_comparisons() -> dict[str, Path]:
    """Return name -> file of the shipped recipes of a comparison: those with arms."""
    return {name: file for name, file in shipped_recipes().items() if _ARMS.search(file.read_text(encoding="utf-8"))}


def load_recipe(name_or_path: str | os.PathLike[str], overrides: list[str] | None = None) -> RunConfig:
    """Read a recipe and apply `key=value` overrides.

    Args:
        name_or_path: a YAML file, or the name of a recipe that ships with the package (`quickstart`).
        overrides: dotted, as in `train.steps=10` or `tasks.0.digits=3`; values are YAML.

    Raises:
        ConfigError: with one line per mistake.
    """
    path, raw = read_recipe(name_or_path)
    if "arms" in raw:
        raise ConfigError(f"{path} is a comparison of runs, not a run; `sapo compare {name_or_path}` makes them")
    config = resolve_recipe(raw, overrides or [], path)
    if config.run_dir is None:
        config = config.model_copy(update={"run_dir": f"runs/{path.stem}"})
    return config


def read_recipe(name_or_path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Find and read the file of a recipe, of a run or a comparison.

    Raises:
        ConfigError: no such recipe, or no mapping of settings.
    """
    path = _find_recipe(name_or_path)
    return path, read_yaml(path)


def resolve_recipe(raw: Mapping[str, Any], overrides: list[str], where: str | os.PathLike[str]) -> RunConfig:
    """Apply overrides to a recipe's settings and check them; errors name it by `where`.

    Raises:
        ConfigError: with one line per mistake.
    """
    return change_recipe(raw, [parse_override(override) for override in overrides], where)


def change_recipe(
    raw: Mapping[str, Any], changes: Sequence[tuple[str, Any]], where: str | os.PathLike[str]
) -> RunConfig:
    """Apply changes, dotted keys with values, to a recipe's settings and check them; errors name it by `where`.

    Raises:
        ConfigError: with one line per mistake.
    """
    settings = copy.deepcopy(dict(raw))
    _drop_settings_of_another_objective(settings, dict(changes).get("objective.name"))
    try:
        merged = OmegaConf.create(settings)
    except OmegaConfBaseException as error:
        rule = "a key must be a text" if isinstance(error, KeyValidationError) else "a value must be one of YAML"
        raise ConfigError(f"{where}: {rule}; got {first_line(error)}") from error
    for key, value in changes:
        try:
            OmegaConf.update(merged, key, value, merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
            raise ConfigError(f"{key} is not a place in {where}: {first_line(error)}") from error
    try:
        resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
    assert isinstance(resolved, dict)
    return parse_recipe({str(k): v for k, v in resolved.items()})


def _drop_settings_of_another_objective(raw: dict[str, Any], name: Any) -> None:
    """Drop the base objective's settings under `objective.name=grpo`: GRPO starts from its own defaults.

    Nor are a normalizer and an advantage that are those of SAPO's source, which the config.yaml of a run writes down.
    """
    objective = raw.get("objective")
    if not isinstance(objective, dict) or name is None or name == (before := objective.get("name", "sapo")):
        return
    kept = {k: v for k, v in objective.items() if k in ObjectiveConfig.model_fields}
    if (source := known_objective(str(before))) is not None:
        of_source = {"normalizer": source.normalizer, "advantage": source.advantage}
        kept = {k: v for k, v in kept.items() if k not in of_source or v != of_source[k]}
    raw["objective"] = kept


def parse_recipe(settings: dict[str, Any], *, recorded: bool = False) -> RunConfig:
    """Check settings and fill in the defaults.

    Args:
        recorded: the settings are what a run wrote down. An objective of its user's own is then not imported.

    Raises:
        ConfigError: with one line per mistake.
    """
    return parse_settings(RunConfig, settings, recorded=recorded)


def parse_settings(model: type[Settings], settings: Mapping[str, Any], *, recorded: bool = False) -> Settings:
    """Check settings of any kind as `parse_recipe` checks a recipe.

    Raises:
        ConfigError: with one line per mistake.
    """
    try:
        return model.model_validate(settings, context={"recorded": recorded})
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(dict(e), model) for e in error.errors())) from error


def parse_prompt(settings: dict[str, Any]) -> PromptConfig:
    """Check the settings of a prompt format that stands by itself.

    Raises:
        ConfigError: with one line per mistake.
    """
    return _parse_part(PromptConfig, ("prompt",), settings)


def parse_turns(settings: dict[str, Any]) -> TurnsConfig:
    """Check limits of episodes that stand by themselves.

    Raises:
        ConfigError: with one line per mistake.
    """
    return _parse_part(TurnsConfig, ("rollout", "turns"), settings)


def _parse_part(kind: type[Part], place: tuple[str, ...], settings: dict[str, Any]) -> Part:
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        mistakes = [{**e, "loc": (*place, *e["loc"])} for e in error.errors()]
        raise ConfigError("\n".join(_explain(e, RunConfig) for e in mistakes)) from error


# What may change in mid-run: how long it goes on, what is written, and the way out of a divergence.
RESUMABLE_KEYS = (
    "train.steps",
    "train.learning_rate",
    "eval.every",
    "checkpoint",
    "log",
    "profile",
    "diagnostics",
    "warnings",
    "train.tokens_per_microbatch",
    "train.picture_tokens_per_microbatch",
    "train.ranks",
    "train.replicas",
    "train.max_restarts",
    "train.rank_timeout",
    "train.stall_timeout",
    "train.context_parallel",
    "train.stop_when",
    "cluster",
    "rollout.parity_every",
    "rollout.parity_tolerance",
    "rollout.servers",
    "rollout.server_timeout",
    "rollout.run_in",
    "rollout.max_staleness",
    "rollout.timeout",
    "rollout.turns.max_environment_errors",
    "rollout.turns.seconds_per_reply",
    "rollout.turns.play_in",
    "rollout.turns.env",
)


def override_run(config: RunConfig, overrides: list[str]) -> RunConfig:
    """Change the few settings of a run that leave it the same run.

    Raises:
        ConfigError: for any other key.
    """
    settings = OmegaConf.create(config.model_dump(mode="json"))
    for override in overrides:
        key, value = parse_override(override)
        if not any(key == k or key.startswith(k + ".") for k in RESUMABLE_KEYS):
            raise ConfigError(
                f"{key} cannot change when a run is resumed; {', '.join(RESUMABLE_KEYS)} can; "
                f"`sapo train {config.run_dir}/config.yaml run_dir=NAME {override}` starts another run"
            )
        try:
            OmegaConf.update(settings, key, value, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
            raise ConfigError(f"{key} is not a place in the recipe of {config.run_dir}: {first_line(error)}") from error
    resolved = OmegaConf.to_container(settings, resolve=False)
    assert isinstance(resolved, dict)
    return parse_recipe({str(k): v for k, v in resolved.items()})


def _find_recipe(name_or_path: str | os.PathLike[str]) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    recipes = shipped_recipes()
    if str(name_or_path) in recipes:
        return recipes[str(name_or_path)]
    if path.is_dir() and (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path} is a run directory: `sapo resume {path}` continues it, {path}/config.yaml repeats it"
        )
    if (path / "comparison.yaml").is_file():
        raise ConfigError(f"{path} is the directory of a comparison: `sapo compare {path}` goes on with it")
    if path.is_dir():
        raise ConfigError(f"{path} is a directory, of neither a run nor a comparison; name a recipe's file")
    hint = nearest(str(name_or_path), list(recipes))
    raise ConfigError(f"no recipe file {str(path)!r} and no shipped recipe of that name{hint}")


def parse_override(override: str) -> tuple[str, Any]:
    """Split `key=value` into the key and the value read as YAML.

    >>> parse_override("train.learning_rate=2e-4")
    ('train.learning_rate', 0.0002)

    Raises:
        ConfigError: not of that form.
    """
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"an override is written key=value; got {override!r}")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"the value of {key} is not valid YAML: {text!r:.200}") from error
    if isinstance(value, str):
        value = _as_number(value)
    return key.strip(), value


def _as_number(text: str) -> Any:
    """Read `1e-4` as a number: YAML 1.1 makes it a string."""
    try:
        return float(text)
    except ValueError:
        return text


FEW_BITS = {"bits", "load_in_4bit", "load_in_8bit", "nf4", "qlora", "quantization", "quantization_config", "quantize"}
"""Names by which other trainers load a base in few bits."""


def few_bits_refusal(name: str) -> str:
    """Say that a base in few bits is not supported, and the way out."""
    return (
        f"{name}: a base of 4 or 8 bits (QLoRA) is not supported on any device; train an adapter on a 16-bit base: "
        "model.dtype=bfloat16 with model.lora.rank=16"
    )


def _explain(error: dict[str, Any], root: type[BaseModel]) -> str:
    """Write one line for one validation error: key, rule, value, way out."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        if location[0] == "model" and location[-1] in FEW_BITS:
            return few_bits_refusal(key)
        section = _section_at(location[:-1], root)
        known = list(section.model_fields) if section is not None else []
        return f"unknown key {key}{nearest(location[-1], known, prefix='.'.join(location[:-1]))}"
    if error["type"] == "missing":
        return f"{key} is required and has no default"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]}; got {error['input']!r}"


def _section_at(location: list[str], root: type[BaseModel]) -> type[BaseModel] | None:
    """Return the model class that the keys of a location belong to."""
    section = root
    for part in location:
        if part.isdigit() or part not in section.model_fields:
            return None
        annotation: Any = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        found = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not found:
            return None
        section = found[0]
    return section
