"""Whether bytes that a function offers are a model's: a client is not trusted, its memory is proved.

A function that outlived its agent still maps the model. Its memfds are adopted only when nobody can ever change them
(all seals, which the kernel grants only while no writable mapping exists), when no page is missing (touching one could
kill the agent), and when their content digest is the revision of what the origin has. The layout is this agent's own;
nothing but the fds comes from the client.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Sequence

from cache_agent.ledger import Ledger
from cache_agent.model import content
from cache_agent.model import manifest as manifests
from cache_agent.model.checkpoint import Description, describe
from cache_agent.model.manifest import Manifest
from cache_agent.model.origin import Origin
from cache_agent.residency.leases import EntryMemory
from cache_agent.tiers.dram import Dram

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_BLOCK = 512  # of st_blocks
_STEP = 8 << 20


class NotAdopted(Exception):
    """The text says why the bytes stay the function's own."""


def inodes(fds: Sequence[int]) -> list[tuple[int, int]]:
    """What memory the fds are, whoever opened them."""
    found = [os.fstat(fd) for fd in fds]
    return [(status.st_dev, status.st_ino) for status in found]


def sealed_size(fds: Sequence[int]) -> int:
    """Bytes of memory behind fds that are sealed memfds; others count for nothing, whatever they claim."""
    return sum(os.fstat(fd).st_blocks * _BLOCK for fd in fds if _is_sealed(fd))


def examine(fds: Sequence[int], plan: Manifest) -> None:
    """Raises `NotAdopted` unless the fds are immutable, whole, and of the plan's sizes."""
    if len(fds) != len(plan.segments):
        raise NotAdopted(f"{len(fds)} segments were offered and the model has {len(plan.segments)}")
    for number, (fd, size) in enumerate(zip(fds, plan.segments, strict=True)):
        if not _is_sealed(fd):
            raise NotAdopted(f"segment {number} is not sealed: somebody could write to it")
        status = os.fstat(fd)
        if status.st_size != size:
            raise NotAdopted(f"segment {number} has {status.st_size} bytes and the model's has {size}")
        if status.st_blocks * _BLOCK < size:
            raise NotAdopted(f"segment {number} has holes")


def receive(origin: Origin, source: str, fds: Sequence[int]) -> EntryMemory:
    """The memory behind the fds, on descriptions of our own, for `prove`.

    Raises `NotAdopted`, or what the origin does.
    """
    description = describe(origin)
    if description.manifest.source != source:
        raise NotAdopted("the origin has other files by now")
    examine(fds, description.manifest)
    return EntryMemory(description, Ledger("agent"), Dram.adopted(fds), tier="dram")


def prove(memory: EntryMemory, origin: Origin, known: str) -> str:
    """The revision that the bytes were shown to be; `known` is what the source is, or "" to read the origin.

    Raises `NotAdopted`, or what the origin does.
    """
    assert memory.dram is not None, "received"
    maps = memory.dram.map()
    try:
        if not content.gaps_are_zero(memory.description.manifest, maps):
            raise NotAdopted("there is something between the tensors")
        found = content.digest(memory.description, maps)
    finally:
        for mapping in maps:
            mapping.close()
    wanted = known or _revision_at(memory.description, origin)
    if found != wanted:
        raise NotAdopted(f"the bytes are {found} and the model is {wanted}")
    memory.keep_manifest()
    return found


def _is_sealed(fd: int) -> bool:
    with contextlib.suppress(OSError):  # no memfd
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    return False


def _revision_at(description: Description, origin: Origin) -> str:
    """Reads the origin once, without keeping it: the price of bytes that nobody on this node has vouched for."""
    contents = {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in description.manifest.files.items()
    }
    for weights in description.manifest.weight_files:
        file = description.source.file(weights.name)
        assert file is not None, "a manifest names only files of its source"
        total = hashlib.sha256()
        for start in range(0, file.size, _STEP):
            total.update(origin.read(file, start, min(_STEP, file.size - start)))
        contents[file.name] = (file.size, total.hexdigest())
    return manifests.revision(contents)
