"""Which web pages may use the server. Programs that are no browsers send no Origin, and are not concerned.

A page from elsewhere can make a browser send requests to a server on this machine: under that server's own name
(refused by Origin), or under a name of its own that it has pointed here (DNS rebinding, refused by Host).
"""

import ipaddress
from collections.abc import Iterable

from server.errors import ApiError
from server.http.head import Head


class Origins:
    """host: the address that the server was bound to; on a local one, only local names are answered to.
    allowed_hosts: further names. allowed_origins: pages that may ask, such as https://example.com; "*": all."""

    def __init__(self, host: str, allowed_hosts: Iterable[str] = (), allowed_origins: Iterable[str] = ()):
        self._hosts = None if not is_local(host) else {"localhost", host.lower(), *map(str.lower, allowed_hosts)}
        self._origins = {origin.rstrip("/").lower() for origin in allowed_origins}

    def check(self, head: Head) -> list[tuple[str, str]]:
        """Header fields for the answer, by which a browser lets an allowed page read it. Raises ApiError(403)."""
        host = head.get("host") or ""
        if self._hosts is not None and host and not self._is_ours(_name(host)):
            raise ApiError(403, "the Host header names another server; --allow-host would admit it",
                           type="permission_error", code="host_not_allowed")
        origin = head.get("origin")
        if origin is None or _is_same(origin, host):
            return []
        if origin.lower() not in self._origins and "*" not in self._origins:
            raise ApiError(403, "web pages from elsewhere may not use this server; --allow-origin would admit "
                           "them", type="permission_error", code="origin_not_allowed")
        fields = [("Access-Control-Allow-Origin", "*" if "*" in self._origins else origin), ("Vary", "Origin"),
                  ("Access-Control-Expose-Headers", "X-Request-Id, Retry-After")]
        if head.method == "OPTIONS":
            fields += [("Access-Control-Allow-Methods", "GET, HEAD, POST, OPTIONS"),
                       ("Access-Control-Allow-Headers", "Authorization, *"), ("Access-Control-Max-Age", "600")]
        return fields

    def _is_ours(self, name: str) -> bool:
        return name in self._hosts or is_local(name)


def is_local(host: str) -> bool:
    """Whether nobody but this machine reaches a server bound to it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _name(host: str) -> str:
    """The Host field, which is a good one, without its port and an IPv6 address's brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_same(origin: str, host: str) -> bool:
    """Whether the page is the server's own. Whoever ends TLS before it keeps the host and not the scheme."""
    return bool(host) and origin.partition("://")[2].lower() == host.lower()
