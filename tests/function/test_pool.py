"""Node mode: a pool's worker in a real container is confined as the container's own processes are.

As root only: these containers are real namespaces, with a root directory and a user of their own.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from node_mode import POSSIBLE, ROOT, SECONDS, Container, Pool, comm, ended, status, wait

pytestmark = [
    pytest.mark.skipif(not POSSIBLE, reason="needs root and unshare"),
    pytest.mark.timeout(240),
]


@pytest.fixture(scope="module")
def agent(agent_process: Callable[..., Any]) -> Iterator[Any]:
    with agent_process("--socket-mode", "666", "--file-root", str(ROOT)) as made:
        yield made


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, agent: Any) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("pool"), "--agent", str(agent.socket))
    yield made
    made.close()


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """A pool with a filter that allows everything; the tests, in their order, kill its zygote and then the pool."""
    place = tmp_path_factory.mktemp("doomed")
    program = place / "filter.bpf"
    program.write_bytes(bytes.fromhex("0600000000 00ff7f"))
    made = Pool(place, "--seccomp", str(program), "--spares", "1")
    yield made
    made.close()


@pytest.fixture
def container(pool: Pool, tmp_path: Path) -> Iterator[Callable[..., Container]]:
    with contextlib.ExitStack() as stack:

        def make(uid: int = 12000, which: Pool = pool, **options: Any) -> Container:
            made = Container(which, tmp_path, uid, **options)
            stack.callback(made.close)
            return made

        yield make


@pytest.mark.parametrize("uid", [12000, 0])
def test_the_worker_is_one_of_the_container(container: Callable[..., Container], uid: int) -> None:
    place = container(uid)
    worker, first = place.outside(place.worker()), place.first()
    ours, theirs = status(worker), status(first)
    for name in ("Uid", "Gid", "Groups"):
        assert ours[name] == theirs[name], name
    # gunicorn has another one for the moment in which it makes a file.
    wait(lambda: status(worker)["Umask"] == theirs["Umask"], "the container's umask")
    assert {int(ours[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
    assert ours["NoNewPrivs"] == "1"
    assert ours["Threads"] != "0"
    for kind in ("pid", "mnt", "net", "uts", "ipc", "cgroup", "user"):
        assert os.stat(f"/proc/{worker}/ns/{kind}").st_ino == os.stat(f"/proc/{first}/ns/{kind}").st_ino, kind
    assert os.stat(f"/proc/{worker}/root/").st_ino == os.stat(f"/proc/{first}/root/").st_ino
    assert Path(f"/proc/{worker}/cgroup").read_text() == Path(f"/proc/{first}/cgroup").read_text()
    assert Path(f"/proc/{worker}/limits").read_text() == Path(f"/proc/{first}/limits").read_text()


def test_it_is_charged_to_the_containers_cgroups(container: Callable[..., Container]) -> None:
    kinds = [Path("/sys/fs/cgroup") / kind for kind in ("memory", "pids", "unified")]
    groups = [kind for kind in kinds if kind.is_dir()]
    made = [group / f"glowplug-test-{os.getpid()}" for group in groups or [Path("/sys/fs/cgroup")]]
    try:
        for group in made:
            group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroups can be made here: {error}")
    files = [group / "cgroup.procs" for group in made]
    place = container(cgroups=[str(file) for file in files])
    try:
        worker = place.outside(place.worker())
        for file in files:
            assert worker in [int(pid) for pid in file.read_text().split()], file
        assert Path(f"/proc/{worker}/cgroup").read_text() == Path(f"/proc/{place.first()}/cgroup").read_text()
    finally:
        place.close()
        for group, file in zip(made, files, strict=True):
            wait(lambda file=file: not file.read_text(), "nothing of the container is left")
            group.rmdir()


ATTACK = """
import ctypes, json, os, struct
libc = ctypes.CDLL(None, use_errno=True)
pid, found = {pid}, {{}}
def attempt(name, action):
    try:
        found[name] = "got " + repr(action())[:60]
    except OSError as error:
        found[name] = error.errno
def called(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
for name in ("mem", "environ", "maps", "smaps", "auxv", "stack", "syscall", "pagemap"):
    attempt(name, lambda: open(f"/proc/{{pid}}/{{name}}", "rb").read(16))
for name in ("exe", "cwd", "root"):
    attempt(name, lambda: os.readlink(f"/proc/{{pid}}/{{name}}"))
attempt("files under root", lambda: os.listdir(f"/proc/{{pid}}/root/"))
for number in range(12):
    attempt(f"fd {{number}}", lambda: os.readlink(f"/proc/{{pid}}/fd/{{number}}"))
    if number > 2 and found[f"fd {{number}}"] == 2:  # it is not open: a root may know that
        del found[f"fd {{number}}"]
files = f"/proc/{{pid}}/map_files"
attempt("map_files", lambda: [open(f"{{files}}/{{each}}") for each in os.listdir(files)])
attempt("ptrace", lambda: called(libc.ptrace(16, pid, 0, 0)))
attempt("seize", lambda: called(libc.ptrace(0x4206, pid, 0, 0)))
room = ctypes.create_string_buffer(8)
vector = struct.pack("=QQ", ctypes.addressof(room), 8)  # an address that a child of the same program has, too
attempt("process_vm_readv", lambda: called(libc.process_vm_readv(pid, vector, 1, vector, 1, 0)))
pidfd = os.pidfd_open(pid)
for number in range(6):
    attempt(f"pidfd_getfd {{number}}", lambda: called(libc.syscall(438, pidfd, number, 0)))
for kind in ("pid", "mnt", "net"):
    attempt(f"ns {{kind}}", lambda: os.readlink(f"/proc/{{pid}}/ns/{{kind}}"))
print(json.dumps(found))
"""


@pytest.mark.parametrize("uid", [12000, 0])
def test_nobody_in_the_container_looks_into_the_worker(container: Callable[..., Container], uid: int) -> None:
    place = container(uid)
    found = place.attack(ATTACK.format(pid=place.worker()))
    assert len(found) > 25
    # A process that is gone or a file that is not there would prove nothing.
    assert {name: result for name, result in found.items() if result not in (1, 13)} == {}


@pytest.mark.parametrize("uid", [12000, 0])
def test_nothing_of_the_host_or_of_others_is_in_reach(
    container: Callable[..., Container], tmp_path: Path, uid: int
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    one, other = container(uid), container(uid)
    worker, others = one.outside(one.worker()), other.outside(other.worker())
    found = one.attack(
        f"""
import json, os
processes = [int(name) for name in os.listdir("/proc") if name.isdigit()]
paths = [{str(secret)!r}, *(f"/proc/{{pid}}/root{secret}" for pid in processes)]
print(json.dumps([[path for path in paths if os.access(path, os.F_OK)], processes]))
"""
    )
    files, processes = found
    assert files == []
    assert len(processes) == 3, "the first process, the worker, and whoever asks"
    assert os.stat(f"/proc/{worker}/ns/pid").st_ino != os.stat(f"/proc/{others}/ns/pid").st_ino
    # What the worker itself has open: its sockets, standard streams, and what its container could open.
    for fd in Path(f"/proc/{worker}/fd").iterdir():
        target = os.readlink(fd)
        assert target.startswith(("socket:", "pipe:", "anon_inode:", "/dev/null", "/memfd:")) or "root-" in target, (
            target
        )


@pytest.mark.parametrize("uid", [12000, 0])
def test_only_the_first_process_is_served_and_once(container: Callable[..., Container], uid: int) -> None:
    place = container(uid)
    place.worker()
    place.order(ask=2)
    assert place.hear("refused", "forked") == {"refused": 2, "why": "its container has a worker"}
    found = place.attack(
        """
import json, os, socket
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
    asking.connect("/run/glowplug/pool.sock")
    asking.settimeout(20)
    print(json.dumps(asking.recv(4096).decode()))
"""
    )
    assert found == "failed=only the first process of a container is served\0"


def test_a_spare_waits_for_the_request_and_goes_with_its_container(
    pool: Pool, container: Callable[..., Container]
) -> None:
    """A spare is confined like a worker before one is asked for, and then becomes that worker."""
    place = container()
    place.introduce()
    spare = place.named("glowplug-spare")
    wait(lambda: status(spare)["NoNewPrivs"] == "1", "it has entered the container", place.log)
    ours, theirs = status(spare), status(place.first())
    assert [ours[name] for name in ("Uid", "Gid", "Groups")] == [theirs[name] for name in ("Uid", "Gid", "Groups")]
    assert os.stat(f"/proc/{spare}/root/").st_ino == os.stat(f"/proc/{place.first()}/root/").st_ino

    def held() -> set[str]:
        return {os.readlink(fd).split(":")[0] for fd in Path(f"/proc/{spare}/fd").iterdir()}

    wait(lambda: held() == {"/dev/null", "socket"}, "it has nothing open of the pool's", place.log)
    found = place.attack(ATTACK.format(pid=int(ours["NSpid"].split()[-1])))
    assert {name: result for name, result in found.items() if result not in (1, 13)} == {}
    place.order(ask=1)
    assert place.hear("forked", "refused")["pid"] == int(ours["NSpid"].split()[-1])
    wait(lambda: comm(spare) == "glowplug-worker", "it is the worker")

    os.kill(spare, signal.SIGKILL)
    place.hear("ended")
    another = place.named("glowplug-spare")
    os.kill(another, signal.SIGKILL)  # somebody in the container has done that
    wait(lambda: ended(another), "it is reaped")
    place.order(ask=2)
    assert "forked" in place.hear("forked", "refused")
    os.kill(place.named("glowplug-worker"), signal.SIGKILL)
    place.hear("ended")
    last = place.named("glowplug-spare")
    place.close()
    wait(lambda: ended(last), "nothing of the container is left")
    assert pool.process.poll() is None


def test_who_is_no_container_is_refused(pool: Pool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
        asking.connect(str(pool.socket))
        asking.settimeout(SECONDS)
        assert asking.recv(4096) == b"failed=only the first process of a container is served\0"


def test_a_filtered_container_needs_a_filter(container: Callable[..., Container], doomed: Pool) -> None:
    refused = container(filtered=True).hear("failed")
    assert refused == {"failed": "its container has a seccomp filter, and the pool was given none"}
    place = container(filtered=True, which=doomed)
    assert status(place.outside(place.worker()))["Seccomp"] == "2"


def test_a_container_with_its_own_user_namespace_is_refused(pool: Pool, tmp_path: Path) -> None:
    code = f"""
import socket
asking = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
asking.connect({str(pool.socket)!r})
asking.settimeout(20)
print(asking.recv(4096).decode())
"""
    command = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout.startswith("failed=its container has a user namespace")


OLD = b'{"wants":{"machine":"x86_64","python":"p","base":"b"},"environment":{},"cwd":"/"}'


def test_a_container_with_its_own_clocks_is_refused(pool: Pool) -> None:
    """The container's shim and a worker of the pool would have different clocks."""
    code = f"""
import socket
asking = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
asking.connect({str(pool.socket)!r})
asking.settimeout(20)
print(asking.recv(4096).decode())
"""
    spaces = ["--time", "--monotonic=86400", "--mount", "--pid", "--fork"]
    done = subprocess.run(["unshare", *spaces, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if "unshare" in done.stderr:
        pytest.skip(done.stderr)
    assert "time namespace" in done.stdout.partition("failed=")[2]


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        (b"", b""), (b"no message", b""), (b"beat=1\0", b""), (b"fork=1\0kind=zygote\0spec={}\0\0", b""),
        (b"\0" * 5000, b""), (OLD, b'{"failed":"the pool is of another version"}'),
        (b"wants=1\0machine=\0python=\0base=\0cwd=/\0\0A=b\0", b"failed=the pool is of another version\0"),
    ],
)  # fmt: skip
def test_nonsense_ends_the_connection_and_nothing_else(pool: Pool, message: bytes, answer: bytes) -> None:
    """Shims of other versions get an answer that they understand, and start without the pool."""
    code = f"""
import socket
asking = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
asking.connect({str(pool.socket)!r})
asking.settimeout(20)
asking.send({message!r})
while data := asking.recv(4096):
    print(data.hex())
print("closed")
"""
    command = ["unshare", "--mount", "--pid", "--fork", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert "closed" in done.stdout or "reset" in done.stderr, done.stderr
    assert answer.hex() in done.stdout, done.stdout
    assert pool.process.poll() is None


def test_killing_the_first_process_ends_the_container(pool: Pool, container: Callable[..., Container]) -> None:
    place = container()
    worker, first = place.outside(place.worker()), place.first()
    os.kill(first, signal.SIGKILL)
    wait(lambda: ended(worker), "the worker is gone, and reaped")
    place.process.wait(SECONDS)
    assert pool.process.poll() is None
    container().worker()


def test_workers_outlive_a_zygote_that_hangs(doomed: Pool, container: Callable[..., Container]) -> None:
    place = container(which=doomed)
    inner = place.worker()
    worker = place.outside(inner)
    (zygote,) = doomed.children()
    os.kill(zygote, signal.SIGSTOP)
    wait(lambda: ended(zygote), "it is killed for its silence, and reaped", doomed.log)
    assert not ended(worker)
    os.kill(worker, signal.SIGKILL)
    assert place.hear("ended") == {"ended": inner, "status": signal.SIGKILL}
    wait(lambda: doomed.children(), "another zygote is built", doomed.log)


def test_workers_outlive_their_pool_and_spares_do_not(doomed: Pool, container: Callable[..., Container]) -> None:
    """Otherwise an update of the pool would end all functions of its node."""
    place, waiting, third = (container(which=doomed) for _ in range(3))
    worker = place.outside(place.worker())
    waiting.introduce()
    spare = waiting.named("glowplug-spare")
    third.introduce()
    third.order(ask=1)
    assert "forked" in third.hear("forked", "refused"), "whoever asks gets a worker"
    third.named("glowplug-worker")
    assert doomed.grandchildren("glowplug-spare") == [spare], "one is as many as may wait"
    third.close()
    doomed.close()
    assert doomed.process.returncode == 0, doomed.log.read_text()
    assert place.hear("closed")
    wait(lambda: ended(spare), "what waited has nobody to wait for")
    assert not ended(worker)
    place.close()
    wait(lambda: ended(worker), "it ends with its container")


def test_the_runtime_is_there_read_only_where_the_container_lacks_it(pool: Pool) -> None:
    from runtime.zygote import placed

    found = placed.runtime_directories()
    assert str(ROOT / "runtime") in found
    assert any(os.path.realpath(sysconfig.get_path("purelib")).startswith(path) for path in found)
    assert not any(a != b and a.startswith(f"{b}/") for a in found for b in found)


def test_select_is_not_fooled_by_a_pid_that_is_used_again() -> None:
    """A pidfd of a process that has ended names no process."""
    from runtime.zygote import join

    child = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(child.pid)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    assert poller.poll(SECONDS * 1000)
    child.wait()
    with pytest.raises(join.JoinRefused, match="gone"):
        join.look(pidfd)
    os.close(pidfd)
