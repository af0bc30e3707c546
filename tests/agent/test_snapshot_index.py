"""What agents keep of requests, over the socket: names, signatures, limits, large pieces, agents that go away."""

from __future__ import annotations

import os
import threading
import time

import pytest

from cache_agent.client.snapshots import SnapshotClient
from cache_agent.config import AgentConfig
from cache_agent.errors import AgentError, AgentUnreachable, BadSetting, ProtocolError, StoreUnavailable
from cache_agent.snapshots.index import SnapshotIndex, open_index
from cache_agent.snapshots.store import InProcessSnapshots, Keep, Key
from cache_agent.snapshots.store_redis import RedisSnapshots
from cache_agent.wire import blobs
from cache_agent.wire.requests import Checkpoint, Checkpointed, ClaimRequest, KeepItem

KEY = Key("chat", "chatcmpl-0123456789abcdef")
A, B = "worker-a", "worker-b"


def step(at, *pieces, owner=A, epoch=1, lease=10.0, done=False, key=KEY):
    return Keep(key, owner, epoch, at, pieces, lease, done)


@pytest.fixture
def open_client():
    clients = []

    def make(agent):
        clients.append(SnapshotClient(lambda: agent.client))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def test_kept_over_one_connection_claimed_over_another(start_local_agent, open_client):
    agent = start_local_agent()
    first, second = open_client(agent), open_client(agent)
    assert [kept.outcome for kept in first.keep([step(0, b"one"), step(1, b"two", b"")])] == ["kept", "kept"]
    assert second.claim(KEY, B, 5).outcome == "held"
    assert first.keep([step(3, lease=0)])[0].wanted
    found = second.claim(KEY, B, 5)
    assert (found.outcome, found.epoch, found.pieces) == ("taken", 2, (b"one", b"two", b""))
    assert first.keep([step(3, b"three")])[0].outcome == "fenced"
    first.close()
    second.close()


@pytest.mark.parametrize("size", [blobs.INLINE, blobs.INLINE + 1, 3 << 20])
def test_pieces_of_any_size(start_local_agent, open_client, size):
    client = open_client(start_local_agent())
    pieces = [os.urandom(size), b"x", os.urandom(100)]
    assert client.keep([step(0, *pieces, lease=0)])[0].outcome == "kept"
    assert client.claim(KEY, B, 5).pieces == tuple(pieces)
    client.close()


def test_many_requests_in_one_call(start_local_agent, open_client):
    client = open_client(start_local_agent())
    keys = [Key("chat", f"chatcmpl-{number:016}") for number in range(300)]
    results = client.keep([step(0, b"p" * (number * 7), key=key) for number, key in enumerate(keys)])
    assert [kept.outcome for kept in results] == ["kept"] * 300
    assert client.claim(keys[-1], A, 5).pieces == (b"p" * (299 * 7),)
    client.close()


def test_what_is_too_large_is_said_of_that_one_alone(start_local_agent, open_client, monkeypatch):
    monkeypatch.setattr("cache_agent.snapshots.index.MOST", 1000)
    client = open_client(start_local_agent())
    other = Key("chat", "chatcmpl-1111111111111111")
    results = client.keep([step(0, b"x" * 2000), step(0, b"x", key=other)])
    assert [kept.outcome for kept in results] == ["too_large", "kept"]
    assert "1000 may be kept" in results[0].why
    client.close()


@pytest.mark.parametrize(
    ("space", "id_", "owner", "lease"),
    [
        ("", KEY.id, A, 1.0),
        ("../etc", KEY.id, A, 1.0),
        ("chat:x", KEY.id, A, 1.0),
        ("chat", "short", A, 1.0),
        ("chat", "chatcmpl:0123456789abcdef", A, 1.0),
        ("chat", KEY.id + "\n", A, 1.0),
        ("chat", KEY.id, "a", 1.0),
        ("chat", KEY.id, "worker a", 1.0),
        ("chat", KEY.id, A, -1.0),
        ("chat", KEY.id, A, 1e9),
    ],
)
def test_names_that_are_none_are_refused(space, id_, owner, lease):
    tested = SnapshotIndex(InProcessSnapshots(10, 1000, 1000), b"k" * 32)
    with pytest.raises(ProtocolError):
        tested.claim(ClaimRequest(space, id_, owner, lease))
    with pytest.raises(ProtocolError):
        tested.keep(Checkpoint([KeepItem(space, id_, owner, 1, 0, [1], lease)]), [b"x"])


def test_what_a_caller_is_goes_before_its_space():
    tested = SnapshotIndex(InProcessSnapshots(10, 1000, 1000), b"k" * 32)
    tested.keep(Checkpoint([KeepItem(*KEY, A, 1, 0, [1], 0.0)]), [b"x"], within="team-a")
    assert tested.claim(ClaimRequest(*KEY, B, 1.0), within="team-b").outcome == "absent"
    assert tested.claim(ClaimRequest(*KEY, B, 1.0)).outcome == "absent"
    assert tested.claim(ClaimRequest("team-a/chat", KEY.id, B, 1.0)).outcome == "absent", "by its mere name"
    assert tested.claim(ClaimRequest(*KEY, B, 1.0), within="team-a").outcome == "taken"


def test_an_fd_that_is_no_sealed_memfd_is_not_read(start_local_agent, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    reader, writer = os.pipe()
    open_memfd = os.memfd_create("open")
    os.write(open_memfd, b"x" * 100)
    for fd in (os.open(file, os.O_RDONLY), reader, open_memfd):
        channel = start_local_agent().client.connect()
        channel.send(Checkpoint([KeepItem(*KEY, A, 1, 0, [100], 1.0)], b"", 1), [fd])
        os.close(fd)
        with pytest.raises(Exception, match="sealed memfd"):
            raise_error(channel)
        channel.close()
    os.close(writer)


def raise_error(channel):
    message, _ = channel.receive(time.monotonic() + 10)
    raise AssertionError(getattr(message, "text", message))


def test_lengths_that_do_not_fit_are_refused(start_local_agent):
    channel = start_local_agent().client.connect()
    channel.send(Checkpoint([KeepItem(*KEY, A, 1, 0, [3], 1.0)], b"four"))
    with pytest.raises(AssertionError, match="4 bytes came for pieces of 3"):
        raise_error(channel)
    channel.close()


# --- agents that share a Redis ----------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path, redis_url):
    """`cluster(key)`: options of an agent that shares Redis and this key with the others."""

    def options(key: str = "k" * 32):
        file = tmp_path / key[:8]
        file.write_text(key)
        return "--redis-url", redis_url, "--cluster-key-file", str(file)

    return options


def test_another_nodes_agent_has_what_this_one_kept(start_agent, cluster, open_client):
    first, second = start_agent(*cluster(), "--node", "n1"), start_agent(*cluster(), "--node", "n2")
    one, two = open_client(first), open_client(second)
    one.keep([step(0, b"prompt", os.urandom(100_000))])
    first.kill()
    assert two.claim(KEY, B, 5).outcome == "held"
    with pytest.raises(AgentUnreachable):
        one.keep([step(2, b"more")])


def test_another_cluster_key_is_refused(start_agent, cluster, open_client, refused):
    one, two = (open_client(start_agent(*cluster(key * 32))) for key in "ab")
    one.keep([step(0, b"prompt", lease=0)])
    with refused("snapshot_forged"):
        two.claim(KEY, B, 5)


def test_what_was_changed_moved_or_never_signed_is_refused(redis_url, refused):
    import redis

    store = RedisSnapshots(redis_url, 20, 10_000, 10_000)
    tested = SnapshotIndex(store, b"k" * 32)
    pieces = f"glowplug:snapshot:{KEY.space}:{KEY.id}:pieces"
    with redis.Redis.from_url(redis_url) as client:

        def kept():
            client.flushall()
            tested.keep(Checkpoint([KeepItem(*KEY, A, 1, 0, [3, 3], 0.0)]), [b"one", b"two"])
            return client.lrange(pieces, 0, -1)

        first, second = kept()
        for forged in ([second, first], [first, first], [first[:-1] + b"X", second], [b"one", b"two"], [first[:10]]):
            kept()
            client.delete(pieces)
            client.rpush(pieces, *forged)
            with refused("snapshot_forged"):
                tested.claim(ClaimRequest(*KEY, B, 5.0))
        other = Key("chat", "chatcmpl-9999999999999999")
        tested.keep(Checkpoint([KeepItem(*other, A, 1, 0, [3], 0.0)]), [b"one"])
        client.delete(pieces)
        client.rpush(pieces, client.lindex(f"glowplug:snapshot:{other.space}:{other.id}:pieces", 0))
        with refused("snapshot_forged"):
            tested.claim(ClaimRequest(*KEY, B, 5.0))
    store.close()


def test_redis_away_is_an_error_of_its_own_and_the_agent_serves_on(start_local_agent, open_client, tmp_path):
    key = tmp_path / "key"
    key.write_text("k" * 32)
    config = AgentConfig(redis_url=f"unix://{tmp_path}/nobody.sock", cluster_key_file=key)
    tested = open_index(config, private=False)
    with pytest.raises(StoreUnavailable):
        tested.claim(ClaimRequest(*KEY, B, 5.0))
    tested.close()


def test_without_a_key_or_a_redis_and_when_private_all_stays_here(tmp_path):
    key = tmp_path / "key"
    key.write_text("k" * 32)
    here = f"unix://{tmp_path}/nobody.sock"
    for config, private in (
        (AgentConfig(redis_url=here), False),
        (AgentConfig(cluster_key_file=key), False),
        (AgentConfig(redis_url=here, cluster_key_file=key), True),
    ):
        assert open_index(config, private=private).claim(ClaimRequest(*KEY, B, 5.0)).outcome == "absent"


@pytest.mark.parametrize("content", [None, b"short"])
def test_a_key_that_is_none_is_refused(tmp_path, content):
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadSetting, match="GLOWPLUG_CLUSTER_KEY_FILE"):
        open_index(AgentConfig(cluster_key_file=file), private=False)


def test_a_client_finds_the_next_agent_by_itself(start_agent, open_client):
    agent = start_agent()
    client = open_client(agent)
    client.keep([step(0, b"one")])
    agent.restart()
    assert client.keep([step(1, b"two")])[0].outcome == "gap", "the next one begins empty, and asks for all of it"
    assert client.keep([step(0, b"one", b"two")])[0].outcome == "kept"


def test_many_threads_share_a_client(start_local_agent, open_client):
    client, failures = open_client(start_local_agent()), []

    def live(number):
        try:
            key = Key("chat", f"chatcmpl-{number:016}")
            for at in range(20):
                assert client.keep([step(at, b"x" * 2000, key=key)])[0].outcome == "kept"
            assert len(client.claim(key, A, 5).pieces) == 20
        except (AgentError, AssertionError) as error:
            failures.append(error)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    client.close()


def test_the_reply_is_a_message_of_its_own():
    assert Checkpointed.__struct_config__.tag == "checkpointed"
