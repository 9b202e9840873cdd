"""What a server says that it serves, held against the policy that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapo.errors import ConfigError
from sapo.model.policy import Policy

BACKEND = "sapo"
"""Name of the way of the weights in vLLM's factory."""
PROTOCOL = 1
"""Counts changes of what a run and its servers say to each other."""
RELEASE = "0.32."
"""Of vLLM: what was tested. Another one may have other paths and other answers."""
HOW = "start it by python -m sapo.rollout.servers.serve MODEL"

# What says nothing of the computation.
_SILENT = {"transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "output_router_logits"}


def check_release(where: str, release: str) -> None:
    """Refuse a server of another release of vLLM than the tested one.

    Raises:
        ConfigError: the rule, the release and the way out.
    """
    if not release.startswith(RELEASE):
        raise ConfigError(
            f"a server must run vLLM {RELEASE}x, which this version of sapo was tested with; got {release} at {where}; "
            f"install vllm=={RELEASE}0 there"
        )


def check_description(where: str, found: Mapping[str, Any], policy: Policy, longest: int) -> None:
    """Refuse a server of another model, or one that was started without what a run needs.

    Args:
        where: the server, for the message.
        found: from `SapoWorker.sapo_describe`.
        longest: tokens of the longest completion.

    Raises:
        ConfigError: the rule, what the server has, and the way out.
    """
    if found.get("protocol") != PROTOCOL:
        raise ConfigError(
            f"run and server must be of one version of sapo; got protocol {found.get('protocol')} at {where} and "
            f"{PROTOCOL} here; install the same version on both sides"
        )
    config = policy.model.config.to_dict()
    theirs = found["config"]
    pairs = [("vocab_size", "vocabulary"), ("model_type", "architecture"), ("num_hidden_layers", "layers")]
    for key in [k for k, _ in pairs] + sorted((config.keys() | theirs.keys()) - _SILENT):
        if not key.startswith("_") and _plain(config.get(key)) != _plain(theirs.get(key)):
            name = dict(pairs).get(key, key)
            raise ConfigError(
                f"a server must have the model that is trained; got {name} {theirs.get(key)} at {where} and "
                f"{config.get(key)} here; {HOW} with this run's model, or leave the address out"
            )
    dtype = str(policy.dtype).removeprefix("torch.")
    if found["dtype"] != dtype:
        raise ConfigError(
            f"a server must compute in the policy's precision; got {found['dtype']} at {where} and {dtype} here; start "
            f"it with --dtype {dtype}, or set model.dtype"
        )
    if found["logprobs_mode"] != "processed_logprobs":
        raise ConfigError(
            f"a server must give the log-probabilities that it draws by; got --logprobs-mode {found['logprobs_mode']} "
            f"at {where}; {HOW}, which sets it"
        )
    if found["tensor_parallel"] != 1:
        raise ConfigError(
            f"weights are sent to servers of one worker each; got {found['tensor_parallel']} workers at {where}; start "
            "it without --tensor-parallel-size and --pipeline-parallel-size"
        )
    if found["max_length"] <= longest:
        raise ConfigError(
            f"a server must hold the longest sequence, prompt and completion; got --max-model-len "
            f"{found['max_length']} at {where} and rollout.max_new_tokens={longest}; start it with more"
        )


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
