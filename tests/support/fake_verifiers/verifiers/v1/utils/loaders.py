"""A stand-in for the loaders of verifiers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from verifiers.v1 import Environment


def default_harness_id(taskset: str) -> str:
    return "bash"


def env_config_type(taskset: str, env: str) -> Any:
    return SimpleNamespace(model_fields={"agent": None})


def resolve_env_config(config: dict[str, Any]) -> dict[str, Any]:
    assert config["agent"]["harness"] == {"id": "sapo_chat"}
    assert config["agent"]["runtime"] == {"type": "subprocess"}
    return config


def load_environment(config: dict[str, Any]) -> Environment:
    return Environment(config)
