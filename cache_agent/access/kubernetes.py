"""Owns access to the Kubernetes API: address, certificate authority, and the pod's token, read for each request."""

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
    """One API server, used as the ServiceAccount whose files (`token`, `ca.crt`) are in the directory `account`."""

    def __init__(self, url: str, account: Path = SERVICE_ACCOUNT) -> None:
        """`url` is the server's root. Raises `BadSetting`."""
        place = urlsplit(url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise BadSetting(f"GLOWPLUG_KUBERNETES={url!r} is no URL; use https://kubernetes.default.svc")
        self._secure = place.scheme == "https"
        self._host, self._port = place.hostname, place.port
        self._prefix = place.path.rstrip("/")
        self._account = account

    def path(self, path: str) -> str:
        """Return `path` below the server's root."""
        return self._prefix + path

    def headers(self, **more: str) -> dict[str, str]:
        """Return every request's headers, with the token as it is now: the kubelet renews its file."""
        headers = {"User-Agent": "glowplug-agent", **more}
        with contextlib.suppress(FileNotFoundError):
            headers["Authorization"] = "Bearer " + (self._account / "token").read_text().strip()
        return headers

    def connection(self, seconds: float = _CONNECT_SECONDS) -> HTTPConnection:
        """Return a connection that is not open yet; `seconds` bounds the connecting and every read."""
        if not self._secure:
            return HTTPConnection(self._host, self._port, timeout=seconds)
        authority = self._account / "ca.crt"
        context = ssl.create_default_context(cafile=str(authority) if authority.exists() else None)
        return HTTPSConnection(self._host, self._port, timeout=seconds, context=context)
