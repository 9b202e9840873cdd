"""Within a vLLM server: takes weights from the trainer, and says what it serves. Imported by vLLM's workers alone.

vLLM imports this module because its server is started with `--worker-extension-cls` (serve.py), which registers the way
of the weights with vLLM's own factory. A transfer is vLLM's: start, any number of updates, finish; weights go through
its layerwise reload. On a CPU the packed copies are then made anew, as for the engine in process.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from os import _exit, getppid
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from sapo.rollout.servers.description import BACKEND, PROTOCOL
from sapo.rollout.servers.transfer import SERVER, Link, LinkInfo
from sapo.rollout.vllm.core import repack


@dataclass
class SapoInitInfo(WeightTransferInitInfo):
    """The trainer's `LinkInfo`."""

    host: str
    port: int
    key: str
    seconds: float


@dataclass
class SapoUpdateInfo(WeightTransferUpdateInfo):
    """The trainer's `Bucket.describe`."""

    parts: list[Any]
    num_bytes: int


class SapoWeightTransfer(WeightTransferEngine[SapoInitInfo, SapoUpdateInfo]):
    """Receives buckets of weights over gloo."""

    init_info_cls = SapoInitInfo
    update_info_cls = SapoUpdateInfo
    supports_draft_weight_update = False
    _link: Link | None = None

    def init_transfer_engine(self, init_info: SapoInitInfo) -> None:
        """Connect to the trainer; a connection from before is given up."""
        self._link = None
        self._link = Link(LinkInfo(**vars(init_info)), SERVER)

    @torch.no_grad()
    def start_weight_update(self) -> None:
        """Make ready for all weights anew."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take one bucket. vLLM's own would ask for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    @torch.no_grad()
    def receive_weights(self, update_info: SapoUpdateInfo) -> None:
        """Receive a bucket and load its tensors."""
        assert self._link is not None, "a transfer begins with init_weight_transfer_engine"
        bucket = self._link.receive({"parts": update_info.parts, "num_bytes": update_info.num_bytes})
        on_device = ((name, tensor.to(self.device)) for name, tensor in bucket.tensors())
        self.model.load_weights(on_device)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    @torch.no_grad()
    def finish_weight_update(self) -> None:
        """Bring the weights into the form that vLLM computes with."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            repack(self.model)

    def shutdown(self) -> None:
        """Give up the connection."""
        self._link = None


class SapoWorker:
    """What `collective_rpc` of the server can call by name."""

    def sapo_describe(self) -> dict[str, Any]:
        """Return what this server serves, as JSON; `description.py` compares it with the policy."""
        vllm: Any = self.vllm_config  # type: ignore[attr-defined]
        model = vllm.model_config
        return {
            "protocol": PROTOCOL,
            "config": model.hf_config.to_dict(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_length": int(model.max_model_len),
            "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
            "tensor_parallel": int(vllm.parallel_config.world_size),
        }

    def sapo_forget_update(self) -> None:
        """Give up a transfer that a run has begun and not finished, as one that was killed."""
        engine: Any = self.weight_transfer_engine  # type: ignore[attr-defined]
        self._weight_update_active = False
        engine.reset_weight_update_target()


def _end_with_the_parent() -> None:
    """End this process when the one that started it has ended, as a server that is killed leaves its workers behind."""
    parent = getppid()

    def watch() -> None:
        while getppid() == parent:
            time.sleep(0.5)
        _exit(1)

    threading.Thread(target=watch, daemon=True).start()


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, SapoWeightTransfer)
    _end_with_the_parent()
