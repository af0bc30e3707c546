"""Functions in containers of a node with a pool: first start, idle time, end, and starts without the pool.

Once with the shim in Python, and once with its static twin, which the twin's compiler has built.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from node_mode import (
    POSSIBLE,
    PYTHON_SHIM,
    ROOT,
    SECONDS,
    Container,
    Function,
    Pool,
    children,
    comm,
    ended,
    names,
    status,
    wait,
)

from runtime.container import native

pytestmark = [
    pytest.mark.skipif(not POSSIBLE, reason="needs root and unshare"),
    pytest.mark.timeout(240),
]

LIBC = ctypes.CDLL(None, use_errno=True)
PIDFD_GETFD = 438  # the system call, of which Python has no function
GIVES_WAY = "the static shim gives way to the one in Python"
HANDLER = """
import contextlib
import os
import socket
import time

def load(context):
    if "CUT" in os.environ:  # as user code may, that has got hold of the line to its shim
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as found:
                if (found.family, found.getpeername()) == (socket.AF_UNIX, ""):
                    found.send(b'\\xff{"state": \\n[1]\\n{"load": ["x", 1]}\\n' + b"[" * 5000 + b"\\n")

def handle(event, context):
    match event.path:
        case "/slow":
            return (str(time.sleep(0.02) or number) + "\\n" for number in range(50))
        case "/environment":
            if os.fork() == 0:  # a process that nobody here will wait for
                os._exit(os.fork() and 0)
            os.wait()
            return {name: os.fsencode(value).hex() for name, value in os.environ.items() if name.startswith("X_")}
        case "/exit":
            os._exit(int(event.query["code"]))
    return str(os.getpid())
"""


@pytest.fixture(scope="module")
def agent(agent_process: Callable[..., Any]) -> Iterator[Any]:
    with agent_process("--socket-mode", "666", "--file-root", str(ROOT)) as made:
        yield made


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, agent: Any) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("pool"), "--agent", str(agent.socket)).ready()
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


@pytest.fixture(scope="session")
def static_shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not native.compiler():
        pytest.skip("needs a C compiler")
    place = tmp_path_factory.mktemp("static")
    place.chmod(0o755)
    target = os.environ.get("STATIC_SHIM") or str(place / "glowplug-shim")
    if not os.path.exists(target):
        native.build(target)
    return target


@pytest.fixture(params=["python", "static"])
def shim(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return PYTHON_SHIM if request.param == "python" else (request.getfixturevalue("static_shim"),)


@pytest.fixture
def function(container: Callable[..., Container], agent: Any, shim: tuple[str, ...]) -> Callable[..., Function]:
    return lambda **environment: Function(container, agent.socket, shim, **environment)


@pytest.fixture
def static(
    container: Callable[..., Container], agent: Any, static_shim: str, tmp_path: Path
) -> Callable[..., Function]:
    """A function with the static shim, and a handler for tests."""
    folder = tmp_path / "handler"
    folder.mkdir()
    (folder / "handler.py").write_text(HANDLER)

    def start(**environment: Any) -> Function:
        variables = {"GLOWPLUG_HANDLER": str(folder), **environment}
        return Function(container, agent.socket, (static_shim,), more=[str(folder)], **variables)

    return start


def is_static(function: Function) -> bool:
    return not comm(function.container.first()).startswith("python")


def test_a_functions_first_start_is_a_fork(function: Callable[..., Function]) -> None:
    served = function()
    ledger = served.ready()
    assert ledger["start"] == "lang", served.container.log.read_text()
    assert "fork from lang" in names(ledger, "worker")
    assert names(ledger, "pool") == ["fork", "cgroup", "join"]
    assert served.answer()
    assert served.crash()["start"] == "lang"
    os.kill(served.container.first(), signal.SIGTERM)
    assert served.container.process.wait(SECONDS) == 0, served.container.log.read_text()


def test_its_port_sends_at_once_also_while_no_worker_is_there(function: Callable[..., Function]) -> None:
    """Connections of shim and worker inherit the listener's option."""
    served = function(GLOWPLUG_HOLD="user=0.3")
    served.ready()
    wait(lambda: served.get("/_/ready") == {"state": "parked"}, "it is parked", served.container.log)
    (listener,) = listeners(served.container.first())
    with listener:
        assert listener.getsockname()[1] == served.port
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def listeners(pid: int) -> list[socket.socket]:
    """Return sockets that a process listens on by TCP, as copies."""
    found = []
    process = os.pidfd_open(pid)
    for name in os.listdir(f"/proc/{pid}/fd"):
        fd = LIBC.syscall(PIDFD_GETFD, process, int(name), 0)
        assert fd >= 0, os.strerror(ctypes.get_errno())
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
            os.close(fd)
            continue
        sock = socket.socket(fileno=fd)
        if sock.family == socket.AF_INET and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            found.append(sock)
        else:
            sock.close()
    os.close(process)
    return found


def test_an_idle_worker_goes_when_the_pool_says_so_and_comes_with_a_request(
    pool: Pool, function: Callable[..., Function]
) -> None:
    name = f"briefly-{time.monotonic_ns()}"
    served = function(GLOWPLUG_HOLD="user=0.3", GLOWPLUG_NAME=name)
    served.ready()
    first = served.container.named("glowplug-worker")

    def layer() -> dict[str, Any]:
        return next((each for each in pool.layers() if each.get("function") == name), {"state": ""})

    wait(lambda: served.get("/_/ready") == {"state": "parked"}, "it is parked", served.container.log)
    assert ended(first)
    wait(lambda: layer()["state"] == "absent", "people are told")
    assert layer()["hold"] == 0.3
    assert served.answer()
    assert served.get("/_/ledger")["start"] == "lang"
    assert served.container.named("glowplug-worker") != first


def test_a_model_that_was_used_is_forked_from(
    pool: Pool,
    container: Callable[..., Container],
    agent: Any,
    start_agent: Callable[..., Any],
) -> None:
    """A model layer is built on the pool's own lease, and not used by functions that the agent lends other bytes."""
    served = Function(container, agent.socket, GLOWPLUG_LAYERS="model")
    first = served.ready()
    assert "fork from lang, no model layer is there" in names(first, "worker")
    told = served.answer()
    wait(lambda: "model layer of file://" in pool.log.read_text(), "the model is held", pool.log)
    assert served.crash()["start"] == "model"
    assert served.answer() == told
    (held,) = [layer for layer in pool.layers() if layer["level"] == "model"]
    assert held["model"].endswith("llm-python/model")
    assert held["bytes"] > 3_000_000, "its pages, and the weights that the agent cannot give up"

    other = start_agent("--socket-mode", "666", "--file-root", str(ROOT))
    stranger = Function(container, other.socket, GLOWPLUG_LAYERS="model")
    assert stranger.ready()["start"] == "lang"
    assert "stale_layer" in stranger.container.log.read_text()
    assert stranger.answer() == told
    wait(lambda: "the agent has another revision" in pool.log.read_text(), "it is given up", pool.log)


def test_a_model_layer_that_is_killed_takes_nothing_with_it(
    pool: Pool, container: Callable[..., Container], agent: Any
) -> None:
    served = Function(container, agent.socket, GLOWPLUG_LAYERS="model")
    served.ready()
    (zygote,) = wait(lambda: pool.grandchildren("glowplug-zygote"), "the model is held", pool.log)

    def states() -> set[str]:
        return {layer["state"] for layer in pool.layers() if layer["level"] == "model"}

    wait(lambda: states() & {"used", "idle"}, "it is ready", pool.log)
    assert served.crash()["start"] == "model"
    os.kill(zygote, signal.SIGKILL)
    wait(lambda: "its zygote was lost" in pool.log.read_text(), "it is missed", pool.log)
    assert served.answer()
    assert served.crash()["start"] == "lang"


def test_without_the_pool_a_function_starts_alone_and_says_why(function: Callable[..., Function]) -> None:
    """The function sets a library's variable that the pool lacks: modules imported there would not obey it."""
    ledger = function(TOKENIZERS_EXAMPLE="1").ready()
    assert ledger["start"] == "cold"
    (why,) = [span["name"] for span in ledger["spans"] if "no pool" in span["name"]]
    assert "another environment (TOKENIZERS_EXAMPLE)" in why


# --- the static shim --------------------------------------------------------------------------------------------------


def test_the_static_shim_is_small_and_stays(static: Callable[..., Function]) -> None:
    served = static()
    served.ready()
    first = served.container.first()
    assert is_static(served)
    assert int(status(first)["VmRSS"].split()[0]) < 2048, "KiB"
    assert "ready after" in served.container.log.read_text()
    held = [os.readlink(fd).split(":")[0] for fd in sorted(Path(f"/proc/{first}/fd").iterdir())]
    # Standard streams, the port, the pool's wire, the line; signals, and the worker's pidfd.
    assert held.count("socket") == 3
    assert len(held) == 8


def test_it_drains_and_tells_the_truth(static: Callable[..., Function]) -> None:
    served = static(GLOWPLUG_DRAIN_LINGER="0.1")
    served.ready()
    os.kill(served.container.first(), signal.SIGTERM)
    assert served.container.process.wait(SECONDS) == 0, served.container.log.read_text()
    broken = static(GLOWPLUG_HANDLER="/no/handler")
    assert broken.container.process.wait(SECONDS) == 65
    assert "[handler_not_found]" in broken.container.log.read_text()
    assert GIVES_WAY not in served.container.log.read_text() + broken.container.log.read_text()


def test_it_parks_and_answers_probes_itself(static: Callable[..., Function]) -> None:
    served = static(GLOWPLUG_HOLD="user=0.2")
    served.ready()
    for _ in range(2):
        wait(lambda: served.get("/_/ready") == {"state": "parked"}, "it is parked", served.container.log)
        assert served.get("/_/health?a=b") == {"status": "ok"}
        assert served.container.find("glowplug-worker") == 0
        assert served.get("/")
    assert is_static(served)
    wait(lambda: served.get("/_/ready") == {"state": "parked"}, "it is parked", served.container.log)
    os.kill(served.container.first(), signal.SIGTERM)
    assert served.container.process.wait(SECONDS) == 0, served.container.log.read_text()


def test_a_crash_is_for_the_shim_in_python(static: Callable[..., Function]) -> None:
    served = static()
    assert served.crash()["start"] == "lang"
    assert f"{GIVES_WAY}: its worker crashed" in served.container.log.read_text()
    assert "starting another" in served.container.log.read_text()
    assert served.get("/")
    held = {os.readlink(fd) for fd in Path(f"/proc/{served.container.first()}/fd").iterdir()}
    assert not any("glowplug-shim" in each for each in held), "what it was handed is closed"
    os.kill(served.container.first(), signal.SIGTERM)
    assert served.container.process.wait(SECONDS) == 0, served.container.log.read_text()


def test_settings_arrive_as_they_are(static: Callable[..., Function]) -> None:
    """Settings that are no text arrive, too; garbage that user code writes on the line is skipped."""
    values = {"X_QUOTES": 'a "b" \\ c', "X_LINES": "one\ntwo\tthree\x01", "X_BYTES": "\udcff\udcc3(ü\U0001f600"}
    served = static(CUT="1", **values)
    served.ready()
    assert served.get("/environment") == {name: os.fsencode(value).hex() for name, value in values.items()}
    assert is_static(served), served.container.log.read_text()
    first = served.container.first()
    wait(lambda: not children(first), "what others left behind is reaped", served.container.log)


def test_what_is_not_plain_node_mode_is_for_the_shim_in_python(
    static: Callable[..., Function], static_shim: str
) -> None:
    served = static(GLOWPLUG_LAYERS="off")
    assert served.ready()["start"] == "cold"
    assert not is_static(served)
    assert "GLOWPLUG_SHIM_STATE" not in Path(f"/proc/{served.container.first()}/environ").read_text()
    variables = {"GLOWPLUG_MODEL": "/m", "GLOWPLUG_SLOTS": "none", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([static_shim], env=variables, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, "GLOWPLUG_SLOTS is 'none'" in done.stderr) == (64, True), "it is no container's first"


def test_nothing_is_lost_with_a_pool_that_hangs_or_is_killed(
    tmp_path_factory: pytest.TempPathFactory, agent: Any, static: Callable[..., Function]
) -> None:
    """Cases: a request to a function on standby, a worker that is asked for, an answer that is under way."""
    mortal = Pool(tmp_path_factory.mktemp("mortal"), "--agent", str(agent.socket)).ready()
    try:
        idle = static(which=mortal, GLOWPLUG_HOLD="user=0.2")
        idle.ready()
        wait(lambda: idle.get("/_/ready") == {"state": "parked"}, "it is parked", idle.container.log)
        mortal.process.send_signal(signal.SIGSTOP)
        assert idle.get("/")
        mortal.process.send_signal(signal.SIGCONT)
        log = idle.container.log.read_text()
        assert GIVES_WAY in log
        assert "not forked: " in log
        served = static(which=mortal)
        first = served.ready()
        assert first["start"] == "lang"
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=SECONDS)
        connection.request("GET", "/slow")
        answer = connection.getresponse()
        assert answer.readline() == b"0\n"
        mortal.process.kill()
        wait(lambda: GIVES_WAY in served.container.log.read_text(), "it takes over", served.container.log)
        assert answer.read() == b"".join(b"%d\n" % number for number in range(1, 50))
        assert served.ready()["start_id"] == first["start_id"], "by the very same worker"
        connection.close()
        os.kill(served.container.first(), signal.SIGTERM)
        assert served.container.process.wait(SECONDS) == 0, "though nobody told how its worker ended"
    finally:
        mortal.close()
