"""Draining workers find destinations on one node, and across two, whose agents sign every piece."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

import pytest

from cache_agent.client.handoff import await_match, find_destination, offer_as_destination, report
from cache_agent.cluster.directory import InProcessDirectory
from cache_agent.cluster.key import ClusterKey
from cache_agent.errors import NoDestination, SnapshotForged
from cache_agent.handoff import splice as crossings
from cache_agent.handoff.destinations import Destinations, WaitingWorker
from cache_agent.handoff.splice import Splice
from cache_agent.wire import link
from cache_agent.wire.channel import Disconnected
from cache_agent.wire.requests import HandoffOutcome, RelayedBytes

KEY = ClusterKey(b"only for these tests, only for these")
KIN, SOURCE, OTHER = "chat:00ff:plain", "worker-source", "worker-other"


@pytest.fixture
def host():
    """Give `host(agent)`, which waits as a destination; its list gets the end of a socket once a worker is sent."""
    made = []

    def begin(agent, owner=OTHER, siblings=KIN):
        channel, ends = agent.client.connect(), []
        offer_as_destination(channel, siblings, owner)
        agent.client.status()  # a later connection's answer: the agent has read the earlier one's question

        def wait():
            with contextlib.suppress(Disconnected):  # the test is over
                ends.append(await_match(channel, lambda: False))

        thread = threading.Thread(target=wait)
        thread.start()
        made.append((channel, thread, ends))
        return ends

    yield begin
    for channel, thread, ends in made:
        with contextlib.suppress(OSError):
            channel.sock.shutdown(socket.SHUT_RDWR)
        thread.join(20)
        channel.close()
        for end in ends:
            if end is not None:
                end.close()


def found(agent, eventually, siblings=KIN, owner=SOURCE):
    """Return the end of a socket to a destination, as soon as one waits."""

    def seek():
        try:
            return find_destination(agent.client, siblings, owner)
        except NoDestination:
            return None

    return eventually(seek, 20)


def check_pipe(mine, ends, eventually):
    (theirs,) = eventually(lambda: ends)
    data = os.urandom(3 << 20)
    mine.settimeout(20)
    theirs.settimeout(20)
    sending = threading.Thread(target=mine.sendall, args=(data,))
    sending.start()
    received = bytearray()
    while len(received) < len(data):
        received += theirs.recv(1 << 20)
    sending.join(20)
    assert bytes(received) == data
    theirs.sendall(b"back")
    assert mine.recv(10) == b"back"
    mine.close()
    assert theirs.recv(10) == b"", "the end of one is the end of the other"


def test_two_workers_of_one_node(start_local_agent, host, eventually):
    agent = start_local_agent({})
    ends = host(agent)
    check_pipe(found(agent, eventually), ends, eventually)
    with pytest.raises(NoDestination, match="chat"):
        find_destination(agent.client, KIN, SOURCE)


def test_two_workers_of_two_nodes(start_local_agent, host, eventually):
    directory = InProcessDirectory()
    here = start_local_agent({}, directory=directory, node="n1", key=KEY)
    there = start_local_agent({}, directory=directory, node="n2", key=KEY)
    ends = host(there)
    check_pipe(found(here, eventually), ends, eventually)


def test_another_function_or_oneself_is_no_destination(start_local_agent, host, eventually):
    agent = start_local_agent({})
    host(agent, owner=SOURCE)
    host(agent, siblings="chat:another")
    ends = host(agent)
    mine = found(agent, eventually)
    eventually(lambda: ends)
    with pytest.raises(NoDestination):
        find_destination(agent.client, KIN, SOURCE)
    mine.close()


def test_who_waits_longest_is_next_and_a_namespace_is_among_itself():
    destinations = Destinations()
    for name in ("a", "b", "c"):
        destinations.add(name, WaitingWorker("team", KIN, name))
    destinations.add("a", WaitingWorker("team", KIN, "a"))
    assert destinations.take(WaitingWorker("", KIN, "x")) is None
    assert destinations.take(WaitingWorker("other", KIN, "x")) is None
    assert destinations.take(WaitingWorker("team", KIN, "x"))[0] == "b"
    destinations.remove("c")
    assert destinations.take(WaitingWorker("team", KIN, "a")) is None
    assert destinations.take(WaitingWorker("team", KIN, "x"))[0] == "a"
    assert destinations.take(WaitingWorker("team", KIN, "x")) is None


def test_what_is_told_is_counted_and_shown(start_local_agent):
    agent = start_local_agent({})
    items = [
        HandoffOutcome("chat", "gen-1", SOURCE, OTHER, 12, 0.025, "kv", "moved"),
        HandoffOutcome("chat", "gen-2", SOURCE, OTHER, 0, 5.0, "relay", "back", "it took no byte"),
    ]
    report(agent.client, items)
    newest, oldest = agent.client.status().handoffs
    assert (oldest.id, oldest.node, oldest.outcome) == ("gen-1", "test", "moved")
    assert newest.reason == "it took no byte"
    texts = [event.text for event in agent.client.events() if event.kind == "handoff"]
    assert texts[0] == f"gen-1: moved from {SOURCE} to {OTHER} after 12 tokens (kv, 25 ms)"
    counts = agent.agent.journal.counts()
    assert counts.handoffs == {("moved", "kv"): 1, ("back", "relay"): 1}
    assert (counts.handed_tokens, counts.handed_pause) == ({"chat": 12}, {"kv": 0.025})


# --- between agents ---------------------------------------------------------------------------------------------------


@pytest.fixture
def splice():
    """Give a splice, the worker's end of its socket, and the link to the other agent."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        mine = link.dial(f"127.0.0.1:{door.getsockname()[1]}", 10)
        theirs = link.Link(door.accept()[0], of_agent=False)
    near, worker = socket.socketpair()
    mine.state = theirs.state = "relaying"
    tested = Splice(mine, near, KEY, ("a" * 32, "b" * 32), "caller")
    thread = threading.Thread(target=tested.run)
    thread.start()
    worker.settimeout(20)
    yield tested, worker, theirs
    theirs.close()
    worker.close()
    thread.join(20)
    assert not thread.is_alive()
    mine.close()
    near.close()


def say(theirs, signed):
    theirs.send(RelayedBytes(len(signed)))
    theirs.send_bytes(signed)


def about(number, side="called", names=("a" * 32, "b" * 32)):
    return f"piece {number} of the {side} in hand-off {'/'.join(names)}"


def test_pieces_that_follow_one_another_come_through(splice):
    _, worker, theirs = splice
    for number in range(3):
        say(theirs, KEY.sign(about(number), b"piece %d" % number))
        assert worker.recv(100) == b"piece %d" % number


@pytest.mark.parametrize("attack", ["replayed", "left out", "changed", "unsigned", "foreign", "own", "another's key"])
def test_what_is_not_the_next_piece_ends_it(splice, attack):
    _, worker, theirs = splice
    first = KEY.sign(about(0), b"one")
    say(theirs, first)
    assert worker.recv(100) == b"one"
    second = KEY.sign(about(1), b"two")
    say(
        theirs,
        {
            "replayed": first,
            "left out": KEY.sign(about(2), b"three"),
            "changed": second[:-1] + b"x",
            "unsigned": b"two",
            "foreign": KEY.sign(about(1, names=("c" * 32, "b" * 32)), b"two"),
            "own": KEY.sign(about(1, "caller"), b"two"),
            "another's key": ClusterKey(b"another cluster's key, as long").sign(about(1), b"two"),
        }[attack],
    )
    assert worker.recv(100) == b"", "nothing of it reaches the worker, who hears the end"


def test_a_signature_is_for_one_place_only():
    signed = KEY.sign("this", b"data")
    assert KEY.verified("this", signed) == b"data"
    with pytest.raises(SnapshotForged):
        KEY.verified("that", signed)


def test_a_piece_is_bounded(splice):
    _, worker, theirs = splice
    theirs.send(RelayedBytes(crossings._MOST + 1))
    assert worker.recv(100) == b""
