"""A sandbox of each backend, used by root and by a plain user: whichever of the four this machine can have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sapo.sandbox.choice import BACKENDS
from support.sandbox_cases import Sandbox, machine_allows, start_server


@pytest.fixture(scope="session", params=[(b, u) for b in BACKENDS for u in ("root", "plain user")], ids=" as ".join)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Each backend, as root and as a plain user; skipped, with the reason, where the machine cannot have it."""
    backend, user = request.param
    server = start_server(user)
    try:
        made = Sandbox(backend, server)
        report = next(r for r in made.ask({"do": "describe"})["backends"] if r["name"] == backend)
        if not report["usable"]:
            assert not machine_allows(backend), f"{backend} as {user}: {report['detail']}"
            pytest.skip(f"{backend} as {user}: {report['detail']}")
        yield made
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait(30)
