"""What the tests share: one thread, and a tiny policy of each architecture."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sapo.model.policy import Policy
from support.browser import MISSING
from support.plain_models import plain_copy
from support.policies import ATTENTION_ONLY, make_policy


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


@pytest.fixture(scope="session", params=(*ATTENTION_ONLY, "qwen3_5"))
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
