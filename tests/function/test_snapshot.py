"""The formats of snapshots and records: golden bytes, damage, other replicas, hostile input."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.base import STATE_VERSION, GenerationRequest, GenerationState, KVRow, SamplingParams
from runtime.engine.toy import ToyEngine
from runtime.errors import SnapshotRefused
from runtime.resume import record, snapshot
from runtime.resume.record import AnswerContext
from runtime.resume.snapshot import ReplicaIdentity, Snapshot, check, decode, encode

REQUEST = GenerationRequest(
    "chatcmpl-0123456789abcdef01234567-0",
    (256, 257, 97, 98),
    40,
    SamplingParams(0.7, 40, 0.95, 0.01, 1.1, 0.5, -0.25, {7: -100.0, 9: 2.5}, -(2**63)),
    ("\n\n", "ü“"),
    frozenset({259, 2}),
    3,
    True,
)
ROWS = (
    KVRow("fed", "int64", (), (5).to_bytes(8, "little")),
    KVRow("exact", "int64", (), (4).to_bytes(8, "little")),
    KVRow("0", "bfloat16", (5, 1, 4), bytes(range(40))),
)
STATE = GenerationState(STATE_VERSION, "batched", "rev-1", REQUEST, (11, 12), 3, ROWS, "8 rows, 1 thread")
SNAPSHOT = Snapshot(STATE, "tok-1", "", 7)
BARE = Snapshot(replace(STATE, kv=(), generated=(), emitted=0, arithmetic=""), "tok-1")
HERE = ReplicaIdentity("batched", "rev-1", "tok-1", "", "8 rows, 1 thread")


def resealed(data: bytes) -> bytes:
    """Return the same bytes with a checksum that fits."""
    return data[:-8] + xxhash.xxh3_64_digest(data[:-8])


def refused(data: bytes, match: str | None = None) -> None:
    with pytest.raises(SnapshotRefused, match=match) as caught:
        decode(data)
    assert len(caught.value.text.split()) > 4


def test_golden(golden: Callable[[str, Any], None]) -> None:
    """Hex of the bytes: a change of the format shows in review, and needs another version."""
    golden("function/snapshots.json", {"rows": encode(SNAPSHOT).hex(), "bare": encode(BARE).hex()})


@pytest.mark.parametrize("made", [SNAPSHOT, BARE])
def test_it_comes_back_as_it_was(made: Snapshot) -> None:
    assert decode(encode(made)) == made
    assert decode(memoryview(encode(made))) == made


@given(
    st.floats(0, 2, allow_nan=False),
    st.lists(st.integers(0, (1 << 31) - 1), min_size=1, max_size=50),
    st.lists(st.integers(0, (1 << 31) - 1), max_size=50),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9), max_size=4),
    st.integers(-(2**63), 2**63 - 1),
    st.lists(st.binary(max_size=30), max_size=3),
)
def test_any_state_comes_back(
    temperature: float, prompt: list[int], generated: list[int], stop: list[str], seed: int, rows: list[bytes]
) -> None:
    request = replace(
        REQUEST, prompt=tuple(prompt), stop=tuple(stop), sampling=SamplingParams(temperature=temperature, seed=seed)
    )
    kv = tuple(KVRow(str(number), "uint8", (len(data),), data) for number, data in enumerate(rows))
    made = replace(SNAPSHOT, state=replace(STATE, request=request, generated=tuple(generated), kv=kv))
    assert decode(encode(made)) == made


def test_every_truncation_is_refused() -> None:
    data = encode(SNAPSHOT)
    for length in range(len(data)):
        refused(data[:length])
    refused(data + b"\0")


def test_every_changed_byte_is_refused() -> None:
    data = encode(SNAPSHOT)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x41
        refused(bytes(changed))


def test_another_format_is_named() -> None:
    data = bytearray(encode(BARE))
    data[8:10] = struct.pack("!H", 2)
    refused(resealed(bytes(data)), "has format 2, this replica reads format 1")


def headers() -> dict[str, tuple[bytes, bytes]]:
    return {
        "unknown field": (b'"state":', b'"later":1,"state":'),
        "no request": (b'"request":', b'"requesx":'),
        "empty prompt": (b'"prompt":[256,257,97,98]', b'"prompt":[]'),
        "negative token": (b'"prompt":[256', b'"prompt":[-25'),
        "token too large": (b'"generated":[11,12]', b'"generated":[4294967296]'),
        "no tokens wanted": (b'"max_tokens":40', b'"max_tokens":0'),
        "temperature is text": (b'"temperature":0.7', b'"temperature":"0"'),
        "seed is a float": (b'"seed":-9223372036854775808', b'"seed":-922337203685477580.8'),
        "negative epoch": (b'"epoch":7', b'"epoch":-1'),
        "row longer": (b'"bytes":40', b'"bytes":41'),
        "row shorter": (b'"bytes":40', b'"bytes":39'),
        "rows beyond all memory": (b'"bytes":40', b'"bytes":4611686018427387903'),
        "two rows of a name": (b'"name":"exact"', b'"name":"fed"'),
        "not JSON": (b'{"state"', b'["state"'),
    }


@pytest.mark.parametrize("name", headers())
def test_a_header_that_is_none_is_refused(name: str) -> None:
    old, new = headers()[name]
    data = encode(SNAPSHOT)
    magic, version, length = struct.unpack_from("!8sHI", data)
    header, rest = data[14 : 14 + length], data[14 + length :]
    assert old in header
    header = header.replace(old, new, 1)
    refused(resealed(struct.pack("!8sHI", magic, version, len(header)) + header + rest))


@pytest.mark.parametrize("number", ["1e999", "NaN"])
def test_numbers_that_are_none(number: str) -> None:
    data = encode(SNAPSHOT)
    length = struct.unpack_from("!8sHI", data)[2]
    header = data[14 : 14 + length].replace(b'"7":-100.0', b'"7":' + number.encode())
    refused(resealed(struct.pack("!8sHI", b"GLOWSNAP", 1, len(header)) + header + data[14 + length :]))


@given(st.binary(max_size=200))
def test_fuzz_any_bytes(data: bytes) -> None:
    refused(data)
    refused(resealed(struct.pack("!8sHI", b"GLOWSNAP", 1, len(data)) + data + bytes(8)))


def test_fuzz_changed_headers(rounds: Callable[[int, int], int]) -> None:
    """Damaged bytes give a state of the declared types, or a refusal, and nothing else."""
    source, data = random.Random(5), encode(SNAPSHOT)
    for _ in range(rounds(2000, 300_000)):
        changed = bytearray(data)
        for _ in range(source.randint(1, 3)):
            changed[source.randrange(14, len(changed) - 8)] = source.randrange(256)
        try:
            found = decode(resealed(bytes(changed)))
        except SnapshotRefused:
            continue
        assert decode(encode(found)) == found


# --- who may go on with it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["engine", "revision", "tokenizer", "adapter", "arithmetic"])
def test_another_replica_is_refused_by_name(what: str) -> None:
    check(SNAPSHOT, HERE)
    with pytest.raises(SnapshotRefused, match=f"made with another {what} .* \\(other\\)"):
        check(SNAPSHOT, replace(HERE, **{what: "other"}))


def test_arithmetic_matters_to_deterministic_requests_alone() -> None:
    loose = replace(SNAPSHOT, state=replace(STATE, request=replace(REQUEST, deterministic=False)))
    check(loose, replace(HERE, arithmetic="other"))


def test_another_version_of_the_state_is_refused_by_name() -> None:
    with pytest.raises(SnapshotRefused, match="state has version 9"):
        check(replace(SNAPSHOT, state=replace(STATE, version=9)), HERE)


def test_a_real_state_goes_through_the_format_and_on() -> None:
    first, second = ToyEngine(step_delay=0.005), ToyEngine()
    request = replace(REQUEST, prompt=tuple(b"one two three"), stop=(), logprobs=None, deterministic=False)
    whole = [event.token for event in first.submit(replace(request, id="whole"))]
    stream = first.submit(request)
    head = [next(iter(stream)).token for _ in range(5)]
    state = first.export(request.id)
    rest = [event.token for event in second.admit(decode(encode(Snapshot(state, "t"))).state)]
    assert head == whole[:5]
    assert rest == whole[len(state.generated) :]
    first.close()
    second.close()


# --- what is kept of a request ----------------------------------------------------------------------------------------

CONTEXT = AnswerContext("chat", "chatcmpl-0123456789abcdef01234567", 1_700_000_000, "d1", True)


def test_golden_pieces(golden: Callable[[str, Any], None]) -> None:
    pieces = [record.opening(CONTEXT, [BARE, BARE]), record.progress({0: (0, [1, 2]), 1: (0, [3])})]
    golden("function/pieces.json", [piece.hex() for piece in pieces])


def test_tokens_gather_and_the_later_word_holds() -> None:
    pieces = [record.opening(CONTEXT, [BARE, BARE])]
    pieces += [record.progress({0: (0, [1, 2, 3])}), record.progress({1: (0, [9])}), record.progress({0: (3, [4])})]
    assert [choice.state.generated for choice in record.assemble(pieces).choices] == [(1, 2, 3, 4), (9,)]
    pieces.append(record.progress({0: (1, [7])}))
    found = record.assemble(pieces)
    assert [choice.state.generated for choice in found.choices] == [(1, 7), (9,)]
    assert found.context == CONTEXT
    assert record.assemble(pieces[:2]).choices[0].state.generated == (1, 2, 3)


@pytest.mark.parametrize(
    ("pieces", "match"),
    [
        ([], "nothing was kept"),
        ([record.progress({})], "does not begin"),
        ([record.opening(CONTEXT, [BARE]), record.opening(CONTEXT, [BARE])], "two openings"),
        ([record.opening(CONTEXT, [BARE]), record.progress({0: (1, [5])})], "hole"),
        ([record.opening(CONTEXT, [BARE]), record.progress({1: (0, [5])})], "hole"),
        ([record.opening(CONTEXT, [BARE])[:-3]], "not of format 1"),
        ([record.opening(CONTEXT, [BARE]).replace(b"\xa6format\x01", b"\xa6format\x02")], "kept in format 2"),
    ],
)
def test_pieces_that_are_no_record(pieces: list[bytes], match: str) -> None:
    with pytest.raises(SnapshotRefused, match=match):
        record.assemble(pieces)


@given(st.lists(st.binary(max_size=80), max_size=3))
def test_fuzz_pieces(rest: list[bytes]) -> None:
    with pytest.raises(SnapshotRefused):
        record.assemble([record.opening(CONTEXT, [BARE]), *rest, b"\xc1"])


def test_the_limits_are_in_the_modules_text() -> None:
    assert snapshot.__doc__ is not None
    assert "MAX_HEADER" in snapshot.__doc__
