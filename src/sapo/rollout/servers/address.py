"""Addresses of servers: what a recipe may give, and which need a token."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from urllib.parse import urlsplit

from sapo.errors import ConfigError
from sapo.rollout.servers.guard import TOKEN


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host name or address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("gpu-7")
    (True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_addresses(addresses: Sequence[str]) -> None:
    """Refuse what is no address of a server, and addresses beyond loopback without a token.

    Raises:
        ConfigError: the rule, the address and the way out.
    """
    for address in addresses:
        parts = urlsplit(address)
        try:
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port
        except ValueError:  # a port that is no number
            whole = False
        if not whole or parts.path.strip("/") or parts.query or parts.username:
            raise ConfigError(f"rollout.servers must hold addresses as http://127.0.0.1:8000; got {address!r}")
        if not is_loopback(str(parts.hostname)) and not os.environ.get(TOKEN):
            raise ConfigError(
                f"a server beyond loopback must ask for a token; got {address} and no {TOKEN} in the environment; set "
                "it to the token that the server was started with (docs/engines.md)"
            )
    twice = [a for a in addresses if [b.rstrip("/") for b in addresses].count(a.rstrip("/")) > 1]
    if twice:
        raise ConfigError(f"rollout.servers must hold every address once; got {twice[0]} twice")


def needs_token(address: str) -> bool:
    """Return whether others than this machine reach a server.

    >>> needs_token("http://127.0.0.1:8000"), needs_token("http://gpu-7:8000")
    (False, True)
    """
    return not is_loopback(str(urlsplit(address).hostname))
