"""The routes of a function, on the toy model: who is answered by whom, who is refused, what the first answer tells."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import Client

from cache_agent.ledger import Ledger
from runtime.config import FunctionConfig
from runtime.errors import ModelUnusable, NotReady, WeightsUnavailable
from runtime.function.handler import Handler
from runtime.function.model import Model
from runtime.function.testing import toy_model
from runtime.http.application import Application, prepare
from runtime.http.lifecycle import Lifecycle

CHAT = {"messages": [{"role": "user", "content": "hello there"}]}
SECONDS = 120.0


class App:
    """A function's application and what is behind it."""

    def __init__(self, model: Model, **settings: Any) -> None:
        self.config = FunctionConfig(model="file:///models/toy", **settings)
        self.lifecycle = Lifecycle("toy", self.config.slots + self.config.queue)
        self.ledger = Ledger("worker", "0123456789abcdef")
        self.ledger.add("http", 1_000_000, 3_500_000)
        self.drains: list[str] = []
        self.model = model
        self.wsgi = Application(self.config, self.lifecycle, self.ledger, self.drains.append)
        self.client = Client(self.wsgi)

    def opened(self, handle: Callable[..., object] | None = None) -> App:
        self.lifecycle.opened(self.model, Handler(handle) if handle else None)
        return self

    def get(self, path: str, **options: Any) -> Any:
        return self.client.get(path, buffered=True, **options)

    def post(self, path: str, **options: Any) -> Any:
        return self.client.post(path, buffered=True, **options)


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    model = toy_model()
    yield model
    model.engine.close()


@pytest.fixture
def make(model: Model) -> Callable[..., App]:
    """`make(**settings)`: an application whose model has not come yet."""
    return lambda **settings: App(model, **settings)


def _echo(event: Any, _context: Any) -> object:
    return {"body": event.body, "headers": {"X-Seen": f"{event.method} {event.path} {dict(event.query)}"}}


# --- routes -----------------------------------------------------------------------------------------------------------


def test_applications_on_the_same_prepared_routes_serve_each_its_own(closing: ExitStack) -> None:
    """As in a layer, whose routes have served a warm-up before they serve a function; and each request is one's."""
    prepared, clients = prepare(), dict[str, Client]()
    for name in ("first", "second"):
        model, lifecycle = toy_model(name), Lifecycle(name, 4)
        closing.callback(model.engine.close)
        lifecycle.opened(model, Handler(lambda event, context: context.model.name))
        config, ledger = FunctionConfig(model="file:///models/toy"), Ledger("worker", name)
        clients[name] = Client(Application(config, lifecycle, ledger, lambda _reason: None, prepared=prepared))
    for name in ("first", "second", "first"):
        client = clients[name]
        assert client.get("/_/ledger", buffered=True).get_json()["start_id"] == name
        assert client.get("/v1/models", buffered=True).get_json()["data"][0]["id"] == name
        assert client.post("/v1/chat/completions", json=CHAT, buffered=True).get_json()["model"] == name
        assert client.post("/", buffered=True).text == name


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/a", "/a/b/c", "/v2/chat", "/_", "/_a"])
def test_everything_that_is_not_reserved_goes_to_the_handler(make: Callable[..., App], method: str, path: str) -> None:
    answer = make().opened(_echo).client.open(f"{path}?q=1", method=method, data=b"body")
    assert (answer.status_code, answer.data) == (200, b"body")
    assert answer.headers["X-Seen"] == f"{method} {path} {{'q': '1'}}"


def test_headers_reach_the_handler_without_regard_to_case(make: Callable[..., App]) -> None:
    app = make().opened(lambda event, _: event.headers["x-mine"])
    assert app.get("/", headers={"X-Mine": "yes"}).data == b"yes"


def test_reserved_routes_are_never_the_handlers(make: Callable[..., App]) -> None:
    app = make().opened(lambda _event, _context: pytest.fail("the handler was called"))
    answer = app.get("/_/anything")
    assert (answer.status_code, answer.json["error"]["code"]) == (404, "not_found")


def test_openai_routes_go_before_the_handler(make: Callable[..., App]) -> None:
    app = make().opened(lambda _event, _context: pytest.fail("the handler was called"))
    assert app.post("/v1/chat/completions", json=CHAT).json["choices"][0]["message"]["content"] == "hello there"
    assert app.get("/v1/models").json["data"][0]["id"] == "toy"


def test_without_a_handler_the_openai_routes_are_all_there_is(make: Callable[..., App]) -> None:
    app = make().opened()
    answer = app.get("/hello")
    assert (answer.status_code, answer.json["error"]["code"]) == (404, "not_found")
    assert "/hello is none of the /v1/" in answer.json["error"]["message"]
    assert app.post("/v1/completions", json={"prompt": "a b", "max_tokens": 3}).status_code == 200


def test_health_is_always_there(make: Callable[..., App]) -> None:
    app = make()
    assert app.get("/_/health").json == {"status": "ok"}
    app.lifecycle.fail(ModelUnusable("no"))
    assert app.get("/_/health").status_code == 200


def test_ready_says_how_far_the_start_is(make: Callable[..., App]) -> None:
    app = make()
    app.lifecycle.phase, app.lifecycle.progress = "weights", (10, 40)
    answer = app.get("/_/ready")
    assert answer.status_code == 503
    assert answer.json == {"state": "starting", "phase": "weights", "loaded": 10, "total": 40, "error": None}
    app.opened()
    assert (app.get("/_/ready").status_code, app.get("/_/ready").json["state"]) == (200, "ready")
    app.lifecycle.drain("SIGTERM")
    assert (app.get("/_/ready").status_code, app.get("/_/ready").json["state"]) == (503, "draining")


def test_ready_tells_why_a_start_failed(make: Callable[..., App]) -> None:
    app = make()
    app.lifecycle.fail(ModelUnusable("no such architecture"))
    answer = app.get("/_/ready")
    assert (answer.status_code, answer.json["state"], answer.json["error"]) == (503, "failed", "no such architecture")


def test_the_ledger(make: Callable[..., App]) -> None:
    assert make().get("/_/ledger").json == {
        "start_id": "0123456789abcdef",
        "node": "",
        "start": "cold",
        "state": "starting",
        "spans": [{"owner": "worker", "name": "http", "start_ns": 1_000_000, "end_ns": 3_500_000}],
    }


# --- drain ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "", "wrong", "Bearer wrong", "Bearer ", "Bearer séc", "Basic secret"])
def test_draining_needs_the_token(make: Callable[..., App], tmp_path: Path, given: str | None) -> None:
    (tmp_path / "token").write_text("secret")
    app = make(token_file=str(tmp_path / "token")).opened()
    headers = {} if given is None else {"Authorization": given.encode().decode("latin-1")}
    answer = app.post("/_/drain", headers=headers)
    assert (answer.status_code, answer.json["error"]["code"]) == (403, "denied")
    assert app.drains == []


def test_draining_with_the_token(make: Callable[..., App], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    app = make(token_file=str(tmp_path / "token")).opened()
    assert app.post("/_/drain", headers={"Authorization": "Bearer secret"}).status_code == 202
    assert len(app.drains) == 1
    assert app.get("/_/drain").status_code == 404
    assert len(app.drains) == 1


def test_without_a_token_nobody_may_drain(make: Callable[..., App]) -> None:
    app = make().opened()
    for given in ("", "Bearer ", "Bearer x"):
        assert app.post("/_/drain", headers={"Authorization": given}).status_code == 403
    assert app.drains == []


# --- waiting and refusing ---------------------------------------------------------------------------------------------


def test_a_request_waits_for_the_model(make: Callable[..., App]) -> None:
    app = make()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(app.post, "/", data=b"early")
        assert not waiting.done()
        app.opened(_echo)
        assert waiting.result(SECONDS).data == b"early"


def test_a_model_that_does_not_come_in_time(model: Model) -> None:
    app = App(model, start_timeout=1.0)
    app.lifecycle.wait = lambda timeout: None  # type: ignore[method-assign]
    answer = app.get("/")
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "starting")
    assert answer.headers["Retry-After"] == "5"


@pytest.mark.parametrize("error", [ModelUnusable("no layers"), WeightsUnavailable("nowhere")])
def test_a_start_that_fails_is_told_to_those_who_wait(make: Callable[..., App], error: Any) -> None:
    app = make()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(app.get, "/"), pool.submit(app.post, "/v1/chat/completions", json=CHAT)]
        app.lifecycle.fail(error)
        for answer in (future.result(SECONDS) for future in waiting):
            assert (answer.status_code, answer.json["error"]["code"]) == (error.status, error.code)
            assert answer.json["error"]["message"] == error.text


@pytest.mark.parametrize("path", ["/", "/v1/models", "/anything"])
def test_one_too_many_is_refused_with_a_time_to_come_back(make: Callable[..., App], path: str) -> None:
    app = make(slots=1, queue=1)
    for _ in range(2):
        app.lifecycle.enter()
    answer = app.get(path)
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "starting")
    assert int(answer.headers["Retry-After"]) >= 1
    app.opened(_echo)
    answer = app.get(path)
    assert (answer.status_code, answer.json["error"]["code"]) == (429, "busy")
    assert int(answer.headers["Retry-After"]) >= 1
    assert app.get("/_/health").status_code == 200
    app.lifecycle.leave()
    assert app.get(path).status_code == 200


def test_every_request_leaves(make: Callable[..., App]) -> None:
    def handle(event: Any, _context: Any) -> object:
        if event.path == "/raise":
            raise ValueError
        return iter(["a", "b"]) if event.path == "/stream" else "ok"

    app = make().opened(handle)
    for path in ("/", "/raise", "/stream", "/v1/models", "/v1/nothing"):
        app.get(path)
        assert app.lifecycle.inside == 0, path
    abandoned = app.client.open("/stream", buffered=False)
    assert app.lifecycle.inside == 1
    abandoned.close()
    assert app.lifecycle.inside == 0


def test_a_body_that_is_too_large(make: Callable[..., App]) -> None:
    app = make(max_body=1000).opened(_echo)
    assert app.post("/", data=b"x" * 1000).data == b"x" * 1000
    answer = app.post("/", data=b"x" * 1001)
    assert answer.status_code == 413
    assert answer.json["error"]["code"] == "request_too_large"


def test_a_bug_in_the_handler_is_told_without_its_traceback(make: Callable[..., App]) -> None:
    def handle(_event: Any, _context: Any) -> object:
        raise ValueError("in here")

    answer = make().opened(handle).get("/")
    assert (answer.status_code, answer.json["error"]["code"]) == (500, "handler_raised")
    assert "ValueError: in here" in answer.json["error"]["message"]
    assert "File" not in answer.text


def test_a_handlers_own_refusal(make: Callable[..., App]) -> None:
    def handle(_event: Any, _context: Any) -> object:
        raise NotReady("my own backend is not there", retry_after=7.0)

    answer = make().opened(handle).get("/")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")


# --- the first answer -------------------------------------------------------------------------------------------------


def test_the_first_answer_tells_of_the_start_and_only_it(make: Callable[..., App]) -> None:
    app = make().opened(_echo)
    app.get("/_/ready")
    first, second = app.get("/"), app.get("/")
    assert first.headers["X-Glowplug-Start"] == "cold"
    assert first.headers["Server-Timing"] == "worker-http;dur=2.5"
    assert not {"X-Glowplug-Start", "Server-Timing"} & set(second.headers.keys())


def test_only_one_of_many_tells_of_the_start(make: Callable[..., App]) -> None:
    app = make()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(app.get, "/") for _ in range(8)]
        app.opened(_echo)
        answers = [future.result(SECONDS) for future in waiting]
    assert sum("X-Glowplug-Start" in answer.headers for answer in answers) == 1


# --- turns ------------------------------------------------------------------------------------------------------------


class Turns:
    """A handler that notes how many of its calls run at once, and holds each until the test lets it go."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.now = self.most = 0
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def __call__(self, event: Any, _context: Any) -> object:
        return self.stream() if event.path == "/stream" else "".join(self.stream())

    def stream(self) -> Iterator[str]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.entered.release()
        assert self.go.acquire(timeout=SECONDS)
        yield "a"
        yield "b"
        with self.lock:
            self.now -= 1


@pytest.mark.parametrize("path", ["/", "/stream"])
@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_calls_of_handle_at_once_than_wanted(make: Callable[..., App], path: str, limit: int) -> None:
    turns = Turns()
    app = make(handler_concurrency=limit, slots=8).opened(turns)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(app.get, path) for _ in range(8)]
        for _ in range(limit):
            assert turns.entered.acquire(timeout=SECONDS)
        assert not turns.entered.acquire(timeout=0.05), "one too many is inside"
        for _ in range(8):
            turns.go.release()
        assert {future.result(SECONDS).data for future in waiting} == {b"ab"}
    assert turns.most == limit


def test_a_stream_keeps_its_turn_until_it_is_over(make: Callable[..., App]) -> None:
    """The rest of a stream is the handler's code, too: with a limit of 1 nobody else runs meanwhile."""
    app = make(handler_concurrency=1).opened(lambda event, _: iter("ab") if event.path == "/stream" else "other")
    open_stream = app.client.open("/stream", buffered=False)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(app.get, "/")
        with pytest.raises(TimeoutError):
            other.result(0.05)
        open_stream.close()
        assert other.result(SECONDS).data == b"other"


@pytest.mark.parametrize("how", ["raises", "wrong type", "first piece raises"])
def test_a_call_that_fails_gives_its_turn_back(make: Callable[..., App], how: str) -> None:
    def handle(_event: Any, _context: Any) -> object:
        if how == "raises":
            raise ValueError
        return object() if how == "wrong type" else (1 / 0 for _ in range(1))

    app = make(handler_concurrency=1).opened(handle)
    for _ in range(3):
        assert app.get("/").status_code == 500


def test_a_response_that_is_returned_twice_does_not_raise_the_limit(make: Callable[..., App]) -> None:
    from flask import Response

    kept, turns = Response("kept"), Turns()
    app = make(handler_concurrency=1, slots=8).opened(lambda e, c: kept if e.path == "/kept" else turns(e, c))
    for _ in range(3):
        assert app.get("/kept").data == b"kept"
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(app.get, "/") for _ in range(2)]
        assert turns.entered.acquire(timeout=SECONDS)
        second = turns.entered.acquire(timeout=0.05)
        for _ in range(2):
            turns.go.release()
        assert [future.result(SECONDS).data for future in waiting] == [b"ab", b"ab"]
    assert not second, "two calls ran at once"
