"""An agent that comes back: functions offer what they map; true bytes are adopted without a copy, others never."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from leased import FAKE, contents, inodes, large_tensors, ready, soon, tensors_of, whole

from cache_agent.errors import AgentUnreachable, LeaseLost
from cache_agent.model.manifest import PAGE
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.tiers.ssd import Writing
from cache_agent.wire.messages import Drain, Hello, LeaseRequest, Offer
from cache_agent.wire.protocol import encode

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def wait_for_the_end(lease) -> None:
    while True:
        lease.next_event(10)


def sealed(lease, eventually) -> None:
    eventually(lambda: all(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE for fd in lease.segments))


@pytest.fixture
def model(tmp_path, write_checkpoint, random_tensors):
    return f"file://{write_checkpoint(tmp_path / 'model', seed=4)}", random_tensors(4)


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.parametrize("with_ssd", [True, False], ids=["revision from SSD", "origin read again"])
def test_functions_share_one_copy_after_a_restart(how, with_ssd, start_agent, model, tmp_path, eventually):
    uri, tensors = model
    agent = start_agent(*(["--ssd", str(tmp_path / "ssd")] if with_ssd else []))
    with ready(agent, uri) as first, ready(agent, uri) as second:
        sealed(first, eventually)
        if with_ssd:
            eventually(lambda: [stored.revision for stored in agent.client.status().ssd.images if stored.revision])
        getattr(agent, how)()
        for lease in (first, second):
            with pytest.raises(LeaseLost):
                wait_for_the_end(lease)
        agent.start()
        for lease in (first, second):
            adopted = agent.client.offer(uri, lease, deadline=soon())
            assert (adopted.shared, adopted.why) == (True, "")
            assert adopted.revision == lease.revision != ""
        (status,) = agent.client.status().models
        assert (status.leases, status.state, agent.client.status().orphaned) == (2, "ready", 0)
        with ready(agent, uri) as third:
            assert inodes(third) == inodes(first)
            assert (third.tier, third.revision) == ("dram", first.revision)
            assert tensors_of(third) == contents(tensors)
        assert agent.client.push_drain("rollout", 1.0, uri) == 2
        assert first.next_event(10) == Drain("rollout", 1.0)
    eventually(lambda: agent.client.status().models[0].leases == 0)
    agent.client.evict(uri)
    eventually(lambda: not agent.memfds())


def test_huge_pages_are_adopted_as_such(huge_pages, start_agent, model, eventually):
    huge_pages(4)
    agent = start_agent("--huge-pages", "always")
    with ready(agent, model[0]) as lease:
        sealed(lease, eventually)
        agent.kill()
        agent.start()
        assert agent.client.offer(model[0], lease, deadline=soon()).shared
        assert agent.client.status().models[0].page == PAGE


def test_whoever_asks_while_an_offer_is_examined_waits_and_shares(start_local_agent, checkpoint_files, eventually):
    files = checkpoint_files(seed=1)
    old = start_local_agent({FAKE: FakeOrigin(FAKE, files)})
    lease = ready(old, FAKE)
    gate, reading = threading.Event(), threading.Event()

    def before_read(name: str, start: int, size: int) -> None:
        if name == "model.safetensors" and threading.current_thread().name.startswith("adoption"):
            reading.set()
            assert gate.wait(30)

    new = start_local_agent({FAKE: FakeOrigin(FAKE, files, before_read=before_read)})
    with lease:
        offering = threading.Thread(target=lambda: new.client.offer(FAKE, lease, deadline=soon()))
        offering.start()
        assert reading.wait(10)
        found = []
        asking = threading.Thread(target=lambda: found.append(ready(new, FAKE)))
        asking.start()
        eventually(lambda: new.agent._ledger.residency._aliases[FAKE].waiting)
        gate.set()
        offering.join(20)
        asking.join(20)
        with found[0] as shared:
            assert inodes(shared) == inodes(lease)


def test_a_large_offer_keeps_no_small_one_waiting(start_local_agent, checkpoint_files):
    """The large one hangs in its origin; others are examined meanwhile."""
    large, small = "fake://large", "fake://small"
    files = {large: checkpoint_files(seed=1), small: checkpoint_files(seed=2)}
    old = start_local_agent({uri: FakeOrigin(uri, content) for uri, content in files.items()})
    gate, reading = threading.Event(), threading.Event()

    def hang(name: str, start: int, size: int) -> None:
        reading.set()
        assert gate.wait(30)

    origins = {uri: FakeOrigin(uri, content) for uri, content in files.items()}
    origins[large].before_read = hang
    new = start_local_agent(origins)
    with ready(old, large) as first, ready(old, small) as second:
        offering = threading.Thread(target=lambda: new.client.offer(large, first, deadline=soon()))
        offering.start()
        assert reading.wait(10)
        try:
            assert new.client.offer(small, second, deadline=soon(10)).shared
            assert [model.model for model in new.agent.status()[2]] == [small]
        finally:
            gate.set()
            offering.join(20)
        assert len(new.agent.status()[2]) == 2


def test_of_equal_offers_that_come_at_once_one_is_examined_and_all_share(start_local_agent, checkpoint_files):
    files = checkpoint_files(large_tensors(1))
    old = start_local_agent({FAKE: FakeOrigin(FAKE, files)})
    origin = FakeOrigin(FAKE, files)
    new = start_local_agent({FAKE: origin})
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        leases = [stack.enter_context(ready(old, FAKE)) for _ in range(8)]
        together = threading.Barrier(8)

        def offer(lease):
            together.wait(20)
            return new.client.offer(FAKE, lease, deadline=soon())

        assert [adopted.shared for adopted in pool.map(offer, leases)] == [True] * 8
        assert [model.leases for model in new.agent.status()[2]] == [8]
        assert {tuple(inodes(lease)) for lease in leases} == {tuple(inodes(leases[0]))}
    weights = len(files["model.safetensors"])
    assert origin.bytes_read < 2 * weights, "the weights were read once; each offer looks at the headers"


def test_what_was_adopted_is_kept_on_ssd_and_told_to_other_nodes(start_agent, model, tmp_path, eventually):
    uri, tensors = model
    old, new = start_agent(), start_agent("--ssd", str(tmp_path / "ssd"))
    with ready(old, uri) as lease:
        sealed(lease, eventually)
        adopted = new.client.offer(uri, lease, deadline=soon())
        assert adopted.shared
        (stored,) = eventually(lambda: [image for image in new.client.status().ssd.images if image.revision])
        assert (stored.revision, stored.bytes) == (adopted.revision, lease.manifest.nbytes)
        both = {("dram", stored.bytes), ("ssd", stored.bytes)}
        eventually(lambda: {(held.tier, held.done) for held in new.client.cluster().holdings} == both)
        (place,) = (tmp_path / "ssd" / "images").iterdir()
        assert [(place / f"{n}.seg").read_bytes() for n in range(len(lease.segments))] == whole(lease)
    new.kill()
    new.start()
    with ready(new, uri) as again:
        assert (again.tier, again.revision) == ("ssd", adopted.revision)
        assert tensors_of(again) == contents(tensors)


def test_what_was_adopted_can_be_evicted_while_it_is_written(start_local_agent, checkpoint_files, tmp_path, eventually):
    """A disk that hangs must not keep the memory: the image is given up."""
    files = checkpoint_files(seed=1)
    old = start_local_agent({FAKE: FakeOrigin(FAKE, files)})
    new = start_local_agent({FAKE: FakeOrigin(FAKE, files)}, ssd=tmp_path / "ssd")
    writing, gate = threading.Event(), threading.Event()

    def write(self, segment, start, view):
        writing.set()
        assert gate.wait(30)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writing, "write", write)
        with ready(old, FAKE) as lease:
            assert new.client.offer(FAKE, lease, deadline=soon()).shared
            assert writing.wait(10)
        eventually(lambda: new.agent.status()[2][0].leases == 0)
        evicting = threading.Thread(target=new.client.evict, args=(FAKE,))
        evicting.start()
        eventually(lambda: new.agent.status()[2][0].state == "evicting")
        gate.set()
        evicting.join(20)
    eventually(lambda: not new.agent.status()[2])
    assert new.client.status().ssd.images == []
    assert not list((tmp_path / "ssd" / "partial").iterdir())


def test_an_agent_with_a_copy_of_its_own_says_so_and_counts_the_orphan(agent, model, eventually):
    with ready(agent, model[0]) as lease:
        sealed(lease, eventually)
        agent.kill()
        agent.start()
        with ready(agent, model[0]) as other:
            adopted = agent.client.offer(model[0], lease, deadline=soon())
            assert (adopted.shared, adopted.why) == (False, "the agent has a copy of its own")
            assert inodes(other) != inodes(lease)
        assert agent.client.status().orphaned == lease.manifest.nbytes
        assert agent.client.push_drain("rollout", 1.0, model[0]) == 1
        assert lease.next_event(10) == Drain("rollout", 1.0)
    eventually(lambda: agent.client.status().orphaned == 0)


# --- the hostile client -----------------------------------------------------------------------------------------------


def memory(size: int, content: bytes = b"", *, seals: int = SEALS, holes: bool = False, huge: bool = False) -> int:
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if huge else 0))
    os.ftruncate(fd, size)
    if not holes:
        os.posix_fallocate(fd, 0, size)
    if content:
        os.pwrite(fd, content, 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def image(lease) -> bytearray:
    with mmap.mmap(lease.segments[0], 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        return bytearray(view[:])


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        ("one bit of a tensor", "the bytes are rev-"),
        ("the first byte", "the bytes are rev-"),
        ("something in the padding", "between the tensors"),
        ("no seals", "not sealed"),
        ("future writes sealed only", "not sealed"),
        ("may grow", "not sealed"),
        ("too short", "bytes and the model's has"),
        ("too long", "bytes and the model's has"),
        ("holes", "has holes"),
        ("a file", "not sealed"),
        ("a socket", "not sealed"),
        ("one too many", "2 segments were offered"),
        ("another source", "other files"),
    ],
)
def test_a_client_that_lies_is_refused_and_harms_nobody(lie, why, agent, model, eventually, tmp_path):
    uri, tensors = model
    with ready(agent, uri) as lease:
        bytes_, source, fds = image(lease), lease.manifest.source, []
        tensor = lease.manifest.tensors[3]
        match lie:
            case "one bit of a tensor":
                bytes_[tensor.offset + 5] ^= 1
            case "the first byte":
                bytes_[0] ^= 0xFF
            case "something in the padding":
                bytes_[-1] = 1
            case "no seals":
                fds = [memory(len(bytes_), bytes_, seals=0)]
            case "future writes sealed only":
                fds = [memory(len(bytes_), bytes_, seals=0x10 | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)]
            case "may grow":
                fds = [memory(len(bytes_), bytes_, seals=fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)]
            case "too short":
                fds = [memory(len(bytes_) - 4096, bytes_[:-4096])]
            case "too long":
                fds = [memory(len(bytes_) + 4096, bytes_)]
            case "holes":
                fds = [memory(len(bytes_), holes=True)]
            case "a file":
                (tmp_path / "file").write_bytes(bytes_)
                fds = [os.open(tmp_path / "file", os.O_RDONLY)]
            case "a socket":
                fds = [socket.socket().detach()]
            case "one too many":
                fds = [memory(len(bytes_), bytes_), memory(len(bytes_), bytes_)]
            case "another source":
                source = "src-" + "0" * 40
        true_fds, lease.segments = lease.segments, fds or [memory(len(bytes_), bytes_)]
        lease.manifest = type(lease.manifest)(
            **{
                name: source if name == "source" else getattr(lease.manifest, name)
                for name in lease.manifest.__struct_fields__
            }
        )
        agent.kill()
        agent.start()
        adopted = agent.client.offer(uri, lease, deadline=soon())
        assert not adopted.shared
        assert why in adopted.why
        assert agent.client.status().models == []
        with ready(agent, uri) as honest:
            assert tensors_of(honest) == contents(tensors)
            assert inodes(honest) != inodes(lease)
        for fd in true_fds:
            os.close(fd)
    eventually(lambda: agent.client.status().orphaned == 0)


def test_what_was_adopted_cannot_be_written_to(start_agent, model, eventually):
    """Not even by the one who made the memory."""
    agent = start_agent()
    with ready(agent, model[0]) as lease:
        mine = memory(lease.manifest.nbytes, bytes(image(lease)))
        true_fds, lease.segments = lease.segments, [mine]
        agent.kill()
        agent.start()
        assert agent.client.offer(model[0], lease, deadline=soon()).shared, "the bytes are right, whoever made them"
        for attempt in (
            lambda: os.pwrite(mine, b"x", 0),
            lambda: os.ftruncate(mine, 0),
            lambda: mmap.mmap(mine, PAGE, mmap.MAP_SHARED, mmap.PROT_WRITE),
        ):
            with pytest.raises((OSError, PermissionError)):
                attempt()
        for fd in true_fds:
            os.close(fd)


@pytest.mark.parametrize("when", ["with a lease", "with half a message", "more than named"])
def test_fds_that_no_offer_names_end_the_connection(when, agent):
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(agent.socket))
        raw.sendall(encode(Hello(1, "x")))
        raw.recv(4096)
        before = len(agent.fds())
        frame = encode(Offer("file:///m", "src-1", 1)) if when != "with a lease" else encode(LeaseRequest("file:///m"))
        fds = [raw.fileno()] * (3 if when == "more than named" else 1)
        socket.send_fds(raw, [frame[:10] if when == "with half a message" else frame], fds)
        raw.settimeout(10)
        while raw.recv(4096):
            pass
    assert len(agent.fds()) <= before


def test_an_offer_that_is_broken_off_leaves_nothing(agent, model, eventually):
    with ready(agent, model[0]) as lease:
        sealed(lease, eventually)
        agent.kill()
        agent.start()
        before = len(agent.fds())
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(agent.socket))
                raw.sendall(encode(Hello(1, "x")))
                raw.recv(4096)
                message = Offer(model[0], lease.manifest.source, len(lease.segments))
                socket.send_fds(raw, [encode(message)], lease.segments)
        eventually(lambda: not any(model.leases for model in agent.client.status().models))
        eventually(lambda: len(agent.fds()) <= before + 2, what="at most the adopted copy is left")
    with ready(agent, model[0]) as again:
        assert tensors_of(again) == contents(model[1])


def test_agents_killed_while_they_adopt(start_agent, tmp_path, write_checkpoint, rounds, eventually):
    """In the middle of proving the bytes, or of writing them to SSD: the next one finds no half of either."""
    tensors = large_tensors(3)
    uri = f"file://{write_checkpoint(tmp_path / 'm', tensors)}"
    old, agent = start_agent(), start_agent("--ssd", str(tmp_path / "ssd"))
    source = random.Random(2)
    with ready(old, uri) as lease:
        sealed(lease, eventually)
        for _ in range(rounds(5, 300)):
            agent.kill()
            agent.start()
            killer = threading.Timer(source.uniform(0, 0.12), agent.running.kill)
            killer.start()
            with contextlib.suppress(AgentUnreachable, LeaseLost):
                agent.client.offer(uri, lease, deadline=soon())
            killer.join()
        agent.kill()
        agent.start()
        assert agent.client.offer(uri, lease, deadline=soon()).shared
        with ready(agent, uri) as other:
            assert inodes(other) == inodes(lease)
            assert tensors_of(other) == contents(tensors)
        eventually(lambda: [image.revision for image in agent.client.status().ssd.images] == [lease.revision])
        (place,) = (tmp_path / "ssd" / "images").iterdir()
        assert [(place / "0.seg").read_bytes()] == whole(lease)
