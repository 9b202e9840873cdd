"""What a worker builds its engine from: the description of a policy, its buffers, its tokenizer, and the recipe."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig

from sapo.config import RolloutConfig, RunConfig
from sapo.data.messages import Message
from sapo.errors import ConfigError
from sapo.model.policy import Policy
from sapo.model.sharding import allocate
from sapo.model.skeleton import buffers, build, describe, set_buffers
from sapo.rollout.engine import Engine
from sapo.rollout.registry import make_engine

TOKENIZER, BUFFER = "tokenizer/", "buffer/"
"""Prefixes of the tensors of a hello: bytes of the tokenizer's files, and buffers of the model."""


def check_describable(config: RunConfig, policy: Policy) -> None:
    """Refuse a model that another process cannot build from its description.

    Raises:
        ConfigError: it brings code of its own.
    """
    if not type(policy.model).__module__.startswith("transformers."):
        raise ConfigError(
            f"rollout.run_in={config.rollout.run_in} needs a model of transformers' own, which the engine's process "
            f"builds from its config; got {type(policy.model).__name__}, which brings code of its own; use "
            "rollout.run_in=driver or thread"
        )


def hello_message(policy: Policy, settings: RolloutConfig) -> Message:
    """Return the first message to a worker: all that its engine is built from but the weights, which come later."""
    tensors = {f"{BUFFER}{name}": tensor for name, tensor in buffers(policy).items()}
    with tempfile.TemporaryDirectory(prefix="sapo-tokenizer-") as directory:
        policy.tokenizer.save_pretrained(directory)
        for file in sorted(Path(directory).rglob("*")):
            if file.is_file():
                data = np.frombuffer(bytearray(file.read_bytes()), np.uint8)
                tensors[f"{TOKENIZER}{file.relative_to(directory)}"] = torch.from_numpy(data)
    generation = getattr(policy.model, "generation_config", None)
    header = {
        "call": "hello",
        "policy": describe(policy),
        "generation": None if generation is None else generation.to_json_string(),
        "source": policy.source,
        "rollout": settings.model_dump(mode="json"),
        "device": str(policy.device),
        "threads": torch.get_num_threads(),
        "path": sys.path,
    }
    return Message(header, tensors)


def build_policy(hello: Message) -> Policy:
    """Build the policy of a hello, with weights that are not set yet."""
    header = hello.header
    with tempfile.TemporaryDirectory(prefix="sapo-tokenizer-") as directory:
        for name, tensor in hello.tensors.items():
            if name.startswith(TOKENIZER):
                file = Path(directory) / name.removeprefix(TOKENIZER)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(tensor.numpy().tobytes())
        policy = build(dict(header["policy"]), AutoTokenizer.from_pretrained(directory))
        if header["generation"] is not None:
            (Path(directory) / "generation_config.json").write_text(header["generation"])
            policy.model.generation_config = GenerationConfig.from_pretrained(directory)
    allocate(policy, header["device"])
    set_buffers(policy, {k.removeprefix(BUFFER): t for k, t in hello.tensors.items() if k.startswith(BUFFER)})
    policy.source = header["source"]
    return policy


def build_engine(hello: Message, policy: Policy) -> Engine:
    """Build the engine that the recipe of a hello names, of a policy.

    Raises:
        ConfigError: no such engine, or one that cannot run this model here.
    """
    sys.path += [entry for entry in hello.header["path"] if entry not in sys.path]
    torch.set_num_threads(hello.header["threads"])
    return make_engine(policy, RolloutConfig(**hello.header["rollout"]))
