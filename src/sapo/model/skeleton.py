"""A policy without weights, built from the description of another: what a rank shards before it is sent its slices.

The description is JSON, and holds all that decides what a forward pass computes beside the weights. Buffers, which are
small, travel as tensors: most are computed when a model is made, from its config, and on the meta device they have no
values.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from sapo.model.adapters import install_adapter
from sapo.model.attention import ATTENTION_NAME, attend_by
from sapo.model.blocks import proven_forms, use_proven_forms
from sapo.model.policy import Policy
from sapo.model.vision import Vision, family_of_files, processor_files


def describe(policy: Policy) -> dict[str, Any]:
    """Return the description of a policy, as JSON."""
    model = policy.model
    adapter = None if policy.adapter is None else policy.adapter.peft_config["default"].to_dict()
    description = {
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "experts": getattr(model.config.get_text_config(), "_experts_implementation", None),
        "processor": None if policy.vision is None else processor_files(policy.vision.family),
        "adapter": adapter,
        "path": policy.path,
        "own_attention": policy.own_attention,
        "engine_paths": policy.engine_paths,
        "closed_forms": proven_forms(model),
        "unused_tokens": policy.unused_tokens,
        "parameters": {n: [_dtype_name(p.dtype), p.requires_grad] for n, p in model.named_parameters()},
    }
    read: dict[str, Any] = json.loads(json.dumps(description, default=_plain))
    return read


def buffers(policy: Policy) -> dict[str, Tensor]:
    """Return the buffers of a policy by name, those left out of checkpoints too."""
    return {name: buffer.detach() for name, buffer in policy.model.named_buffers()}


def build(description: dict[str, Any], tokenizer: Any = None) -> Policy:
    """Build the policy that was described, on the meta device.

    Args:
        tokenizer: None in a process that is given encoded prompts only.
    """
    parameters = {
        name: (getattr(torch, dtype), trained) for name, (dtype, trained) in description["parameters"].items()
    }
    config = AutoConfig.for_model(**description["config"])
    files = description["processor"]
    family = None if files is None else family_of_files(files, config, tokenizer)
    base = next(dtype for name, (dtype, _) in parameters.items() if "lora_" not in name)
    with torch.device("meta"):
        attention = ATTENTION_NAME if description["path"] == "packed" else description["own_attention"]
        if family is None:
            model = AutoModelForCausalLM.from_config(config, dtype=base, attn_implementation=attention)
        else:
            model = AutoModelForImageTextToText.from_config(config, dtype=base, attn_implementation="sdpa")
            attend_by(model, attention)
        if description["experts"] is not None:
            model.set_experts_implementation(description["experts"])
        policy = Policy(model, tokenizer, vision=None if family is None else Vision(model, family))
        policy.path, policy.own_attention = description["path"], description["own_attention"]
        policy.engine_paths = dict(description["engine_paths"])
        policy.is_built_elsewhere = True
        if description["adapter"] is not None:
            install_adapter(policy, description["adapter"])
    use_proven_forms(model, description["closed_forms"])
    policy.unused_tokens = description["unused_tokens"]
    found = dict(model.named_parameters())
    assert found.keys() == parameters.keys(), f"another model was built: {sorted(found.keys() ^ parameters.keys())[:3]}"
    for name, (dtype, trained) in parameters.items():
        found[name].data = found[name].data.to(dtype)
        found[name].requires_grad_(trained)
    return policy


def set_buffers(policy: Policy, values: dict[str, Tensor]) -> None:
    """Give a policy the buffers of another."""
    with torch.no_grad():
        for name, buffer in policy.model.named_buffers():
            buffer.copy_(values[name])


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """Turn what configs hold and JSON does not into lists and names."""
    if isinstance(value, torch.dtype):
        return _dtype_name(value)
    return sorted(value) if isinstance(value, set) else str(value)
