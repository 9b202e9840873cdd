"""Find the engine that a recipe names in `rollout.engine`: one of ENGINES, or `module:Class` of the user's.

A class is loaded when it is named, so that an engine costs nothing where another one draws.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from sapo.config import RolloutConfig, RunConfig
from sapo.errors import ConfigError
from sapo.rollout.engine import Capabilities, Engine, RecipeEngine
from sapo.utils.names import did_you_mean
from sapo.utils.plugins import import_named

# For the annotation only: an engine is checked before any model is loaded.
if TYPE_CHECKING:
    from sapo.model.policy import Policy

ENGINES: dict[str, str] = {
    "local": "sapo.rollout.local.engine:LocalEngine",
    "vllm": "sapo.rollout.vllm.engine:VllmEngine",
}
"""Name -> where the class is."""
VLLM_SERVERS = "sapo.rollout.servers.engine:ServerEngine"
"""The class of `vllm` with `rollout.servers`."""

NEEDS = {
    "records_experts": "records the experts of every token",
    "stop_strings": "ends completions at strings",
    "exact_logprobs": "gives the log-probabilities it draws by",
    "top_logprobs": "gives the likeliest tokens beside those it draws",
}
"""Fields of `Capabilities` in words."""

METHODS = ("from_settings", "generate", "set_weights", "sleep", "wake", "close")
"""What an engine's class must have; see `RecipeEngine`."""


def engine_class(name: str, elsewhere: bool = False) -> type[RecipeEngine]:
    """Return the class of an engine by the name a recipe gives it.

    Args:
        elsewhere: it draws on other machines, so that what it needs need not be installed on this one.

    Raises:
        ConfigError: no such name, module or class, or a class that lacks a part of the protocol.
    """
    if name not in ENGINES and not all(name.partition(":")):
        raise ConfigError(
            f"rollout.engine must be one of {', '.join(ENGINES)} or module:Class; got {name!r}"
            f"{did_you_mean(name, ENGINES)}"
        )
    if name == "vllm" and not elsewhere and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine=vllm needs the package vllm, which is not installed; pip install 'sapo-rl[vllm]' on a "
            "machine with a GPU, docs/engines.md on one without, or set rollout.engine=local"
        )
    found = import_named(ENGINES.get(name, name), what="rollout.engine", noun="class", error=ConfigError)
    _check_protocol(name, found)
    engine: type[RecipeEngine] = found
    return engine


def chosen_class(settings: RolloutConfig) -> type[RecipeEngine]:
    """Return the class of the engine of a recipe.

    Raises:
        ConfigError: see `engine_class`.
    """
    found = engine_class(settings.engine, elsewhere=isinstance(settings.servers, list))
    if settings.servers is not None:
        found = import_named(VLLM_SERVERS, what="rollout.servers", noun="class", error=ConfigError)
    return found


def make_engine(policy: Policy, settings: RolloutConfig) -> Engine:
    """Make the engine that `settings.engine` names; weights are set before it draws (`weights.loaded`).

    Raises:
        ConfigError: see `engine_class`; or an engine without a version.
    """
    engine = chosen_class(settings).from_settings(policy, settings)
    if not isinstance(version := getattr(engine, "version", None), int):
        raise ConfigError(
            f"rollout.engine {settings.engine!r} must have `version`, the number of updates made by the weights it "
            f"holds; got {version!r}; set self.version = 0 where the engine is made, and to `version` in set_weights"
        )
    return engine


def prove_engine(policy: Policy, settings: RolloutConfig) -> None:
    """Let an engine that has something to prove do so with the policy itself (`Engine.prove`, which few have).

    Raises:
        ModelError: it cannot draw from this model exactly.
    """
    if callable(prove := getattr(chosen_class(settings), "prove", None)):
        prove(policy)


def check_engine(config: RunConfig) -> None:
    """Refuse a recipe that asks its engine for what it cannot do.

    Raises:
        ConfigError: see `engine_class`; or the rule that is broken, and the way out. An engine's own rules are in its
            class method `check(config)`, if it has one.
    """
    name, replay = config.rollout.engine, config.model.routing_replay
    engine = chosen_class(config.rollout)
    if replay in (True, "R3"):
        key = f"model.routing_replay={'true' if replay is True else replay}"
        _require(engine, name, "records_experts", key, "set it to R2, which the trainer records")
    if any(prompt.stop for prompt in (config.prompt, *(t.prompt for t in config.tasks)) if prompt is not None):
        _require(engine, name, "stop_strings", "prompt.stop", "use rollout.stop_token_ids")
    if config.train.old_logprobs == "engine":
        _require(engine, name, "exact_logprobs", "train.old_logprobs=engine", "set it to trainer")
    if config.objective.tis is not None:
        _require(engine, name, "exact_logprobs", "objective.tis", "leave it out")
    if config.rollout.overlaps and config.old_logprobs != "current":
        way_out = "set experiments.old_logprobs=current, or rollout.run_in=driver"
        _require(engine, name, "exact_logprobs", config.rollout.overlap_keys, way_out)
    if callable(check := getattr(engine, "check", None)):
        check(config)


def require(name: str, capability: str, wanted_by: str, way_out: str) -> None:
    """Refuse an engine that lacks a capability.

    Args:
        name: of the engine, as a recipe gives it.
        capability: a field of `Capabilities`.
        wanted_by: what asks for it.
        way_out: what to do instead.

    Raises:
        ConfigError: it lacks that; or see `engine_class`.
    """
    _require(engine_class(name), name, capability, wanted_by, way_out)


def _require(engine: type[RecipeEngine], name: str, capability: str, wanted_by: str, way_out: str) -> None:
    if not getattr(engine.capabilities, capability):
        raise ConfigError(f"{wanted_by} needs an engine that {NEEDS[capability]}; got rollout.engine={name}; {way_out}")


def _check_protocol(name: str, found: Any) -> None:
    missing = [method for method in METHODS if not callable(getattr(found, method, None))]
    if not isinstance(getattr(found, "capabilities", None), Capabilities):
        missing.append("capabilities")
    if missing:
        raise ConfigError(
            f"rollout.engine {name!r} must have all of sapo.rollout.engine.Engine; it lacks {', '.join(missing)}; "
            "add what is missing"
        )
