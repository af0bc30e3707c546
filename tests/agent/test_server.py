"""The agent's socket under hostile and unlucky clients: nothing leaks, and other clients notice nothing."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from leased import FAKE, soon

from cache_agent.client import credentials
from cache_agent.client.cache_client import CacheClient
from cache_agent.config import AgentConfig
from cache_agent.errors import AgentUnreachable, BadSetting, ProtocolError
from cache_agent.serving import connection as connections
from cache_agent.serving import server as servers
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.wire.channel import Channel
from cache_agent.wire.messages import ErrorReply, Granted, Hello, Identity, LeaseRequest, ManifestRequest, Welcome
from cache_agent.wire.operations import EvictRequest, PushDrain, StatusReply, StatusRequest
from cache_agent.wire.protocol import MAX_REPLY, MAX_REQUEST, VERSION, Decoder, encode


class Raw:
    """A client that may send any bytes."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self.decoder = Decoder(MAX_REPLY)
        self.messages: list[object] = []

    def send(self, *messages: object) -> Raw:
        # In one piece: the agent may close after the first message, before a second could be sent.
        self.sock.sendall(b"".join(m if isinstance(m, bytes) else encode(m) for m in messages))
        return self

    def receive(self) -> object:
        """Return the next message, or None when the agent has closed the connection."""
        while not self.messages:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 65536, 250)
            except ConnectionResetError:
                return None
            for fd in fds:
                os.close(fd)
            if not data:
                return None
            self.messages += self.decoder.feed(data)
        return self.messages.pop(0)

    def rest(self) -> list[object]:
        """Return all messages until the agent closes."""
        return list(iter(self.receive, None))

    def greeted(self) -> Raw:
        self.send(Hello(VERSION, "raw"))
        assert isinstance(self.receive(), Welcome)
        return self

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


@pytest.fixture(scope="module")
def shared_agent(agent_process):
    """One agent for all tests that must not harm it, with its fds and threads counted."""
    with agent_process("--max-connections", "60") as agent:
        yield agent


def idle_fds(agent) -> int:
    """Count the agent's fds without its weights; 0 while a client is connected."""
    names = list(agent.fds().values())
    if sum(name.startswith("socket:") for name in names) != 1:
        return 0
    return sum("memfd:" not in name for name in names)


@pytest.fixture
def unharmed(shared_agent, eventually):
    """Check after the test that the agent answers, with the same fds as before, few threads and no leases."""
    before = eventually(lambda: idle_fds(shared_agent), what="nobody is connected")
    yield shared_agent
    assert not any(model.leases for model in eventually(lambda: shared_agent.client.status()).models)
    eventually(lambda: idle_fds(shared_agent) == before, what=f"fds are closed: {before} and {shared_agent.fds()}")
    eventually(lambda: shared_agent.threads() <= 18, what="the pools' threads are left, no connection's")


# --- hostile bytes ----------------------------------------------------------------------------------------------------

GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": b"\0" * 100_000,
    "ones": b"\xff" * 100_000,
    "length of 4 GiB": struct.pack("!I", 0xFFFFFFFF) + b"x" * 1000,
    "length of 0": struct.pack("!I", 0),
    "one byte too long": struct.pack("!I", MAX_REQUEST + 1),
    "no JSON": struct.pack("!I", 5) + b"hello",
    "deep JSON": struct.pack("!I", 60_000) + b"[" * 60_000,
    "a message of the agent's": encode(Welcome(1, "x", "y")),
    "a lease before hello": encode(LeaseRequest("file:///m")),
    "hello twice": encode(Hello(VERSION, "a")) + encode(Hello(VERSION, "a")),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_answered_with_an_error_and_the_end(name, unharmed):
    with Raw(unharmed.socket) as raw:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            raw.send(GARBAGE[name])
        replies = [reply for reply in raw.rest() if not isinstance(reply, Welcome)]
    assert [reply.code for reply in replies] in (["protocol"], []), replies
    if name in ("length of 0", "one byte too long", "no JSON", "a lease before hello", "hello twice"):
        assert replies, "nothing was left unread, so the error must arrive"


@pytest.mark.parametrize("messages", [[StatusRequest()], [LeaseRequest(FAKE)]], ids=["status", "lease"])
def test_a_lease_that_was_refused_ends_its_connection(messages, unharmed):
    with Raw(unharmed.socket).greeted() as raw:
        raw.send(b"".join(map(encode, [LeaseRequest("nonsense"), *messages])))
        assert raw.rest()[0].code == "bad_uri"


def test_a_refused_question_leaves_the_connection_open(unharmed):
    with Raw(unharmed.socket).greeted() as raw:
        for question, code in (
            (EvictRequest("file:///not/resident"), "not_found"),
            (ManifestRequest("file:///not/there"), "not_found"),
            (EvictRequest("nonsense"), "bad_uri"),
            (PushDrain("x", 1.0, "nonsense"), "bad_uri"),
        ):
            raw.send(question)
            assert raw.receive().code == code
            raw.send(StatusRequest())
            assert isinstance(raw.receive(), StatusReply)


def test_pipelined_questions_are_answered_in_order(unharmed):
    with Raw(unharmed.socket).greeted() as raw:
        raw.send(*[StatusRequest(), PushDrain("x", 1.0, "file:///none")] * 20)
        kinds = [type(raw.receive()).__name__ for _ in range(40)]
    assert kinds == ["StatusReply", "PushDrainReply"] * 20


def test_half_a_hello_and_then_silence_is_cut_off(start_local_agent, monkeypatch, eventually):
    monkeypatch.setattr(connections, "_HELLO_SECONDS", 0.2)
    agent = start_local_agent()
    with Raw(agent.socket) as silent, Raw(agent.socket) as half:
        half.send(encode(Hello(VERSION, "half"))[:10])
        for raw in (silent, half):
            (reply,) = raw.rest()
            assert reply.code == "protocol"
            assert "hello" in reply.text
    with Raw(agent.socket).greeted() as patient:
        eventually(lambda: not agent.server._snapshot()[1:])
        patient.send(StatusRequest())
        assert isinstance(patient.receive(), StatusReply), "who said hello may be silent"


# --- fds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 250, 253])
def test_fds_sent_to_the_agent_are_refused_and_closed(count, unharmed):
    reader, writer = os.pipe()
    try:
        with Raw(unharmed.socket) as raw:
            socket.send_fds(raw.sock, [encode(Hello(VERSION, "fds"))], [writer] * count)
            assert [reply.code for reply in raw.rest()] == ["protocol"]
        os.close(writer)
        writer = -1
        os.set_blocking(reader, True)
        assert os.read(reader, 1) == b"", "the agent closed every copy of the pipe's end"
    finally:
        for fd in (reader, writer):
            if fd >= 0:
                os.close(fd)


def test_fds_without_a_message_are_refused_and_closed(unharmed, rounds):
    for _ in range(rounds(30, 1000)):
        with Raw(unharmed.socket) as raw:
            socket.send_fds(raw.sock, [b"\0"], [raw.sock.fileno()] * 100)
            raw.sock.shutdown(socket.SHUT_WR)
            assert {reply.code for reply in raw.rest()} <= {"protocol"}


def test_a_client_closes_fds_that_no_message_names():
    """An agent cannot fill a function's fd table."""
    ours, theirs = socket.socketpair()
    before = len(os.listdir("/proc/self/fd"))
    with theirs, Channel(ours, of_agent=False) as channel:
        channel.send(Hello(VERSION, "x"))
        socket.send_fds(theirs, [encode(Welcome(VERSION, "n", "a"))], [theirs.fileno()] * 5)
        with pytest.raises(ProtocolError, match="no message names"):
            channel.receive(soon(5))
    assert len(os.listdir("/proc/self/fd")) == before - 2


def test_fds_that_wait_for_a_client_that_left_are_closed():
    ours, theirs = socket.socketpair()
    before = len(os.listdir("/proc/self/fd"))
    with theirs:
        connection = connections.Connection(None, ours, "", lambda _: None, None)
        granted = Granted("src", 1, [1], 4096, 2)
        connection.deliver(granted, [os.dup(theirs.fileno()) for _ in range(2)])
        connection.close()
        connection.deliver(granted, [os.dup(theirs.fileno()) for _ in range(2)])
        assert len(os.listdir("/proc/self/fd")) == before - 1, "only the client's end is left"


def test_fds_do_not_reach_programs_that_a_function_starts(unharmed, tmp_path, write_checkpoint):
    with unharmed.client.lease(f"file://{write_checkpoint(tmp_path / 'm')}") as lease:
        lease.wait_ready(soon())
        show = "import os, sys; os.execvp('ls', ['ls', '-l', '/proc/self/fd'])"
        result = subprocess.run([sys.executable, "-c", show], close_fds=False, capture_output=True, text=True)
    assert "pipe:" in result.stdout, result.stderr
    assert "memfd" not in result.stdout


# --- slow clients and many clients ------------------------------------------------------------------------------------


def test_a_client_that_never_reads_is_given_up_and_others_are_served(start_local_agent, monkeypatch, eventually):
    monkeypatch.setitem(Channel.__init__.__kwdefaults__, "send_timeout", 0.3)
    agent = start_local_agent()
    with Raw(agent.socket).greeted() as deaf:
        deaf.sock.settimeout(0.2)
        request = encode(StatusRequest()) * 100
        # Asks until the agent stops listening: it is stuck in its answer, or gone already.
        with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
            while True:
                deaf.sock.sendall(request)
        assert isinstance(agent.client.status(), StatusReply)
        eventually(lambda: len(agent.server._snapshot()) == 0, what="the agent gave the deaf client up")


def test_too_many_connections_are_refused_and_room_is_made_again(start_agent, eventually):
    agent = start_agent("--max-connections", "5")
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(Raw(agent.socket).greeted())
        with pytest.raises(AgentUnreachable):
            CacheClient(agent.socket, timeout=5).status()
        assert "refused a connection: 5 are open" in agent.output()

    def served() -> bool:
        with contextlib.suppress(AgentUnreachable):
            return isinstance(agent.client.status(), StatusReply)
        return False

    eventually(served)


def test_an_agent_that_runs_out_of_fds_recovers(start_agent, tmp_path, write_checkpoint, eventually):
    """A grant for which no fd is left must not leave a lease behind."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    agent = start_agent(preexec=few)
    agent.may_fail = True
    uri = f"file://{write_checkpoint(tmp_path / 'm')}"
    with agent.client.lease(uri) as lease:
        lease.wait_ready(soon())
        with contextlib.ExitStack() as stack:
            refusals = 0
            for _ in range(100):
                try:
                    stack.enter_context(CacheClient(agent.socket, timeout=0.3).lease(uri, deadline=soon(0.3)))
                except Exception:
                    refusals += 1
                    if refusals > 3:
                        break
            assert refusals > 3, "the fds did run out"

        def one_lease() -> bool:
            with contextlib.suppress(Exception):
                return [model.leases for model in agent.client.status().models] == [1]
            return False

        eventually(one_lease, 20, "only the first lease is left")
        for _ in range(20):
            with agent.client.lease(uri) as again:
                again.wait_ready(soon())
    eventually(lambda: agent.client.status().models[0].leases == 0)
    assert agent.client.evict(uri) > 0
    assert len(agent.fds()) < 20


def test_a_grant_that_finds_no_fd_leaves_neither_a_lease_nor_fds(
    start_local_agent, checkpoint_files, monkeypatch, eventually, refused
):
    agent = start_local_agent({FAKE: FakeOrigin(FAKE, checkpoint_files())})
    with agent.client.lease(FAKE) as lease:
        lease.wait_ready(soon())
    eventually(lambda: agent.agent.status()[2][0].leases == 0)
    eventually(lambda: not agent.server._snapshot())
    fds = len(os.listdir("/proc/self/fd"))
    real, calls = os.dup, []

    def dup(fd: int) -> int:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(24, "Too many open files")
        return real(fd)

    monkeypatch.setattr(os, "dup", dup)
    with refused("internal") as error:
        agent.client.lease(FAKE)
    monkeypatch.undo()
    assert "Too many open files" in error.text
    eventually(lambda: agent.agent.status()[2][0].leases == 0)
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= fds)
    with agent.client.lease(FAKE) as lease:
        lease.wait_ready(soon())


def test_a_connection_whose_thread_cannot_start_is_forgotten(start_local_agent, monkeypatch):
    agent = start_local_agent(max_connections=3)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("connection-"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(5):
        with pytest.raises(AgentUnreachable):
            agent.client.status()
    monkeypatch.undo()
    assert isinstance(agent.client.status(), StatusReply)


# --- who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, VERSION + 1, -1, 10**30])
def test_another_version_is_refused_by_name(version, unharmed):
    with Raw(unharmed.socket) as raw:
        raw.send(struct.pack("!I", len(body := f'{{"type":"hello","version":{version},"client":"x"}}')) + body.encode())
        (reply,) = raw.rest()
    assert reply.code == "version"
    assert str(VERSION) in reply.text
    assert "update" in reply.text


@pytest.mark.parametrize(
    "identity",
    [
        Identity(),
        Identity("token", ""),
        Identity("token", "wrong"),
        Identity("token", "s3cret "),
        Identity("token", "s3cre"),
        Identity("token", "ß"),
        Identity("none", "s3cret"),
        Identity("kubernetes", "s3cret"),
    ],
)
def test_without_the_right_token_nothing_is_said(identity, start_local_agent, tmp_path):
    (tmp_path / "token").write_text("s3cret")
    agent = start_local_agent(token_file=tmp_path / "token")
    with Raw(agent.socket) as raw:
        raw.send(Hello(VERSION, "x", identity), StatusRequest())
        (reply,) = raw.rest()
    assert reply.code == "denied"
    assert "GLOWPLUG_TOKEN_FILE" in reply.text
    assert "s3cret" not in reply.text


def test_the_right_token_is_let_in(start_agent, tmp_path, refused):
    (tmp_path / "token").write_text("s3cret\n")
    agent = start_agent("--token-file", str(tmp_path / "token"))
    assert CacheClient(agent.socket, identity=credentials.shown(tmp_path / "token")).status().models == []
    with refused("denied"):
        CacheClient(agent.socket).status()
    with refused("denied"):
        CacheClient(agent.socket, identity=lambda: Identity("token", "guess")).status()


def test_a_socket_for_others_needs_named_roots(tmp_path):
    with pytest.raises(BadSetting, match="--file-root"):
        AgentConfig(socket=tmp_path / "s", socket_mode=0o660)
    with pytest.raises(BadSetting, match="--file-root"):
        AgentConfig(socket=tmp_path / "s", socket_mode=0o606, file_roots=(Path("/models"), Path("/")))
    AgentConfig(socket=tmp_path / "s", socket_mode=0o666, file_roots=(Path("/models"),))
    AgentConfig(socket=tmp_path / "s", socket_mode=0o600)


@pytest.mark.parametrize("root", ["//", "/./", "/usr/..", "/proc/self/root"])
def test_a_root_that_is_the_whole_machine_by_another_name_does_not_count_as_named(root, tmp_path):
    with pytest.raises(BadSetting, match="--file-root"):
        AgentConfig(socket=tmp_path / "s", socket_mode=0o660, file_roots=(Path(root),))


@pytest.mark.parametrize("mode", ["600", "660", "606"])
def test_the_socket_has_its_mode(mode, start_agent, tmp_path):
    agent = start_agent("--socket-mode", mode, "--file-root", str(tmp_path))
    assert stat.S_IMODE(agent.socket.stat().st_mode) == int(mode, 8)


def test_files_outside_the_roots_are_denied_also_through_links(start_agent, tmp_path, write_checkpoint, refused):
    inside, outside = tmp_path / "models", tmp_path / "secret"
    write_checkpoint(inside / "good")
    write_checkpoint(outside)
    (inside / "link").symlink_to(outside)
    (inside / "linked").mkdir()
    for file in outside.iterdir():
        (inside / "linked" / file.name).symlink_to(file)
    one_link = write_checkpoint(inside / "one-link")
    (one_link / "tokenizer.json").unlink()
    (one_link / "tokenizer.json").symlink_to(outside / "tokenizer.json")
    (tmp_path / "models-of-others").symlink_to(outside)
    agent = start_agent("--file-root", str(inside))
    places = [
        outside,
        inside / "link",
        inside / "linked",
        one_link,
        inside / ".." / "secret",
        tmp_path / "models-of-others",
        Path("/"),
        Path("/etc"),
        inside / "good" / ".." / ".." / "secret",
    ]
    for place in places:
        with refused("denied") as error:
            agent.client.lease(f"file://{place}")
        assert "may" in error.text
        with refused("denied"):
            agent.client.manifest(f"file://{place}")
    with refused("denied"):
        agent.client.lease(f"file://{inside}/%2e%2e/secret")
    with agent.client.lease(f"file://{inside}/good") as lease:
        lease.wait_ready(soon())


# --- the socket itself ------------------------------------------------------------------------------------------------


def test_a_stale_socket_is_replaced(start_agent, agent_process, tmp_path):
    agent = start_agent()
    agent.kill()
    assert agent.socket.exists(), "killed agents leave their socket"
    agent.start()
    assert agent.client.status().pid == agent.pid


def test_a_second_agent_on_the_same_socket_is_refused_and_the_first_goes_on(agent, glowplug_agent):
    result = glowplug_agent("serve", "--socket", agent.socket)
    assert result.returncode == 64
    assert "already serves" in result.stderr
    assert "[bad_config]" in result.stderr
    assert "Traceback" not in result.stderr
    assert agent.client.status().pid == agent.pid


def test_an_agent_too_busy_to_accept_is_not_taken_for_a_stale_socket(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as busy, contextlib.ExitStack() as stack:
        busy.bind(str(path))
        busy.listen(0)
        for _ in range(5):  # fills the backlog
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            waiting.connect_ex(str(path))
        with pytest.raises(BadSetting, match="already serves"):
            servers.listen(path, 0o600)
        assert path.exists()


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_is_no_socket_is_left_alone(what, tmp_path):
    path = tmp_path / "s"
    path.touch() if what == "file" else path.mkdir()
    with pytest.raises(BadSetting, match="is no socket"):
        servers.listen(path, 0o600)
    assert path.exists()


@pytest.mark.parametrize("place", ["/proc/nowhere/s", "/dev/null/s", "x" * 120])
def test_a_place_where_no_socket_can_be_is_named(place, tmp_path):
    with pytest.raises(BadSetting, match=r"cannot listen on .*; choose another --socket") as caught:
        servers.listen(tmp_path / place, 0o600)
    assert "None" not in caught.value.text


def test_an_agent_that_ends_leaves_its_successors_socket_alone(start_agent, agent_process):
    """In a rolling update the new agent listens before the old one has ended."""
    old = start_agent()
    old.socket.unlink()
    new = type(old)(old.socket.parent)
    with new:
        assert old.stop() == 0
        assert new.client.status().pid == new.pid


def test_a_signal_at_any_moment_ends_the_agent(start_agent, rounds):
    """A signal just before the wait for a connection ends the agent, though no connection follows."""
    agent = start_agent()
    for number in range(rounds(6, 300)):
        done = threading.Event()

        def hammer(done=done) -> None:
            while not done.is_set():
                with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(str(agent.socket))

        threads = [threading.Thread(target=hammer) for _ in range(3)]
        for thread in threads:
            thread.start()
        done.wait(0.001 * (number % 7))
        agent.running.send_signal(signal.SIGTERM)
        done.set()
        for thread in threads:
            thread.join()
        assert agent.running.wait(20) == 0
        agent.start()


def test_a_private_agent_serves_an_inherited_socket(tmp_path, write_checkpoint):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        environment = {"GLOWPLUG_DRAM": "64M", "GLOWPLUG_HUGE_PAGES": "never", "PATH": os.environ["PATH"]}
        command = [sys.executable, "-m", "cache_agent.daemon", str(listening.fileno()), str(os.getpid())]
        with subprocess.Popen(command, pass_fds=[listening.fileno()], env=environment) as process:
            try:
                with CacheClient(path, timeout=30).lease(f"file://{write_checkpoint(tmp_path / 'm')}") as lease:
                    lease.wait_ready(soon())
                    assert lease.ready
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
                assert path.exists(), "the socket is its parent's"
            finally:
                process.kill()


def test_error_text_longer_than_a_frame_allows_is_cut(start_local_agent):
    long = "x" * 2000
    agent = start_local_agent()
    with Raw(agent.socket).greeted() as raw:
        raw.send(LeaseRequest(f"fake://{long}"))
        (reply,) = raw.rest()
    assert isinstance(reply, ErrorReply)
    assert len(reply.text) <= 4096
