"""Zygotes as processes: their children, ends of children, and zygotes that hang or die."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.layers import spawn
from runtime.layers.spawn import Ended, Forked, ForkRefused, Lost, Spec, Zygote, ZygoteReady
from runtime.process import wire
from runtime.process.wire import Gone, Wire

pytest.importorskip("torch")

# A real zygote, whose workers do what the request says instead of serving.
PROGRAM = """
import json, os, random, signal, sys, time
from runtime.process import children
from runtime.worker import worker
from runtime.zygote import forkserver

def serve(listener, line, start_id, spans, warm, *, why, connections=()):
    import numpy, torch
    sent = lambda **told: os.write(line, json.dumps(told).encode())
    if start_id == "probe":
        fds = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        sent(
            drawn=[random.random(), float(numpy.random.rand()), float(torch.rand((), dtype=torch.float64))],
            fds=[fd for fd in fds if os.path.exists(f"/proc/self/fd/{fd}")], given=[listener, line, *connections],
            private=children.private_bytes(), level=warm.level, parent=os.getppid(),
            environment=dict(os.environ), blocked=signal.SIGTERM in blocked, threads=len(os.listdir("/proc/self/task")),
        )
    elif start_id == "compute":
        import threading
        def compute():
            torch.set_num_threads(2)
            a = torch.ones(512, 512)
            sent(sum=float((a @ a).sum()), threads=torch.get_num_threads())
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    elif start_id == "wait":
        sent(there=1)
        time.sleep(600)
    else:
        exec(start_id)
    return 0

worker.serve = serve
os._exit(forkserver.main(sys.argv[1:]))
"""


class Family:
    """A zygote, whose supervisor the test plays."""

    def __init__(self, directory: Path) -> None:
        program = directory / "zygote.py"
        program.write_text(PROGRAM)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.zygote = spawn.boot(Spec(key="k"), program=(str(program),))
        self.events: deque[Any] = deque()
        self.status: int | None = None
        self.number = 0
        ready = self.event(ZygoteReady)
        self.size = ready.bytes
        assert (ready.level, ready.key) == ("lang", "k")

    def event(self, kind: Any, seconds: float = 60) -> Any:
        """Return the next event, which has to be of this kind."""
        deadline = time.monotonic() + seconds
        while not self.events and time.monotonic() < deadline:
            select.select([self.zygote.wire], [], [], 0.5)
            self.events.extend(self.zygote.read())  # on a busy machine a child's begin and end come together
        assert self.events, f"no {kind} within {seconds} s"
        event = self.events.popleft()
        assert isinstance(event, kind), event
        return event

    def fork(self, what: str) -> tuple[Forked, socket.socket]:
        ours, theirs = socket.socketpair()
        self.number += 1
        with theirs:
            self.zygote.fork_worker(
                self.number, listener=self.listener.fileno(), line=theirs.fileno(), start_id=what, spans=[],
                environment={"ONLY": "this", "PATH": os.environ["PATH"]},
            )  # fmt: skip
        forked = self.event(Forked)
        assert forked.number == self.number
        os.close(forked.pidfd)
        return forked, ours

    def run(self, what: str) -> tuple[dict[str, Any], int, int]:
        """Return what a child told, its pid and its status."""
        forked, line = self.fork(what)
        with line:
            ended = self.event(Ended)
            assert ended.pid == forked.pid
            line.settimeout(10)
            data = line.recv(1 << 20)
        return json.loads(data or "{}"), ended.pid, ended.status

    def close(self) -> None:
        self.zygote.kill()
        self.zygote.close()
        self.listener.close()
        if self.status is None:
            os.waitpid(self.zygote.pid, 0)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    """A zygote that the tests of this module share: none of them may harm it."""
    made = Family(tmp_path_factory.mktemp("family"))
    yield made
    made.close()


@pytest.fixture
def doomed(tmp_path: Path) -> Iterator[Family]:
    """A zygote of this test's own."""
    made = Family(tmp_path)
    yield made
    made.close()


def test_forks_again_and_again(family: Family, rounds: Callable[[int, int], int]) -> None:
    """No hang, no fd or zombie left, other numbers in every child, and next to no memory of its own."""
    fds = len(os.listdir(f"/proc/{family.zygote.pid}/fd")), len(os.listdir("/proc/self/fd"))
    seen: set[float] = set()
    count = rounds(100, 10_000)
    for _ in range(count):
        told, _, status = family.run("probe")
        assert status == 0
        assert sorted(told["fds"]) == sorted([0, 1, 2, *told["given"]])
        assert (told["threads"], told["level"], told["blocked"]) == (1, "lang", True)
        assert told["parent"] == family.zygote.pid
        assert told["environment"]["ONLY"] == "this"
        assert "HOME" not in told["environment"]
        assert told["private"] < 0.05 * family.size
        seen.update(told["drawn"])
    assert len(seen) == 3 * count
    assert (len(os.listdir(f"/proc/{family.zygote.pid}/fd")), len(os.listdir("/proc/self/fd"))) == fds
    children = Path(f"/proc/{family.zygote.pid}/task/{family.zygote.pid}/children").read_text()
    assert children.split() == []


def test_a_child_computes_on_more_threads_than_its_zygote(family: Family) -> None:
    told, _, status = family.run("compute")
    assert (status, told) == (0, {"sum": 512.0**3, "threads": 2})


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("os._exit(3)", 3),
        ("sys.exit(4)", 70),  # a worker returns its code; whatever else ends it is a fault
        ("raise KeyError", 70),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV),
        ("os.abort()", -signal.SIGABRT),
        ("os.fork() or os._exit(9); os.wait()", 0),
        ("import threading; threading.Thread(target=time.sleep, args=(600,)).start()", 0),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (0, 0)); bytearray(1 << 30)", 70),
    ],
)
def test_every_end_of_a_child_is_told(family: Family, code: str, end: int) -> None:
    _, _, status = family.run(code)
    assert os.waitstatus_to_exitcode(status) == end
    assert family.run("probe")[2] == 0, "the zygote is none the worse for it"


def test_a_child_that_ignores_sigterm_can_be_killed(family: Family) -> None:
    forked, line = family.fork("signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(line, b'x'); time.sleep(600)")
    with line:
        line.settimeout(30)
        assert line.recv(1) == b"x"
        os.kill(forked.pid, signal.SIGTERM)
        os.kill(forked.pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(family.event(Ended).status) == -signal.SIGKILL


def test_children_outlive_a_zygote_that_is_killed(doomed: Family) -> None:
    forked, line = doomed.fork("wait")
    with line:
        line.settimeout(30)
        assert line.recv(100) == b'{"there": 1}'
        os.kill(doomed.zygote.pid, signal.SIGKILL)
        doomed.event(Lost)
        _, doomed.status = os.waitpid(doomed.zygote.pid, 0)
        assert doomed.zygote.state == "gone"
        os.kill(forked.pid, 0)  # raises if it is gone
        os.kill(forked.pid, signal.SIGKILL)
        assert line.recv(1) == b""


def test_a_stopped_zygote_is_overdue_and_a_paused_one_is_not(family: Family, eventually: Callable[..., Any]) -> None:
    def overdue() -> str:
        family.zygote.read()
        return family.zygote.overdue(time.monotonic())

    assert overdue() == ""
    os.kill(family.zygote.pid, signal.SIGSTOP)
    assert eventually(overdue, 30) == "it was silent for 1 s"
    os.kill(family.zygote.pid, signal.SIGCONT)
    eventually(lambda: not overdue(), 30)
    family.zygote.pause()
    assert family.zygote.overdue(time.monotonic() + 100) == ""
    family.zygote.pause(False)
    assert family.run("probe")[2] == 0


def test_it_ends_when_its_supervisor_is_gone(family: Family) -> None:
    """The last of the tests with this zygote."""
    family.zygote.wire.close()
    _, family.status = os.waitpid(family.zygote.pid, 0)
    assert os.waitstatus_to_exitcode(family.status) == 0


def test_what_must_not_be_forked_says_so(tmp_path: Path) -> None:
    """A second thread, and a socket that children would share: refused, and mended once they are gone."""
    program = tmp_path / "zygote.py"
    program.write_text(
        "import os, signal, socket, sys, threading\n"
        "from runtime.zygote import forkserver, warm\n"
        "held, ended = [], threading.Event()\n"
        "def spoil(*_):\n"
        "    held.append(socket.socket())\n"
        "def crowd(*_):\n"
        "    threading.Thread(target=ended.wait, daemon=True).start()\n"
        "signal.signal(signal.SIGUSR1, spoil)\n"
        "signal.signal(signal.SIGUSR2, lambda *_: held.clear() or crowd())\n"
        "warm.Warm.lang = classmethod(lambda cls, kinds, lean: cls('lang'))\n"  # this one needs no torch
        "os._exit(forkserver.main(sys.argv[1:]))\n"
    )
    zygote = spawn.boot(Spec(), program=(str(program),))
    try:
        _until(zygote, ZygoteReady)
        for number, words in ((signal.SIGUSR1, "it has a socket"), (signal.SIGUSR2, "it has 2 threads")):
            os.kill(zygote.pid, number)
            zygote.fork_worker(1, listener=2, line=2, environment={}, start_id="", spans=[])
            refused = _until(zygote, ForkRefused)
            assert words in refused.why
    finally:
        zygote.kill()
        zygote.close()
        os.waitpid(zygote.pid, 0)


def _until(zygote: Zygote, kind: Any) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        select.select([zygote.wire], [], [], 0.5)
        for event in zygote.read():
            assert isinstance(event, kind), event
            return event
    pytest.fail(f"no {kind}")


def test_a_zygote_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    program = tmp_path / "zygote.py"
    program.write_text(
        "import os, sys\nfrom runtime.zygote import forkserver, warm\n"
        "def broken(cls, kinds, lean): raise ImportError('no such thing')\n"
        "warm.Warm.lang = classmethod(broken)\nos._exit(forkserver.main(sys.argv[1:]))\n"
    )
    zygote = spawn.boot(Spec(), program=(str(program),))
    assert _until(zygote, Lost).why == "ImportError: no such thing"
    zygote.close()
    assert os.waitstatus_to_exitcode(os.waitpid(zygote.pid, 0)[1]) == 70


# --- the wire ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def wires() -> Iterator[tuple[Wire, Wire]]:
    ours, theirs = wire.pair()
    ends = Wire(ours), Wire(theirs)
    yield ends
    for end in ends:
        end.close()


def test_messages_bring_their_fds_and_leave_none_behind(wires: tuple[Wire, Wire], tmp_path: Path) -> None:
    here, there = wires
    before = len(os.listdir("/proc/self/fd"))
    with (tmp_path / "file").open("w+") as file:
        here.send({"a": "ü" * 1000}, [file.fileno()])
    message, (fd,) = there.receive() or ({}, [])
    assert message == {"a": "ü" * 1000}
    os.write(fd, b"written")
    os.close(fd)
    assert (tmp_path / "file").read_text() == "written"
    assert there.receive() is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_the_other_side_does_not_read_is_kept(wires: tuple[Wire, Wire]) -> None:
    here, there = wires
    for number in range(2000):
        here.send({"fork": number, "padding": "x" * 10_000}, [2])
    assert here.waiting
    for number in range(2000):
        here.flush()
        message, fds = there.receive() or ({}, [])
        assert message["fork"] == number
        os.close(fds[0])
    assert not here.waiting


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff\0", b"\0", b"fork=1", b"fork=one\0", b'{"fork": 1}'])
def test_nonsense_is_the_end(wires: tuple[Wire, Wire], data: bytes) -> None:
    here, there = wires
    here.sock.send(data)
    with pytest.raises(Gone, match="no message"):
        there.receive()


def test_an_end_that_is_closed_is_gone(wires: tuple[Wire, Wire]) -> None:
    here, there = wires
    here.close()
    with pytest.raises(Gone):
        there.receive()
    with pytest.raises(Gone):
        there.send({"a": 1})


def test_a_message_too_large_is_refused_before_it_is_sent(wires: tuple[Wire, Wire]) -> None:
    with pytest.raises(ValueError, match="may be"):
        wires[0].send({"a": "x" * wire.MAX_PACKET})


def test_what_a_supervisor_imports_is_standard_library(tmp_path: Path) -> None:
    code = "import sys; from runtime.layers import spawn, keys; print(*sorted(sys.modules))"
    import subprocess

    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert not {"msgspec", "numpy", "torch", "flask"} & set(done.stdout.split())
