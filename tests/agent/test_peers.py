"""Nodes that give models to each other: what is read from the origin, what is believed, and who fails on the way."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import threading
from types import SimpleNamespace

import pytest
from leased import soon

from cache_agent.cluster.directory import InProcessDirectory
from cache_agent.cluster.key import ClusterKey
from cache_agent.cluster.peer import Membership, Peer, PeerFailed
from cache_agent.errors import OriginUnavailable
from cache_agent.serving import remote
from cache_agent.tiers.fake import FakeOrigin

URI = "s3://models/m"
KEY = ClusterKey(b"only for these tests, only for these")


@pytest.fixture(scope="module")
def files(checkpoint_files):
    """About 45 MB in 6 chunks."""
    return checkpoint_files(seed=7, layers=4, hidden=800, vocabulary=3000)


@pytest.fixture(scope="module")
def other_files(checkpoint_files):
    """The same shapes and sizes, and other weights."""
    return checkpoint_files(seed=8, layers=4, hidden=800, vocabulary=3000)


@pytest.fixture(scope="module")
def flipped(files):
    """The same but for one bit."""
    name = "model.safetensors"
    content = bytearray(files[name])
    content[len(content) // 2] ^= 1
    return {**files, name: bytes(content)}


class SameName(FakeOrigin):
    """An origin whose files look the same from outside whatever is in them: what a lying node says that it read."""

    @staticmethod
    def _etag(data):
        return f"{len(data)}"


def digest_of(lease):
    found = hashlib.sha256()
    for fd, size in zip(lease.segments, lease.manifest.segments, strict=True):
        with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as data:
            found.update(data)
    return found.hexdigest()


@pytest.fixture
def cluster(start_local_agent):
    """`cluster(*files)`: agents that share a directory and a key; each has an origin of its own, with these files."""

    def make(*contents, key=KEY, **options):
        directory = InProcessDirectory()
        return [
            start_local_agent({URI: SameName(URI, files)}, node=f"n{number}", directory=directory, key=key, **options)
            for number, files in enumerate(contents)
        ]

    return make


class Loads:
    """What came of loads: by agent, the tier and the digest of the bytes that a function got, or an error."""

    def __init__(self):
        self.of = {}

    def run(self, *agents):
        threads = [threading.Thread(target=self._run, args=(agent,)) for agent in agents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        return [self.of[agent] for agent in agents]

    def _run(self, agent):
        try:
            with agent.client.lease(URI, deadline=soon(60)) as lease:
                lease.wait_ready(soon(60))
                self.of[agent] = lease.tier, digest_of(lease)
        except Exception as error:
            self.of[agent] = "error", error


def read(agent):
    return agent.origins[URI].bytes_read


def size_of(files):
    return sum(map(len, files.values()))


@pytest.fixture
def right(start_local_agent, files):
    """The digest of the right bytes, from a node that knows no other."""
    agent = start_local_agent({URI: SameName(URI, files)})
    ((_, digest),) = Loads().run(agent)
    return digest


# --- giving and taking ------------------------------------------------------------------------------------------------


def test_a_second_node_takes_the_model_from_the_first(cluster, files, right, eventually):
    first, second = cluster(files, files)
    assert Loads().run(first) == [("origin", right)]
    eventually(lambda: first.client.status().models[0].revision)
    assert Loads().run(second) == [("peer", right)]
    # headers, and a few bytes of each chunk
    assert read(second) < size_of(files) / 10
    revisions = [agent.client.status().models[0].revision for agent in (first, second)]
    assert revisions[0] == revisions[1] != ""


def test_nodes_that_start_together_read_the_origin_about_once(cluster, files, right):
    agents = cluster(*[files] * 4)
    for agent in agents:
        agent.origins[URI].seconds_per_read = 0.05
    assert {digest for _, digest in Loads().run(*agents)} == {right}
    assert sum(map(read, agents)) < 1.5 * size_of(files)


def test_two_witnesses_read_the_origin_about_twice(cluster, files, right):
    agents = cluster(*[files] * 4, peer_witnesses=2, readers=1)
    for agent in agents:
        agent.origins[URI].seconds_per_read = 0.2
    assert {digest for _, digest in Loads().run(*agents)} == {right}
    assert 1.9 * size_of(files) < sum(map(read, agents)) < 3 * size_of(files)


def test_without_a_key_nodes_do_not_talk(cluster, files, right):
    first, second = cluster(files, files, key=None)
    assert Loads().run(first) == [("origin", right)]
    assert Loads().run(second) == [("origin", right)]


def test_nodes_with_another_key_get_nothing(cluster, files, right):
    first, second = cluster(files, files)
    second.agent._peers._me = second.agent._peers._me._replace(key=ClusterKey(b"another cluster's key, not this one"))
    assert Loads().run(first) == [("origin", right)]
    assert Loads().run(second) == [("origin", right)]
    assert read(second) >= size_of(files)


def test_an_image_on_ssd_is_given_too(cluster, start_local_agent, files, right, tmp_path, eventually):
    (first,) = cluster(files, ssd=tmp_path / "one")
    assert Loads().run(first) == [("origin", right)]
    eventually(lambda: [image.revision for image in first.client.status().ssd.images if image.revision])
    first.evict(URI)
    eventually(lambda: not first.client.status().models)
    second = start_local_agent({URI: SameName(URI, files)}, node="n1", directory=first.directory, key=KEY)
    assert Loads().run(second) == [("peer", right)]
    assert read(second) < size_of(files) / 10


def test_a_follower_hears_at_once_what_there_is_however_young_the_machine_is(cluster, files, monkeypatch):
    (agent,) = cluster(files)
    with agent.client.lease(URI, deadline=soon(60)) as lease:
        lease.wait_ready(soon(60))
        source = lease.manifest.source
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: 0.0))  # it was booted just now
    peer, heard = Peer("n0", agent.address, Membership("n9", "", KEY)), []

    def hear(message):
        heard.append(message)
        peer.close()

    with contextlib.suppress(PeerFailed):
        peer.follow(source, hear)
    assert len(heard) == 1


# --- what a lying node is worth ---------------------------------------------------------------------------------------


def test_a_node_that_gives_other_bytes_is_left(cluster, files, other_files, right):
    """Its checksums fit its bytes, it says that it read them from the origin, and its revision is what they are."""
    liar, honest = cluster(other_files, files)
    ((_, wrong),) = Loads().run(liar)
    assert wrong != right
    assert Loads().run(honest) == [("origin", right)]
    assert "n0" in honest.agent._peers._liars


def test_a_node_that_lies_about_one_byte_is_not_believed_by_two(cluster, files, flipped, right):
    """No sample would find it; but with two witnesses nobody's word alone is enough."""
    agents = cluster(flipped, files, files, peer_witnesses=2)
    Loads().run(agents[0])
    assert {digest for _, digest in Loads().run(*agents[1:])} == {right}


def test_one_wrong_byte_is_found_where_the_revision_is_known(cluster, files, flipped, right, eventually):
    """The node that knew it is gone; who has the model now changed a byte. Nothing is ready before it is proved."""
    honest, liar, receiver = cluster(files, flipped, files)
    assert Loads().run(honest) == [("origin", right)]
    eventually(lambda: honest.client.status().models[0].revision)
    honest.evict(URI)
    liar.agent._revisions.remember = lambda *_: None  # otherwise its word would stand against that of the first
    liar.agent._peers._liars.add("n0")
    Loads().run(liar)
    assert Loads().run(receiver)[0][1] == right
    assert "n1" in receiver.agent._peers._liars
    revisions = receiver.directory.stated(receiver.client.status().models[0].source)
    assert len(set(revisions.values())) == 1


def test_a_liar_among_nodes_that_load_together(cluster, files, other_files, right):
    agents = cluster(files, other_files, files, files)
    for agent in agents:
        agent.origins[URI].seconds_per_read = 0.05
    loads = Loads()
    loads.run(*agents)
    assert {loads.of[agent][1] for agent in agents if agent is not agents[1]} == {right}


def test_an_origin_that_is_down_is_helped_by_who_has_the_model(cluster, files, right, eventually):
    first, second = cluster(files, files)
    assert Loads().run(first) == [("origin", right)]
    eventually(lambda: first.client.status().models[0].revision)
    reads = []

    def fail_after_headers(name, start, size):
        reads.append(size)
        if len(reads) > 10:
            raise OriginUnavailable("the store is down")

    second.origins[URI].before_read = fail_after_headers
    assert Loads().run(second) == [("peer", right)]


# --- an origin that does not answer -----------------------------------------------------------------------------------


class Down(SameName):
    """An origin that does not even list its files."""

    def files(self):
        raise OriginUnavailable("the store is down")


def test_a_node_that_never_saw_the_model_takes_it_from_another(cluster, files, right, eventually):
    first, second = cluster(files, files)
    assert Loads().run(first) == [("origin", right)]
    eventually(lambda: first.client.status().models[0].revision)
    second.origins[URI] = Down(URI, {})
    with second.client.lease(URI, deadline=soon(60)) as lease:
        lease.wait_ready(soon(60))
        assert (lease.tier, digest_of(lease)) == ("peer", right)
        assert any("does not answer" in span.name for span in lease.spans)


def test_a_node_serves_from_its_own_ssd_while_the_origin_is_down(start_local_agent, files, right, tmp_path, eventually):
    origins = {URI: SameName(URI, files)}
    agent = start_local_agent(origins, ssd=tmp_path / "ssd")
    assert Loads().run(agent) == [("origin", right)]
    eventually(lambda: [image.revision for image in agent.client.status().ssd.images if image.revision])
    agent.evict(URI)
    eventually(lambda: not agent.client.status().models)
    agent.origins[URI] = Down(URI, {})
    assert Loads().run(agent) == [("ssd", right)]
