"""The wire format: golden frames, hostile bytes, and every message in every state."""

from __future__ import annotations

import itertools
import json
import random
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_agent.errors import BY_CODE, AgentError, ProtocolError, from_wire
from cache_agent.ledger import Span
from cache_agent.wire import messages, protocol
from cache_agent.wire.layers import Layer, LayersReport
from cache_agent.wire.message import TEXT_LIMIT
from cache_agent.wire.messages import (
    Adopted,
    Challenge,
    ChallengeAnswer,
    Drain,
    ErrorReply,
    Granted,
    Hello,
    Identity,
    LeaseReady,
    LeaseRequest,
    ManifestInline,
    ManifestReply,
    ManifestRequest,
    Offer,
    Progress,
    RevisionNotice,
    StreamedPiece,
    Streaming,
    Welcome,
)
from cache_agent.wire.operations import (
    ClusterReply,
    ClusterRequest,
    EstimateReply,
    EstimateRequest,
    EventRecord,
    EventsReply,
    EventsRequest,
    EvictReply,
    EvictRequest,
    HoldingStatus,
    ImageStatus,
    ModelStatus,
    NodeStatus,
    PinReply,
    PinRequest,
    PrefetchReply,
    PrefetchRequest,
    PushDrain,
    PushDrainReply,
    QuarantineStatus,
    SsdStatus,
    Start,
    Started,
    StartedReply,
    StartsReply,
    StartsRequest,
    StatusReply,
    StatusRequest,
    TierStatus,
)
from cache_agent.wire.peers import Chunk, ChunkStatement, Described, DescribeRequest, FetchRequest, FollowRequest, Holds
from cache_agent.wire.protocol import MAX_REPLY, MAX_REQUEST, Decoder, advance, encode
from cache_agent.wire.requests import (
    Checkpoint,
    Checkpointed,
    ClaimReply,
    ClaimRequest,
    DestinationRequest,
    HandedReply,
    HandedReport,
    HandoffOutcome,
    HandoffRequest,
    KeepItem,
    KeepStatus,
    Matched,
    RelayedBytes,
    TransferReply,
    TransferRequest,
)

EXAMPLES = [
    Hello(1, "chat-7f", Identity("token", "s3cret")),
    Welcome(1, "node-a", "0.1.0"),
    LeaseRequest("s3://models/llama-1b", "start-1"),
    Granted("src-1", 1234, [2 << 20, 4 << 20], 4096, 3),
    Progress([2 << 20, 0], 2 << 20, 6 << 20),
    LeaseReady("origin", "rev-1", [Span("agent", "transfer", 10, 2_000_000_010)]),
    RevisionNotice("rev-1"),
    Offer("s3://models/llama-1b", "src-1", 2),
    Adopted("", False, "the agent has a copy of its own"),
    Drain("node is going down", 30.0),
    StatusRequest(),
    StatusReply(
        "node-a",
        7,
        1 << 30,
        6 << 20,
        [ModelStatus("file:///m/ü", "src-1", "", "loading", "dram", 6 << 20, 2 << 20, 4096, 2, 0.5)],
        SsdStatus(
            "/ssd",
            100 << 30,
            6 << 20,
            [ImageStatus("file:///m", "src-1", "rev-1", 6 << 20, 1)],
            [QuarantineStatus("src-2.1", "truncated")],
        ),
        [TierStatus("ssd", 3, 2e9, 0.125, 1.5, 1.25)],
        4096,
    ),
    ManifestRequest("file:///m"),
    ManifestReply(1234, 1),
    EvictRequest("file:///m"),
    EvictReply(6 << 20),
    PinRequest("file:///m", False),
    PinReply(6 << 20),
    PrefetchRequest("file:///m"),
    PrefetchReply(),
    EstimateRequest("file:///m"),
    EstimateReply(1.5, "ssd", 0.75, 6 << 20),
    PushDrain("update", 5.0, "file:///m"),
    PushDrainReply(2),
    Started("start-1", "chat", "file:///m", "cold", [Span("shim", "python", 10, 20)], ""),
    StartedReply(),
    LayersReport("0a1b", "chat", "pod", 60.0, [Layer("lang", "idle", since=12.5, seconds=3.0, bytes=5, hold=600.0)]),
    EventsRequest(3),
    EventsReply([EventRecord(4, 1767225600.5, "evicted", "s3://m/b", "evicted s3://m/b (6 MB): asked for")]),
    StartsRequest(),
    StartsReply(
        [Start("start-1", "chat", "file:///m", "cold", 1.5e9, [Span("shim", "python", 10, 20)], "no", "ssd", 9)]
    ),
    Checkpoint([KeepItem("chat", "chatcmpl-0123456789abcdef", "worker-7f", 2, 1, [3, 0], 3.0, True)], b"abc"),
    Checkpointed([KeepStatus("kept", True), KeepStatus("too_large", why="it takes 9 bytes")]),
    ClaimRequest("chat", "chatcmpl-0123456789abcdef", "worker-7f", 3.0),
    ClaimReply("taken", 2, 0.0, [3, 0], b"", 1),
    ClusterRequest(),
    ClusterReply(
        [NodeStatus("node-a", "10.0.0.1:9480", 64 << 30, 9, {"ssd": 2e9})],
        [HoldingStatus("rev-1", "node-a", "dram", 3, 9)],
    ),
    ErrorReply("no_capacity", "the model needs 2 MB and 1 MB are free"),
    Challenge("0123456789abcdef0123456789abcdef", "node-a", "5a" * 32),
    ChallengeAnswer("a5" * 32, "10.0.0.2:8091"),
    Streaming("src-1", [6 << 20], 1234),
    StreamedPiece(0, 2 << 20, 4 << 20),
    ManifestInline(1234),
    FollowRequest("src-1"),
    Holds([ChunkStatement(3, "00112233445566778899aabbccddeeff", True), ChunkStatement(4)], [5, 6]),
    FetchRequest("src-1", 3, 1),
    Chunk("00112233445566778899aabbccddeeff", 8 << 20),
    DescribeRequest("src-1"),
    Described(5678),
    TransferRequest("chat", "chatcmpl-0123456789abcdef", "worker-7f", 2, "worker-8a", 3.0),
    TransferReply(True),
    DestinationRequest("chat:00ff:plain", "worker-8a"),
    HandoffRequest("chat:00ff:plain", "worker-7f", "0123456789abcdef"),
    Matched("node-b", "worker-8a", "fedcba9876543210", 1),
    HandedReport([HandoffOutcome("chat", "gen-1", "worker-7f", "worker-8a", 12, 0.025, "kv", "moved")]),
    HandedReply(),
    RelayedBytes(1 << 20),
]
MESSAGES = {type(message): message for message in EXAMPLES}
STATES = ["new", "greeting", "open", "leasing", "loading", "leased", "asking", "offering", "closed"]
STATES += ["challenged", "answering", "peer", "fetching", "following", "streaming", "hosting", "relaying"]

# The diagram in protocol.py once more, written down by hand: client and agent change it together or not at all.
ALLOWED = {
    ("new", Hello): "greeting",
    ("new", ErrorReply): "closed",
    ("greeting", Welcome): "open",
    ("greeting", ErrorReply): "closed",
    ("open", LeaseRequest): "leasing",
    ("open", StatusRequest): "asking",
    ("open", ManifestRequest): "asking",
    ("open", EvictRequest): "asking",
    ("open", EstimateRequest): "asking",
    ("asking", EstimateReply): "open",
    ("open", PushDrain): "asking",
    ("open", ErrorReply): "closed",
    ("asking", StatusReply): "open",
    ("asking", ManifestReply): "open",
    ("asking", EvictReply): "open",
    ("open", PinRequest): "asking",
    ("asking", PinReply): "open",
    ("open", PrefetchRequest): "asking",
    ("asking", PrefetchReply): "open",
    ("asking", PushDrainReply): "open",
    ("open", Started): "asking",
    ("open", LayersReport): "asking",
    ("asking", StartedReply): "open",
    ("open", StartsRequest): "asking",
    ("asking", StartsReply): "open",
    ("open", ClusterRequest): "asking",
    ("asking", ClusterReply): "open",
    ("open", EventsRequest): "asking",
    ("asking", EventsReply): "open",
    ("open", Checkpoint): "asking",
    ("asking", Checkpointed): "open",
    ("open", ClaimRequest): "asking",
    ("asking", ClaimReply): "open",
    ("open", TransferRequest): "asking",
    ("asking", TransferReply): "open",
    ("open", DestinationRequest): "hosting",
    ("hosting", Matched): "open",
    ("hosting", ErrorReply): "closed",
    ("open", HandoffRequest): "asking",
    ("asking", Matched): "open",
    ("open", HandedReport): "asking",
    ("asking", HandedReply): "open",
    ("peer", HandoffRequest): "fetching",
    ("fetching", Matched): "relaying",
    ("relaying", RelayedBytes): "relaying",
    ("relaying", ErrorReply): "closed",
    ("asking", ErrorReply): "open",
    ("leasing", Granted): "loading",
    ("leasing", Drain): "leasing",
    ("leasing", ErrorReply): "closed",
    ("loading", Progress): "loading",
    ("loading", LeaseReady): "leased",
    ("loading", Drain): "loading",
    ("loading", ErrorReply): "closed",
    ("open", Offer): "offering",
    ("offering", Adopted): "leased",
    ("offering", Drain): "offering",
    ("offering", ErrorReply): "closed",
    ("leased", RevisionNotice): "leased",
    ("leased", Drain): "leased",
    ("leased", ErrorReply): "closed",
    ("greeting", Challenge): "challenged",
    ("challenged", ChallengeAnswer): "answering",
    ("challenged", ErrorReply): "closed",
    ("answering", Welcome): "peer",
    ("answering", ErrorReply): "closed",
    ("peer", FetchRequest): "fetching",
    ("fetching", Chunk): "peer",
    ("peer", DescribeRequest): "fetching",
    ("fetching", Described): "peer",
    ("fetching", ErrorReply): "peer",
    ("peer", FollowRequest): "following",
    ("peer", ErrorReply): "closed",
    ("following", Holds): "following",
    ("following", ErrorReply): "closed",
    ("leasing", Streaming): "streaming",
    ("streaming", StreamedPiece): "streaming",
    ("streaming", LeaseReady): "leased",
    ("streaming", Drain): "streaming",
    ("streaming", ErrorReply): "closed",
    ("asking", ManifestInline): "open",
}


def frame(body: bytes | dict) -> bytes:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return struct.pack("!I", len(body)) + body


# --- format -----------------------------------------------------------------------------------------------------------


def test_golden_frames(golden):
    """Hex of the length, then the body: a change of the wire shows in review."""
    frames = [encode(message) for message in EXAMPLES]
    golden("agent/frames.json", [[data[:4].hex(), data[4:].decode()] for data in frames])


def test_every_message_has_a_golden_frame():
    assert set(MESSAGES) == set(messages.AnyMessage.__args__)


def test_golden_frames_are_still_understood(request):
    """Frames of an older peer keep their meaning."""
    path = request.path.parent.parent / "golden" / "agent" / "frames.json"
    for (length, body), message in zip(json.loads(path.read_text()), EXAMPLES, strict=True):
        assert Decoder(MAX_REPLY).feed(bytes.fromhex(length) + body.encode()) == [message]


def test_fields_of_a_newer_peer_are_ignored():
    body = {"type": "lease", "model": "file:///m", "later": [1, {"x": None}]}
    assert Decoder(MAX_REQUEST).feed(frame(body)) == [LeaseRequest("file:///m")]


def test_optional_fields_may_be_missing():
    assert Decoder(MAX_REQUEST).feed(frame({"type": "hello", "version": 1, "client": ""})) == [Hello(1, "")]


# --- the decoder ------------------------------------------------------------------------------------------------------


def test_bytes_one_by_one():
    decoder, found = Decoder(MAX_REPLY), []
    for byte in b"".join(map(encode, EXAMPLES)):
        found += decoder.feed(bytes([byte]))
    assert found == EXAMPLES
    assert decoder.pending == 0


@given(st.lists(st.sampled_from(EXAMPLES), max_size=8), st.lists(st.integers(0, 3000), max_size=12))
def test_any_split(messages, cuts):
    stream = b"".join(map(encode, messages))
    places = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    decoder, found = Decoder(MAX_REPLY), []
    for start, end in itertools.pairwise(places):
        found += decoder.feed(stream[start:end])
    assert found == messages
    assert decoder.pending == 0


@given(st.lists(st.sampled_from(EXAMPLES), min_size=1, max_size=8), st.integers(1, 50))
def test_who_reads_only_what_is_wanted_leaves_what_follows_a_frame(messages, most):
    """On TCP bytes follow some frames: a decoder must never have taken a byte of them."""
    for message in messages:
        stream, decoder, found = encode(message) + b"body", Decoder(MAX_REPLY), []
        while not found:
            part, stream = stream[: min(most, decoder.wanted)], stream[min(most, decoder.wanted) :]
            found = decoder.feed(part)
        assert found == [message]
        assert stream == b"body"


def test_pending_counts_the_bytes_of_an_unfinished_frame():
    decoder = Decoder(MAX_REQUEST)
    assert decoder.feed(encode(StatusRequest()) + b"\0\0\0") == [StatusRequest()]
    assert decoder.pending == 3


@pytest.mark.parametrize("length", [0, MAX_REQUEST + 1, 1 << 31, (1 << 32) - 1])
def test_a_length_out_of_bounds_is_refused_before_its_body_comes(length):
    with pytest.raises(ProtocolError, match="announces"):
        Decoder(MAX_REQUEST).feed(struct.pack("!I", length))


def test_the_longest_frame_is_taken_and_one_byte_more_is_not():
    text = "x" * 100
    body = json.dumps({"type": "status", "padding": text}).encode()
    assert Decoder(len(body)).feed(frame(body)) == [StatusRequest()]
    with pytest.raises(ProtocolError, match="announces"):
        Decoder(len(body) - 1).feed(frame(body))


def test_a_reply_longer_than_the_limit_is_not_sent():
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        encode(Progress([1 << 61] * (MAX_REPLY // 20), 0, 0))


REFUSED = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "tls": bytes.fromhex("16030100a5010000a10303"),
    "zeros": b"\0" * 64,
    "ones": b"\xff" * 64,
    "empty object": frame({}),
    "list": frame(b"[]"),
    "null": frame(b"null"),
    "string": frame(b'"hello"'),
    "not JSON": frame(b"hello"),
    "cut off": frame(b'{"type":"status"'),
    "two objects": frame(b'{"type":"status"}{"type":"status"}'),
    "not UTF-8": frame(b'{"type":"lease","model":"\xff"}'),
    "lone surrogate": frame(b'{"type":"lease","model":"\\ud800"}'),
    "deep nesting": frame(b'{"type":"status","x":' + b"[" * 30_000 + b"]" * 30_000 + b"}"),
    "unknown type": frame({"type": "teleport"}),
    "type missing": frame({"model": "file:///m"}),
    "type is a number": frame({"type": 1, "model": "file:///m"}),
    "type is a list": frame({"type": ["lease"], "model": "file:///m"}),
    "type is null": frame({"type": None}),
    "field missing": frame({"type": "lease"}),
    "model is a number": frame({"type": "lease", "model": 1}),
    "model is null": frame({"type": "lease", "model": None}),
    "model too long": frame({"type": "lease", "model": "x" * 2049}),
    "start_id too long": frame({"type": "lease", "model": "x", "start_id": "x" * 257}),
    "version is a string": frame({"type": "hello", "version": "1", "client": ""}),
    "version is true": frame({"type": "hello", "version": True, "client": ""}),
    "version is 1.5": frame({"type": "hello", "version": 1.5, "client": ""}),
    "client too long": frame({"type": "hello", "version": 1, "client": "x" * 257}),
    "token too long": frame(
        {"type": "hello", "version": 1, "client": "", "identity": {"kind": "token", "token": "x" * 8193}}
    ),
    "identity is a string": frame({"type": "hello", "version": 1, "client": "", "identity": "me"}),
    "data is no base64": frame({"type": "checkpoint", "items": [], "data": "@@@"}),
    "two fds for pieces": frame({"type": "checkpoint", "items": [], "fds": 2}),
    "negative place": frame(
        {
            "type": "checkpoint",
            "items": [{"space": "", "id": "", "owner": "", "epoch": 1, "at": -1, "lengths": [], "lease": 1}],
        }
    ),
    "grace is a string": frame({"type": "push_drain", "reason": "", "grace": "1"}),
    "grace is infinite": frame(b'{"type":"push_drain","reason":"","grace":1e999}'),
    "grace is NaN": frame(b'{"type":"push_drain","reason":"","grace":NaN}'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_request_is_refused(name):
    with pytest.raises(ProtocolError) as caught:
        Decoder(MAX_REQUEST).feed(REFUSED[name])
    assert len(caught.value.text.split()) > 4


@pytest.mark.parametrize(
    "body",
    [
        {"type": "granted", "source": "", "manifest_bytes": -1, "segments": [], "page": 1, "fds": 1},
        {"type": "granted", "source": "", "manifest_bytes": 1, "segments": [-1], "page": 1, "fds": 1},
        {"type": "granted", "source": "", "manifest_bytes": 1, "segments": [1 << 62], "page": 1, "fds": 1},
        {"type": "granted", "source": "", "manifest_bytes": 1, "segments": [], "page": 1, "fds": 0},
        {"type": "granted", "source": "", "manifest_bytes": 1, "segments": [], "page": 1, "fds": -1},
        {"type": "granted", "source": "", "manifest_bytes": 1, "segments": [], "page": 1, "fds": 251},
        {"type": "manifest_reply", "manifest_bytes": 1, "fds": 2},
        {"type": "progress", "ready": [-1], "done": 0, "total": 0},
        {"type": "error", "code": "x", "text": "x" * (TEXT_LIMIT + 1)},
        {"type": "ready", "tier": "", "revision": "", "spans": [{"owner": 1}]},
    ],
)
def test_what_is_no_reply_is_refused(body):
    with pytest.raises(ProtocolError):
        Decoder(MAX_REPLY).feed(frame(body))


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_message_in_every_state(state, kind):
    if (state, kind) in ALLOWED:
        assert advance(state, MESSAGES[kind]) == ALLOWED[state, kind]
        return
    with pytest.raises(ProtocolError, match=f"'{kind.__struct_config__.tag}' is not allowed in state '{state}'"):
        advance(state, MESSAGES[kind])


def test_there_is_no_other_state():
    used = {state for pair, state in protocol._TRANSITIONS.items()} | {state for state, _ in protocol._TRANSITIONS}
    assert used == set(STATES)


# --- errors on the wire -----------------------------------------------------------------------------------------------


def test_every_error_class_has_a_code_of_its_own_and_comes_back_as_itself():
    def below(cls):
        return {cls} | {found for child in cls.__subclasses__() for found in below(child)}

    classes = below(AgentError) - {AgentError}
    assert {cls.code: cls for cls in classes} == BY_CODE
    assert len(BY_CODE) == len(classes)
    for cls in classes:
        error = from_wire(cls.code, "what to do")
        assert (type(error), error.text) == (cls, "what to do")


def test_an_unknown_code_keeps_its_text():
    error = from_wire("quota", "the team's quota is used up")
    assert type(error) is AgentError
    assert error.text == "the team's quota is used up"


# --- fuzz -------------------------------------------------------------------------------------------------------------


def check(decoder: Decoder, data: bytes) -> None:
    try:
        for message in decoder.feed(data):
            msgspec.json.decode(encode(message)[4:])
    except ProtocolError as error:
        error.text.encode()


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_fuzz_any_bytes(pieces):
    decoder = Decoder(MAX_REQUEST)
    for piece in pieces:
        check(decoder, piece)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(
    ["model", "version", "client", "identity", "grace", "reason", "fds", "segments", "spans", "models", "code", "text"]
)


@given(
    st.sampled_from([kind.__struct_config__.tag for kind in MESSAGES]) | json_values,
    st.dictionaries(fields | st.text(max_size=4), json_values, max_size=4),
)
def test_fuzz_any_json(kind, body):
    check(Decoder(MAX_REPLY), frame(json.dumps({"type": kind, **body}).encode()))


def test_fuzz_changed_frames(rounds):
    source = random.Random(3)
    frames = [encode(message) for message in EXAMPLES]
    for _ in range(rounds(3000, 500_000)):
        changed = bytearray(source.choice(frames))
        for _ in range(source.randint(1, 3)):
            changed[source.randrange(4, len(changed))] = source.randrange(256)
        check(Decoder(MAX_REPLY), bytes(changed))
