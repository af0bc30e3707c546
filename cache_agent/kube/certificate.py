"""Owns a TLS server's certificate and key, and reads the files again when they change."""

from __future__ import annotations

import contextlib
import socket
import ssl
from pathlib import Path

from cache_agent.errors import BadSetting
from cache_agent.stamp import Stamp, stamp

_HANDSHAKE_SECONDS = 5.0


class Certificate:
    """A certificate chain and its private key, in PEM files, with their TLS context. Any thread."""

    def __init__(self, chain: Path, key: Path) -> None:
        """Read the files. Raises `BadSetting`."""
        self.chain = chain
        self.key = key
        self._stamps: list[Stamp] = []
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load()

    def secure(self, sock: socket.socket) -> ssl.SSLSocket:
        """Shake hands with a client, within five seconds. Raises `OSError`."""
        with contextlib.suppress(BadSetting):  # a pair in the middle of its renewal: the old one serves this client
            self._load()
        sock.settimeout(_HANDSHAKE_SECONDS)
        return self._context.wrap_socket(sock, server_side=True)

    def _load(self) -> None:
        try:
            stamps = [stamp(self.chain), stamp(self.key)]
            if stamps != self._stamps:
                self._context.load_cert_chain(self.chain, self.key)
                self._stamps = stamps
        except OSError as error:  # ssl.SSLError is one
            raise BadSetting(f"{self.chain} and {self.key} are no certificate and key: {error}") from error
