"""Owns the way of byte strings that travel with a message: few bytes inside it, many in a sealed memfd beside it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Sequence

from cache_agent.errors import ProtocolError

INLINE = 16 << 10  # bytes; in base64, with the rest of a request, they stay below MAX_REQUEST
MOST = 4 << 30
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def pack(pieces: Sequence[bytes]) -> tuple[list[int], bytes, list[int]]:
    """Return the pieces' lengths, the bytes for the message, and the fds that go with it: none, or one.

    Either the message or the fd has all bytes. The caller closes the fd.
    """
    data = b"".join(pieces)
    inline = len(data) <= INLINE
    fds = [] if inline else [sealed_bytes(data, "glowplug:pieces")]
    return [len(piece) for piece in pieces], data if inline else b"", fds


def unpack(lengths: Sequence[int], data: bytes, fds: Sequence[int]) -> list[bytes]:
    """Return the pieces that `pack` was given; `fds` stay the caller's. Raises `ProtocolError` where lengths differ."""
    size = sum(lengths)
    if fds:
        data = b"".join(_read(fds[0], size))
    if len(data) != size:
        raise ProtocolError(f"{len(data)} bytes came for pieces of {size}")
    pieces, at = [], 0
    for length in lengths:
        pieces.append(data[at : at + length])
        at += length
    return pieces


def _read(fd: int, size: int) -> list[bytes]:
    """Read a memfd of `size` bytes that is sealed against every change, so that reading it never waits."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        sealed = False
    if not sealed or size > MOST or os.fstat(fd).st_size != size:
        raise ProtocolError(f"an fd came for pieces of {size} bytes that is no sealed memfd of this size")
    parts, at = [], 0
    while at < size and (part := os.pread(fd, size - at, at)):
        parts.append(part)
        at += len(part)
    return parts


def sealed_bytes(data: bytes, name: str) -> int:
    """Return a read-only fd of an immutable memfd that holds `data`; the caller closes it."""
    owner = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with contextlib.closing(os.fdopen(os.dup(owner), "wb")) as file:
            file.write(data)
        fcntl.fcntl(owner, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
        return os.open(f"/proc/self/fd/{owner}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(owner)
