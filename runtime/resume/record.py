"""The record of one request in the store: an opening, then the tokens as they come. Pure.

    piece 0     the opening: the answer's context (`AnswerContext`), and a snapshot of every choice
    piece 1 …   progress: for some choices, the tokens from an index on

Pieces are only ever appended, so the cost of a checkpoint does not grow with the answer. A progress may begin before
the end of the recorded tokens, after a worker has continued from an earlier token: the later piece holds. A record
without its last pieces is an earlier, whole record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import msgspec

from runtime.errors import SnapshotRefused
from runtime.resume import snapshot
from runtime.resume.snapshot import MAX_TOKENS, Count, Snapshot, Tokens

FORMAT = 1
MAX_CHOICES = 1024

Route = Literal["chat", "completion", "handler"]


class AnswerContext(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The parts of an answer besides its tokens. `asked` is the digest of the request's body; "" matches nothing."""

    route: Route
    id: str
    created: int = 0
    asked: str = ""
    include_usage: bool = False


class _Opening(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="opening"):
    format: int
    context: AnswerContext
    snapshots: Annotated[list[bytes], msgspec.Meta(min_length=1, max_length=MAX_CHOICES)]


class Gain(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Tokens of choice number `choice`, from index `start` on; they replace all recorded ones from there on."""

    choice: Count
    start: Count
    tokens: Tokens


class _Progress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="progress"):
    format: int
    gains: Annotated[list[Gain], msgspec.Meta(max_length=MAX_CHOICES)]


class Record(msgspec.Struct, frozen=True):
    """A request as far as it was recorded: a snapshot of every choice, with all its tokens."""

    context: AnswerContext
    choices: tuple[Snapshot, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Opening | _Progress)


def opening(context: AnswerContext, choices: Sequence[Snapshot]) -> bytes:
    """Encode piece 0 of a request."""
    return _encoder.encode(_Opening(FORMAT, context, [snapshot.encode(choice) for choice in choices]))


def progress(gains: Mapping[int, tuple[int, Sequence[int]]]) -> bytes:
    """Encode a later piece; `gains`: choice → (index of the first token, tokens)."""
    return _encoder.encode(_Progress(FORMAT, [Gain(choice, at, list(ids)) for choice, (at, ids) in gains.items()]))


def assemble(pieces: Sequence[bytes]) -> Record:
    """Return the record of these pieces. Raises `SnapshotRefused` unless they are one request's, in order."""
    if not pieces:
        raise SnapshotRefused("nothing was kept of this request")
    first, *rest = map(_decoded, pieces)
    if not isinstance(first, _Opening):
        raise SnapshotRefused("what was kept of this request does not begin with its opening")
    choices = [snapshot.decode(data) for data in first.snapshots]
    tokens = [list(choice.state.generated) for choice in choices]
    for piece in rest:
        if not isinstance(piece, _Progress):
            raise SnapshotRefused("what was kept of this request has two openings")
        for gain in piece.gains:
            if gain.choice >= len(tokens) or gain.start > len(tokens[gain.choice]):
                raise SnapshotRefused("what was kept of this request has a hole")
            tokens[gain.choice][gain.start :] = gain.tokens
            if len(tokens[gain.choice]) > MAX_TOKENS:
                raise SnapshotRefused(f"what was kept of this request has more than {MAX_TOKENS} tokens")
    return Record(
        first.context,
        tuple(
            replace(choice, state=replace(choice.state, generated=tuple(ids), emitted=0))
            for choice, ids in zip(choices, tokens, strict=True)
        ),
    )


def _decoded(piece: bytes) -> _Opening | _Progress:
    try:
        found: _Opening | _Progress = _decoder.decode(piece)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SnapshotRefused(f"what was kept of this request is not of format {FORMAT}: {error}") from error
    if found.format != FORMAT:
        raise SnapshotRefused(f"this request was kept in format {found.format}, this replica reads format {FORMAT}")
    return found
