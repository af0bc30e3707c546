"""Helpers of the agent's tests for leases: deadlines, the bytes behind the fds, models that have chunks."""

from __future__ import annotations

import mmap
import os
import random
import time

from cache_agent.model.manifest import CHUNK

FAKE = "fake://m"


def soon(seconds: float = 120.0) -> float:
    """A deadline."""
    return time.monotonic() + seconds


def tensors_of(lease) -> dict[str, bytes]:
    """Every tensor's bytes, through mappings of the leased segments."""
    maps = [mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) for fd in lease.segments]
    try:
        return {t.name: maps[t.segment][t.offset : t.offset + t.size] for t in lease.manifest.tensors}
    finally:
        for view in maps:
            view.close()


def whole(lease) -> list[bytes]:
    """All bytes of all segments, padding included."""
    found = []
    for fd in lease.segments:
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
            found.append(view[:])
    return found


def contents(tensors) -> dict[str, bytes]:
    """Return a checkpoint's tensors as `tensors_of` has to find them."""
    return {name: content for name, (_, _, content) in tensors.items()}


def inodes(lease) -> list[int]:
    """Return the inodes of a lease's segments, which identify its memory."""
    return [os.fstat(fd).st_ino for fd in lease.segments]


def ready(agent, uri: str, seconds: float = 120.0):
    """A lease whose bytes are all there."""
    lease = agent.client.lease(uri, deadline=soon(seconds))
    try:
        lease.wait_ready(soon(seconds))
    except BaseException:
        lease.close()
        raise
    return lease


def large_tensors(chunks: int = 3, seed: int = 0) -> dict:
    """A model of one embedding and `chunks` layers of about a chunk each; cheap to make, different everywhere."""
    source = random.Random(seed)
    tensors = {"model.embed_tokens.weight": ("U8", (1000,), source.randbytes(1000))}
    for layer in range(chunks):
        block = source.randbytes(1 << 16) * (CHUNK >> 16)
        tensors[f"model.layers.{layer}.mlp.weight"] = ("U8", (len(block) - 7,), block[7:])
    return tensors
