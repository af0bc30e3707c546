"""Several nodes on one Redis, and what becomes of them when it is down, slow, emptied, full, or strict."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import redis

from cache_agent.cluster.directory import Holding, Node
from cache_agent.cluster.directory_redis import RedisDirectory
from cache_agent.errors import BadSetting
from cache_agent.tiers.fake import FakeOrigin

BEAT, TTL = 0.05, 1.5


class OwnRedis:
    """A Redis on a port of its own, that a test may stop, kill and start again."""

    def __init__(self, place: Path, *arguments: str) -> None:
        self.place = place
        self.arguments = arguments
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("there is no redis-server on PATH")
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.place)]
        log = (self.place / "redis.log").open("ab")
        with log:
            self.process = subprocess.Popen([*command, *self.arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self.process.poll() is None, (self.place / "redis.log").read_text()
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.01)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    @property
    def admin(self) -> redis.Redis:
        return redis.Redis(port=self.port)


@pytest.fixture
def own_redis(tmp_path):
    server = OwnRedis(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def join():
    """`join(url, "n1")`: a directory that speaks for that node."""
    with contextlib.ExitStack() as stack:

        def open_one(url: str, node: str = "", **options) -> RedisDirectory:
            directory = RedisDirectory(url, **{"beat": BEAT, "ttl": TTL, "timeout": 0.3, **options})
            stack.callback(directory.close)
            if node:
                directory.heartbeat(Node(node, f"{node}:8090", 10, 1))
            return directory

        yield open_one


def names(directory) -> list[str]:
    return [node.name for node in directory.nodes()]


def test_what_one_node_tells_the_others_hear(redis_url, join, eventually):
    a, b = join(redis_url, "a"), join(redis_url, "b")
    a.publish("src-1", Holding("a", "dram", 3, 9))
    a.measured("a", "origin", 1.5e9)
    a.remember("src-1", "rev-1")
    eventually(lambda: b.holders("src-1") == [Holding("a", "dram", 3, 9)])
    eventually(lambda: b.revision("src-1") == "rev-1")
    assert b.bandwidth("a", "origin") == 1.5e9
    assert b.nodes() == [Node("a", "a:8090", 10, 1), Node("b", "b:8090", 10, 1)]
    a.publish("src-1", Holding("a", "dram", 9, 9))
    eventually(lambda: b.holders("src-1") == [Holding("a", "dram", 9, 9)])
    a.withdraw("src-1", "a", "dram")
    eventually(lambda: b.holders("src-1") == [])


def test_sources_are_bounded_and_the_oldest_go(redis_url, join, monkeypatch):
    monkeypatch.setattr("cache_agent.cluster.directory_redis._MOST_SOURCES", 3)
    a = join(redis_url, "a")
    for number in range(5):
        a.remember(f"src-{number}", "rev-1")
    told = [field for (_, key, field), value in a._values.items() if key == 4 and value]
    assert told == ["src-2", "src-3", "src-4"]


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_reader_says_when_it_knows_nothing_any_more(how, own_redis, join, eventually):
    a, reader = join(own_redis.url, "a"), join(own_redis.url)
    a.validated("s3://m", "src-1", 1000.0)
    eventually(lambda: reader.lost() == "" and reader.validation("s3://m")[0] == "src-1")
    eventually(lambda: names(reader) == ["a"])
    own_redis.signal(signal.SIGSTOP) if how == "stopped" else own_redis.kill()
    begun = time.monotonic()
    eventually(lambda: "cannot be used" in reader.lost(), 10)
    assert time.monotonic() - begun >= TTL / 2, "what was heard lately is good for a while"
    assert names(reader) == []
    assert "redis://127.0.0.1" in reader.lost()
    if how == "stopped":
        own_redis.signal(signal.SIGCONT)
    else:
        own_redis.start()
    eventually(lambda: reader.lost() == "" and names(reader) == ["a"], 20)
    assert reader.validation("s3://m") == ("src-1", 1000.0)


def test_before_the_first_look_nothing_is_known(join):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reader = join(f"redis://127.0.0.1:{silent.getsockname()[1]}", timeout=1.0)
        assert "has not been read yet" in reader.lost()
        reader.wait_looked(20)
        assert "cannot be used" in reader.lost()


def test_a_node_that_ends_says_goodbye_and_one_that_is_killed_ages_out(redis_url, join, eventually):
    a, b, c = (join(redis_url, name) for name in "abc")
    for directory, name in ((a, "a"), (b, "b")):
        directory.publish("src-1", Holding(name, "dram", 1, 1))
        directory.remember(f"src-{name}", "rev-1")
    eventually(lambda: names(c) == ["a", "b", "c"])
    a.close()
    eventually(lambda: names(c) == ["b", "c"], TTL / 2)
    b._ask = lambda *_: None  # as good as killed: nothing more comes of it
    eventually(lambda: names(c) == ["c"])
    assert c.holders("src-1") == []
    assert (c.revision("src-a"), c.revision("src-b")) == ("rev-1", "rev-1"), "what they learnt stays"


def test_a_successor_with_the_same_name_starts_with_nothing_and_is_not_said_goodbye_to(redis_url, join, eventually):
    old, other = join(redis_url, "a"), join(redis_url, "b")
    old.publish("src-1", Holding("a", "dram", 1, 1))
    eventually(lambda: other.holders("src-1"))
    beats, old._ask = old._ask, lambda *_: None
    join(redis_url, "a").publish("src-2", Holding("a", "dram", 2, 2))
    eventually(lambda: other.holders("src-2") and not other.holders("src-1"))
    old._closing.set()
    old._ask = beats
    old.close()
    assert names(other) == ["a", "b"]
    assert other.holders("src-2")


def slow_calls(directory) -> float:
    """Seconds that the calls of the load path took."""
    start = time.monotonic()
    for number in range(100):
        directory.publish(f"src-{number}", Holding("a", "dram", 1, 1))
        directory.revision("src-1")
        directory.holders("src-1")
        directory.remember("src-1", "rev-1")
        directory.measured("a", "origin", 1.0)
        directory.nodes()
    directory.withdraw("src-1", "a", "dram")
    return time.monotonic() - start


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_redis_goes_away_and_comes_back(how, own_redis, join, eventually, caplog):
    a, b = join(own_redis.url, "a"), join(own_redis.url, "b")
    a.publish("src-x", Holding("a", "dram", 1, 1))
    eventually(lambda: b.holders("src-x"))
    own_redis.signal(signal.SIGSTOP) if how == "stopped" else own_redis.kill()
    assert slow_calls(a) < 0.3
    eventually(lambda: a._down and b._down)
    start = time.monotonic()
    assert [a.claim("x", "a", 5) for _ in range(50)] == [""] * 50
    assert time.monotonic() - start < 5
    assert a.holders("src-x") == [Holding("a", "dram", 1, 1)], "of itself a node always knows"
    eventually(lambda: b.holders("src-x") == [], what="what others had is forgotten after a while")
    own_redis.signal(signal.SIGCONT) if how == "stopped" else own_redis.start()
    eventually(lambda: b.holders("src-x") == [Holding("a", "dram", 1, 1)])
    eventually(lambda: b.holders("src-7") and b.revision("src-1") == "rev-1")
    eventually(lambda: a.claim("x", "a", 5) == "a")
    told = [record.getMessage() for record in caplog.records if record.name == "glowplug.directory"]
    assert sum("cannot be used" in text for text in told) <= 4, told  # once per node; twice if it came back twice
    assert sum("rejoined" in text for text in told) >= 2


def test_a_redis_that_was_emptied_hears_everything_again(own_redis, join, eventually):
    a, b = join(own_redis.url, "a"), join(own_redis.url, "b")
    for number in range(1200):  # more than one step carries
        a.publish(f"src-{number}", Holding("a", "dram", number, 2000))
    a.remember("src-1", "rev-1")
    eventually(lambda: all(b.holders(f"src-{number}") for number in (0, 600, 1199)))
    own_redis.admin.flushall()
    eventually(lambda: own_redis.admin.hlen("glowplug:node:a:held") == 1200)
    eventually(lambda: b.holders("src-1199") and b.revision("src-1") == "rev-1")


def test_a_full_redis_is_read_and_told_later(own_redis, join, eventually, caplog):
    a, b = join(own_redis.url, "a"), join(own_redis.url, "b")
    a.publish("src-1", Holding("a", "dram", 1, 1))
    eventually(lambda: b.holders("src-1"))
    own_redis.admin.config_set("maxmemory-policy", "noeviction")
    own_redis.admin.config_set("maxmemory", "1")
    a.publish("src-200", Holding("a", "dram", 2, 2))
    eventually(lambda: a._down and b._down)
    assert slow_calls(a) < 0.3
    assert a.claim("x", "a", 5) == ""
    own_redis.admin.config_set("maxmemory", "0")
    eventually(lambda: b.holders("src-200") == [Holding("a", "dram", 2, 2)])
    told = [record.getMessage() for record in caplog.records if "cannot be used" in record.getMessage()]
    assert 1 <= len(told) <= 2


def test_a_redis_that_is_not_there_at_first(tmp_path, join, eventually, caplog):
    server = OwnRedis(tmp_path)
    a = join(server.url, "a")
    assert slow_calls(a) < 0.3
    eventually(lambda: a._down)
    server.start()
    try:
        b = join(server.url, "b")
        eventually(lambda: b.holders("src-99"))
    finally:
        server.kill()


def test_the_rights_that_the_manifests_give_are_enough_and_no_more_is_used(own_redis, tmp_path, join, eventually):
    rights = ["+@read", "+@write", "+@scripting", "+@connection", "-@dangerous", "%R~glowplug:*"]
    writes = ["%RW~glowplug:node:{n}:*", "%RW~glowplug:claim:*", "%RW~glowplug:snapshot:*"]
    for node in ("a", "b"):
        own_redis.admin.execute_command(
            "ACL", "SETUSER", f"agent-{node}", "on", f">secret-{node}", *rights, *(w.format(n=node) for w in writes)
        )
        (tmp_path / node).write_text(f"secret-{node}\n")
    own_redis.admin.execute_command("ACL", "SETUSER", "default", "resetkeys")

    def url(node: str) -> str:
        return f"redis://agent-{node}@127.0.0.1:{own_redis.port}"

    a, b = (join(url(node), node, password_file=tmp_path / node) for node in ("a", "b"))
    a.publish("src-1", Holding("a", "dram", 1, 1))
    a.measured("a", "origin", 2.0)
    a.remember("src-1", "rev-1")
    eventually(lambda: b.holders("src-1") and b.revision("src-1") == "rev-1" and b.bandwidth("a", "origin") == 2.0)
    assert a.claim("x", "a", 5) == "a"
    assert b.claim("x", "b", 5) == "a"
    assert a.release("x", "a")
    log = own_redis.admin.execute_command("ACL", "LOG")
    assert not log, log
    b.publish("src-1", Holding("a", "ssd", 1, 1))  # in another's name
    eventually(lambda: b._down)
    assert "NOPERM" in b._down or "permission" in b._down.lower()


def test_who_may_only_read_sees_all_and_tells_nothing(own_redis, join, eventually):
    rights = ["%R~glowplug:*", "-@all", "+@read", "+@connection", "-@dangerous"]
    own_redis.admin.execute_command("ACL", "SETUSER", "placer", "on", ">secret", *rights)
    a = join(own_redis.url, "a")
    a.publish("src-1", Holding("a", "dram", 1, 1))
    placer = join(f"redis://placer:secret@127.0.0.1:{own_redis.port}")
    eventually(lambda: placer.holders("src-1") == [Holding("a", "dram", 1, 1)])
    assert names(placer) == ["a"]
    assert placer.claim("x", "placer", 5) == ""
    assert own_redis.admin.keys("glowplug:claim:*") == []


def test_a_password_that_changes_is_read_again(own_redis, tmp_path, join, eventually):
    secret = tmp_path / "password"
    secret.write_text("one")
    admin = own_redis.admin
    admin.config_set("requirepass", "one")
    a = join(own_redis.url, "a", password_file=secret)
    with redis.Redis(port=own_redis.port, password="one") as admin:
        eventually(lambda: admin.exists("glowplug:node:a:alive"))
        secret.write_text("two")
        admin.config_set("requirepass", "two")
        admin.client_kill_filter(_type="normal", skipme=True)
        eventually(lambda: admin.exists("glowplug:node:a:alive"))
        eventually(lambda: not a._down)


def test_tls(tmp_path, join, eventually):
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-nodes"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", "key.pem", "-out", "cert.pem", *subject]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    files = {name: str(tmp_path / name) for name in ("key.pem", "cert.pem")}
    tls = ["--tls-port", str(port), "--tls-cert-file", files["cert.pem"], "--tls-key-file", files["key.pem"]]
    server = OwnRedis(tmp_path, *tls, "--tls-ca-cert-file", files["cert.pem"], "--tls-auth-clients", "no")
    try:
        server.start()
    except AssertionError as error:
        pytest.skip(f"this redis-server speaks no TLS: {error}")
    try:
        a = join(f"rediss://127.0.0.1:{port}?ssl_ca_certs={files['cert.pem']}", "a", timeout=2)
        eventually(lambda: server.admin.exists("glowplug:node:a:alive"))
        assert not a._down
        stranger = join(f"rediss://127.0.0.1:{port}", "b", timeout=2)
        eventually(lambda: "certificate" in stranger._down.lower())
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("node", "held"),
    [("[1]", {}), ("{", {}), ('["x", 1, 2, 3, 4, 5]', {}), ("not json", {}), ('["z"]', {"dram src-1": "many"})],
)
def test_what_another_version_wrote_is_skipped(node, held, redis_url, join, eventually):
    with redis.Redis.from_url(redis_url) as admin:
        admin.set("glowplug:node:z:alive", f"incarnation {node}", px=60000)
        if held:
            admin.hset("glowplug:node:z:held", mapping=held)
    a, b = join(redis_url, "a"), join(redis_url, "b")
    a.publish("src-1", Holding("a", "dram", 1, 1))
    eventually(lambda: b.holders("src-1") == [Holding("a", "dram", 1, 1)])


@pytest.mark.parametrize("url", ["", "http://x", "redis", "redis://h:port"])
def test_urls_that_are_none(url):
    with pytest.raises(BadSetting, match="GLOWPLUG_REDIS_URL"):
        RedisDirectory(url)


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_password_files_that_are_none(content, tmp_path):
    path = tmp_path / "password"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadSetting, match="PASSWORD_FILE"):
        RedisDirectory("redis://127.0.0.1:1", password_file=path)


def test_no_thread_is_left(redis_url, join, eventually):
    before = set(threading.enumerate())
    a = join(redis_url, "a")
    a.close()
    eventually(lambda: set(threading.enumerate()) <= before)


def test_agents_share_what_they_admitted(redis_url, start_agent, tmp_path, write_checkpoint, eventually):
    directory = write_checkpoint(tmp_path / "m")
    env = {"GLOWPLUG_REDIS_URL": redis_url}
    first = start_agent(env={**env, "GLOWPLUG_NODE": "n1"})
    with first.client.lease(f"file://{directory}", deadline=time.monotonic() + 30) as lease:
        lease.wait_ready(time.monotonic() + 30)
        with redis.Redis.from_url(redis_url) as admin:
            eventually(lambda: admin.hlen("glowplug:node:n1:held") and admin.hlen("glowplug:node:n1:sources"))
            assert json.loads(admin.get("glowplug:node:n1:alive").partition(b" ")[2])[0] == "n1"
            first.stop()
            assert not admin.exists("glowplug:node:n1:alive")
    second = start_agent(env={**env, "GLOWPLUG_NODE": "n2"})
    assert second.client.status().node == "n2"


@pytest.mark.parametrize("how", ["stopped", "absent"])
def test_an_agent_serves_without_its_redis(how, own_redis, start_agent, tmp_path, write_checkpoint):
    agent = start_agent(env={"GLOWPLUG_REDIS_URL": own_redis.url})
    own_redis.signal(signal.SIGSTOP) if how == "stopped" else own_redis.kill()
    start = time.monotonic()
    with agent.client.lease(f"file://{write_checkpoint(tmp_path / 'm')}", deadline=start + 30) as lease:
        lease.wait_ready(start + 30)
        assert lease.manifest.tensors
    assert agent.stop() == 0
    assert agent.output().count("cannot be used") <= 1


def test_how_far_a_load_is_and_how_fast_it_was(start_local_agent, checkpoint_files, eventually):
    """What the agent tells its directory, whichever that is."""
    gate = threading.Event()

    def before_read(name: str, start: int, size: int) -> None:
        if start > 12 << 20:
            gate.wait(30)

    files = checkpoint_files({f"layers.{n}.w": ("U8", (8 << 20,), bytes(8 << 20)) for n in range(3)})
    agent = start_local_agent({"fake://m": FakeOrigin("fake://m", files, before_read=before_read)})
    with agent.client.lease("fake://m") as lease:
        source = lease.manifest.source
        eventually(lambda: agent.directory.holders(source) == [Holding("test", "dram", 16 << 20, 24 << 20)])
        gate.set()
        lease.wait_ready(time.monotonic() + 30)
    eventually(lambda: agent.directory.holders(source) == [Holding("test", "dram", 24 << 20, 24 << 20)])
    assert agent.directory.bandwidth("test", "origin") > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--redis-url", "http://x"], "GLOWPLUG_REDIS_URL"),
        (["--redis-url", "redis://h", "--redis-password-file", "/no/such"], "GLOWPLUG_REDIS_PASSWORD_FILE"),
    ],
)
def test_an_agent_with_a_bad_setting_ends_with_its_name(options, words, glowplug_agent, tmp_path):
    done = glowplug_agent("serve", "--socket", tmp_path / "s", *options)
    assert done.returncode == 64
    assert words in done.stderr
