"""The witness against an API server that speaks the watch protocol: chunks, bookmarks, expiry, silence, loss."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from cache_agent.client.cache_client import CacheClient
from cache_agent.errors import BadSetting
from cache_agent.kube import witness
from cache_agent.kube.witness import AnnouncedRemovals, ObjectMetadata, Removal, Witness
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.wire.messages import Drain

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def pod(uid: str, *, version: int = 1, grace: float | None = None, name: str = "chat-1") -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": "llm", "uid": uid, "resourceVersion": str(version)}
    if grace is not None:
        ends = datetime.now(UTC) + timedelta(seconds=grace)
        metadata |= {"deletionTimestamp": ends.isoformat()[:19] + "Z", "deletionGracePeriodSeconds": grace}
    return {"kind": "PartialObjectMetadata", "metadata": metadata}


class ApiServer(ThreadingHTTPServer):
    """An API server that lists `pods` and watches what `send` was given. `asked` are the queries, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        self.pods: list[dict[str, Any]] = []
        self.version = 1
        self.asked: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.refuse: list[int] = []  # statuses for the requests to come, instead of an answer
        self.pages = 0
        self.watch: queue.Queue[bytes | None] = queue.Queue()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def queries(self, *, watch: bool) -> list[dict[str, str]]:
        return [query for query in self.asked if ("watch" in query) == watch]

    def send(self, kind: str, item: dict[str, Any]) -> None:
        self.watch.put(json.dumps({"type": kind, "object": item}).encode() + b"\n")

    def end(self) -> None:
        self.watch.put(None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ApiServer

    def do_GET(self) -> None:
        server = self.server
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        server.asked.append(query)
        server.headers.append(dict(self.headers))
        if server.refuse:
            self._send(server.refuse.pop(0), {"kind": "Status"})
        elif "watch" in query:
            self._stream()
        else:
            page, more = server.pods, ""
            if server.pages:
                number = int(query.get("continue", 0))
                page, more = server.pods[number : number + 1], str(number + 1)
            last = not server.pages or int(more) >= len(server.pods)
            metadata = {"resourceVersion": str(server.version), "continue": "" if last else more}
            self._send(200, {"kind": "PartialObjectMetadataList", "metadata": metadata, "items": page})

    def _send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while (line := self.server.watch.get()) is not None:
            if line == b"cut":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            half = len(line) // 2  # a chunk is no line
            for part in (line[:half], line[half:]):
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.end()
        server.shutdown()
        thread.join()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "_PAUSES", (0.01, 0.05))


@pytest.fixture
def told() -> list[Removal]:
    return []


@pytest.fixture
def watching(api: ApiServer, told: list[Removal], quick: None, tmp_path: Path) -> Iterator[Callable[..., Witness]]:
    """Give `watching()`, which starts a witness of node-1 with announcements in `told`; each must end at once."""
    started: list[Witness] = []

    def start(**options: Any) -> Witness:
        started.append(Witness(options.pop("url", api.url), "node-1", told.append, account=tmp_path))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.close()
        assert not one._thread.is_alive(), "the witness did not end"


@pytest.mark.parametrize(
    ("stamp", "grace", "expected"),
    [
        ("2026-01-01T00:05:00Z", 300, 300.0),
        ("2026-01-01T00:00:20Z", 300, 20.0),  # most of it is over
        ("2026-01-01T01:00:00Z", 300, 300.0),  # this node's clock is behind
        ("2025-12-31T00:00:00Z", 300, 0.0),
        ("2026-01-01T00:05:00Z", None, 30.0),
        ("yesterday", 300, 300.0),
        ("2026-01-01T00:00:20", 300, 300.0),
    ],
)
def test_grace(stamp: str, grace: float | None, expected: float) -> None:
    seen = AnnouncedRemovals()
    change = ObjectMetadata("a", "b", "uid", "1", stamp, grace)
    assert seen.changed(change, NOW) == Removal("uid", "b/a", expected)
    assert seen.changed(change, NOW) is None, "once is enough"


def test_forgets_who_is_gone() -> None:
    seen = AnnouncedRemovals()
    going = ObjectMetadata("a", "b", "u", "1", "2026-01-01T00:00:20Z", 30)
    assert seen.listed([going, ObjectMetadata("c", "b", "v")], NOW)
    assert not seen.listed([going], NOW)
    seen.deleted(going)
    assert seen.changed(going, NOW)
    seen.listed([], NOW)
    assert seen.changed(going, NOW)


def test_announces_each_removal_once(
    api: ApiServer, told: list[Removal], watching: Callable[..., Witness], eventually: Callable[..., Any]
) -> None:
    api.pods = [pod("a"), pod("b", grace=60)]
    watching()
    eventually(lambda: [removal.uid for removal in told] == ["b"], what="what was being removed before")
    api.send("ADDED", pod("c", version=2))
    api.send("MODIFIED", pod("a", version=3, grace=300))
    api.send("MODIFIED", pod("a", version=4, grace=300))
    api.send("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": "5"}})
    api.send("DELETED", pod("a", version=6, grace=0))
    api.send("MODIFIED", pod("c", version=7, grace=10))
    eventually(lambda: [removal.uid for removal in told] == ["b", "a", "c"], what="the removals, in order")
    assert told[1].name == "llm/chat-1"
    assert 290 < told[1].grace <= 300


def test_asks_for_no_more_than_it_needs(
    api: ApiServer, watching: Callable[..., Witness], tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    (tmp_path / "token").write_text("first\n")
    api.version = 41
    watching()
    eventually(lambda: api.queries(watch=True), what="a watch")
    (asked,) = api.queries(watch=True)
    assert asked["fieldSelector"] == api.asked[0]["fieldSelector"] == "spec.nodeName=node-1"
    assert (asked["resourceVersion"], asked["allowWatchBookmarks"]) == ("41", "true")
    assert int(asked["timeoutSeconds"]) <= 300
    assert all("PartialObjectMetadata" in headers["Accept"] for headers in api.headers)
    assert api.headers[0]["Authorization"] == "Bearer first"
    (tmp_path / "token").write_text("renewed\n")
    api.end()
    eventually(lambda: len(api.queries(watch=True)) == 2, what="another watch")
    assert api.headers[-1]["Authorization"] == "Bearer renewed"


def test_goes_on_where_it_was(
    api: ApiServer, told: list[Removal], watching: Callable[..., Witness], eventually: Callable[..., Any]
) -> None:
    """A new watch begins at the last version without listing, also after a break within an event."""
    watching()
    api.send("BOOKMARK", {"metadata": {"resourceVersion": "7"}})
    api.end()
    eventually(lambda: len(api.queries(watch=True)) == 2, what="the second watch")
    api.send("MODIFIED", pod("a", version=9, grace=30))
    eventually(lambda: told, what="the removal")
    api.watch.put(b"cut")
    eventually(lambda: len(api.queries(watch=True)) == 3, what="the third watch")
    assert [query["resourceVersion"] for query in api.queries(watch=True)] == ["1", "7", "9"]
    assert len(api.queries(watch=False)) == 1


@pytest.mark.parametrize("how", ["event", "status"])
def test_lists_again_when_its_version_has_expired(
    api: ApiServer, told: list[Removal], watching: Callable[..., Witness], eventually: Callable[..., Any], how: str
) -> None:
    api.pods = [pod("a", grace=60)]
    watching()
    eventually(lambda: api.queries(watch=True), what="a watch")
    api.pods, api.version = [*api.pods, pod("b", grace=60)], 100
    if how == "event":
        api.send("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old", "metadata": {}})
        api.end()
    else:
        api.refuse.append(410)
        api.end()
    eventually(lambda: [removal.uid for removal in told] == ["a", "b"], what="only the new one")
    eventually(lambda: api.queries(watch=True)[-1]["resourceVersion"] == "100", what="the watch from there")


def test_lists_page_by_page(
    api: ApiServer, told: list[Removal], watching: Callable[..., Witness], eventually: Callable[..., Any]
) -> None:
    api.pods, api.pages = [pod(str(number), grace=60) for number in range(5)], 1
    watching()
    eventually(lambda: len(told) == 5, what="all of them")


def test_bears_refusals_and_garbage(
    api: ApiServer,
    told: list[Removal],
    watching: Callable[..., Witness],
    eventually: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    api.refuse += [403, 403, 500]
    watching()
    eventually(lambda: api.queries(watch=True), what="a watch after all")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2, "one for each reason"
    assert "bind the ClusterRole glowplug-agent" in warnings[0]
    for garbage in (b"{]\n", b"[]\n", b'{"type": "MODIFIED"}\n', b'{"type": "MODIFIED", "object": {"metadata": 3}}\n'):
        before = len(api.queries(watch=True))
        api.watch.put(garbage)
        api.end()
        eventually(lambda before=before: len(api.queries(watch=True)) > before, what="a new watch")
    api.send("UNHEARD-OF", pod("x", grace=3))
    api.send("MODIFIED", pod("a", grace=30))
    eventually(lambda: [removal.uid for removal in told] == ["a"], what="the removal")


def test_ends_while_it_waits(api: ApiServer, watching: Callable[..., Witness], eventually: Callable[..., Any]) -> None:
    """The witness ends in a silent watch, without an API server, and before one that accepts and never answers."""
    watching()
    eventually(lambda: api.queries(watch=True), what="a watch")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        watching(url=f"http://127.0.0.1:{port}")
        silent.accept()[0].close()
        watching(url="http://127.0.0.1:1")


@pytest.mark.parametrize("url", ["", "kubernetes", "ftp://x", "https://"])
def test_bad_url(url: str) -> None:
    with pytest.raises(BadSetting, match="GLOWPLUG_KUBERNETES"):
        Witness(url, "n", print)


def test_only_the_pods_own_functions_are_told(
    start_local_agent: Callable[..., Any], checkpoint_files: Callable[..., dict[str, bytes]]
) -> None:
    """A removal reaches the leases of the removed pod, and no others."""
    uri = "s3://models/a"
    local = start_local_agent({uri: FakeOrigin(uri, checkpoint_files())})
    clients = [CacheClient(local.socket, name=name, pod=name, timeout=30) for name in ("one", "two", "")]
    leases = [client.lease(uri) for client in clients]
    try:
        for lease in leases:
            lease.wait_ready(time.monotonic() + 30)
        assert local.agent.push_drain("the pod llm/one is being removed", 12.5, pod="one") == 1
        assert local.agent.push_drain("nobody's", 1.0, pod="three") == 0
        events = [lease.next_event(5.0) for lease in leases[:1]]
        while not isinstance(events[-1], Drain):
            events.append(leases[0].next_event(5.0))
        assert events[-1] == Drain("the pod llm/one is being removed", 12.5)
        assert not [e for lease in leases[1:] for e in (lease.next_event(0.05),) if isinstance(e, Drain)]
    finally:
        for lease in leases:
            lease.close()


def test_the_agent_witnesses_its_node(
    api: ApiServer,
    start_agent: Callable[..., Any],
    write_checkpoint: Callable[..., Path],
    tmp_path: Path,
    eventually: Callable[..., Any],
) -> None:
    """A removal goes from the API server through the agent's process to the function's lease."""
    agent = start_agent("--kubernetes", api.url, "--node", "node-1")
    folder = write_checkpoint(tmp_path / "model")
    with CacheClient(agent.socket, name="w", pod="uid-1", timeout=30).lease(f"file://{folder}") as lease:
        lease.wait_ready(time.monotonic() + 30)
        eventually(lambda: api.queries(watch=True), 20, "the agent's watch")
        api.send("MODIFIED", pod("uid-1", grace=120))

        def drained() -> bool:
            return isinstance(lease.next_event(0.2), Drain)

        eventually(drained, 20, "the drain")
        eventually(lambda: "1 functions in it were told" in agent.output(), 20, "the log")
