"""Owns a TCP connection that speaks the protocol and carries bytes between its frames.

Bytes go straight from a file's pages into the socket, and from the socket into the mapping that they are for. Every
wait has a deadline. A peer that moves fewer than SLOWEST bytes per second is given up, however regularly some come.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Sequence

from cache_agent.errors import BadSetting, ProtocolError
from cache_agent.model.manifest import PAGE
from cache_agent.wire.channel import Channel, Disconnected
from cache_agent.wire.message import Message

SLOWEST = 64 << 10  # bytes per second
_READ = 64 << 10
_BACKLOG = 256
_KEEPALIVE = 30  # seconds of silence until TCP probes whether the other machine is there


def parse_address(text: str) -> tuple[str, int]:
    """Return (host, port) of "host:port" or "[v6]:port". Raises `ValueError`."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isdecimal() or not 0 <= int(port) < 1 << 16:
        raise ValueError("use host:port")
    return host, int(port)


def listen(address: str) -> socket.socket:
    """Return a listening TCP socket. Raises `BadSetting`."""
    host, port = parse_address(address)
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG
        )
    except OSError as error:
        raise BadSetting(
            f"cannot listen on {address}: {error.strerror or error}; choose another --agent-listen"
        ) from error


class Link(Channel):
    """One TCP connection. One thread at a time."""

    def __init__(self, sock: socket.socket, *, of_agent: bool, send_timeout: float = 10.0) -> None:
        super().__init__(sock, of_agent=of_agent, send_timeout=send_timeout)
        with contextlib.suppress(OSError):  # the peer may be gone already, which the first read finds
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A connection is a lease: a machine that vanished must not hold a model for hours.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE // 3)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message without fds. Raises `Disconnected`."""
        if fds:
            raise ProtocolError("fds cannot be passed over TCP")
        super().send(message)

    def send_file(self, fd: int, offset: int, size: int) -> None:
        """Send `size` bytes of a file from `offset`, behind the frame that announces them. Raises `Disconnected`."""
        done = 0
        deadline = time.monotonic() + self._send_timeout + size / SLOWEST

        def push() -> int:
            return os.sendfile(self.sock.fileno(), fd, offset + done, size - done)

        while done < size:
            try:
                done += self._pushed(push, deadline)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise Disconnected(error.strerror or str(error)) from error
                # Some filesystems cannot feed a socket, hugetlbfs of older kernels among them.
                start = (offset + done) // PAGE * PAGE
                with (
                    mmap.mmap(fd, offset + size - start, prot=mmap.PROT_READ, offset=start) as pages,
                    memoryview(pages) as view,
                    view[offset + done - start :] as rest,
                ):
                    self.send_bytes(rest)
                return

    def send_bytes(self, data: memoryview | bytes) -> None:
        """Send bytes behind the frame that announces them. Raises `Disconnected`."""
        with memoryview(data) as view:
            done = 0
            deadline = time.monotonic() + self._send_timeout + len(view) / SLOWEST

            def push() -> int:
                with view[done:] as rest:
                    return self.sock.send(rest)

            while done < len(view):
                try:
                    done += self._pushed(push, deadline)
                except OSError as error:
                    raise Disconnected(error.strerror or str(error)) from error

    def read_into(self, view: memoryview, patience: float) -> None:
        """Fill `view` with the bytes behind the frame that was received last.

        Raises `Disconnected` when the peer is gone, sends nothing for `patience` seconds, or is slower than SLOWEST.
        """
        done = 0
        last = time.monotonic()
        deadline = last + patience + len(view) / SLOWEST
        while done < len(view):
            try:
                with view[done:] as rest:
                    count = self.sock.recv_into(rest)
            except BlockingIOError:
                if not self._wait(select.POLLIN, min(last + patience, deadline) - time.monotonic()):
                    raise Disconnected(f"{len(view) - done} of {len(view)} bytes did not come in time") from None
                continue
            except OSError as error:
                raise Disconnected(error.strerror or str(error)) from error
            if count == 0:
                raise Disconnected(f"closed by the peer, {len(view) - done} bytes before the end")
            done += count
            last = time.monotonic()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing waits to be read, not even the connection's end."""
        return not self._wait(select.POLLIN, 0.0)

    def interrupt(self) -> None:
        """End the connection from another thread: a thread that waits on it sees the end."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def read(self, size: int, patience: float) -> bytes:
        """Return the `size` bytes behind the frame that was received last; the caller has checked that size."""
        data = bytearray(size)
        with memoryview(data) as view:
            self.read_into(view, patience)
        return bytes(data)

    def _pushed(self, push: Callable[[], int], deadline: float) -> int:
        """Return the bytes that `push` moved, 0 after a wait for room. Raises `Disconnected`, or `push`'s own error."""
        try:
            return push()
        except BlockingIOError:
            if not self._wait(select.POLLOUT, min(self._send_timeout, deadline - time.monotonic())):
                raise Disconnected("the peer does not read") from None
            return 0

    def _read(self) -> None:
        try:
            data = self.sock.recv(min(_READ, self._decoder.wanted))
        except BlockingIOError:
            return
        except OSError as error:
            raise Disconnected(error.strerror or str(error)) from error
        if not data:
            raise Disconnected("closed by the peer")
        self._messages.extend(self._decoder.feed(data))


def dial(address: str, timeout: float) -> Link:
    """Return a connection to an agent, before `hello`; `timeout` in seconds. Raises `OSError`, `ValueError`."""
    sock = socket.create_connection(parse_address(address), timeout)
    return Link(sock, of_agent=False, send_timeout=timeout)
