"""What the tests share: one thread, and a tiny policy of each architecture."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from browser import MISSING
from plain_models import plain_copy
from sapo.model.loading import prepare_policy
from sapo.model.policy import Policy
from sapo.model.tiny import ARCHITECTURES, character_tokenizer, tiny_model

ALPHABET = "0123456789+-*=?"
WINDOW = 6
"""Sliding window of the tiny mistral: shorter than nearly every sequence the tests run."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say at the end what was not tested for want of a browser: skipped tests are a letter among a thousand dots."""
    skipped = terminalreporter.stats.get("skipped", [])
    without = sum(MISSING in str(report.longrepr) for report in skipped)
    if without:
        terminalreporter.write_line(f"{without} tests of pages were skipped: {MISSING}", yellow=True)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are so small that threads cost more than they save, and another count is another rounding."""
    torch.set_num_threads(1)


def make_policy(architecture: str, *, dtype: torch.dtype = torch.float32, gain: float = 5.0, **options) -> Policy:
    """A tiny policy over ALPHABET whose answers depend on every token it may see.

    Fresh weights attend almost evenly and give flat logits; `gain` times larger ones tell a wrong key or position at
    once. The embeddings stay as they are: the norms undo their size.
    """
    tokenizer = character_tokenizer(ALPHABET)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    window = {"sliding_window": WINDOW} if architecture == "mistral" else {}
    model = tiny_model(architecture, len(tokenizer), seed=0, **ids, **{"hidden_size": 32, **window, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(gain)
    if dtype == torch.float64:
        compute_in_double(model)
    return prepare_policy(model.to(dtype), tokenizer)


def compute_in_double(model: nn.Module) -> None:
    """Norms, routers and grouped experts of transformers go through float32 whatever the model's dtype; not here."""

    def norm(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        value, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, value / value.sum(-1, keepdim=True), index

    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(norm, module)
        elif type(module).__name__.endswith("TopKRouter"):
            module.forward = types.MethodType(route, module)


@pytest.fixture(scope="session")
def policies() -> Callable[..., Policy]:
    """policies(architecture, **options): `make_policy`, each built once; not to be changed by a test."""
    made: dict[object, Policy] = {}

    def get(architecture: str, **options) -> Policy:
        key = (architecture, *sorted(options.items(), key=str))
        if key not in made:
            made[key] = make_policy(architecture, **options)
        return made[key]

    return get


@pytest.fixture(scope="session", params=ARCHITECTURES)
def policy(request: pytest.FixtureRequest, policies: Callable[..., Policy]) -> Policy:
    """A tiny float32 policy of each architecture; not to be changed by a test."""
    return policies(request.param)


@pytest.fixture(scope="session")
def plain() -> Callable[[Policy], nn.Module]:
    """plain(policy): a copy of its model that runs transformers' own attention."""
    made: dict[int, nn.Module] = {}

    def get(policy: Policy) -> nn.Module:
        if id(policy) not in made:
            made[id(policy)] = plain_copy(policy.model)
        return made[id(policy)]

    return get


@pytest.fixture(scope="session")
def new_policy() -> Callable[..., Policy]:
    """`make_policy` itself: a policy of a test's own, to be changed at will."""
    return make_policy
