"""How the Kubernetes API is spoken to: its address, its authority, and the pod's own token, read anew each time."""

from __future__ import annotations

import contextlib
import ssl
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

from cache_agent.errors import BadSetting

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CONNECT_SECONDS = 5.0


class Api:
    """One API server, as the ServiceAccount whose files `account` holds (`token` and `ca.crt`)."""

    def __init__(self, url: str, account: Path = SERVICE_ACCOUNT) -> None:
        """Raises `BadSetting`."""
        place = urlsplit(url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise BadSetting(f"GLOWPLUG_KUBERNETES={url!r} is no URL; use https://kubernetes.default.svc")
        self._secure = place.scheme == "https"
        self._host, self._port = place.hostname, place.port
        self._prefix = place.path.rstrip("/")
        self._account = account

    def path(self, path: str) -> str:
        """`path` below the server's root, as it is asked for."""
        return self._prefix + path

    def headers(self, **more: str) -> dict[str, str]:
        """What every request carries; the kubelet renews the token under us."""
        headers = {"User-Agent": "glowplug-agent", **more}
        with contextlib.suppress(FileNotFoundError):
            headers["Authorization"] = "Bearer " + (self._account / "token").read_text().strip()
        return headers

    def connection(self, seconds: float = _CONNECT_SECONDS) -> HTTPConnection:
        """Not connected yet; `seconds` is its patience with connecting and with every read."""
        if not self._secure:
            return HTTPConnection(self._host, self._port, timeout=seconds)
        authority = self._account / "ca.crt"
        context = ssl.create_default_context(cafile=str(authority) if authority.exists() else None)
        return HTTPSConnection(self._host, self._port, timeout=seconds, context=context)
