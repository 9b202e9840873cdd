"""Serve an application on an address: bind, guard, and stop when asked to.

Beyond loopback every request needs a token. On loopback there is none, and requests are taken only under the address's
own names, so that a page elsewhere whose name was pointed at this machine (DNS rebinding) is refused.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from starlette.responses import RedirectResponse, Response

from sapo.errors import ConfigError
from sapo.rollout.servers.address import is_loopback
from sapo.rollout.servers.guard import TOKEN

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]
Refusal = Callable[[int, str], Response]
"""Makes the response of a request that is refused, from its status and a sentence."""

COOKIE = "sapo_token"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
PATIENCE = 5
"""Seconds that requests under way have to end in, once the server is asked to stop."""
LOOK_EVERY = 0.1
"""Seconds between two looks at whether it is."""


@dataclass(frozen=True)
class Address:
    """Where an application is served, and the token that its requests need.

    >>> Address("127.0.0.1", 8000, None).url
    'http://127.0.0.1:8000'
    >>> Address("::", 8000, "abc").url
    'http://[::1]:8000'
    """

    host: str
    port: int
    token: str | None
    made: bool = False
    """Whether the token was made here, so that nobody knows it who is not told."""

    @classmethod
    def of(cls, host: str, port: int) -> Address:
        """Take the token of the environment, or make one where others than this machine reach the host."""
        if (given := os.environ.get(TOKEN)) or is_loopback(host):
            return cls(host, port, given or None)
        return cls(host, port, secrets.token_urlsafe(24), made=True)

    @property
    def url(self) -> str:
        """Return an address that this machine reaches it at."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


@contextmanager
def bound(host: str, port: int) -> Iterator[tuple[socket.socket, Address]]:
    """Take a port, before anything is loaded; whoever connects is refused until it is served.

    Args:
        port: 0 for any that is free.

    Raises:
        ConfigError: it is in use, or the host is none of this machine's.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"--host must be a name or address of this machine; got {host!r}: {error}") from error
    with taken:
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(place)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"--port must be free; got {host} {port}: {reason}; choose another, or 0 for any that is free"
            ) from error
        yield taken, Address.of(host, taken.getsockname()[1])


class Guard:
    """An ASGI middleware that refuses requests without the token, or under a name that is not the address's.

    A browser gives the token once, as ?token=..., and then by a cookie.

    Args:
        refusal: the application's way to say no.
    """

    def __init__(self, app: Application, address: Address, refusal: Refusal) -> None:
        self._app, self._token, self._refusal = app, address.token, refusal
        self._names = {address.host.lower(), *LOOPBACK_NAMES}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        await (self._answer(scope, headers) or self._app)(scope, receive, send)

    def _answer(self, scope: Scope, headers: dict[bytes, str]) -> Response | None:
        """Return the guard's own answer; None for a request that may pass."""
        if self._token is None:
            if _host_name(headers.get(b"host", "")) in self._names:
                return None
            return self._refusal(403, "the request names another host than this server's; use its own address")
        given = headers.get(b"authorization", "").removeprefix("Bearer ").strip()
        if self._is_token(given) or self._is_token(_cookie(headers.get(b"cookie", ""))):
            return None
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["method"] == "GET" and self._is_token(asked):
            answer = RedirectResponse(scope["path"], 303)
            answer.set_cookie(COOKIE, asked, httponly=True, samesite="strict")
            return answer
        return self._refusal(401, f"the token is missing or wrong; the server printed it, or has it from {TOKEN}")

    def _is_token(self, given: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(given.encode(), self._token.encode())


def _host_name(header: str) -> str:
    """Return the name of a Host header, without its port."""
    name = header.rpartition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]
    return name.lower()


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


class _Server(uvicorn.Server):
    """A server whose signals are its caller's."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def serve(
    app: Application,
    taken: socket.socket,
    *,
    should_stop: Callable[[], bool],
    on_ready: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Serve an application until a stop is asked for.

    Args:
        taken: from `bound`.
        on_ready: called when requests are answered.
        on_stop: called when a stop was asked for, before requests under way are waited for; ends them.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=PATIENCE,
    )
    server = _Server(config)

    async def watch() -> None:
        while not server.started:
            await asyncio.sleep(LOOK_EVERY / 10)
        on_ready()
        while not should_stop():
            await asyncio.sleep(LOOK_EVERY)
        on_stop()
        server.should_exit = True

    async def run() -> None:
        watching = asyncio.create_task(watch())
        try:
            await server.serve(sockets=[taken])
        finally:
            watching.cancel()

    asyncio.run(run())
