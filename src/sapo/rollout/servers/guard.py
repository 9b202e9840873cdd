"""Within a server: asks every request for the token of the run.

vLLM's own `--api-key` guards the paths under /v1 and /inference alone. Whoever reaches the port could set weights and
call workers without it. This middleware (`--middleware`) guards every path.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

TOKEN = "SAPO_SERVER_TOKEN"
"""The environment variable that has the token, in the server's process and in the run's."""

Scope = MutableMapping[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]


class Guard:
    """An ASGI middleware that answers 401 to a request without the token; it lets all pass where no token is set."""

    def __init__(self, app: Application) -> None:
        self._app = app
        token = os.environ.get(TOKEN)
        self._expected = None if not token else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] not in ("http", "websocket") or self._expected is None or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _allowed(self, scope: Scope) -> bool:
        assert self._expected is not None
        given = [value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
        return any(hmac.compare_digest(value, self._expected) for value in given)
