"""Loading end to end: real agents, files, S3; many clients, changed sources, lost connections, killed processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from leased import FAKE, contents, large_tensors, soon, tensors_of

from cache_agent.client.cache_client import CacheClient
from cache_agent.errors import AccessDenied, AgentError, LeaseLost, OriginChanged, OriginUnavailable
from cache_agent.model.manifest import CHUNK, PAGE
from cache_agent.tiers.dram import Dram
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.wire.messages import Drain, RevisionNotice


def revision_by_hand(files) -> str:
    lines = [
        f"{name}\0{len(content)}\0{hashlib.sha256(content).hexdigest()}\n"
        for name, content in sorted(files.items())
        if not name.endswith(".index.json")
    ]
    return "rev-" + hashlib.sha256("".join(lines).encode()).hexdigest()[:40]


def await_revision(lease, seconds: float = 20.0) -> str:
    deadline = soon(seconds)
    while not lease.revision and time.monotonic() < deadline:
        lease.next_event(1.0)
    return lease.revision


# --- the bytes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_agent(agent_process, s3):
    """One agent for the tests that need nothing special of it."""
    with agent_process("--s3-endpoint", s3.endpoint, env=s3.env) as agent:
        yield agent


@pytest.mark.parametrize("scheme", ["file", "s3"])
@pytest.mark.parametrize("shards", [1, 5])
def test_segments_hold_the_tensors_of_the_files(
    scheme, shards, request, tmp_path, s3, shared_agent, random_tensors, checkpoint_files, write_checkpoint
):
    tensors = random_tensors(seed=shards, layers=3)
    kinds = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
    for number, (dtype, size) in enumerate(kinds.items()):
        tensors[f"model.layers.{number}.extra.{dtype}"] = (dtype, (7, 3), bytes([number]) * 21 * size)
    tensors["model.layers.0.scalar"] = ("F32", (), b"abcd")
    tensors["model.layers.0.empty"] = ("F32", (0, 5), b"")
    if scheme == "file":
        uri = f"file://{write_checkpoint(tmp_path / 'm', tensors, shards=shards)}"
    else:
        uri = s3.upload(s3.new_bucket(), "models/m", checkpoint_files(tensors, shards=shards))
    with shared_agent.client.lease(uri, deadline=soon()) as lease:
        lease.wait_ready(soon())
        assert tensors_of(lease) == contents(tensors)
        assert {t.name: (t.dtype, t.shape) for t in lease.manifest.tensors} == {
            name: (dtype, tuple(shape)) for name, (dtype, shape, _) in tensors.items()
        }
        files = checkpoint_files(tensors, shards=shards)
        small = {name for name in files if not name.endswith((".safetensors", ".index.json"))}
        assert {name: lease.manifest.files[name] for name in small} == {name: files[name] for name in small}
        assert await_revision(lease) == revision_by_hand(files)
        assert lease.tier == "origin"
        assert [span.name for span in lease.spans] == ["lease", "resolve", "reserve", "transfer"]


def test_a_model_larger_than_a_chunk_from_s3(s3, shared_agent, checkpoint_files, eventually):
    tensors = large_tensors(3, seed=5)
    uri = s3.upload(s3.new_bucket(), "a/b/c", checkpoint_files(tensors, shards=2))
    with shared_agent.client.lease(uri, deadline=soon()) as lease:
        lease.wait_ready(soon())
        assert tensors_of(lease) == contents(tensors)


def test_padding_between_tensors_is_zero(shared_agent, tmp_path, write_checkpoint):
    tensors = {"a": ("U8", (3,), b"abc"), "b": ("U8", (70,), b"b" * 70)}
    with shared_agent.client.lease(f"file://{write_checkpoint(tmp_path / 'm', tensors)}") as lease:
        lease.wait_ready(soon())
        with mmap.mmap(lease.segments[0], 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
            assert view[:] == (b"abc".ljust(64, b"\0") + b"b" * 70).ljust(PAGE, b"\0")


def test_links_as_model_caches_use_them_are_followed(shared_agent, tmp_path, write_checkpoint, random_tensors):
    blobs = write_checkpoint(tmp_path / "blobs", seed=9)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    with shared_agent.client.lease(f"file://{snapshot}") as lease:
        lease.wait_ready(soon())
        assert tensors_of(lease) == contents(random_tensors(9))


def test_huge_pages_hold_the_same_bytes_and_come_back(
    huge_pages, start_agent, tmp_path, write_checkpoint, random_tensors, eventually
):
    huge_pages(4)
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    agent = start_agent("--huge-pages", "always")
    uri = f"file://{write_checkpoint(tmp_path / 'm')}"
    with agent.client.lease(uri) as lease:
        lease.wait_ready(soon())
        assert lease.page == PAGE
        assert int(free.read_text()) == 3
        assert tensors_of(lease) == contents(random_tensors())
        assert await_revision(lease)
    eventually(lambda: agent.client.status().models[0].leases == 0)
    agent.client.evict(uri)
    eventually(lambda: int(free.read_text()) == 4)


def test_what_clients_get_is_read_only_and_sealed(shared_agent, tmp_path, write_checkpoint):
    with shared_agent.client.lease(f"file://{write_checkpoint(tmp_path / 'm')}") as lease:
        lease.wait_ready(soon())
        for fd in [lease.manifest_fd, *lease.segments]:
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            assert seals & fcntl.F_SEAL_WRITE
            assert seals & fcntl.F_SEAL_SEAL
            assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_two_leases_share_the_same_memory(shared_agent, tmp_path, write_checkpoint):
    uri = f"file://{write_checkpoint(tmp_path / 'm', seed=41)}"
    with shared_agent.client.lease(uri) as first, shared_agent.client.lease(uri) as second:
        first.wait_ready(soon())
        second.wait_ready(soon())
        inodes = [[os.fstat(fd).st_ino for fd in lease.segments] for lease in (first, second)]
        assert inodes[0] == inodes[1]
        assert second.tier in ("origin", "dram")


# --- many clients -----------------------------------------------------------------------------------------------------


def test_fifty_clients_at_once_cause_one_load(start_local_agent, checkpoint_files):
    files = checkpoint_files(large_tensors(3))
    gate = threading.Event()
    origin = FakeOrigin(FAKE, files, before_read=lambda *_: gate.wait(30))
    agent = start_local_agent({FAKE: origin})
    started = threading.Barrier(51)

    def use() -> str:
        started.wait(30)
        with agent.client.lease(FAKE, deadline=soon(60)) as lease:
            lease.wait_ready(soon(60))
            return hashlib.sha256(tensors_of(lease)["model.layers.2.mlp.weight"]).hexdigest()

    with ThreadPoolExecutor(50) as pool:
        digests = [pool.submit(use) for _ in range(50)]
        started.wait(30)
        gate.set()
        expected = hashlib.sha256(large_tensors(3)["model.layers.2.mlp.weight"][2]).hexdigest()
        assert {digest.result(60) for digest in digests} == {expected}
    weights = len(files["model.safetensors"])
    small = sum(len(content) for name, content in files.items() if name != "model.safetensors")
    # Once per describe a first look at the header; every byte of the weights exactly once.
    assert origin.bytes_read <= 2 * (small + (256 << 10)) + weights
    _, used, models = agent.agent.status()
    assert [(model.state, used) for model in models] == [("ready", models[0].bytes)]


def test_fifty_processes_worth_of_connections_to_a_real_agent_are_one_entry(agent, tmp_path, write_checkpoint):
    uri = f"file://{write_checkpoint(tmp_path / 'm', large_tensors(2))}"
    with ThreadPoolExecutor(50) as pool, contextlib.ExitStack() as stack:
        leases = list(pool.map(lambda _: agent.client.lease(uri, deadline=soon(60)), range(50)))
        for lease in leases:
            stack.enter_context(lease)
        for lease in leases:
            lease.wait_ready(soon(60))
        (model,) = agent.client.status().models
        assert (model.leases, model.state) == (50, "ready")
        assert len({os.fstat(lease.segments[0]).st_ino for lease in leases}) == 1
        assert {name for name in agent.fds().values() if "memfd:glowplug:" in name} == {
            "/memfd:glowplug:1:0 (deleted)",
            "/memfd:glowplug:manifest (deleted)",
        }


def test_progress_is_monotone_and_what_it_calls_ready_is_there(start_local_agent, checkpoint_files):
    """Chunks arrive one by one and out of order; after each report the bytes it covers are the model's."""
    tensors = large_tensors(6)
    files = checkpoint_files(tensors)
    turn = threading.Semaphore(0)

    def before_read(name: str, start: int, size: int) -> None:
        if size > 1 << 20:
            assert turn.acquire(timeout=30)

    agent = start_local_agent({FAKE: FakeOrigin(FAKE, files, before_read=before_read)}, readers=3)
    with agent.client.lease(FAKE) as lease:
        view = mmap.mmap(lease.segments[0], 0, mmap.MAP_SHARED, mmap.PROT_READ)
        with view:
            image = bytearray(lease.manifest.nbytes)
            for tensor in lease.manifest.tensors:
                image[tensor.offset : tensor.offset + tensor.size] = tensors[tensor.name][2]
            seen = []
            while not lease.ready:
                turn.release()
                message = lease._next(soon())
                if lease.ready:
                    break
                (ready,), done = message.ready, message.done
                assert message.total == len(image)
                assert not seen or (ready >= seen[-1][0] and done > seen[-1][1])
                assert ready <= done
                assert view[:ready] == bytes(image[:ready])
                seen.append((ready, done))
            assert len(seen) >= 3
            assert view[:] == bytes(image)


# --- revisions and changed sources ------------------------------------------------------------------------------------


def test_a_pin_on_the_right_revision_is_served_and_on_another_refused(
    shared_agent, tmp_path, write_checkpoint, checkpoint_files, random_tensors, refused
):
    uri = f"file://{write_checkpoint(tmp_path / 'm', seed=21)}"
    right = revision_by_hand(checkpoint_files(seed=21))
    with shared_agent.client.lease(f"{uri}@{right}") as lease:
        lease.wait_ready(soon())
        assert lease.revision == right
        assert tensors_of(lease) == contents(random_tensors(21))
    with refused("wrong_revision") as error, shared_agent.client.lease(f"{uri}@rev-{'0' * 40}") as lease:
        lease.wait_ready(soon())
    assert right in error.text


def test_a_wrong_pin_that_loads_first_is_refused_after_the_digest(
    shared_agent, tmp_path, write_checkpoint, checkpoint_files, refused
):
    uri = f"file://{write_checkpoint(tmp_path / 'm', seed=22)}"
    with shared_agent.client.lease(f"{uri}@rev-{'0' * 40}") as lease, refused("wrong_revision"):
        lease.wait_ready(soon())
    with shared_agent.client.lease(uri) as lease:
        lease.wait_ready(soon())
        assert await_revision(lease) == revision_by_hand(checkpoint_files(seed=22))


@pytest.mark.parametrize("scheme", ["file", "s3"])
def test_after_the_source_changed_new_leases_get_new_bytes_and_old_ones_keep_theirs(
    scheme, start_agent, tmp_path, s3, write_checkpoint, checkpoint_files, random_tensors, eventually
):
    bucket = s3.new_bucket()

    def publish(seed: int) -> str:
        if scheme == "s3":
            return s3.upload(bucket, "m", checkpoint_files(seed=seed))
        return f"file://{write_checkpoint(tmp_path / 'm', seed=seed)}"

    agent = start_agent("--revalidate", "0", "--s3-endpoint", s3.endpoint, env=s3.env)
    uri = publish(1)
    with agent.client.lease(uri) as old:
        old.wait_ready(soon())
        publish(2)

        def fresh() -> bool:
            with agent.client.lease(uri) as lease:
                lease.wait_ready(soon())
                return tensors_of(lease) == contents(random_tensors(2))

        eventually(fresh, 20)
        assert tensors_of(old) == contents(random_tensors(1))
        assert len(agent.client.status().models) == 2


def test_a_source_touched_but_not_changed_collapses_to_one_copy(agent_process, tmp_path, write_checkpoint, eventually):
    directory = write_checkpoint(tmp_path / "m")
    with agent_process("--revalidate", "0") as agent:
        uri = f"file://{directory}"
        with agent.client.lease(uri) as lease:
            lease.wait_ready(soon())
            revision = await_revision(lease)
        for file in directory.iterdir():
            os.utime(file, (1, 1))

        def collapsed() -> bool:
            with agent.client.lease(uri) as lease:
                lease.wait_ready(soon())
            models = agent.client.status().models
            return {model.revision for model in models} == {revision} and len(models) == 1

        with agent.client.lease(uri) as lease:
            lease.wait_ready(soon())
        eventually(collapsed, 20)


def test_overwritten_while_it_loads_is_an_error_and_no_mixture(
    start_local_agent, checkpoint_files, refused, eventually
):
    tensors = large_tensors(4)
    origin = FakeOrigin(FAKE, checkpoint_files(tensors))
    first_read = threading.Event()

    def overwrite(name: str, start: int, size: int) -> None:
        if size > 1 << 20 and not first_read.is_set():
            first_read.set()
            origin.contents |= checkpoint_files(large_tensors(4, seed=1))

    origin.before_read = overwrite
    agent = start_local_agent({FAKE: origin})
    with agent.client.lease(FAKE) as lease, refused("origin_changed"):
        lease.wait_ready(soon())
    origin.before_read = None
    eventually(lambda: agent.agent.status()[1] == 0)
    with agent.client.lease(FAKE) as lease:
        lease.wait_ready(soon())
        assert tensors_of(lease) == contents(large_tensors(4, seed=1))


@pytest.mark.parametrize("how", ["rewritten", "replaced", "cut short", "removed", "became a pipe"])
def test_a_file_changed_behind_the_listing_is_noticed(how, tmp_path, write_checkpoint):
    from cache_agent.model.uri import parse_uri
    from cache_agent.tiers.origin import FileOrigin

    directory = write_checkpoint(tmp_path / "m")
    origin = FileOrigin(parse_uri(f"file://{directory}"), [Path("/")])
    (listed,) = [file for file in origin.files() if file.name == "model.safetensors"]
    path = directory / listed.name
    content = origin.read(listed, 0, listed.size)
    match how:
        case "rewritten":
            path.write_bytes(content[::-1])
        case "replaced":
            (directory / "new").write_bytes(content[::-1])
            os.utime(directory / "new", ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
            (directory / "new").replace(path)
        case "cut short":
            os.truncate(path, 100)
        case "removed":
            path.unlink()
        case "became a pipe":
            path.unlink()
            os.mkfifo(path)
    with pytest.raises((OriginChanged, OriginUnavailable) if how == "became a pipe" else OriginChanged):
        origin.read(listed, 0, listed.size)


def test_an_object_overwritten_behind_the_listing_is_noticed(s3, checkpoint_files):
    from cache_agent.model.uri import parse_uri
    from cache_agent.tiers.s3 import S3, S3Origin

    bucket = s3.new_bucket()
    uri = s3.upload(bucket, "m", checkpoint_files(seed=1))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.env.items():
            patch.setenv(name, value)
        store = S3(endpoint=s3.endpoint)
        origin = S3Origin(parse_uri(uri), store)
        (listed,) = [file for file in origin.files() if file.name == "model.safetensors"]
        origin.read(listed, 0, 100)
        s3.upload(bucket, "m", checkpoint_files(seed=2))
        with pytest.raises(OriginChanged):
            origin.read(listed, 0, 100)
        s3.client.delete_object(Bucket=bucket, Key="m/model.safetensors")
        with pytest.raises(AgentError) as caught:
            origin.read(listed, 0, 100)
        assert caught.value.code in ("origin_changed", "not_found")
        store.client().close()


# --- faults of the origin ---------------------------------------------------------------------------------------------


def test_a_hiccup_of_the_origin_is_retried(start_local_agent, checkpoint_files, random_tensors):
    hiccups = iter([True, True, False])

    def before_read(name: str, start: int, size: int) -> None:
        if name == "model.safetensors" and start > 0 and next(hiccups, False):
            raise OriginUnavailable("the store hiccups")

    agent = start_local_agent({FAKE: FakeOrigin(FAKE, checkpoint_files(), before_read=before_read)})
    with agent.client.lease(FAKE) as lease:
        lease.wait_ready(soon())
        assert tensors_of(lease) == contents(random_tensors())
    assert next(hiccups, None) is None, "all hiccups happened"


@pytest.mark.parametrize("error", [OriginUnavailable("gone for good"), AccessDenied("not any more")])
def test_a_load_that_fails_for_good_reaches_all_clients_and_frees_the_memory(
    error, start_local_agent, checkpoint_files, eventually, monkeypatch
):
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    failing = threading.Event()
    failing.set()
    gate = threading.Event()

    def before_read(name: str, start: int, size: int) -> None:
        if name == "model.safetensors" and start > 0 and failing.is_set():
            gate.wait(30)
            raise error

    files = checkpoint_files(large_tensors(3))
    agent = start_local_agent({FAKE: FakeOrigin(FAKE, files, before_read=before_read)})
    with contextlib.ExitStack() as stack:
        leases = [stack.enter_context(agent.client.lease(FAKE)) for _ in range(20)]
        gate.set()
        for lease in leases:
            with pytest.raises(type(error), match=error.text):
                lease.wait_ready(soon())
    assert agent.agent.status()[1:] == (0, [])
    eventually(lambda: not [name for name in map(link, Path("/proc/self/fd").iterdir()) if "memfd:glowplug" in name])
    failing.clear()
    with agent.client.lease(FAKE) as lease:
        lease.wait_ready(soon())
        assert tensors_of(lease) == contents(large_tensors(3))


def link(path: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


@pytest.mark.parametrize("what", ["a load that failed", "an eviction"])
def test_whoever_hears_of_it_finds_the_memory_free(what, start_local_agent, checkpoint_files, eventually, monkeypatch):
    """Or asking again at once could be refused for want of the very memory that is about to be free."""
    told, freed = threading.Event(), []
    real_close = Dram.close

    def close(dram: Dram) -> None:
        if dram.segments:
            told.wait(0.3)  # if the news came first, it comes now
            real_close(dram)
            freed.append(dram)

    failing = what == "a load that failed"

    def before_read(name: str, start: int, size: int) -> None:
        if start > 0 and failing:
            raise AccessDenied("not any more")

    agent = start_local_agent({FAKE: FakeOrigin(FAKE, checkpoint_files(), before_read=before_read)})
    monkeypatch.setattr(Dram, "close", close)
    with agent.client.lease(FAKE) as lease:
        if failing:
            with pytest.raises(AccessDenied):
                lease.wait_ready(soon())
        else:
            lease.wait_ready(soon())
    if not failing:
        eventually(lambda: agent.agent.status()[2][0].leases == 0)
        agent.client.evict(FAKE)
    assert freed
    told.set()


def test_a_fault_inside_the_agent_is_an_internal_error_and_the_agent_goes_on(
    start_local_agent, checkpoint_files, refused
):
    broken = FakeOrigin(FAKE, checkpoint_files())

    def before_read(name: str, start: int, size: int) -> None:
        if start > 0:
            raise ZeroDivisionError("a bug")

    broken.before_read = before_read
    agent = start_local_agent({FAKE: broken, "fake://good": FakeOrigin("fake://good", checkpoint_files())})
    with agent.client.lease(FAKE) as lease, refused("internal") as error:
        lease.wait_ready(soon())
    assert "ZeroDivisionError" in error.text
    with agent.client.lease("fake://good") as lease:
        lease.wait_ready(soon())


class CuttingProxy:
    """Passes TCP on to a server, and cuts each connection after `cut_after` bytes of its answers, none with 0."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self.target = host, int(port)
        self.limits = [0]  # the last one holds; connections that live already count anew from it
        self.cuts = 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.server.accept()
                upstream = socket.create_connection(self.target)
                threading.Thread(target=self.copy, args=(client, upstream, False), daemon=True).start()
                threading.Thread(target=self.copy, args=(upstream, client, True), daemon=True).start()

    def cut_after(self, limit: int) -> None:
        self.limits.append(limit)

    def copy(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            passed = counted = 0
            while data := source.recv(65536):
                if counted != len(self.limits):
                    passed, counted = 0, len(self.limits)
                limit = self.limits[counted - 1] if answers else 0
                target.sendall(data[: limit - passed] if limit else data)
                passed += len(data)
                if limit and passed > limit:
                    self.cuts += 1
                    # A reset, not an orderly end: the reader gets an exception in the middle of a body.
                    target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    break
        self.end(source, target)

    def end(self, source: socket.socket, target: socket.socket) -> None:
        for sock in (target, source):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def test_connections_that_break_in_the_middle_of_a_body(s3, start_agent, checkpoint_files, eventually, refused):
    """First for good, then once more with the store recovered; no memory may stay behind from the broken load."""
    proxy = CuttingProxy(s3.endpoint)
    agent = start_agent("--s3-endpoint", proxy.endpoint, env=s3.env)
    tensors = large_tensors(3)
    uri = s3.upload(s3.new_bucket(), "m", checkpoint_files(tensors))
    with agent.client.lease(uri, deadline=soon()) as lease:
        lease.close()
    eventually(lambda: agent.client.status().models[0].state == "ready", 30)
    agent.evict(uri)
    proxy.cut_after(16 << 10)  # all tries of all readers bring less than what makes a further round worthwhile
    with refused("origin_unavailable"), agent.client.lease(uri, deadline=soon()) as lease:
        lease.wait_ready(soon(60))
    assert proxy.cuts >= 2
    eventually(lambda: agent.memfds() == [], what="the memory of the broken load is free")
    proxy.cut_after(0)
    with agent.client.lease(uri, deadline=soon()) as lease:
        lease.wait_ready(soon(60))
        assert tensors_of(lease) == contents(tensors)
    proxy.server.close()


def test_connections_that_break_now_and_then_are_retried(s3, start_agent, checkpoint_files):
    proxy = CuttingProxy(s3.endpoint)
    agent = start_agent("--s3-endpoint", proxy.endpoint, "--readers", "1", env=s3.env)
    tensors = large_tensors(4)
    uri = s3.upload(s3.new_bucket(), "m", checkpoint_files(tensors))
    proxy.cut_after(CHUNK + (1 << 20))  # connections are kept: one chunk passes, the next breaks, and so on
    with agent.client.lease(uri, deadline=soon()) as lease:
        lease.wait_ready(soon(60))
        assert proxy.cuts >= 1
        assert tensors_of(lease) == contents(tensors)
    proxy.server.close()


@pytest.mark.parametrize(
    ("env", "code"),
    [
        ({}, "denied"),
        ({"AWS_ACCESS_KEY_ID": "glowplug", "AWS_SECRET_ACCESS_KEY": "wrong"}, "denied"),
        ({"AWS_ACCESS_KEY_ID": "stranger", "AWS_SECRET_ACCESS_KEY": "wrong"}, "denied"),
    ],
    ids=["no credentials", "wrong secret", "unknown key"],
)
def test_s3_credentials(env, code, s3, start_agent, checkpoint_files, refused):
    uri = s3.upload(s3.new_bucket(), "m", checkpoint_files())
    agent = start_agent("--s3-endpoint", s3.endpoint, env=env)
    with refused(code):
        agent.client.lease(uri, deadline=soon())


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("s3://no-such-bucket-of-ours/m", "not_found"),
        ("s3://{bucket}/no/such/prefix", "not_found"),
        ("s3://{bucket}", "bad_uri"),
        ("s3://{bucket}/", "bad_uri"),
        ("s3:///prefix", "bad_uri"),
        ("s3://Not A Bucket!/m", "bad_uri"),
    ],
)
def test_s3_uris_that_name_nothing(uri, code, s3, shared_agent, refused):
    with refused(code):
        shared_agent.client.lease(uri.format(bucket=s3.new_bucket()), deadline=soon())


def test_an_s3_endpoint_where_nobody_listens(start_agent, refused):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_MAX_ATTEMPTS": "1"}
    agent = start_agent("--s3-endpoint", f"http://127.0.0.1:{port}", env=keys)
    with refused("origin_unavailable"):
        agent.client.lease("s3://bucket/m", deadline=soon())


# --- room -------------------------------------------------------------------------------------------------------------


def test_a_model_larger_than_the_budget_and_one_that_fits_after_it(
    start_agent, tmp_path, write_checkpoint, refused, eventually
):
    agent = start_agent("--dram", "5M")
    large = f"file://{write_checkpoint(tmp_path / 'large', large_tensors(1))}"
    small = [f"file://{write_checkpoint(tmp_path / str(seed), seed=seed)}" for seed in range(3)]
    with refused("no_capacity") as error:
        agent.client.lease(large)
    assert "--dram" in error.text
    with contextlib.ExitStack() as stack:
        for uri in small[:2]:
            stack.enter_context(agent.client.lease(uri)).wait_ready(soon())
        with refused("no_capacity"):
            agent.client.lease(small[2])
    eventually(lambda: not any(model.leases for model in agent.client.status().models))
    with agent.client.lease(small[2]) as lease:
        lease.wait_ready(soon())
    status = agent.client.status()
    assert status.used <= status.capacity == 5 << 20
    assert small[2] in {model.model for model in status.models}


def test_models_come_and_go_without_leaving_memory_behind(start_agent, tmp_path, write_checkpoint, rounds, eventually):
    agent = start_agent("--dram", "5M")
    uris = [f"file://{write_checkpoint(tmp_path / str(seed), seed=seed)}" for seed in range(5)]
    for number in range(rounds(30, 2000)):
        with agent.client.lease(uris[number % 5], deadline=soon()) as lease:
            lease.wait_ready(soon())
    eventually(lambda: len([place for place in agent.fds().values() if "memfd:glowplug" in place]) <= 4)
    assert agent.client.status().used <= 5 << 20


# --- lost connections and killed processes ----------------------------------------------------------------------------

CLIENT = """
import sys, time
from cache_agent.client.cache_client import CacheClient
lease = CacheClient(sys.argv[1]).lease(sys.argv[2])
print("granted", flush=True)
lease.wait_ready(time.monotonic() + 60)
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def client_process(path: Path, uri: str):
    """Another process that leases a model and says how far it is, line by line, until its input ends."""
    command = [sys.executable, "-c", CLIENT, str(path), uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_client_killed_while_loading_leaves_the_load_to_the_others(start_local_agent, checkpoint_files, eventually):
    gate = threading.Event()

    def before_read(name: str, start: int, size: int) -> None:
        if size > 1 << 20:
            assert gate.wait(60)

    tensors = large_tensors(3)
    origin = FakeOrigin(FAKE, checkpoint_files(tensors), before_read=before_read)
    agent = start_local_agent({FAKE: origin})

    def leases() -> int:
        return agent.agent.status()[2][0].leases

    with client_process(agent.socket, FAKE) as killed, agent.client.lease(FAKE) as other:
        assert killed.stdout.readline() == "granted\n"
        assert leases() == 2
        killed.send_signal(signal.SIGKILL)
        eventually(lambda: leases() == 1)
        (held,) = agent.agent._ledger.memories.values()
        eventually(lambda: len(held.load._watchers) == 1, what="the load forgot the killed client")
        gate.set()
        other.wait_ready(soon())
        assert tensors_of(other) == contents(tensors)
    eventually(lambda: leases() == 0)


def test_when_the_only_client_is_killed_the_load_still_ends_and_serves_the_next(
    start_local_agent, checkpoint_files, eventually
):
    gate = threading.Event()

    def before_read(name: str, start: int, size: int) -> None:
        if size > 1 << 20:
            assert gate.wait(60)

    tensors = large_tensors(2)
    origin = FakeOrigin(FAKE, checkpoint_files(tensors), before_read=before_read)
    agent = start_local_agent({FAKE: origin})
    with client_process(agent.socket, FAKE) as killed:
        assert killed.stdout.readline() == "granted\n"
        killed.send_signal(signal.SIGKILL)
        eventually(lambda: agent.agent.status()[2][0].leases == 0)
    gate.set()
    eventually(lambda: agent.agent.status()[2][0].state == "ready")
    read = origin.bytes_read
    with agent.client.lease(FAKE) as lease:
        lease.wait_ready(soon())
        assert (lease.tier, origin.bytes_read) == ("dram", read)
        assert tensors_of(lease) == contents(tensors)


class SlowStore(CuttingProxy):
    """Passes nothing on after so many bytes of a connection, and does not hang up."""

    def end(self, source: socket.socket, target: socket.socket) -> None:
        """Both sockets stay open."""


@pytest.fixture
def stalled(s3, start_agent, checkpoint_files, eventually):
    """An agent in the middle of a load that will not end, and the model's URI."""
    proxy = SlowStore(s3.endpoint)
    agent = start_agent("--s3-endpoint", proxy.endpoint, env=s3.env)
    uri = s3.upload(s3.new_bucket(), "m", checkpoint_files(large_tensors(3)))
    proxy.cut_after(1 << 20)
    yield agent, uri, lambda: eventually(lambda: proxy.cuts, what="the load stalls")
    proxy.server.close()


def processes_with(inode: tuple[int, int]) -> set[int]:
    """Pids that have a file open or mapped, other than this one."""
    found = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    status = fd.stat()
                    if (status.st_dev, status.st_ino) == inode:
                        found.add(int(process.name))
    return found


def test_an_agent_killed_while_loading_is_noticed_at_once_and_leaves_no_memory(stalled):
    agent, uri, wait_for_stall = stalled
    with contextlib.ExitStack() as stack:
        leases = [stack.enter_context(agent.client.lease(uri, deadline=soon())) for _ in range(5)]
        wait_for_stall()
        inode = os.fstat(leases[0].segments[0]).st_dev, os.fstat(leases[0].segments[0]).st_ino
        assert processes_with(inode) == {agent.pid}
        agent.kill()
        for lease in leases:
            with pytest.raises(LeaseLost):
                lease.wait_ready(soon(5))
        assert processes_with(inode) == set(), "only the leases of this process keep the memory"
    assert [name for name in map(link, Path("/proc/self/fd").iterdir()) if "memfd:glowplug" in name] == []
    agent.start()
    assert agent.client.status().used == 0


def test_an_agent_stopped_while_loading_ends_soon_however_often_it_is_told(stalled):
    agent, uri, wait_for_stall = stalled
    with agent.client.lease(uri, deadline=soon()) as lease:
        wait_for_stall()
        agent.running.send_signal(signal.SIGTERM)
        with pytest.raises(LeaseLost):
            lease.wait_ready(soon(10))
        deadline = soon(20)
        while agent.running.poll() is None:
            assert time.monotonic() < deadline
            agent.running.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                agent.running.wait(0.05)
    assert agent.running.returncode == 0


def test_an_agent_stopped_while_the_origin_hangs_ends_soon(start_agent, eventually):
    """The store accepts the connection and never answers, so that not even the listing comes back."""
    with socket.create_server(("127.0.0.1", 0)) as hung:
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        agent = start_agent("--s3-endpoint", f"http://127.0.0.1:{hung.getsockname()[1]}", env=keys)
        failures = []

        def ask() -> None:
            try:
                agent.client.lease("s3://bucket/m", deadline=soon(60))
            except Exception as error:
                failures.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        connection, _ = hung.accept()
        with connection:
            assert agent.stop(20) == 0
        asking.join(10)
        assert [type(error) for error in failures] == [LeaseLost]


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_memory_that_clients_map_outlives_the_agent(how, agent, tmp_path, write_checkpoint, random_tensors):
    uri = f"file://{write_checkpoint(tmp_path / 'm')}"
    with agent.client.lease(uri) as lease, client_process(agent.socket, uri) as other:
        assert [other.stdout.readline() for _ in range(2)] == ["granted\n", "ready\n"]
        lease.wait_ready(soon())
        assert await_revision(lease), "nothing else will be pushed"
        with mmap.mmap(lease.segments[0], 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
            if how == "stop":
                assert agent.stop() == 0
                assert not agent.socket.exists()
            else:
                agent.kill()
            with pytest.raises(LeaseLost):
                lease.next_event(5)
            for tensor in lease.manifest.tensors:
                assert view[tensor.offset : tensor.offset + tensor.size] == random_tensors()[tensor.name][2]
            agent.start()
            with agent.client.lease(uri) as again:
                again.wait_ready(soon())
                assert tensors_of(again) == contents(random_tensors())


def test_agents_killed_at_random_moments(start_agent, tmp_path, write_checkpoint, rounds):
    """Whatever the moment, clients get their bytes or an error that says to try again."""
    agent = start_agent("--readers", "2")
    tensors = large_tensors(4)
    uri = f"file://{write_checkpoint(tmp_path / 'm', tensors)}"
    source = random.Random(5)
    outcomes = []
    for _ in range(rounds(6, 500)):
        moment = source.uniform(0, 0.05)

        def use() -> str:
            try:
                with CacheClient(agent.socket, timeout=5).lease(uri, deadline=soon(20)) as lease:
                    lease.wait_ready(soon(20))
                    return "served" if tensors_of(lease) == contents(tensors) else "wrong bytes"
            except Exception as error:
                return getattr(error, "code", repr(error))

        with ThreadPoolExecutor(4) as pool:
            uses = [pool.submit(use) for _ in range(4)]
            threading.Event().wait(moment)
            agent.kill()
            outcomes += [use.result(60) for use in uses]
        agent.start()
    assert set(outcomes) <= {"served", "lease_lost", "agent_unreachable"}, outcomes


# --- what the agent pushes --------------------------------------------------------------------------------------------


def test_drain_reaches_the_holders_of_that_model_only(shared_agent, tmp_path, write_checkpoint):
    one, two = (f"file://{write_checkpoint(tmp_path / str(seed), seed=30 + seed)}" for seed in range(2))
    with shared_agent.client.lease(one) as first, shared_agent.client.lease(two) as second:
        first.wait_ready(soon())
        second.wait_ready(soon())
        await_revision(first)
        await_revision(second)
        assert shared_agent.client.push_drain("rollout", 12.5, one) == 1
        assert first.next_event(10) == Drain("rollout", 12.5)
        assert second.next_event(0) is None
        assert shared_agent.client.push_drain("node goes down", 1.0) >= 2
        assert second.next_event(10) == Drain("node goes down", 1.0)


def test_admitted_is_pushed_once_the_digest_is_known(start_local_agent, checkpoint_files):
    files = checkpoint_files(large_tensors(2))
    agent = start_local_agent({FAKE: FakeOrigin(FAKE, files)})
    with agent.client.lease(FAKE) as lease:
        lease.wait_ready(soon())
        if not lease.revision:
            assert lease.next_event(20) == RevisionNotice(revision_by_hand(files))
        assert lease.revision == revision_by_hand(files)
    with agent.client.lease(FAKE) as lease:
        lease.wait_ready(soon())
        assert (lease.tier, lease.revision) == ("dram", revision_by_hand(files))


def test_status_counts_while_it_loads(start_local_agent, checkpoint_files, eventually):
    gate = threading.Event()

    def before_read(name: str, start: int, size: int) -> None:
        if start > CHUNK:
            assert gate.wait(60)

    agent = start_local_agent({FAKE: FakeOrigin(FAKE, checkpoint_files(large_tensors(3)), before_read=before_read)})
    with agent.client.lease(FAKE) as lease:
        eventually(lambda: agent.client.status().models[0].done > 0)
        (model,) = agent.client.status().models
        assert (model.state, model.leases, model.bytes) == ("loading", 1, lease.manifest.nbytes)
        assert 0 < model.done < model.bytes
        gate.set()
        lease.wait_ready(soon())
