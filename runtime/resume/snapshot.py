"""The format of a snapshot: all that a generation needs to continue elsewhere, to bytes and back. Pure.

    snapshot := magic version header-length header rows checksum

    magic          8 bytes, "GLOWSNAP"
    version        2 bytes, big endian; a reader takes its own version only
    header-length  4 bytes, big endian, 2 … MAX_HEADER
    header         one JSON object: `Header`; each of its rows says how many bytes it has
    rows           the bytes of the cache's rows, in the header's order, without gaps
    checksum       8 bytes, XXH3 of everything before it: against damage, not against forgers

The agents sign a snapshot that leaves its node (`cache_agent.wire.signing`): only they have the cluster's key. In the
store it may be encrypted with the function's key (`runtime.resume.seal`). Access rights are checked before `decode`;
`decode` checks that a snapshot is well-formed and complete, and `check` names the first thing in which this replica
differs from the one that made it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
import xxhash

from runtime.engine.base import STATE_VERSION, GenerationRequest, GenerationState, KVRow, SamplingParams
from runtime.errors import SnapshotRefused

VERSION = 1
MAGIC = b"GLOWSNAP"
MAX_TOKENS = 1 << 21  # of prompt and answer, each
MAX_HEADER = 32 << 20
MAX_ROWS = 4096
MAX_SNAPSHOT = 16 << 30

_FRONT = struct.Struct("!8sHI")
_CHECKSUM = 8

Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Tokens = Annotated[list[Token], msgspec.Meta(max_length=MAX_TOKENS)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Name = Annotated[str, msgspec.Meta(max_length=512)]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A generation's state, the digests of the tokenizer and the adapter ("" for none) that it needs, and the fencing
    epoch under which it was taken."""

    state: GenerationState
    tokenizer: str
    adapter: str = ""
    epoch: int = 0


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Name
    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    shape: Annotated[list[Count], msgspec.Meta(max_length=8)]
    bytes: Count


class _Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    temperature: float
    top_k: Count
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Annotated[dict[Token, float], msgspec.Meta(max_length=4096)]
    seed: int


class _Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: Name
    prompt: Annotated[Tokens, msgspec.Meta(min_length=1)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    sampling: _Sampling
    stop: Annotated[list[Annotated[str, msgspec.Meta(max_length=4096)]], msgspec.Meta(max_length=64)]
    stop_ids: Annotated[list[Token], msgspec.Meta(max_length=4096)]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=1000)] | None
    deterministic: bool


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The generation itself. Unknown fields are refused: a reader that ignores one continues the generation wrongly."""

    state: int
    engine: Name
    revision: Name
    tokenizer: Name
    adapter: Name
    arithmetic: Name
    epoch: Count
    request: _Request
    generated: Tokens
    emitted: Count
    rows: Annotated[list[_Row], msgspec.Meta(max_length=MAX_ROWS)]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Header)


def encode(snapshot: Snapshot) -> bytes:
    """Return the snapshot as bytes."""
    state, request = snapshot.state, snapshot.state.request
    sampling = {name: getattr(request.sampling, name) for name in _Sampling.__struct_fields__}
    header = Header(
        state.version,
        state.engine,
        state.revision,
        snapshot.tokenizer,
        snapshot.adapter,
        state.arithmetic,
        snapshot.epoch,
        _Request(
            request.id,
            list(request.prompt),
            request.max_tokens,
            _Sampling(**{**sampling, "logit_bias": dict(request.sampling.logit_bias)}),
            list(request.stop),
            sorted(request.stop_ids),
            request.logprobs,
            request.deterministic,
        ),
        list(state.generated),
        state.emitted,
        [_Row(row.name, row.dtype, list(row.shape), len(row.data)) for row in state.kv],
    )
    body = _encoder.encode(header)
    checksum = xxhash.xxh3_64()
    parts = [_FRONT.pack(MAGIC, VERSION, len(body)), body, *(row.data for row in state.kv)]
    for part in parts:
        checksum.update(part)
    return b"".join([*parts, checksum.digest()])


def decode(data: bytes | memoryview) -> Snapshot:
    """Return the snapshot that these bytes are.

    Raises `SnapshotRefused`, with the reason, for anything but the whole of one snapshot of this version.
    """
    view = memoryview(data)
    if not _FRONT.size + _CHECKSUM < len(view) <= MAX_SNAPSHOT:
        raise SnapshotRefused(f"{len(view)} bytes are no snapshot; it is cut off, or something else")
    magic, version, length = _FRONT.unpack_from(view)
    if magic != MAGIC:
        raise SnapshotRefused("this is no snapshot: it does not begin with GLOWSNAP")
    if version != VERSION:
        raise SnapshotRefused(f"the snapshot has format {version}, this replica reads format {VERSION}; update one")
    end = len(view) - _CHECKSUM
    if not 2 <= length <= min(MAX_HEADER, end - _FRONT.size):
        raise SnapshotRefused(f"the snapshot announces a header of {length} bytes; it is cut off, or damaged")
    if xxhash.xxh3_64_digest(view[:end]) != view[end:]:
        raise SnapshotRefused("the snapshot is damaged: its checksum is another")
    try:
        header = _decoder.decode(view[_FRONT.size : _FRONT.size + length])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SnapshotRefused(f"the snapshot's header is not one of format {VERSION}: {error}") from error
    return Snapshot(_state(header, view[_FRONT.size + length : end]), header.tokenizer, header.adapter, header.epoch)


def _state(header: Header, data: memoryview) -> GenerationState:
    if sum(row.bytes for row in header.rows) != len(data):
        raise SnapshotRefused("the snapshot's rows are not as long as its header says; it is cut off, or damaged")
    if len({row.name for row in header.rows}) != len(header.rows):
        raise SnapshotRefused("the snapshot has two rows of the same name")
    given = header.request.sampling
    values = {name: getattr(given, name) for name in _Sampling.__struct_fields__}
    numbers = [value for value in values.values() if isinstance(value, float)]
    if not all(map(math.isfinite, [*numbers, *given.logit_bias.values()])):
        raise SnapshotRefused("the snapshot's sampling parameters are not finite numbers")
    request = GenerationRequest(
        header.request.id,
        tuple(header.request.prompt),
        header.request.max_tokens,
        SamplingParams(**values),
        tuple(header.request.stop),
        frozenset(header.request.stop_ids),
        header.request.logprobs,
        header.request.deterministic,
    )
    rows, at = [], 0
    for row in header.rows:
        rows.append(KVRow(row.name, row.dtype, tuple(row.shape), bytes(data[at : at + row.bytes])))
        at += row.bytes
    return GenerationState(
        header.state,
        header.engine,
        header.revision,
        request,
        tuple(header.generated),
        header.emitted,
        tuple(rows),
        header.arithmetic,
    )


def tokenizer_digest(files: Mapping[str, bytes]) -> str:
    """Return the digest of a model's small files, without those that only configure the model and its sampling."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(set(files) - {"config.json", "generation_config.json"}):
        digest.update(f"{name}\0{len(files[name])}\0".encode())
        digest.update(files[name])
    return f"tok-{digest.hexdigest()}"


@dataclass(frozen=True, slots=True)
class ReplicaIdentity:
    """The properties of a replica that a snapshot depends on; `arithmetic` matters to deterministic requests only."""

    engine: str
    revision: str
    tokenizer: str
    adapter: str = ""
    arithmetic: str = ""

    def state(self, request: GenerationRequest, generated: Sequence[int] = ()) -> GenerationState:
        """Return the state of a request of this replica, by its tokens alone."""
        arithmetic = self.arithmetic if request.deterministic else ""
        return GenerationState(
            STATE_VERSION, self.engine, self.revision, request, tuple(generated), 0, arithmetic=arithmetic
        )

    def snapshot(self, state: GenerationState, epoch: int = 0) -> Snapshot:
        return Snapshot(state, self.tokenizer, self.adapter, epoch)


def check(snapshot: Snapshot, here: ReplicaIdentity) -> None:
    """Raise `SnapshotRefused`, naming the first difference between `here` and the replica that made the snapshot."""
    state = snapshot.state
    if state.version != STATE_VERSION:
        raise SnapshotRefused(f"the generation's state has version {state.version}, here is version {STATE_VERSION}")
    there = ReplicaIdentity(state.engine, state.revision, snapshot.tokenizer, snapshot.adapter, state.arithmetic)
    if not state.request.deterministic:
        here, there = replace(here, arithmetic=""), replace(there, arithmetic="")
    for what in ("engine", "revision", "tokenizer", "adapter", "arithmetic"):
        made, have = getattr(there, what), getattr(here, what)
        if made != have:
            raise SnapshotRefused(
                f"the snapshot was made with another {what} ({made or 'none'}) than this replica has "
                f"({have or 'none'}); send it to a replica of the same function"
            )
