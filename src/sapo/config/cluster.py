"""Where the processes of a run are: on one machine, or placed on a cluster by Ray."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sapo.config.section import Section


class ClusterConfig(Section):
    """Where the processes of a run are. Without it all are on one machine, or where torchrun starts them."""

    kind: Literal["none", "ray"] = "none"
    """none. ray: Ray places ranks and engines on the nodes of a cluster, and starts them there (extra `ray`)."""
    address: str = "auto"
    """The Ray cluster. auto: that of RAY_ADDRESS, or the one this machine belongs to, as in a job of `ray job submit`.
    local: a cluster of this machine, which starts and ends with the run. HOST:PORT: that of this head, from one of its
    nodes. ray://HOST:PORT: that of this client server, from a machine outside."""
    trainers: int | None = Field(None, ge=1)
    """Ranks that train together, the driver's own counted; another name of `train.ranks`, which null takes."""
    engines: int = Field(0, ge=0)
    """Engines in processes of the cluster, each with a copy of the weights, which share the prompts of a batch. 0: the
    driver draws (`rollout.run_in`). One that dies is started again (`train.max_restarts`)."""
    wait_seconds: float = Field(10.0, gt=0)
    """How long to wait for CPUs and GPUs that the cluster has not free, before the run is refused. Raise it where an
    autoscaler adds nodes."""

    @field_validator("address")
    @classmethod
    def _address_has_a_form(cls, address: str) -> str:
        if address not in ("auto", "local") and not re.fullmatch(r"(ray://)?[^/:\s]+:\d{1,5}", address):
            raise ValueError(
                f"address must be auto, local, HOST:PORT or ray://HOST:PORT; got {address!r}; auto finds the cluster "
                "of this machine"
            )
        return address

    @model_validator(mode="after")
    def _only_with_ray(self) -> ClusterConfig:
        if self.kind == "none" and self.trainers is not None:
            raise ValueError(f"trainers needs kind: ray; got trainers {self.trainers}; set kind, or use train.ranks")
        if self.kind == "none" and self.engines:
            raise ValueError(f"engines needs kind: ray; got engines {self.engines}; set kind, or engines: 0")
        return self
