"""kube-scheduler's extender: recorded requests, hostile ones, and a scheduler's connection over a real socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cache_agent.kube import routes
from cache_agent.kube.extender import Extender
from cache_agent.kube.outlook import FileOutlook, NoOutlook, Unavailable
from cache_agent.kube.routes import MAX_BODY, Refused, RoutesServer
from cache_agent.policy.placement import PlacementNode, Tier, View

MODEL = "s3://models/a"
ESTIMATES = {
    "alive": ["node-1", "node-2"],
    "models": {
        MODEL: {
            "bytes": 4 * 10**9,
            "nodes": [
                {"name": "node-1", "tiers": [{"name": "ssd", "bytes": 4 * 10**9, "bandwidth": 2e9}]},
                {"name": "node-2", "tiers": [{"name": "dram", "bytes": 4 * 10**9}]},
            ],
        }
    },
}


class Known:
    """An outlook of one model, on as many nodes as a test likes."""

    def __init__(self, view: View | None = None, fault: Exception | None = None) -> None:
        self.view, self.fault = view, fault

    def look(self, model: str) -> View | None:
        if self.fault:
            raise self.fault
        return self.view if model == MODEL else None

    def alive(self) -> frozenset[str]:
        if self.fault:
            raise self.fault
        return frozenset(node.name for node in self.view.nodes) if self.view else frozenset()


@pytest.fixture
def estimates(tmp_path: Path) -> Path:
    path = tmp_path / "estimates.json"
    path.write_text(json.dumps(ESTIMATES))
    return path


def request(annotations: Any = None, names: Any = ("node-1", "node-2", "node-3"), **more: Any) -> bytes:
    pod = {"metadata": {"name": "chat-1", "annotations": annotations}, "spec": {"containers": [{"name": "function"}]}}
    return json.dumps({"Pod": pod, "Nodes": None, "NodeNames": names and list(names), **more}).encode()


def body(answer: Any) -> Any:
    assert answer.status == 200
    return json.loads(answer.body)


def test_wire(estimates: Path, golden: Callable[[str, Any], None]) -> None:
    """A pod as kube-scheduler 1.36 sends it, and the answers field by field."""
    place = Path(__file__).parents[1] / "golden" / "agent" / "scheduler-request.json"
    recorded = place.read_bytes()
    extender = Extender(FileOutlook(estimates))
    golden("agent/scheduler-prioritize.json", body(extender.prioritize(recorded)))
    golden("agent/scheduler-filter.json", body(extender.filter(recorded)))


def test_prefers_the_node_that_has_the_model(estimates: Path) -> None:
    answer = body(Extender(FileOutlook(estimates)).prioritize(request({"glowplug.dev/model": MODEL})))
    assert answer == [
        {"Host": "node-1", "Score": 4},
        {"Host": "node-2", "Score": 10},
        {"Host": "node-3", "Score": 0},
    ]


def test_reads_whole_node_objects(estimates: Path) -> None:
    """A scheduler whose nodeCacheCapable is false sends Node objects, and wants those back that may."""
    items = [{"metadata": {"name": name}, "spec": {"podCIDR": "10.0.0.0/8"}} for name in ("node-2", "node-9")]
    annotations = {"glowplug.dev/model": MODEL, "glowplug.dev/require-agent": "true"}
    sent = request(annotations, None, Nodes={"kind": "NodeList", "items": items})
    extender = Extender(FileOutlook(estimates))
    assert body(extender.prioritize(sent))[0] == {"Host": "node-2", "Score": 10}
    answer = body(extender.filter(sent))
    assert answer["Nodes"] == {"kind": "NodeList", "items": items[:1]}
    assert answer["NodeNames"] is None
    assert list(answer["FailedNodes"]) == ["node-9"]


@pytest.mark.parametrize("fault", [Unavailable("Redis does not answer"), RuntimeError("a bug")])
def test_without_knowledge_all_nodes_are_equal(fault: Exception) -> None:
    extender = Extender(Known(fault=fault))
    answer = body(extender.prioritize(request({"glowplug.dev/model": MODEL})))
    assert {row["Score"] for row in answer} == {0}
    passed = body(extender.filter(request({"glowplug.dev/model": MODEL})))
    assert (passed["NodeNames"], passed["FailedNodes"]) == (["node-1", "node-2", "node-3"], {})


@pytest.mark.parametrize(
    "outlook", [NoOutlook(), Known(fault=Unavailable("Redis is gone")), Known(fault=KeyError("x"))]
)
def test_who_requires_an_agent_goes_nowhere_while_nobody_knows(outlook: Any) -> None:
    answer = body(Extender(outlook).filter(request({"glowplug.dev/require-agent": "true"})))
    assert answer["NodeNames"] == []
    assert answer["Error"] == "", "an error would be a fault of the extender, and be retried as one"
    assert all("requires a glowplug agent" in why for why in answer["FailedNodes"].values())


@pytest.mark.parametrize(
    "annotations",
    [
        None,
        {},
        {"glowplug.dev/model": ""},
        {"glowplug.dev/model": "s3://models/unknown"},
        {"glowplug.dev/model": "x" * 300_000},
        {"glowplug.dev/model": "\u0000'; DROP TABLE; \ud83d\ude00 ../../etc"},
        {"glowplug.dev/require-agent": "TRUE", "glowplug.dev/model": "]"},
    ],
)
def test_unknown_and_hostile_annotations_change_nothing(estimates: Path, annotations: Any) -> None:
    extender = Extender(FileOutlook(estimates))
    assert {row["Score"] for row in body(extender.prioritize(request(annotations)))} == {0}
    assert body(extender.filter(request(annotations)))["FailedNodes"] == {}


@pytest.mark.parametrize("names", [(), None])
def test_no_nodes(estimates: Path, names: Any) -> None:
    extender = Extender(FileOutlook(estimates))
    sent = request({"glowplug.dev/model": MODEL, "glowplug.dev/require-agent": "true"}, names)
    assert body(extender.prioritize(sent)) == []
    assert body(extender.filter(sent))["NodeNames"] == []


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b"null",
        b'{"Pod": 3}',
        b'{"Pod": {"metadata": {"annotations": {"a": 3}}}}',
        b'{"Pod": {}, "NodeNames": [3]}',
        b'{"Pod": {}, "Nodes": {"items": [{}]}}',
        b'{"Pod": {}, "Nodes": {"items": 7}}',
        b'{"Pod": ' * 50_000,
    ],
)
def test_what_is_no_request_is_refused(sent: bytes) -> None:
    extender = Extender(NoOutlook())
    for verb in (extender.prioritize, extender.filter):
        with pytest.raises(Refused) as caught:
            verb(sent)
        assert caught.value.status == 400


def test_estimates_follow_the_file(estimates: Path) -> None:
    outlook = FileOutlook(estimates)
    assert outlook.look(MODEL) is not None
    replaced = estimates.with_suffix(".new")
    replaced.write_text('{"models": {}}')
    replaced.replace(estimates)
    assert outlook.look(MODEL) is None
    assert outlook.alive() == frozenset()
    estimates.write_text('{"models": {"s3://a/b": {"bytes": -1}}}')
    with pytest.raises(Unavailable, match="no estimates"):
        outlook.look(MODEL)
    estimates.unlink()
    with pytest.raises(Unavailable, match="cannot be read"):
        outlook.alive()


# --- over a socket ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[RoutesServer]:
    nodes = tuple(PlacementNode(f"node-{number}", tiers=(Tier("ssd", number, 1e9),)) for number in range(300))
    extender = Extender(Known(View(10**9, nodes)))
    verbs = {("POST", "/scheduler/prioritize"): extender.prioritize, ("POST", "/broken"): lambda _: 1 / 0}
    made = RoutesServer("127.0.0.1", 0, verbs)  # type: ignore[arg-type]
    made.start()
    yield made
    made.stop()


def ask(server: RoutesServer, sent: bytes, *, path: str = "/scheduler/prioritize", **headers: str) -> tuple[int, Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.request("POST", path, sent, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_a_kept_connections_next_answer_waits_for_nothing(server: RoutesServer, eventually: Callable[..., Any]) -> None:
    """Ten answers of 300 nodes within less than half of what ten delayed acknowledgements take, each of them 40 ms."""
    sent = request({}, [f"node-{number}" for number in range(300)])
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:

        def ten() -> float:
            start = time.perf_counter()
            for _ in range(10):
                connection.request("POST", "/scheduler/prioritize", sent)
                assert len(json.loads(connection.getresponse().read())) == 300
            return time.perf_counter() - start

        eventually(lambda: ten() < 0.2, 30, "ten answers come at once")


def test_what_http_refuses(server: RoutesServer) -> None:
    assert ask(server, b"{}")[0] == 400
    assert ask(server, b"{}", path="/nothing")[0] == 404
    assert ask(server, b"{}", path="/healthz")[0] == 405
    assert ask(server, b"", Content_Length=str(MAX_BODY + 1))[0] == 413
    assert ask(server, b"", Content_Length="-1")[0] == 411
    assert ask(server, b"", Content_Length="9" * 5000)[0] == 413
    assert ask(server, b"0\r\n\r\n", Transfer_Encoding="chunked")[0] == 411
    status, said = ask(server, b"", path="/broken")
    assert (status, "ZeroDivisionError" in said["error"]) == (500, False)


def test_garbage_and_silence_hold_nobody_up(server: RoutesServer) -> None:
    with contextlib.ExitStack() as stack:
        for sent in (b"", b"\x16\x03\x01\x02\x00", b"POST", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70_000):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            client.sendall(sent)
        assert ask(server, request({}))[0] == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno field\r\n\r\n", 400),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n", 431),
        (b"POST /scheduler/filter HTTP/1.1\r\nContent-Length: 9\r\nContent-Length: 8\r\n\r\n", 400),
        (b"POST /scheduler/filter HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 8\r\n\r\n", 411),
    ],
)
def test_what_is_no_request_of_http_is_refused_in_json(server: RoutesServer, sent: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(sent)
        response = http.client.HTTPResponse(client)
        response.begin()
        assert (response.status, response.getheader("Connection")) == (status, "close")
        assert json.loads(response.read())["error"]
        assert client.recv(100) == b""


def test_a_client_that_stops_within_a_body_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it sends later is no request of its own."""
    monkeypatch.setattr(routes, "_IDLE_SECONDS", 1)
    server = RoutesServer("127.0.0.1", 0, {})
    server.start()
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
            client.sendall(b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            response = http.client.HTTPResponse(client)
            response.begin()
            assert (response.status, json.loads(response.read())["error"]) == (400, "the body ended early")
            with contextlib.suppress(OSError):
                client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                assert client.recv(100) == b""
    finally:
        server.stop()


def test_commands(estimates: Path, eventually: Callable[..., Any]) -> None:
    """`extender` as warm-scheduler's pod runs it: starts, is found alive, answers, ends on SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from runtime.cli import main; main()", "agent", "extender", "--port", str(port)]
    process = subprocess.Popen([*command, "--estimates", str(estimates)], env=dict(os.environ))
    try:
        eventually(
            lambda: subprocess.run([*command, "--check"], capture_output=True, timeout=30).returncode == 0,
            30,
            "the extender lives",
        )
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request("POST", "/scheduler/filter", request({"glowplug.dev/require-agent": "true"}))
            assert json.loads(connection.getresponse().read())["NodeNames"] == ["node-1", "node-2"]
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(b"POST /scheduler/filter HTTP/1.1\r\n")
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0, "half a request holds nothing up"
    finally:
        process.kill()
        process.wait(10)
    done = subprocess.run([*command, "--check"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, "[agent_unreachable]" in done.stderr) == (1, True)
