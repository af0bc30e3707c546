"""The connection of two workers during a hand-off: messages that are sealed, counted, and never late.

Any thread may send; one receives. A side that takes no byte for `STALL` seconds, sends none for `SILENCE` seconds, or
sends another frame than the one that follows is given up: afterwards the pipe is closed.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import threading
import time
from types import TracebackType

from runtime.errors import SnapshotRefused
from runtime.handoff.messages import HEADER, MAX_FRAME, VERSION, AnyMessage, Beat, Greeting, PipeMessage, decode, encode
from runtime.resume.seal import Seal

STALL = 2.0  # seconds
SILENCE = 5.0
BEAT = 1.0  # seconds without a message after which a beat is sent
_GREETING = 3.0
_READ = 256 << 10
_SEALED = 64  # bytes that sealing adds, at most


class Broken(Exception):
    """The other side is gone, too slow, or no sibling of this worker."""


class Pipe:
    """One end of the connection. It owns the connected socket that it is made with; `greet` comes first."""

    def __init__(self, sock: socket.socket, seal: Seal, *, source: bool) -> None:
        """`source` is the end of the worker that drains."""
        self._sock = sock
        self._seal = seal
        self._sides = ("source", "destination") if source else ("destination", "source")
        self._pair = ""
        self._sending = threading.Lock()
        self._sent = self._received = 0
        self._said = self._heard = time.monotonic()
        self._buffer = bytearray()
        self._broken = ""
        sock.setblocking(False)

    def greet(self, siblings: str, owner: str, slots: int = 0, queue: int = 0) -> Greeting:
        """Exchange greetings; return the other side's. Raises `Broken`."""
        mine = secrets.token_hex(16)
        self._push(encode(Greeting(VERSION, mine, siblings, owner, slots, queue)))
        deadline = time.monotonic() + _GREETING
        while (body := self._frame(deadline - time.monotonic())) is None:
            if time.monotonic() >= deadline:
                raise self._fail(f"the other side did not greet within {_GREETING:.0f} s")
        theirs = self._decoded(body)
        if not isinstance(theirs, Greeting) or theirs.version != VERSION:
            raise self._fail("the other side speaks another version of hand-offs; update the older of the two")
        if theirs.siblings != siblings:
            raise self._fail("the other side is no replica of this function with the same model")
        source = self._sides[0] == "source"
        self._pair = f"{mine}{theirs.nonce}" if source else f"{theirs.nonce}{mine}"
        return theirs

    def send(self, message: PipeMessage) -> None:
        """Send a message. Raises `Broken`."""
        data = encode(message)
        with self._sending:
            body = self._seal.close(self._about(self._sides[0], self._sent), data)
            self._sent += 1
            self._push(body)

    def receive(self, timeout: float) -> AnyMessage | None:
        """Return the next message, or None after `timeout` seconds; send and skip beats. Raises `Broken`."""
        deadline = time.monotonic() + timeout
        while True:
            now = time.monotonic()
            if now >= self._said + BEAT:
                self.send(Beat())
            body = self._frame(min(deadline - now, BEAT))
            if body is not None:
                message = self._opened(body)
                if not isinstance(message, Beat):
                    return message
            elif time.monotonic() >= self._heard + SILENCE:
                raise self._fail(f"the other side has been silent for {SILENCE:.0f} s")
            if time.monotonic() >= deadline:
                return None

    def close(self, why: str = "it was closed") -> None:
        """Make both sides' calls fail with `why`; from any thread, and more than once."""
        self._broken = self._broken or why
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close the socket; for the receiving thread. Later sends raise `Broken`."""
        self.close()
        with self._sending:
            self._sock.close()

    # --- bytes ------------------------------------------------------------------------------------------------------

    def _about(self, side: str, number: int) -> str:
        return f"message {number} of the {side} in hand-off {self._pair}"

    def _opened(self, body: bytes) -> AnyMessage:
        about = self._about(self._sides[1], self._received)
        self._received += 1
        try:
            return self._decoded(self._seal.open(about, body))
        except SnapshotRefused as error:
            raise self._fail(error.text) from error

    def _decoded(self, body: bytes) -> AnyMessage:
        try:
            return decode(body)
        except SnapshotRefused as error:
            raise self._fail(error.text) from error

    def _push(self, body: bytes) -> None:
        rest = memoryview(HEADER.pack(len(body)) + body)
        while rest:
            if self._broken:
                raise Broken(self._broken)
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                if not self._wait(select.POLLOUT, STALL):
                    raise self._fail(f"the other side took no byte for {STALL:.0f} s") from None
            except OSError as error:
                raise self._fail(f"the other side is gone ({error.strerror or error})") from error
        self._said = time.monotonic()

    def _frame(self, timeout: float) -> bytes | None:
        """Return the next body, or None after `timeout` seconds without one."""
        deadline = time.monotonic() + timeout
        while True:
            if len(self._buffer) >= HEADER.size:
                (length,) = HEADER.unpack_from(self._buffer)
                if not 1 <= length <= MAX_FRAME + _SEALED:
                    raise self._fail(f"a frame of {length} bytes is announced; 1 to {MAX_FRAME} are allowed")
                if len(self._buffer) >= HEADER.size + length:
                    body = bytes(self._buffer[HEADER.size : HEADER.size + length])
                    del self._buffer[: HEADER.size + length]
                    return body
            if self._broken:
                raise Broken(self._broken)
            try:
                data = self._sock.recv(_READ)
            except BlockingIOError:
                if not self._wait(select.POLLIN, deadline - time.monotonic()):
                    return None
                continue
            except OSError as error:
                raise self._fail(f"the other side is gone ({error.strerror or error})") from error
            if not data:
                raise self._fail("the other side is gone")
            self._heard = time.monotonic()
            self._buffer += data

    def _wait(self, events: int, seconds: float) -> bool:
        poller = select.poll()
        try:
            poller.register(self._sock, events)
        except ValueError:  # closed by the thread that owns it
            return True
        return bool(poller.poll(max(0.0, seconds) * 1000))

    def _fail(self, why: str) -> Broken:
        self.close(why)
        return Broken(self._broken)
