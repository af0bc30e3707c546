"""Owns a unix socket that speaks the protocol; no other module sends or receives fds.

Every fd that arrives is either returned with the message that names it or closed: a peer cannot fill the process's
table of fds.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType

from cache_agent.errors import AgentTimeout, ProtocolError
from cache_agent.wire.message import MAX_FDS, Message
from cache_agent.wire.messages import AnyMessage
from cache_agent.wire.protocol import MAX_REPLY, MAX_REQUEST, Decoder, advance, encode

_READ = 64 << 10
_FD_SPACE = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class Disconnected(Exception):
    """The peer is gone, or does not read."""


class Channel:
    """One connection and its protocol state. One thread at a time."""

    def __init__(self, sock: socket.socket, *, of_agent: bool, send_timeout: float = 10.0) -> None:
        """Take over a connected socket; `send_timeout` in seconds.

        With `of_agent` messages of up to MAX_REQUEST bytes are accepted, else of up to MAX_REPLY. The agent's side
        takes fds in state "open" only, and only with a whole message: a client cannot leave fds there.
        """
        self.sock = sock
        self.state = "new"
        self._of_agent = of_agent
        self._send_timeout = send_timeout
        self._decoder = Decoder(MAX_REQUEST if of_agent else MAX_REPLY)
        self._messages: deque[AnyMessage] = deque()
        self._fds: deque[int] = deque()
        sock.setblocking(False)

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message. Raises `Disconnected` when the peer is gone or does not read within the send timeout."""
        self.state = advance(self.state, message)
        frame = memoryview(encode(message))
        deadline = time.monotonic() + self._send_timeout
        while frame:
            try:
                if fds:
                    sent = socket.send_fds(self.sock, [frame], fds)
                    fds = ()
                else:
                    sent = self.sock.send(frame)
                frame = frame[sent:]
            except BlockingIOError:
                if not self._wait(select.POLLOUT, deadline - time.monotonic()):
                    raise Disconnected(f"peer did not read for {self._send_timeout:.0f} s") from None
            except OSError as error:
                raise Disconnected(error.strerror or str(error)) from error

    def receive(self, deadline: float) -> tuple[AnyMessage, list[int]]:
        """Return the next message and its fds, which the caller closes. `deadline` in seconds of time.monotonic.

        Raises `AgentTimeout`, `Disconnected`, or `ProtocolError`, after which the channel is of no more use.
        """
        while (received := self.poll()) is None:
            if not self._wait(select.POLLIN, deadline - time.monotonic()):
                raise AgentTimeout("the agent did not answer in time; is it overloaded or stopped?")
        return received

    def poll(self) -> tuple[AnyMessage, list[int]] | None:
        """Return the next message and its fds like `receive`, without waiting: None when no whole message is there."""
        if not self._messages:
            self._read()
        if not self._messages:
            return None
        message = self._messages.popleft()
        self.state = advance(self.state, message)
        wanted = getattr(message, "fds", 0)
        if wanted > len(self._fds):
            raise ProtocolError(f"a message names {wanted} fds and {len(self._fds)} came with it")
        fds = [self._fds.popleft() for _ in range(wanted)]
        if self._fds and not self._messages and not self._decoder.pending:
            raise ProtocolError("fds came that no message names")
        return message, fds

    def _read(self) -> None:
        try:
            # socket.recv_fds drops its flags, and a function's children must not inherit the weights.
            data, ancillary, flags, _ = self.sock.recvmsg(_READ, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError as error:
            raise Disconnected(error.strerror or str(error)) from error
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        self._fds.extend(fds)
        if fds and self._of_agent and self.state != "open":
            raise ProtocolError("fds are not accepted here")
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            raise ProtocolError(f"more than {MAX_FDS} fds at once")
        if not data:
            raise Disconnected("closed by the peer")
        self._messages.extend(self._decoder.feed(data))
        if self._of_agent and self._fds and not self._messages:
            raise ProtocolError("fds came with half a message")

    def _wait(self, events: int, seconds: float) -> bool:
        """Wait until the socket is ready for `events` (POLLIN, POLLOUT); False when `seconds` ended first."""
        poller = select.poll()
        poller.register(self.sock, events)
        return bool(poller.poll(max(0.0, seconds) * 1000))

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popleft())
        with contextlib.suppress(OSError):
            self.sock.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
