"""Find the engine that a recipe names in `rollout.engine`: one of ENGINES, or `module:Class` of the user's.

A class is loaded when it is named, so that an engine costs nothing where another one draws.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from sapo.config import RolloutConfig, RunConfig
from sapo.errors import ConfigError
from sapo.rollout.engine import Capabilities, Engine
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

NEEDS = {
    "records_experts": "records the experts of every token",
    "stop_strings": "ends completions at strings",
    "exact_logprobs": "gives the log-probabilities it draws by",
}
"""Fields of `Capabilities` in words."""

METHODS = ("from_settings", "generate", "set_weights", "sleep", "wake", "close")
"""What an engine's class must have; see `Engine`."""


def engine_class(name: str) -> type[Engine]:
    """Return the class of an engine by the name a recipe gives it.

    Raises:
        ConfigError: no such name, module or class, or a class that lacks a part of the protocol.
    """
    if name not in ENGINES and not all(name.partition(":")):
        raise ConfigError(
            f"rollout.engine must be one of {', '.join(ENGINES)} or module:Class; got {name!r}"
            f"{did_you_mean(name, ENGINES)}"
        )
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine=vllm needs the package vllm, which is not installed; pip install 'sapo-rl[vllm]' on a "
            "machine with a GPU, docs/engines.md on one without, or set rollout.engine=local"
        )
    found = import_named(ENGINES.get(name, name), what="rollout.engine", noun="class", error=ConfigError)
    _check_protocol(name, found)
    engine: type[Engine] = found
    return engine


def make_engine(policy: Policy, settings: RolloutConfig) -> Engine:
    """Make the engine that `settings.engine` names; weights are set before it draws (`weights.loaded`).

    Raises:
        ConfigError: see `engine_class`; or an engine without a version.
    """
    engine = engine_class(settings.engine).from_settings(policy, settings)
    if not isinstance(version := getattr(engine, "version", None), int):
        raise ConfigError(
            f"rollout.engine {settings.engine!r} must have `version`, the number of updates made by the weights it "
            f"holds; got {version!r}; set self.version = 0 where the engine is made, and to `version` in set_weights"
        )
    return engine


def check_engine(config: RunConfig) -> None:
    """Refuse a recipe that asks its engine for what it cannot do.

    Raises:
        ConfigError: see `engine_class`; or the rule that is broken, and the way out. An engine's own rules are in its
            class method `check(config)`, if it has one.
    """
    name, replay = config.rollout.engine, config.model.routing_replay
    engine = engine_class(name)
    if replay in (True, "R3"):
        key = f"model.routing_replay={'true' if replay is True else replay}"
        require(name, "records_experts", key, "set it to R2, which the trainer records")
    if any(prompt.stop for prompt in (config.prompt, *(t.prompt for t in config.tasks)) if prompt is not None):
        require(name, "stop_strings", "prompt.stop", "use rollout.stop_token_ids")
    if config.train.old_logprobs == "engine":
        require(name, "exact_logprobs", "train.old_logprobs=engine", "set it to trainer")
    if config.objective.tis is not None:
        require(name, "exact_logprobs", "objective.tis", "leave it out")
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
    if not getattr(engine_class(name).capabilities, capability):
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
