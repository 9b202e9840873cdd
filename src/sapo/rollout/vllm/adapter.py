"""An adapter that reaches vLLM as itself (`rollout.vllm.lora_sync=adapter`): its A and B, in peft's layout.

vLLM reads adapters from a directory, so that each one is written into a temporary one and taken from there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

import torch

from sapo.errors import ConfigError
from sapo.model.policy import Policy
from sapo.rollout.engine import Weights

WEIGHTS_FILE = "adapter_model.safetensors"


class Adapter:
    """A policy's adapter, on its way to one vLLM.

    Args:
        policy: for the adapter's settings and its name; the tensors come with each sync.

    Raises:
        ConfigError: the policy has no adapter, or one of a rank above vLLM's largest.
    """

    def __init__(self, policy: Policy) -> None:
        if policy.adapter is None:
            raise ConfigError(
                "rollout.vllm.lora_sync=adapter is for a policy with an adapter; got one without; give it model.lora, "
                "or leave lora_sync out"
            )
        (self._name,) = policy.adapter.active_adapters
        self._settings = policy.adapter.peft_config[self._name]
        self._loaded = 0
        """The id of the adapter that vLLM holds; 0 without one."""
        self.request: Any = None
        """What every request to vLLM carries."""

    def engine_options(self) -> dict[str, Any]:
        """Return what vLLM is started with."""
        from vllm.config.lora import MaxLoRARanks

        ranks = sorted(get_args(MaxLoRARanks))
        fitting = [rank for rank in ranks if rank >= self._settings.r]
        if not fitting:
            raise ConfigError(
                f"rollout.vllm.lora_sync=adapter takes adapters of rank {ranks[-1]} at most; got {self._settings.r}; "
                "leave lora_sync out"
            )
        return {"enable_lora": True, "max_lora_rank": fitting[0], "max_loras": 1}

    def split(self, weights: Weights) -> tuple[dict[str, torch.Tensor], Iterator[tuple[str, torch.Tensor]]]:
        """Part weights into those of the adapter, which are filled in as the others are drawn from the iterator.

        Args:
            weights: every parameter by the policy's own name, as `Policy.weights` yields them.

        Returns:
            The adapter's tensors by peft's names, complete when the second is exhausted; the model's own weights by the
            names they have without an adapter.
        """
        parts: dict[str, torch.Tensor] = {}

        def base() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if ".lora_A." in name or ".lora_B." in name:
                    # A copy: the trainer's own tensors hold these values until the next update alone.
                    parts[f"base_model.model.{name.replace(f'.{self._name}.', '.')}"] = tensor.cpu().clone()
                else:
                    yield name.replace(".base_layer.", "."), tensor

        return parts, base()

    def load(self, engine: Any, parts: dict[str, torch.Tensor]) -> None:
        """Put an adapter in the place of the one before, under a name of its own, so that no cache mixes the two.

        Args:
            engine: vLLM's, with nothing in flight.
            parts: as `split` gives them.
        """
        from safetensors.torch import save_file
        from vllm.lora.request import LoRARequest

        if self._loaded in engine.list_loras():  # a reload of the model's weights has dropped it already
            engine.remove_lora(self._loaded)
        self._loaded += 1
        with tempfile.TemporaryDirectory(prefix="sapo-vllm-adapter-") as directory:
            save_file(parts, Path(directory) / WEIGHTS_FILE)
            self._settings.save_pretrained(directory)
            self.request = LoRARequest(f"policy-{self._loaded}", self._loaded, directory)
            taken = cast(bool, engine.add_lora(self.request))
        assert taken, "vLLM did not take the adapter"
