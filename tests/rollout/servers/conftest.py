"""Two fake vLLM servers that the tests of this directory share; each test sets their faults anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sapo.model.policy import Policy
from support.policies import make_policy
from support.servers import serving


@pytest.fixture(scope="session")
def policy() -> Policy:
    return make_policy("qwen3")


@pytest.fixture(scope="session")
def addresses(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    model = tmp_path_factory.mktemp("model")
    policy.save(model)
    with serving(model, count=2) as started:
        yield [address for address, _ in started]
