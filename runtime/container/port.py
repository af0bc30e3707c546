"""The function's port, opened or inherited; whether a socket answers. Standard library only."""

from __future__ import annotations

import contextlib
import os
import socket

from runtime.config import FunctionConfig
from runtime.errors import BadConfig

BACKLOG = 1024


def open_port(config: FunctionConfig) -> socket.socket:
    """Return the listening socket. Raises `BadConfig`."""
    if config.listen_fd >= 0:
        return _take(config.listen_fd)
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        _send_at_once(listener)
        listener.listen(BACKLOG)
    except OSError as error:
        raise BadConfig(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; set PORT to another port"
        ) from error
    return listener


def _take(fd: int) -> socket.socket:
    """Return the inherited socket, in which requests may wait since before this process began."""
    try:
        listener = socket.socket(fileno=fd)
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise BadConfig(f"GLOWPLUG_LISTEN_FD is {fd}, which is no open socket ({error.strerror})") from error
    if not listening:
        raise BadConfig(f"GLOWPLUG_LISTEN_FD is {fd}, a socket that does not listen")
    listener.set_inheritable(False)
    _send_at_once(listener)
    return listener


def _send_at_once(listener: socket.socket) -> None:
    """Set TCP_NODELAY, which accepted connections inherit; a socket without TCP stays as it is.

    Without the option the body of an answer waits on a kept connection until the peer acknowledges the headers: 40 ms.
    """
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def answers(path: str) -> bool:
    """Return whether a process accepts connections on this unix socket."""
    if os.path.exists(path):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            with contextlib.suppress(OSError):
                probe.connect(path)
                return True
    return False
