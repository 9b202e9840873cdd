"""The HTTP of one server: every call with a limit, and every way to fail told apart.

`ServerLost` says that the server cannot be reached or has stopped to answer: others take its requests. `ServerRefused`
is an answer that no other server would give better, so that the run ends with it.
"""

from __future__ import annotations

import os
from typing import Any

import httpx

from sapo.rollout.servers.guard import TOKEN
from sapo.rollout.servers.transfer import Bucket, LinkInfo
from sapo.utils.text import first_line, visible

HEALTH_SECONDS = 10.0
"""Most seconds that a server may take to say that it lives."""
CONNECT_SECONDS = 10.0
JSON = dict[str, Any]


class ServerLost(Exception):  # noqa: N818 (what happened, not an error of ours)
    """The server cannot be reached, or has failed; the message says how."""


class ServerRefused(Exception):  # noqa: N818
    """The server has understood the request and refused it; the message says why."""


class Client:
    """One server's HTTP.

    Args:
        address: as http://127.0.0.1:8000.
        token: None takes that of the environment, if there is one.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        token = token or os.environ.get(TOKEN)
        self.headers = {} if token is None else {"authorization": f"Bearer {token}"}
        # No proxy of the environment: what is sent to a server is for it alone.
        self._http = httpx.Client(headers=self.headers, trust_env=False, limits=UNLIMITED)
        self.move(address)

    def move(self, address: str) -> None:
        """Speak to another address from now on."""
        self.address = address.rstrip("/")
        self._http.base_url = self.address

    def healthy(self, seconds: float = HEALTH_SECONDS) -> bool:
        """Return whether the server says that it lives."""
        try:
            return self._http.get("/health", timeout=seconds).status_code == 200
        except httpx.HTTPError:
            return False

    def release(self) -> str:
        """Return the version of vLLM."""
        return str(self._get("/version", HEALTH_SECONDS).get("version"))

    def guarded(self) -> bool:
        """Return whether the server refuses a caller without the token."""
        try:
            answer = httpx.get(f"{self.address}/weight_info", timeout=HEALTH_SECONDS, trust_env=False)
        except httpx.HTTPError as error:
            raise ServerLost(describe(error)) from error
        return answer.status_code == 401

    def describe(self) -> JSON:
        """Return what `SapoWorker.sapo_describe` says."""
        found = self._post("/collective_rpc", {"method": "sapo_describe"})["results"]
        if not isinstance(found, list) or not found or not isinstance(found[0], dict):
            raise ServerRefused("it does not say what it serves")
        return dict(found[0])

    def connect(self, info: LinkInfo) -> None:
        """Have the server join a connection for weights; it answers once both ends have met."""
        self._post("/init_weight_transfer_engine", {"init_info": vars(info)}, info.seconds)

    def start_update(self, seconds: float) -> None:
        """Have the server make ready for weights."""
        self._post("/collective_rpc", {"method": "sapo_forget_update"}, seconds)
        self._post("/start_weight_update", {}, seconds)

    def update(self, bucket: Bucket, seconds: float) -> None:
        """Have the server take a bucket, whose bytes are sent at the same time."""
        self._post("/update_weights", {"update_info": bucket.describe()}, seconds)

    def finish_update(self, label: str, seconds: float) -> None:
        """Have the server use the weights it was sent, under a label that its completions carry."""
        self._post("/finish_weight_update", {"weight_version": label}, seconds)
        self._post("/reset_prefix_cache", {}, seconds)

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _get(self, path: str, seconds: float) -> JSON:
        return self._answer("GET", path, None, seconds)

    def _post(self, path: str, body: JSON, seconds: float = HEALTH_SECONDS) -> JSON:
        return self._answer("POST", path, body, seconds)

    def _answer(self, method: str, path: str, body: JSON | None, seconds: float) -> JSON:
        try:
            answer = self._http.request(method, path, json=body, timeout=limits(seconds))
        except httpx.HTTPError as error:
            raise ServerLost(f"{method} {path}: {describe(error)}") from error
        return read_answer(f"{method} {path}", answer.status_code, answer)


def _first(text: str) -> str:
    return visible((text.strip().splitlines() or ["nothing"])[0])[:200]


UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=None)


def limits(seconds: float) -> httpx.Timeout:
    """Return the limits of a call: to connect, and to answer."""
    return httpx.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds), pool=None)


def read_answer(what: str, status: int, answer: httpx.Response) -> JSON:
    """Return an answer's JSON.

    Raises:
        ServerRefused: 4xx.
        ServerLost: 5xx, or no JSON.
    """
    if status == 401:
        raise ServerRefused(f"{what}: it does not know the token; set {TOKEN} to the one it was started with")
    if status >= 400:
        problem = f"{what}: status {status}, {_first(answer.text)}"
        raise ServerRefused(problem) if status < 500 else ServerLost(problem)
    try:
        found = answer.json()
    except ValueError:
        raise ServerLost(f"{what}: an answer that is no JSON") from None
    if not isinstance(found, dict):
        raise ServerLost(f"{what}: an answer that is no JSON object")
    return found


def describe(error: httpx.HTTPError) -> str:
    """Return what went wrong with a call, in words."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer within the limit"
    if isinstance(error, httpx.ConnectError):
        return "no connection"
    return f"the connection broke ({first_line(error) or type(error).__name__})"
