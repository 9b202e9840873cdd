"""The engine `vllm` with `rollout.servers`: completions by vLLM servers, of the same tokens and rules as in process.

Servers at given addresses are asked what they serve before anything is written. Those that the run starts by itself
come up once its directory is there (`begin`), where their logs go. The weights that were set last are kept in this
process's memory until the batch is drawn, so that a server that is started again can be sent them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch

from sapo.config import RolloutConfig, RunConfig, VllmConfig
from sapo.data import Completion
from sapo.errors import ConfigError
from sapo.model.adapters import folded_weights
from sapo.model.policy import Policy
from sapo.rollout.engine import Capabilities, Request, Weights, check_lengths
from sapo.rollout.experts import ExpertLog
from sapo.rollout.params import SamplingParams
from sapo.rollout.servers.address import check_addresses, needs_token
from sapo.rollout.servers.client import Client, ServerLost, ServerRefused
from sapo.rollout.servers.description import check_description, check_release
from sapo.rollout.servers.fleet import Fleet, Server
from sapo.rollout.servers.processes import ServerProcess, save_config, server_options
from sapo.rollout.servers.spread import Job, Spread
from sapo.rollout.stopping import StopRules
from sapo.rollout.vllm.drawing import sampling_fields
from sapo.rollout.vllm.models import check_model


class ServerEngine:
    """Samples completions with vLLM servers.

    Args:
        policy: the model that the servers must have.
        settings: the recipe's section `rollout`.

    Raises:
        ConfigError: an address does not answer, or serves something else.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(copies_weights=True)

    def __init__(self, policy: Policy, settings: RolloutConfig) -> None:
        assert settings.servers is not None, "this engine is that of rollout.servers"
        check_model(policy)
        if policy.vision is not None:
            raise ConfigError(
                f"rollout.servers takes models of text so far; got {type(policy.model).__name__}, which has a vision "
                "tower; leave rollout.servers out, which draws with vLLM in the process that trains"
            )
        self.policy = policy
        self.version = 0
        self._settings = settings
        self._ready = False
        self.max_length: int | None = None
        """Longest sequence that every server holds, once they have said so; see `max_length_of`."""
        self._token = secrets.token_urlsafe(32)
        addresses = settings.servers if isinstance(settings.servers, list) else []
        servers = [Server(i, Client(address)) for i, address in enumerate(addresses)]
        self._fleet = Fleet(servers, self._check_server, settings.server_timeout) if servers else None
        for server in servers:
            with _refused(server.client):
                self._check_server(server.client, server.client.address)

    @classmethod
    def from_settings(cls, policy: Policy, settings: RolloutConfig) -> Self:
        """See `RecipeEngine.from_settings`."""
        return cls(policy, settings)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Refuse what a recipe asks for and this engine cannot do, before anything is loaded or made.

        Raises:
            ConfigError: the rule, and the way out.
        """
        servers = config.rollout.servers
        if isinstance(servers, list):
            check_addresses(servers)
            for address in servers:
                _check_answer(Client(address))
        elif config.device.startswith("cuda"):
            _check_devices(config.train.ranks, int(servers or 0))

    def begin(self, directory: Path, max_restarts: int, ranks: int, warn: Callable[[str], None]) -> None:
        """Start the servers that are the run's own.

        Args:
            directory: for their logs, NN.log.
            max_restarts: how often one of them may be started again.
            ranks: of the training group, which have the first GPUs.
            warn: told of a server that is lost.

        Raises:
            EngineError: one has not come up; none is left behind.
        """
        if self._fleet is None:
            directory.mkdir(exist_ok=True)
            save_config(self.policy, directory / "model")
            servers = [self._own(i, directory, ranks) for i in range(_count(self._settings))]
            self._fleet = Fleet(servers, self._check_server, self._settings.server_timeout)
        self._fleet.max_restarts, self._fleet.warn = max_restarts, warn
        self._fleet.way_out = f"`sapo resume {directory.parent}` goes on from the newest checkpoint"
        self._fleet.start()

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        should_stop: Callable[[], bool] = lambda: False,
        experts: ExpertLog | None = None,
    ) -> list[tuple[Completion, ...]]:
        """See `Engine.generate`.

        Raises:
            EngineError: no server is left.
        """
        assert self._fleet is not None, "`begin` starts the servers"
        assert self._ready, "an engine draws after `set_weights`, and not while it sleeps"
        assert experts is None, "this engine records no experts"
        if not requests:
            return []
        check_lengths(requests, params, self.policy.max_length)
        stop_sets = sorted({r.prompt.stop for r in requests})
        rules = StopRules(self.policy, stop_sets, params.stop_token_ids)
        numbers = [stop_sets.index(r.prompt.stop) for r in requests]
        jobs = [
            [_job(request, sample, params, rules, number) for sample in range(request.samples)]
            for request, number in zip(requests, numbers, strict=True)
        ]
        Spread(
            self._fleet,
            [job for group in jobs for job in group],
            rows=self._settings.max_rows,
            vocabulary=self.policy.head_weight.shape[0],
            seconds=self._settings.server_timeout,
            should_stop=should_stop,
        ).run()
        return [
            tuple(_completion(job, rules, number, request.prompt.special_tokens) for job in group)
            for group, number, request in zip(jobs, numbers, requests, strict=True)
        ]

    def set_weights(self, weights: Weights, version: int) -> None:
        """See `Engine.set_weights`. An adapter is folded into the weights, one layer after the other."""
        assert self._fleet is not None, "`begin` starts the servers"
        self._fleet.load(folded_weights(self.policy, weights))
        self.version, self._ready = version, True

    def sleep(self) -> None:
        """See `Engine.sleep`. The servers have memory of their own, and keep it."""
        if self._fleet is not None:
            self._fleet.forget()
        self._ready = False

    def wake(self) -> None:
        """See `Engine.wake`."""

    def close(self) -> None:
        """See `Engine.close`."""
        if self._fleet is not None:
            self._fleet.close()
        self._ready = False

    def _own(self, number: int, directory: Path, ranks: int) -> Server:
        settings = self._settings
        process = ServerProcess(
            directory / "model",
            server_options(self.policy, settings.max_rows, settings.vllm or VllmConfig()),
            directory / f"{number:02d}.log",
            self._token,
            ranks + number if self.policy.device.type == "cuda" else None,
        )
        return Server(number, Client("http://127.0.0.1:0", self._token), process)

    def _check_server(self, client: Client, name: str) -> None:
        check_release(name, client.release())
        found = client.describe()
        check_description(name, found, self.policy, self._settings.max_new_tokens)
        length = int(found["max_length"])
        self.max_length = length if self.max_length is None else min(self.max_length, length)


def _count(settings: RolloutConfig) -> int:
    return settings.servers if isinstance(settings.servers, int) else 0


class _refused:  # noqa: N801 (reads as a word: with _refused(client))
    """Turns what a server says at the start into a refusal of the recipe."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ServerLost | ServerRefused):
            raise ConfigError(
                "rollout.servers must hold addresses of vLLM servers that sapo can train with; "
                f"{self._client.address}: {error}; start it by python -m sapo.rollout.servers.serve MODEL "
                "(docs/engines.md), or leave it out"
            ) from error


def _check_answer(client: Client) -> None:
    """Refuse an address that does not answer, or that takes weights from whoever reaches it."""
    with _refused(client):
        check_release(client.address, client.release())
        if needs_token(client.address) and not client.guarded():
            raise ConfigError(
                f"a server beyond loopback must refuse who has no token; got {client.address}, which does not; start "
                "it by python -m sapo.rollout.servers.serve, with the token in its environment (docs/engines.md)"
            )
    client.close()


def _check_devices(ranks: int, servers: int) -> None:
    if ranks + servers > torch.cuda.device_count():
        raise ConfigError(
            f"servers that a run starts have a GPU each, beside those of its ranks; got rollout.servers={servers}, "
            f"train.ranks={ranks} and {torch.cuda.device_count()} GPUs; lower them, or give addresses of servers on "
            "other machines"
        )


def _request_id(request: Request, sample: int, params: SamplingParams) -> str:
    """Name a sample to the servers; a later turn of an episode is told from the first."""
    turn = f"-{request.drawn}" if request.drawn else ""
    return f"sapo-{params.seed & (2**64 - 1):x}-{request.prompt.id}-{request.first_sample + sample}{turn}"


def _job(request: Request, sample: int, params: SamplingParams, rules: StopRules, number: int) -> Job:
    fields = sampling_fields(request, sample, params, rules.policy.unused_tokens)
    body = {
        "request_id": _request_id(request, sample, params),
        "token_ids": list(request.prompt.token_ids),
        "sampling_params": fields,
    }
    ends = None if not request.prompt.stop else lambda ids: rules.ends(number, ids)
    return Job(body, most=fields["max_tokens"], ends=ends)


def _completion(job: Job, rules: StopRules, number: int, special: bool) -> Completion:
    assert job.finish is not None, "a sample was lost"
    return Completion(
        token_ids=np.array(job.token_ids, dtype=np.int64),
        logprobs=np.array(job.logprobs, dtype=np.float32),
        finish_reason=job.finish,
        text=rules.text(number, job.token_ids, special),
    )
