"""The shim with stand-ins for its children: deadlines, verdicts, inherited fds. Whole functions: tests/system."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STAND_IN = """
import os, signal, socket, sys, time

def line(**message):
    os.write(control, b"".join(b"%s=%s\\0" % (name.encode(), str(value).encode()) for name, value in message.items()))
    os.write(control, b"\\n")

stop = False
def on_term(*_):
    global stop
    stop = True

if sys.argv[3] == "runtime.worker.worker":
    control = int(sys.argv[5])
    signal.signal(signal.SIGTERM, on_term)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    {worker}
else:
    {agent}
"""


class Shim:
    """A real shim whose children are small scripts: `sys.executable` is a stand-in that knows which it is to play."""

    def __init__(self, directory: Path, worker: str, agent: str, settings: dict[str, str]) -> None:
        script = directory / "python"
        body = STAND_IN.format(
            worker=worker.replace("\n", "\n    "), agent=(agent or "time.sleep(600)").replace("\n", "\n    ")
        )
        script.write_text(f"#!{sys.executable}\n{body}")
        script.chmod(0o755)
        self.temporary = directory / "t"
        self.temporary.mkdir()
        code = f"import sys; sys.executable = {str(script)!r}; from runtime import shim; sys.exit(shim.main())"
        env = {name: value for name, value in os.environ.items() if not name.startswith("GLOWPLUG_")}
        env |= {"GLOWPLUG_MODEL": "/m", "GLOWPLUG_PORT": "0", "GLOWPLUG_HOST": "127.0.0.1"}
        env |= {"TMPDIR": str(self.temporary), **settings}
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code], env=env, stderr=log, stdout=log, start_new_session=True
            )

    def output(self) -> str:
        return self.log.read_text()

    def end(self, seconds: float = 30) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[3]) == self.process.pid:
                        os.kill(int(entry.name), signal.SIGKILL)
                except OSError:
                    continue
        self.process.wait()


@pytest.fixture
def shim(tmp_path: Path) -> Iterator[Callable[..., Shim]]:
    """`shim(worker, agent="", **settings)`: both are Python source; `line(...)` speaks to the shim."""
    started: list[Shim] = []

    def start(worker: str, agent: str = "", **settings: object) -> Shim:
        place = tmp_path / str(len(started))
        place.mkdir()
        variables = {f"GLOWPLUG_{name.upper()}": str(value) for name, value in settings.items()}
        started.append(Shim(place, worker, agent, variables))
        return started[-1]

    yield start
    for each in started:
        each.kill()


SERVE = "line(state='http')\nwhile not stop: time.sleep(0.01)\n"


def test_it_passes_sigterm_on_and_ends_with_the_workers_code(
    shim: Callable[..., Shim], eventually: Callable[..., Any]
) -> None:
    running = shim("line(state='ready')\n" + SERVE + "sys.exit(0)", socket="/s")
    eventually(lambda: "ready after" in running.output(), 30)
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0


@pytest.mark.parametrize("code", [64, 65, 66, 67, 68, 69])
def test_an_explained_end_is_not_tried_again(shim: Callable[..., Shim], code: int) -> None:
    running = shim(f"line(error='some_code', text='what happened; do this')\nsys.exit({code})", socket="/s")
    assert running.end() == code
    assert running.output().count("glowplug: what happened; do this [some_code]\n") == 1


@pytest.mark.parametrize(
    ("worker", "words"),
    [
        ("sys.exit(1)", "ended with code 1"),
        ("sys.exit(0)", "ended with code 0"),
        ("sys.exit(70)", "ended with code 70"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "set GLOWPLUG_PRIVATE_WEIGHTS=1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "memory limit is too small"),
    ],
)
def test_a_worker_that_dies_again_and_again(shim: Callable[..., Shim], worker: str, words: str) -> None:
    running = shim(worker, socket="/s")
    assert running.end() == 69
    assert running.output().count("starting another") == 3
    assert words in running.output()


def test_a_signal_while_stopping_shows_in_the_code(shim: Callable[..., Shim], eventually: Callable[..., Any]) -> None:
    running = shim("line(state='ready')\n" + SERVE + "os.kill(os.getpid(), signal.SIGKILL)", socket="/s")
    eventually(lambda: "ready after" in running.output(), 30)
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 128 + signal.SIGKILL


def test_a_sigterm_that_comes_before_the_worker_listens_is_kept(shim: Callable[..., Shim]) -> None:
    """A stand-in that unblocks SIGTERM only after its start has to find the signal waiting."""
    worker = """
deadline = time.monotonic() + 30
while not stop and time.monotonic() < deadline:
    time.sleep(0.01)
sys.exit(0 if stop else 1)
""".strip()
    running = shim(worker, socket="/s")
    while "is open" not in running.output():
        assert running.process.poll() is None
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0


def test_a_worker_that_hangs_while_stopping_is_killed(
    shim: Callable[..., Shim], eventually: Callable[..., Any]
) -> None:
    running = shim("line(state='ready')\nwhile True: time.sleep(0.01)", socket="/s", drain_grace=0)
    eventually(lambda: "ready after" in running.output(), 30)
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 128 + signal.SIGKILL
    assert "raise GLOWPLUG_DRAIN_GRACE" in running.output()


def test_a_second_interrupt_does_not_wait(shim: Callable[..., Shim], eventually: Callable[..., Any]) -> None:
    worker = f"line(state='ready')\n{SERVE}line(error='note', text='the first was taken')\nwhile True: time.sleep(0.01)"
    running = shim(worker, socket="/s", drain_grace=600)
    eventually(lambda: "ready after" in running.output(), 30)
    running.process.send_signal(signal.SIGINT)
    eventually(lambda: "the first was taken" in running.output(), 30)
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 128 + signal.SIGKILL


def test_a_silent_worker_is_replaced(shim: Callable[..., Shim], eventually: Callable[..., Any], tmp_path: Path) -> None:
    flag = tmp_path / "second"
    worker = f"""
if not os.path.exists({str(flag)!r}):
    open({str(flag)!r}, "w").close()
    line(beat=1)
    time.sleep(600)
while not stop:
    line(beat=1)
    line(state="ready")
    time.sleep(0.1)
""".strip()
    running = shim(worker, socket="/s", worker_timeout=1)
    eventually(lambda: "ready after" in running.output(), 30)
    assert "the worker was silent for 1 s and is killed" in running.output()
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0


def test_garbage_on_the_line_is_skipped(shim: Callable[..., Shim], eventually: Callable[..., Any]) -> None:
    garbage = rb"\xff\n[1]\nspan=5\0\nerror=1\0\nload=x\0turn=9\0\nspan=1 2 \xff \xed\0error=\xff\0text=\x07\0\n"
    worker = f"os.write(control, b'{garbage.decode()}')\nline(state='ready')\n" + SERVE
    running = shim(worker, socket="/s")
    eventually(lambda: "ready after" in running.output(), 30)
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0
    assert "Traceback" not in running.output()


# --- the private agent ------------------------------------------------------------------------------------------------


def test_a_private_agent_that_dies_is_replaced_and_ends_with_the_shim(
    shim: Callable[..., Shim], eventually: Callable[..., Any], tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    agent = f"""
with open({str(pids)!r}, "a") as file:
    print(os.getpid(), file=file, flush=True)
if len(open({str(pids)!r}).readlines()) < 3:
    sys.exit(1)
time.sleep(600)
""".strip()
    running = shim("line(state='ready')\n" + SERVE, agent)
    eventually(lambda: pids.exists() and len(pids.read_text().splitlines()) == 3, 30)
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0
    assert running.output().count("the private cache agent ended (1); starting another") == 2
    assert not Path(f"/proc/{pids.read_text().split()[-1]}").exists()
    assert list(running.temporary.iterdir()) == []


def test_a_private_agent_that_dies_again_and_again_is_no_success(shim: Callable[..., Shim]) -> None:
    running = shim(SERVE + "sys.exit(0)", "sys.exit(1)")
    assert running.end() == 69
    assert "the private cache agent ends again and again: giving up [worker_crashed]" in running.output()
    assert list(running.temporary.iterdir()) == []


def test_the_private_agents_socket_is_for_this_user_only(
    shim: Callable[..., Shim], eventually: Callable[..., Any], tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    worker = f"""
place = os.path.dirname(os.environ["GLOWPLUG_SOCKET"])
with socket.socket(socket.AF_UNIX) as probe:
    probe.connect(os.environ["GLOWPLUG_SOCKET"])
with open({str(seen)!r}, "w") as file:
    print(oct(os.stat(place).st_mode & 0o777), file=file)
line(state="ready")
{SERVE}
""".strip()
    running = shim(worker)
    eventually(lambda: "ready after" in running.output(), 30)
    assert seen.read_text() == "0o700\n"
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0


def test_children_inherit_their_own_fds_and_no_other(
    shim: Callable[..., Shim], eventually: Callable[..., Any], tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    worker = f"""
fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{{fd}}"))
ours = sorted([0, 1, 2, int(sys.argv[4]), int(sys.argv[5])])
with open({str(seen)!r}, "w") as file:
    print(fds == ours, fds, ours, file=file)
line(state="ready")
{SERVE}
""".strip()
    running = shim(worker)
    eventually(lambda: "ready after" in running.output(), 30)
    assert seen.read_text().startswith("True"), seen.read_text()
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0


def test_processes_that_user_code_left_behind_are_reaped(
    shim: Callable[..., Shim], eventually: Callable[..., Any], tmp_path: Path
) -> None:
    orphan = tmp_path / "orphan"
    worker = f"""
if os.fork() == 0:
    if os.fork() == 0:
        open({str(orphan)!r}, "w").write(str(os.getpid()))
        os._exit(0)
    os._exit(0)
os.wait()
line(state="ready")
{SERVE}
""".strip()
    running = shim(worker, socket="/s")
    eventually(lambda: "ready after" in running.output() and orphan.exists() and orphan.read_text(), 30)
    eventually(lambda: not Path(f"/proc/{orphan.read_text()}").exists(), 10, "no zombie is left")
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0


def test_a_worker_that_cannot_understand_its_agent_gets_a_private_one(
    shim: Callable[..., Shim], eventually: Callable[..., Any], tmp_path: Path
) -> None:
    """A worker that asks again is given the same agent; so is the next worker."""
    seen = tmp_path / "seen"
    worker = f"""
for _ in range(2 if os.environ["GLOWPLUG_SOCKET"] == "/s" else 0):
    line(agent="it speaks another version [version]")
    with open({str(seen)!r}, "ab") as file:
        file.write(os.read(control, 4096))
with open({str(seen)!r}, "a") as file:
    print(os.environ["GLOWPLUG_SOCKET"], file=file)
with socket.socket(socket.AF_UNIX) as probe:
    if os.environ["GLOWPLUG_SOCKET"] == "/s":
        sys.exit(1)
    probe.connect(os.environ["GLOWPLUG_SOCKET"])
line(state="ready")
{SERVE}
""".strip()
    running = shim(worker, socket="/s")
    eventually(lambda: "ready after" in running.output(), 30)
    first, second, own, theirs = seen.read_text().splitlines()
    assert first == second == f"agent={theirs}\0"
    assert own == "/s"
    assert "it speaks another version [version]; a private cache agent is asked instead" in running.output()
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0
    assert list(running.temporary.iterdir()) == []


def test_a_port_that_is_taken(shim: Callable[..., Shim]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        running = shim(SERVE, port=other.getsockname()[1])
        assert running.end() == 64
        assert "Address already in use; set PORT to another port [bad_config]" in running.output()
        assert list(running.temporary.iterdir()) == []
