"""The connection between two workers: in order, sealed, bounded, and never waited for longer than its deadlines."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.base import Logprobs, TokenEvent
from runtime.errors import SnapshotRefused
from runtime.handoff import messages
from runtime.handoff import pipe as pipes
from runtime.handoff.messages import Beat, Cancel, Drop, Go, Greeting, OfferReady, Part, decode, encode
from runtime.handoff.pipe import Broken, Pipe
from runtime.resume.seal import Plain, Seal, Sealed

KEY = Sealed(b"k" * 32)


def together(here: Callable[[], Any], there: Callable[[], Any]) -> None:
    """Greet from both ends at once, as each waits for the other."""
    thread = threading.Thread(target=there)
    thread.start()
    here()
    thread.join(10)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


@pytest.fixture(params=["plain", "sealed"])
def pair(request: Any, ends: tuple[socket.socket, socket.socket]) -> tuple[Pipe, Pipe]:
    return greeted(ends, Plain() if request.param == "plain" else KEY)


def greeted(ends: tuple[socket.socket, socket.socket], seal: Seal) -> tuple[Pipe, Pipe]:
    source, other = Pipe(ends[0], seal, source=True), Pipe(ends[1], seal, source=False)
    together(lambda: source.greet("kin", "a"), lambda: other.greet("kin", "b", 4, 8))
    return source, other


def test_each_side_hears_who_the_other_one_is(ends: tuple[socket.socket, socket.socket]) -> None:
    source, other = Pipe(ends[0], Plain(), source=True), Pipe(ends[1], Plain(), source=False)
    heard: list[Greeting] = []
    together(lambda: heard.append(source.greet("kin", "a")), lambda: heard.append(other.greet("kin", "b", 4, 8)))
    assert {(found.owner, found.slots, found.queue) for found in heard} == {("a", 0, 0), ("b", 4, 8)}


def test_messages_arrive_in_order_whatever_their_size(pair: tuple[Pipe, Pipe]) -> None:
    source, other = pair
    sent = [OfferReady(1), Part(2, bytes(messages.MAX_PART)), Go(2, 7), *(Cancel(2, n) for n in range(200))]
    thread = threading.Thread(target=lambda: [source.send(message) for message in sent])
    thread.start()
    assert [other.receive(5) for _ in sent] == sent
    thread.join(10)
    assert other.receive(0) is None


def test_a_side_that_closes_is_noticed_at_once(pair: tuple[Pipe, Pipe]) -> None:
    source, other = pair
    source.close("enough")
    with pytest.raises(Broken, match="gone"):
        other.receive(10)
    with pytest.raises(Broken):
        source.send(OfferReady(1))


def test_a_side_that_takes_nothing_is_given_up(pair: tuple[Pipe, Pipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes, "STALL", 0.2)
    with pytest.raises(Broken, match="took no byte"):
        pair[0].send(Part(1, bytes(messages.MAX_PART)))  # more than a socket of this kind holds


def test_a_silent_side_is_given_up_and_beats_are_no_silence(
    pair: tuple[Pipe, Pipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = pair
    now = time.monotonic()
    monkeypatch.setattr(pipes, "time", SimpleNamespace(monotonic=lambda: now))
    for _ in range(20):
        now += pipes.BEAT
        assert source.receive(0) is None
        assert other.receive(0) is None, "it beats"
    now += pipes.SILENCE
    with pytest.raises(Broken, match="silent"):
        other.receive(0)


@pytest.mark.parametrize("theirs", ["another kin", "another version", "no greeting", "nothing"])
def test_who_is_somebody_else_is_refused(
    ends: tuple[socket.socket, socket.socket], theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "_GREETING", 0.1)
    greeting = {
        "another kin": Greeting(messages.VERSION, "0" * 32, "other", "b"),
        "another version": Greeting(messages.VERSION + 1, "0" * 32, "kin", "b"),
        "no greeting": OfferReady(1),
    }.get(theirs)
    if greeting is not None:
        _frame(ends[1], encode(greeting))
    with pytest.raises(Broken, match=r"replica of this function|another version|did not greet"):
        Pipe(ends[0], Plain(), source=True).greet("kin", "a")


def _frame(sock: socket.socket, body: bytes) -> None:
    sock.sendall(struct.pack("!I", len(body)) + body)


def _sniffed(seal: Seal) -> tuple[Pipe, Pipe, list[bytes], Callable[[bytes], None]]:
    """Two pipes with an attacker in between, which withholds the source's messages, and can send in its name."""
    (a, inner), (outer, b) = socket.socketpair(), socket.socketpair()
    seen: list[bytes] = []

    def carry(reading: socket.socket, writing: socket.socket, greetings: int, kept: list[bytes] | None) -> None:
        buffer = b""
        with contextlib.suppress(OSError):
            while data := reading.recv(65536):
                buffer += data
                while len(buffer) >= 4 and len(buffer) >= 4 + (size := struct.unpack("!I", buffer[:4])[0]):
                    frame, buffer = buffer[: 4 + size], buffer[4 + size :]
                    if greetings or kept is None:
                        greetings -= 1
                        writing.sendall(frame)
                    else:
                        kept.append(frame)

    for arguments in ((inner, outer, 1, seen), (outer, inner, 1, None)):
        threading.Thread(target=carry, args=arguments, daemon=True).start()
    source, other = greeted((a, b), seal)
    return source, other, seen, outer.sendall


def _held(seen: list[bytes], count: int) -> None:
    deadline = time.monotonic() + 10
    while len(seen) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("attack", ["replayed", "left out", "changed", "unsealed", "of another hand-off", "endless"])
def test_what_is_not_the_next_message_of_this_hand_off_ends_it(attack: str) -> None:
    source, other, seen, say = _sniffed(KEY)
    for number in (1, 2):
        source.send(Drop(number))
    _held(seen, 2)
    if attack != "left out":
        say(seen[0])
        assert other.receive(5) == Drop(1)
    match attack:
        case "replayed":
            say(seen[0])
        case "left out":
            say(seen[1])
        case "changed":
            say(seen[1][:-1] + bytes([seen[1][-1] ^ 1]))
        case "unsealed":
            body = Plain().close("", encode(Drop(2)))
            say(struct.pack("!I", len(body)) + body)
        case "of another hand-off":
            foreign, _, theirs, _ = _sniffed(KEY)
            for number in (1, 2):
                foreign.send(Drop(number))
            _held(theirs, 2)
            say(theirs[1])
        case "endless":
            say(struct.pack("!I", messages.MAX_FRAME * 2))
    with pytest.raises(Broken, match=r"decrypted|not encrypted|allowed"):
        other.receive(5)


@given(st.binary(max_size=200))
def test_no_bytes_are_more_than_refused(data: bytes) -> None:
    with contextlib.suppress(SnapshotRefused):
        assert isinstance(decode(data), messages.PipeMessage)


@pytest.mark.parametrize(
    "event",
    [
        TokenEvent(3, 7, "ü"),
        TokenEvent(4, None, "", "moved", "elsewhere"),
        TokenEvent(0, 1, "a", "stop", None, Logprobs(-0.5, ((1, -0.5), (2, -1.5)))),
    ],
)
def test_an_event_comes_as_it_went(event: TokenEvent) -> None:
    message = decode(encode(messages.relayed(1, 2, event)))
    assert isinstance(message, messages.RelayedEvent)
    assert messages.event_of(message) == event
    assert decode(encode(Beat())) == Beat()
