"""The function's port, opened or inherited: what its connections inherit from it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from runtime.config import FunctionConfig
from runtime.container.port import open_port
from runtime.errors import BadConfig


def sends_at_once(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def given(listener: socket.socket) -> FunctionConfig:
    """Return settings with an inherited listening socket, whose fd the function owns."""
    return FunctionConfig(model="/m", listen_fd=os.dup(listener.fileno()))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_to_a_port_that_it_opened_send_at_once(host: str) -> None:
    try:
        listener = open_port(FunctionConfig(model="/m", host=host, port=0))
    except BadConfig as error:
        if host == "127.0.0.1":
            raise
        pytest.skip(f"there is no IPv6 here: {error}")
    with listener, socket.create_connection(listener.getsockname()[:2]), listener.accept()[0] as accepted:
        assert sends_at_once(listener)
        assert sends_at_once(accepted)


def test_connections_to_a_port_that_it_was_given_send_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        assert not sends_at_once(opened), "else nothing is tried"
        with (
            open_port(given(opened)) as listener,
            socket.create_connection(opened.getsockname()),
            listener.accept()[0] as accepted,
        ):
            assert sends_at_once(accepted)
            assert not listener.get_inheritable()


def test_a_unix_socket_that_it_was_given_is_taken_as_it_is(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "port"))
        opened.listen()
        with open_port(given(opened)) as listener:
            assert listener.family == socket.AF_UNIX
