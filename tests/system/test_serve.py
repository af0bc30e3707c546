"""A function from its cold start to its end, with an agent of its own and with the node's."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from cache_agent.client import credentials
from cache_agent.client.cache_client import CacheClient

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
# A flag holds a stream between two pieces for as long as the test likes: nothing here depends on time.
HANDLER = """
    import os
    import time

    from . import words

    loads = 0


    def load(context):
        global loads
        loads += 1
        words.LOADED = type(context.model.raw).__name__


    def handle(event, context):
        match event.path:
            case "/echo":
                return {"statusCode": 201, "body": event.body.decode(), "headers": {"X-Method": event.method}}
            case "/generate":
                return context.model.generate("once", max_tokens=4, temperature=0, ignore_eos=True)
            case "/stream":
                return context.model.generate("once", stream=True, max_tokens=4, temperature=0, ignore_eos=True)
            case "/endless":
                return context.model.generate("once", stream=True, max_tokens=10_000, temperature=0, ignore_eos=True)
            case "/gated":
                return gated(event.query["flag"])
            case "/about":
                return {"loads": loads, "model": words.LOADED, "pid": os.getpid()}
        return words.GREETING


    def gated(flag):
        yield "first "
        while not os.path.exists(flag):
            time.sleep(0.005)
        yield "last"
    """


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import textwrap

    place = tmp_path_factory.mktemp("function")
    (place / "handler.py").write_text(textwrap.dedent(HANDLER))
    (place / "words.py").write_text("GREETING = 'good day'\nLOADED = ''\n")
    # Names of ours: they lie last on sys.path and must not be found.
    for name in ("runtime.py", "torch.py", "cache_agent.py", "logging.py"):
        (place / name).write_text("raise RuntimeError('this is the user\\'s')\n")
    return place


@pytest.fixture(scope="module")
def function(serving: Callable[..., Any], checkpoint: Path, folder: Path) -> Iterator[Any]:
    """A function with a private agent; its very first request is sent while nothing is loaded."""
    with serving(handler=folder, model=checkpoint, slots=2, queue=4) as function:
        function.cold = function.request("/echo", "first")
        yield function.wait_ready()


def test_the_request_that_found_nothing_is_answered(function: Any) -> None:
    assert (function.cold.status, function.cold.body) == (201, b"first")
    assert function.cold.headers["X-Glowplug-Start"] == "cold"
    timing = function.cold.headers["Server-Timing"]
    named = set(re.findall(r"[\w-]+(?=;dur)", timing))
    assert {"shim-listen", "worker-http", "worker-imports", "agent-transfer"} <= named


def test_only_the_first_answer_tells_of_the_start(function: Any) -> None:
    later = function.request("/")
    assert later.body == b"good day"
    assert not {"X-Glowplug-Start", "Server-Timing"} & later.headers.keys()


def test_the_handler_gets_the_request_and_its_own_modules(function: Any) -> None:
    answer = function.request("/echo", "body", method="PUT")
    assert (answer.status, answer.body, answer.headers["X-Method"]) == (201, b"body", "PUT")
    about = function.request("/about").json
    assert (about["loads"], about["model"]) == (1, "LlamaForCausalLM")
    assert about["pid"] == function.worker()


def test_the_handler_generates(function: Any) -> None:
    text = function.request("/generate").body.decode()
    assert text
    assert function.request("/stream").body.decode() == text


def test_the_openai_routes(function: Any, checkpoint: Path, sse_data: Callable[..., list[str]]) -> None:
    assert function.request("/v1/models").json["data"][0]["id"] == checkpoint.name
    whole = function.request("/v1/chat/completions", CHAT).json
    said = whole["choices"][0]["message"]["content"]
    assert whole["usage"]["completion_tokens"] >= 1
    *events, done = sse_data(function.request("/v1/chat/completions", {**CHAT, "stream": True}).body)
    assert done == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(deltas) == said
    completion = function.request("/v1/completions", {"prompt": "once", "max_tokens": 3, "temperature": 0}).json
    assert completion["object"] == "text_completion"


def test_a_handlers_stream_arrives_in_pieces(function: Any, tmp_path: Path) -> None:
    """The first piece is here while the handler is held at its second."""
    flag = tmp_path / "flag"
    with closing(function.connect()) as connection:
        connection.request("GET", f"/gated?flag={flag}")
        response = connection.getresponse()
        assert response.read1(100) == b"first "
        flag.touch()
        assert response.read() == b"last"


def test_a_handlers_stream_as_events(function: Any, tmp_path: Path, sse_data: Callable[..., list[str]]) -> None:
    answer = function.request(f"/gated?flag={tmp_path}", headers={"Accept": "text/event-stream"})
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert sse_data(answer.body) == ["first ", "last", "[DONE]"]


@pytest.mark.parametrize("route", ["/endless", "/v1/chat/completions"])
def test_clients_that_leave_their_streams_free_their_places(function: Any, route: str) -> None:
    """More endless streams than may be inside at once; the next request is refused until they are gone."""
    body = {**CHAT, "stream": True, "max_tokens": 10_000, "logit_bias": {"0": -100}}
    with ExitStack() as stack:

        def begin() -> http.client.HTTPConnection:
            connection = stack.enter_context(closing(function.connect()))
            connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
            return connection

        def full() -> Any:
            if (answer := function.request("/v1/models")).status == 429:
                return answer
            begin()  # that request had a place for an instant, and a stream may have been refused because of it
            return None

        for _ in range(2):
            assert begin().getresponse().read1(10), "the stream has begun"
        for _ in range(6):
            begin()
        assert function.until(full, "all places are taken").code == "busy"
    answer = function.until(
        lambda: (answer := function.request("/generate")).status == 200 and answer, "a place is free again"
    )
    assert answer.body
    with ThreadPoolExecutor(6) as pool:
        function.until(
            lambda: [a.status for a in pool.map(function.request, ["/generate"] * 6)] == [200] * 6,
            "all places are free",
        )


def test_probes_come_through_while_all_places_are_taken(function: Any, tmp_path: Path) -> None:
    flag = tmp_path / "flag"

    def insist() -> Any:
        while (answer := function.request(f"/gated?flag={flag}")).status == 429:
            pass  # a probing request of this test had the place for an instant
        return answer

    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(insist) for _ in range(6)]
        try:
            refused = function.until(
                lambda: (answer := function.request("/v1/models")).status == 429 and answer, "all places are taken"
            )
            assert refused.code == "busy"
            assert int(refused.headers["Retry-After"]) >= 1
            assert function.request("/_/health").status == 200
            assert function.request("/_/ready").status == 200
        finally:
            flag.touch()
        assert {future.result(30).body for future in waiting} == {b"first last"}


def test_a_body_that_is_too_large_is_refused(serving: Callable[..., Any], function: Any) -> None:
    answer = function.request("/echo", "x" * ((16 << 20) + 1))
    assert answer.status == 413
    assert function.request("/").status == 200


def test_reserved_routes(function: Any) -> None:
    assert function.request("/_/health").json == {"status": "ok"}
    assert function.request("/_/nothing").status == 404
    denied = function.request("/_/drain", "", headers={"Authorization": "Bearer guess"})
    assert (denied.status, denied.code) == (403, "denied")
    assert function.request("/_/ready").json["state"] == "ready"


def test_the_ledger_tells_the_whole_start_in_order(function: Any) -> None:
    ledger = function.request("/_/ledger").json
    spans = ledger["spans"]
    assert re.fullmatch(r"[0-9a-f]{16}", ledger["start_id"])
    assert ledger["node"] == socket.gethostname(), "as the agent calls it"
    names = {(span["owner"], span["name"]) for span in spans}
    assert {
        ("shim", "python"), ("shim", "listen"),
        ("worker", "python"), ("worker", "http"), ("worker", "lease"), ("worker", "imports"), ("worker", "weights"),
        ("worker", "attach"), ("worker", "engine"), ("worker", "handler"),
        ("agent", "lease"), ("agent", "resolve"), ("agent", "reserve"), ("agent", "transfer"),
    } <= names  # fmt: skip
    starts = [span["start_ns"] for span in spans]
    assert starts == sorted(starts)
    assert all(span["start_ns"] <= span["end_ns"] for span in spans)
    assert (spans[0]["owner"], spans[0]["name"]) == ("shim", "python")
    at = {(span["owner"], span["name"]): span for span in spans}
    assert at["worker", "http"]["end_ns"] <= at["worker", "imports"]["start_ns"], "HTTP comes before torch"
    assert at["shim", "listen"]["end_ns"] <= at["worker", "python"]["end_ns"]
    assert max(span["end_ns"] for span in spans) <= time.monotonic_ns()


def test_the_log_has_the_start_in_one_line(function: Any) -> None:
    line = re.search(r"glowplug: ready after (\d+) ms \((.*)\)", function.says("ready after"))
    assert line
    assert "worker imports" in line[2]


# --- the node's agent -------------------------------------------------------------------------------------------------


def _segments(pids: list[int]) -> set[str]:
    """Inodes of the weights that these processes map."""
    found = set()
    for pid in pids:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "memfd:glowplug" in line and "manifest" not in line:
                found.add(line.split()[4])
    return found


def test_two_replicas_share_the_weights_of_the_nodes_agent(
    agent: Any, started: Callable[..., Any], checkpoint: Path
) -> None:
    first = started(model=checkpoint, socket=agent.socket)
    second_start = first.request("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert second_start.status == 200
    first.wait_ready()
    second = started(model=checkpoint, socket=agent.socket).wait_ready()
    assert "from origin" in first.output()
    assert "from dram" in second.output()
    assert [function.children().keys() - {function.worker()} for function in (first, second)] == [set(), set()]
    workers = [first.worker(), second.worker()]
    assert len(_segments([*workers, agent.pid])) == 1, "one copy of the weights"
    assert _segments([workers[0]]) == _segments([workers[1]])
    (status,) = agent.client.status().models
    assert status.leases == 2
    assert ("agent", "transfer") not in {(s["owner"], s["name"]) for s in second.spans()}
    assert ("agent", "transfer") in {(s["owner"], s["name"]) for s in first.spans()}
    second.until(lambda: len(agent.client.starts()) == 2, "both have told the agent how they started")
    assert {span.owner for start in agent.client.starts() for span in start.spans} == {"shim", "worker", "agent"}
    assert {start.start_id for start in agent.client.starts()} == {
        function.request("/_/ledger").json["start_id"] for function in (first, second)
    }
    bodies = [f.request("/v1/chat/completions", CHAT).json["choices"] for f in (first, second)]
    assert bodies[0] == bodies[1]
    assert first.stop() == 0
    agent_leases = lambda: agent.client.status().models[0].leases  # noqa: E731
    second.until(lambda: agent_leases() == 1, "the agent noticed that the first has gone")
    assert second.request("/v1/completions", {"prompt": "a", "max_tokens": 1}).status == 200
    assert agent.client.push_drain("maintenance", 10.0) == 1
    second.until(lambda: second.request("/_/ready").json["state"] == "draining", "it drains as the agent says")
    assert second.request("/v1/completions", {"prompt": "a", "max_tokens": 1}).status == 200
    assert second.stop() == 0


def test_a_function_without_the_socket_gets_its_weights_over_tcp(
    start_agent: Callable[..., Any], started: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    """In memory of its own; and it serves on when the agent goes away, and joins the next one without a transfer."""
    token = tmp_path / "token"
    token.write_text("a secret of this test\n")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    agent = start_agent("--agent-listen", address, "--token-file", str(token))
    client = CacheClient(agent.socket, identity=credentials.shown(token), timeout=30)
    function = started(model=checkpoint, socket=f"tcp://{address}", token_file=token).wait_ready()
    answer = function.request("/v1/chat/completions", CHAT)
    assert answer.status == 200
    assert not _segments([function.worker()]) & _segments([agent.pid]), "memory of its own"
    assert client.status().models[0].leases == 1
    before, crashed = _segments([function.worker()]), function.worker()
    os.kill(crashed, signal.SIGKILL)
    function.worker(old=crashed)
    function.wait_ready()
    assert _segments([function.worker()]) == before, "the memory that the shim kept; nothing was fetched again"
    agent.kill()
    assert function.request("/v1/chat/completions", CHAT).json["choices"] == answer.json["choices"]
    agent.start()
    function.until(
        lambda: [model.leases for model in client.status().models if model.state == "ready"] == [1], "it joins again"
    )
    assert client.push_drain("maintenance", 10.0) == 1
    function.until(lambda: function.request("/_/ready").json["state"] == "draining", "it drains as the agent says")


def test_an_agent_that_comes_back_gets_the_weights_that_functions_map(
    agent: Any, started: Callable[..., Any], checkpoint: Path
) -> None:
    """They serve on meanwhile, and there is no second copy: neither theirs nor that of a function that starts later."""
    functions = [started(model=checkpoint, socket=agent.socket).wait_ready() for _ in range(2)]

    def joined() -> bool:
        models = agent.client.status().models
        return [(model.leases, model.state) for model in models] == [(2, "ready")]

    for leave in (agent.stop, agent.kill):
        leave()
        assert functions[0].request("/v1/chat/completions", CHAT).status == 200
        agent.start()
        functions[0].until(joined, "both have offered what they map")
    third = started(model=checkpoint, socket=agent.socket).wait_ready()
    workers = [function.worker() for function in (*functions, third)]
    assert len(_segments([*workers, agent.pid])) == 1, "one copy of the weights"
    assert ("agent", "transfer") not in {(s["owner"], s["name"]) for s in third.spans()}
    assert agent.client.status().orphaned == 0
    assert agent.client.push_drain("maintenance", 10.0) == 3


def test_draining_takes_the_agents_token(
    start_agent: Callable[..., Any], started: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("only-for-tests\n")
    agent = start_agent("--token-file", str(token))
    with_token = started(model=checkpoint, socket=agent.socket, token_file=token)
    without = started(model=checkpoint, socket=agent.socket)
    # While the one that may starts, the other is refused for good.
    answer = without.request("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert (answer.status, answer.code) == (503, "weights_unavailable")
    assert without.wait() == 68
    assert "asks for a token; set GLOWPLUG_TOKEN_FILE" in without.output()
    assert "[denied]" in without.output()
    with_token.wait_ready()
    assert with_token.request("/_/drain", "", headers={"Authorization": "Bearer wrong"}).status == 403
    assert with_token.request("/_/ready").status == 200
    answer = with_token.request("/_/drain", "", headers={"Authorization": "Bearer only-for-tests"})
    assert (answer.status, answer.json["state"]) == (202, "draining")
    assert with_token.request("/_/ready").status == 503
    assert with_token.request("/v1/completions", {"prompt": "a", "max_tokens": 1}).status == 200


# --- the end ----------------------------------------------------------------------------------------------------------


def _read_in_background(connection: http.client.HTTPConnection) -> tuple[threading.Thread, dict[str, Any]]:
    seen: dict[str, Any] = {}

    def read() -> None:
        try:
            response = connection.getresponse()
            seen["status"], seen["body"] = response.status, response.read()
        except Exception as error:
            seen["error"] = error

    thread = threading.Thread(target=read)
    thread.start()
    return thread, seen


# One process, several ends: each test kills the function it gets, so each starts its own.
ENDING = """
    import os, time

    def handle(event, context):
        flag = event.query.get("flag")
        if not flag:
            return "ok"
        return wait(flag)

    def wait(flag):
        yield "begun "
        while not os.path.exists(flag):
            time.sleep(0.01)
        yield "done"
    """


def test_a_former_setting_is_named_in_the_log(started: Callable[..., Any], checkpoint: Path) -> None:
    """By the function, and by the agent, which it has for itself here."""
    function = started(model=checkpoint, chunk=64, snapshot_size="1M")
    function.says("GLOWPLUG_CHUNK is no setting any more")
    function.says("GLOWPLUG_SNAPSHOT_SIZE is no setting any more")
    function.wait_ready()


def test_sigterm_ends_an_idle_function_at_once(started: Callable[..., Any], checkpoint: Path) -> None:
    function = started(handler=ENDING, model=checkpoint).wait_ready()
    with closing(function.connect()) as connection:  # kept alive and idle: no reason to wait for it
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"ok"
        begin = time.monotonic()
        assert function.stop() == 0
        assert time.monotonic() - begin < 15, "not the whole grace"
    function.assert_nothing_left()


def test_sigterm_lets_a_stream_complete(started: Callable[..., Any], checkpoint: Path, tmp_path: Path) -> None:
    function = started(handler=ENDING, model=checkpoint).wait_ready()
    flag = tmp_path / "flag"
    with closing(function.connect()) as connection:
        connection.request("GET", f"/?flag={flag}")
        response = connection.getresponse()
        assert response.read1(100) == b"begun "
        function.process.send_signal(signal.SIGTERM)
        function.until(lambda: function.request("/_/ready").json["state"] == "draining", "it drains")
        # The platform may not have noticed yet: what it still sends is answered.
        assert function.request("/").body == b"ok"
        flag.touch()
        assert response.read() == b"done"
    assert function.wait() == 0


def test_a_stream_that_outlasts_the_grace_is_reported(
    started: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    function = started(handler=ENDING, model=checkpoint, drain_grace=0.3).wait_ready()
    with closing(function.connect()) as connection:
        connection.request("GET", f"/?flag={tmp_path}/never")
        response = connection.getresponse()
        assert response.read1(100) == b"begun "
        assert function.stop() == 71
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
    assert "raise GLOWPLUG_DRAIN_GRACE" in function.output()
    assert "[drain_incomplete]" in function.output()


def test_traffic_that_does_not_end_is_served_to_the_last(
    started: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    """Some platforms route until they are refused: everyone is answered or refused, and nothing is lost."""
    function = started(handler=ENDING, model=checkpoint, drain_grace=20).wait_ready()
    answered, lost, refused = [], [], threading.Event()

    def ask(kept: bool) -> None:
        connection = function.connect()
        while not refused.is_set():
            try:
                connection.request("GET", "/")
                answered.append(connection.getresponse().read())
            except ConnectionRefusedError:
                refused.set()
            except (OSError, http.client.HTTPException) as error:
                # A proxy, too, tries again on a new connection where a kept one ended before a byte came back.
                if not (kept and isinstance(error, (http.client.RemoteDisconnected, ConnectionError))):
                    lost.append(error)
                connection.close()
            if not kept:
                connection.close()

    with ThreadPoolExecutor(4) as pool, closing(function.connect()) as connection:
        connection.request("GET", f"/?flag={tmp_path / 'flag'}")
        stream = connection.getresponse()
        assert stream.read1(100) == b"begun "  # while it runs, there is no instant without a request
        clients = [pool.submit(ask, number < 2) for number in range(4)]
        function.until(lambda: len(answered) > 20, "the traffic flows")
        function.process.send_signal(signal.SIGTERM)
        function.until(lambda: "draining: SIGTERM" in function.output(), "it drains")
        begun = len(answered)
        function.until(lambda: len(answered) > begun + 20, "it goes on answering")
        (tmp_path / "flag").touch()
        assert stream.read() == b"done"
        for client in clients:
            client.result(60)
    assert function.wait() == 0, function.output()
    assert lost == []
    assert set(answered) == {b"ok"}


def test_sigterm_while_loading_answers_the_request_that_waits(started: Callable[..., Any], checkpoint: Path) -> None:
    function = started(handler=ENDING, model=checkpoint)
    with closing(function.connect()) as connection:
        connection.request("GET", "/")
        thread, seen = _read_in_background(connection)
        function.wait_phase("imports", "weights", "model")
        function.process.send_signal(signal.SIGTERM)
        thread.join(60)
    assert seen == {"status": 200, "body": b"ok"}
    assert function.wait() == 0


def test_sigterm_while_loading_with_nobody_waiting(started: Callable[..., Any], checkpoint: Path) -> None:
    function = started(model=checkpoint)
    function.wait_phase("lease", "imports")
    assert function.stop() == 0


def test_sigterm_in_the_first_instant_loses_no_request(started: Callable[..., Any], checkpoint: Path) -> None:
    """The worker is a process that has not yet said how it takes a SIGTERM."""
    function = started(handler=ENDING, model=checkpoint)
    with closing(function.connect()) as connection:
        connection.request("GET", "/")
        thread, seen = _read_in_background(connection)
        function.worker()
        function.process.send_signal(signal.SIGTERM)
        thread.join(60)
    assert seen == {"status": 200, "body": b"ok"}
    assert function.wait() == 0


def test_a_restarted_worker_has_a_ledger_of_its_own(started: Callable[..., Any], checkpoint: Path) -> None:
    function = started(model=checkpoint).wait_ready()
    before = function.request("/_/ledger").json
    worker = function.worker()
    os.kill(worker, signal.SIGKILL)
    function.worker(old=worker)
    answer = function.request("/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert (answer.status, answer.headers["X-Glowplug-Start"]) == (200, "cold")
    after = function.wait_ready().request("/_/ledger").json
    assert after["start_id"] != before["start_id"]
    assert ("shim", "restart") in {(span["owner"], span["name"]) for span in after["spans"]}
    assert ("agent", "transfer") not in {(span["owner"], span["name"]) for span in after["spans"]}, "still in DRAM"
