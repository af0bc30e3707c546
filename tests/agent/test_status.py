"""What an agent says of itself: events with reasons, metrics that the documentation names, and who may ask."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cache_agent.access.control import Access, from_config
from cache_agent.errors import BadSetting, ModelNotFound
from cache_agent.journal import journal as journals
from cache_agent.journal.journal import OTHERS, Journal
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.web import status as statuses
from cache_agent.web.status import Status, parse_address
from cache_agent.web.wsgi import listen

README = (Path(__file__).parents[2] / "cache_agent" / "web" / "README.md").read_text()
OPERATOR = "secret of operator"


# --- the journal ------------------------------------------------------------------------------------------------------


def test_the_ring_is_bounded_and_counts_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "_KEPT", 3)
    journal = Journal(lambda: 1.5)
    for number in range(10):
        journal.evicted(f"m{number}", "dram", 5_000_000, "smallest price, to make room for m7")
    found = journal.since(0)
    assert [event.number for event in found] == [8, 9, 10]
    assert found[-1].text == "evicted m9 (5 MB): smallest price, to make room for m7"
    assert [event.number for event in journal.since(9)] == [10]
    assert journal.wait(10, 0.0) == []


def test_labels_are_bounded() -> None:
    journal = Journal()
    for number in range(1000):
        journal.leased(f"s3://m/{number}", "dram")
    counts = journal.counts()
    assert len(counts.leases) == journals._MODELS + 1
    assert counts.leases[OTHERS, "dram"] == 1000 - journals._MODELS
    assert sum(counts.leases.values()) == 1000


@pytest.mark.parametrize(("expected", "took", "bucket"), [(1.0, 1.0, 0), (1.04, 1.0, 0), (1.2, 1.0, 2), (9.0, 1.0, 7)])
def test_an_estimates_error_is_counted_beside_what_the_load_took(expected: float, took: float, bucket: int) -> None:
    journal = Journal()
    journal.loaded("m", "origin", 100, took, expected, guess=False, page=4096)
    journal.loaded("m", "ssd", 100, took, expected, guess=True, page=4096)
    counts = journal.counts()
    assert counts.errors["origin"].index(1) == bucket
    assert counts.predicted == {"origin": expected}
    assert counts.took == {"origin": took}
    assert counts.seconds == {("m", "origin"): took, ("m", "ssd"): took}


def test_who_waits_hears_at_once() -> None:
    journal = Journal()
    heard: list[Any] = []
    thread = threading.Thread(target=lambda: heard.extend(journal.wait(0, 20.0)))
    thread.start()
    journal.record("test", "m", "it happened")
    thread.join(10)
    assert [event.text for event in heard] == ["it happened"]


# --- over HTTP --------------------------------------------------------------------------------------------------------


class Asker:
    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str, token: str = "", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            if token:
                headers["Authorization"] = f"Bearer {token}"
            connection.request("GET", path, headers={"Connection": "close", **headers})
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def stream(self, token: str = "") -> socket.socket:
        """A stream of events whose status line was read."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        bearer = f"Authorization: Bearer {token}\r\n" if token else ""
        sock.sendall(f"GET /events/stream HTTP/1.1\r\nHost: 127.0.0.1\r\n{bearer}\r\n".encode())
        assert sock.recv(12) == b"HTTP/1.1 200"
        return sock


@pytest.fixture
def watched(start_local_agent, checkpoint_files, tmp_path, request) -> Iterator[Any]:
    """An agent with room for one model of three, and its status server; `request.param` are paths that are open."""
    (tmp_path / "secrets").mkdir()
    for name in ("operator", "chat"):
        (tmp_path / "secrets" / name).write_text(f"secret of {name}")
    (tmp_path / "rights.toml").write_text('[token.operator]\nadmin = true\n[token.chat]\nmodels = ["*"]\n')
    origins = {f"fake://{name}": FakeOrigin(f"fake://{name}", checkpoint_files(seed=n)) for n, name in enumerate("abc")}
    agent = start_local_agent(origins, Access(), dram=3 << 20)
    settings = dataclasses.replace(agent.config, token_file=tmp_path / "secrets", rights=tmp_path / "rights.toml")
    status = Status(agent.agent, from_config(settings), "127.0.0.1:0", getattr(request, "param", ("/healthz",)))
    status.start()
    agent.http = Asker(status.port)
    yield agent
    status.close()


def load(agent: Any, model: str) -> None:
    with agent.client.lease(model) as lease:
        lease.wait_ready(time.monotonic() + 20)


def test_events_say_why(watched, eventually) -> None:
    load(watched, "fake://a")
    eventually(lambda: watched.agent.status()[2][0].leases == 0)
    load(watched, "fake://b")
    status, _, body = watched.http.get("/events", OPERATOR)
    assert status == 200
    found = json.loads(body)
    (evicted,) = [event["text"] for event in found if event["kind"] == "evicted"]
    assert evicted == "evicted fake://a (2 MB): smallest price, to make room for fake://b (2 MB)"
    assert len([event for event in found if event["kind"] == "loaded"]) == 2
    last = found[-1]["number"]
    assert json.loads(watched.http.get(f"/events?since={last}", OPERATOR)[2]) == []
    assert len(json.loads(watched.http.get("/events?limit=1", OPERATOR)[2])) == 1
    assert watched.http.get("/events?since=x", OPERATOR)[0] == 400
    assert [event.number for event in watched.client.events(last - 1)] == [last]


def test_events_as_they_happen(watched) -> None:
    with watched.http.stream(OPERATOR) as sock, sock.makefile("rb") as file:
        thread = threading.Thread(target=load, args=(watched, "fake://a"))
        thread.start()
        line = b""
        while not line.startswith(b"data:"):
            line = file.readline()
            assert line, "the stream ended"
        thread.join(20)
        assert json.loads(line[5:])["text"].startswith("loaded fake://a from origin")


def test_a_stream_has_the_last_event_before_it_ends(start_local_agent) -> None:
    """The agent ends while the stream is busy with an earlier event: the last one is neither lost nor waited for."""
    agent, ending = start_local_agent({}).agent, threading.Event()
    stream = statuses._stream(agent, 0, ending)
    next(stream)
    agent.journal.evicted("m1", "dram", 5_000_000, "room for m3")
    assert b"evicted m1" in next(stream)
    agent.journal.evicted("m2", "dram", 5_000_000, "room for m3")
    ending.set()
    agent.journal.end()
    assert b"evicted m2" in b"".join(stream)


def test_streams_are_few_and_the_other_paths_still_answer(watched) -> None:
    socks = [watched.http.stream(OPERATOR) for _ in range(statuses._STREAMS)]
    try:
        status, _, body = watched.http.get("/events/stream", OPERATOR)
        assert (status, b"streams are open" in body) == (503, True)
        assert watched.http.get("/status.json", OPERATOR)[0] == 200
    finally:
        for sock in socks:
            sock.close()


def documented() -> dict[str, set[str]]:
    """The README's table of metrics: their labels by their names."""
    found = re.findall(r"^\| `(glowplug_\w+)` \|([^|]*)\|", README, re.MULTILINE)
    return {name: {word for word in re.split(r"[, ]+", labels) if word} for name, labels in found}


def test_every_metric_has_its_row_and_every_row_its_metric(watched) -> None:
    load(watched, "fake://a")
    with pytest.raises(ModelNotFound):
        watched.client.lease("fake://none")
    status, headers, body = watched.http.get("/metrics", OPERATOR)
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    families = list(text_string_to_metric_families(body.decode()))
    told = {family.name + ("_total" if family.type == "counter" else ""): family for family in families}
    rows = documented()
    assert told.keys() == rows.keys() - {"glowplug_quarantined"}, "the one of agents with an SSD"
    for name, family in told.items():
        assert {label for sample in family.samples for label in sample.labels} <= rows[name], name
        assert family.documentation
    samples = {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}
    assert samples["glowplug_loads_total", "fake://a", "origin"] == 1
    assert samples["glowplug_load_bytes_total", "fake://a", "origin"] == 2 << 20
    assert samples["glowplug_lease_grants_total", "fake://a", "origin"] == 1
    assert samples["glowplug_resident_bytes", "dram", "fake://a"] == samples["glowplug_used_bytes", "dram"] == 2 << 20
    assert samples["glowplug_refusals_total", "not_found"] == 1


def test_who_may_ask(watched) -> None:
    assert watched.http.get("/healthz")[0] == 200
    for path in ("/", "/metrics", "/status.json", "/events", "/events/stream", "/nothing"):
        status, headers, _ = watched.http.get(path)
        assert (status, headers.get("WWW-Authenticate")) == (401, "Bearer"), path
        assert watched.http.get(path, "guess")[0] == 403
        assert watched.http.get(path, "secret of chat")[0] == 403, "an operator's, not anybody's"
        assert watched.http.get(path, "a.b.c")[0] == 403
    assert watched.http.get("/", OPERATOR)[0] == 200
    assert watched.http.get("/nothing", OPERATOR)[0] == 404
    assert json.loads(watched.http.get("/status.json", OPERATOR)[2])["node"] == "test"


def test_a_kept_connections_next_answer_waits_for_nothing(watched, eventually) -> None:
    """Ten answers within less than a quarter of what ten delayed acknowledgements take, each of them 40 ms."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", watched.http.port, timeout=20)) as connection:

        def ten() -> float:
            start = time.perf_counter()
            for _ in range(10):
                connection.request("GET", "/healthz")
                assert connection.getresponse().read() == b'{"status":"ok"}'
            return time.perf_counter() - start

        eventually(lambda: ten() < 0.1, 20, "ten answers come at once")


def test_its_connections_send_at_once() -> None:
    with (
        listen("127.0.0.1", 0, "--port") as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("watched", [("/healthz", "/metrics")], indirect=True)
def test_what_is_open_takes_no_token(watched) -> None:
    assert watched.http.get("/metrics")[0] == 200
    assert watched.http.get("/status.json")[0] == 401


def test_where_nobody_is_asked_only_this_machine_listens_in(start_local_agent) -> None:
    agent = start_local_agent()
    for address in ("0.0.0.0:0", "10.0.0.1:80", "example.com:80"):
        with pytest.raises(BadSetting, match="nobody is asked"):
            Status(agent.agent, Access(), address, ())
    status = Status(agent.agent, Access(), "127.0.0.1:0", ())
    status.start()
    try:
        asker = Asker(status.port)
        assert asker.get("/status.json")[0] == 200
        assert asker.get("/status.json", Host=f"localhost:{status.port}")[0] == 200
        # A page in a browser whose name was made to point here asks under that name.
        assert asker.get("/status.json", Host=f"evil.example:{status.port}")[0] == 403
    finally:
        status.close()


def test_an_agent_whose_lock_is_stuck_is_not_healthy(watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statuses, "_LOCK_SECONDS", 0.05)
    with watched.agent._ledger.lock:
        assert watched.http.get("/healthz")[0] == 503
    assert watched.http.get("/healthz")[0] == 200


@pytest.mark.parametrize("text", ["", "9480", ":9480", "host:", "host:x", "host:70000", "host:-1"])
def test_an_address_that_is_none_is_named(text: str) -> None:
    with pytest.raises(BadSetting, match="GLOWPLUG_STATUS="):
        parse_address(text)


def test_an_agent_process_serves_and_ends(start_agent, eventually) -> None:
    agent = start_agent("--status", "127.0.0.1:0")
    port = int(eventually(lambda: re.search(r"metrics and events on port (\d+)", agent.output()))[1])
    asker = Asker(port)
    assert json.loads(asker.get("/status.json")[2])["pid"] == agent.pid
    with asker.stream():
        assert agent.stop() == 0, "an open stream holds nothing up"
