"""The HTTP side on real sockets: framing, disconnects, and an end that loses nothing."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import Any

import pytest

from cache_agent.ledger import Ledger
from runtime.config import FunctionConfig
from runtime.function.handler import Handler
from runtime.http.application import Application
from runtime.http.lifecycle import Lifecycle
from runtime.http.server import HttpServer

SECONDS = 120.0
Wsgi = Callable[..., Iterable[bytes]]


def _soon() -> float:
    return time.monotonic() + SECONDS


def _plain(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
    return [b"ok"]


class Gate:
    """An application that holds every request until `open` is set."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return self._body()

    def _body(self) -> Iterator[bytes]:
        yield b"first "
        self.entered.release()
        assert self.open.wait(SECONDS)
        yield b"last"


def _function(handle: Callable[..., object], **settings: Any) -> Wsgi:
    config = FunctionConfig(model="file:///models/toy", **settings)
    lifecycle = Lifecycle("toy", config.slots + config.queue)
    lifecycle.opened(SimpleNamespace(sessions=None), Handler(handle))  # type: ignore[arg-type]
    return Application(config, lifecycle, Ledger("worker", ""), lambda _reason: None)


def test_it_serves_and_beats(serve: Callable[..., Any], eventually: Callable[..., Any]) -> None:
    served = serve(_plain)
    assert served.get("/") == (200, b"ok")
    eventually(lambda: served.beats >= 2, what="a beat about every second")


def test_a_connection_is_kept_alive(serve: Callable[..., Any]) -> None:
    with closing(serve(_plain).connect()) as connection:
        for _ in range(3):
            connection.request("GET", "/")
            assert connection.getresponse().read() == b"ok"


def _sends_at_once(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Length", "1")])
    return [b"%d" % bool(environ["gunicorn.socket"].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))]


def test_a_connection_sends_at_once_whoever_opened_the_port(serve: Callable[..., Any]) -> None:
    """One that waited at a port since before the function had it, too."""
    served = serve(_sends_at_once, start=False)
    assert not served.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), "else nothing is tried"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.get)
        served.start()
        assert waiting.result(SECONDS) == served.get() == (200, b"1")


@pytest.mark.parametrize("path", ["/", "/_/ready", "/stream"])
def test_a_kept_connections_next_answer_waits_for_nothing(
    serve: Callable[..., Any], eventually: Callable[..., Any], path: str
) -> None:
    """Ten first bytes within less than a quarter of what ten delayed acknowledgements take, each of them 40 ms."""
    served = serve(_function(lambda event, _: _pieces(None) if event.path == "/stream" else "ok"))
    with closing(served.connect()) as connection:

        def first_byte() -> float:
            start = time.perf_counter()
            connection.request("GET", path)
            response = connection.getresponse()
            response.read(1)
            seconds = time.perf_counter() - start
            response.read()
            return seconds

        first_byte()
        eventually(lambda: sum(first_byte() for _ in range(10)) < 0.1, SECONDS, "ten answers come at once")


def test_requests_are_served_at_once_up_to_the_capacity(serve: Callable[..., Any]) -> None:
    gate = Gate()
    served = serve(gate, capacity=4)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(served.get) for _ in range(4)]
        for _ in range(4):
            assert gate.entered.acquire(timeout=SECONDS)
        gate.open.set()
        assert [future.result(SECONDS) for future in waiting] == [(200, b"first last")] * 4


# --- framing ----------------------------------------------------------------------------------------------------------


def _pieces(error: BaseException | None) -> Iterator[str]:
    yield "begun "
    if error is not None:
        raise error
    yield "done"


def test_a_complete_stream_ends_with_the_last_chunk(serve: Callable[..., Any]) -> None:
    served = serve(_function(lambda _event, _context: _pieces(None)))
    raw = served.raw(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert raw.endswith(b"6\r\nbegun \r\n4\r\ndone\r\n0\r\n\r\n")


@pytest.mark.parametrize("error", [KeyError("gone"), SystemExit(3)])
def test_a_plain_stream_that_breaks_is_cut_before_the_last_chunk(
    serve: Callable[..., Any], eventually: Callable[..., Any], error: BaseException
) -> None:
    served = serve(_function(lambda event, _: _pieces(error) if event.path == "/broken" else "ok"))
    for _ in range(3):
        raw = served.raw(b"GET /broken HTTP/1.1\r\nHost: a\r\n\r\n")
        assert raw.startswith(b"HTTP/1.1 200 OK")
        assert raw.endswith(b"6\r\nbegun \r\n"), "neither the last chunk nor a second response"
    assert served.get("/") == (200, b"ok")
    assert served.server.wait_idle(_soon()), "a broken answer does not count as running"
    # The client's leaving is noticed when the serving thread comes to it.
    eventually(lambda: served.server.nr_conns == len(served.server.keepalived_conns), what="the count is right again")


def test_an_event_stream_that_breaks_ends_in_order(serve: Callable[..., Any]) -> None:
    served = serve(_function(lambda _event, _context: _pieces(KeyError("gone"))))
    status, body = served.get("/", Accept="text/event-stream")
    assert status == 200
    assert body.startswith(b"data: begun \n\nevent: error\ndata: {")


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_that_is_too_large_is_refused_however_it_is_framed(serve: Callable[..., Any], framing: str) -> None:
    served = serve(_function(lambda event, _: str(len(event.body)), max_body=1000))
    for size, status in ((1000, 200), (1001, 413), (200_000, 413)):
        body: Any = b"x" * size
        with closing(served.connect()) as connection:
            chunks = (body[at : at + 500] for at in range(0, size, 500))
            connection.request("POST", "/", chunks if framing == "chunked" else body)
            response = connection.getresponse()
            text = response.read()
            assert response.status == status, text
            if status == 200:
                assert text == b"1000"


def test_garbage_is_refused_and_hurts_nobody(serve: Callable[..., Any]) -> None:
    served = serve(_plain)
    assert served.raw(b"\x16\x03\x01 not http\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert served.get("/") == (200, b"ok")


def test_a_client_that_leaves_ends_the_stream(serve: Callable[..., Any]) -> None:
    closed = threading.Event()

    def endless(_event: Any, _context: Any) -> Iterator[str]:
        try:
            while True:
                yield "x" * 1000
        finally:
            closed.set()

    served = serve(_function(endless))
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert sock.recv(1000)
    assert closed.wait(SECONDS)


def test_clients_that_do_not_close_hold_nobody_up(serve: Callable[..., Any]) -> None:
    """The end of a connection waits two seconds for its client; other connections do not wait with it."""
    served = serve(_plain)
    with ExitStack() as stack:
        for _ in range(8):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=SECONDS))
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
            connection.request("GET", "/")
            assert connection.getresponse().read() == b"ok"


# --- the end ----------------------------------------------------------------------------------------------------------


def test_it_is_idle_when_nothing_runs(serve: Callable[..., Any]) -> None:
    served = serve(_plain)
    assert served.server.wait_idle(_soon())
    with closing(served.connect()) as connection:
        connection.request("GET", "/")
        connection.getresponse().read()
        assert served.server.wait_idle(_soon()), "a connection that is kept alive is no request"


def test_it_is_not_idle_while_a_request_runs(serve: Callable[..., Any]) -> None:
    gate = Gate()
    served = serve(gate)
    with ThreadPoolExecutor(2) as pool:
        request = pool.submit(served.get)
        assert gate.entered.acquire(timeout=SECONDS)
        assert not served.server.wait_idle(time.monotonic() + 0.05)
        idle = pool.submit(served.server.wait_idle, _soon())
        gate.open.set()
        assert idle.result(SECONDS)
        assert request.result(SECONDS) == (200, b"first last")


def test_it_is_not_idle_after_broken_answers_while_a_request_runs(serve: Callable[..., Any]) -> None:
    """What gunicorn counts wrong must not let a request be cut."""
    gate = Gate()

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/broken":
            return gate(environ, start_response)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return (piece.encode() for piece in _pieces(KeyError("gone")))

    served = serve(app)
    for _ in range(3):
        assert served.raw(b"GET /broken HTTP/1.1\r\nHost: a\r\n\r\n")
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(served.get)
        assert gate.entered.acquire(timeout=SECONDS)
        assert not served.server.wait_idle(time.monotonic() + 0.05)
        served.server.stop()
        gate.open.set()
        assert request.result(SECONDS) == (200, b"first last")


def test_what_waits_in_the_backlog_is_not_idle_and_is_answered(serve: Callable[..., Any]) -> None:
    served = serve(_plain, start=False)
    with socket.create_connection(("127.0.0.1", served.port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert not served.server.wait_idle(time.monotonic() + 0.02), "it does not even run yet"
        served.start()
        assert served.server.wait_idle(_soon())
        served.server.stop()
        served.thread.join(SECONDS)
        sock.settimeout(SECONDS)
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 OK")


def test_stop_lets_running_requests_end(serve: Callable[..., Any]) -> None:
    gate = Gate()
    served = serve(gate)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(served.get)
        assert gate.entered.acquire(timeout=SECONDS)
        served.server.stop()
        gate.open.set()
        assert request.result(SECONDS) == (200, b"first last")
    served.thread.join(SECONDS)
    assert not served.thread.is_alive()


def test_stop_at_once_does_not_wait(serve: Callable[..., Any]) -> None:
    gate = Gate()
    served = serve(gate)
    with closing(served.connect()) as connection:
        connection.request("GET", "/")
        assert gate.entered.acquire(timeout=SECONDS)
        served.server.stop(at_once=True)
        served.thread.join(4.0)  # the graceful way takes 5 s
        assert not served.thread.is_alive()
        gate.open.set()


def test_its_port_ends_after_those_who_waited_there(serve: Callable[..., Any]) -> None:
    """What runs and what is in the backlog is answered; whoever comes later is refused, and not kept waiting."""
    gate = Gate()
    served = serve(gate, start=False)
    with ThreadPoolExecutor(2) as pool:
        requests = [pool.submit(served.get) for _ in range(2)]
        served.start()
        assert gate.entered.acquire(timeout=SECONDS)
        served.server.finish(_soon())
        gate.open.set()
        assert [request.result(SECONDS) for request in requests] == [(200, b"first last")] * 2
    served.thread.join(SECONDS)
    assert (served.thread.is_alive(), served.server.in_hand) == (False, 0)
    with pytest.raises(ConnectionRefusedError):  # although its parent holds the same socket
        served.get()


def test_a_kept_connection_is_told_of_the_end(serve: Callable[..., Any], eventually: Callable[..., Any]) -> None:
    """A proxy sends its requests on connections that it has: the last answer says that this was the last."""
    served = serve(_function(lambda event, _: str(len(event.body))))
    with closing(served.connect()) as connection:
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"0"
        served.server.finish(_soon())
        eventually(lambda: not served.server.alive, what="the end has begun")
        connection.request("POST", "/", b"xy")
        response = connection.getresponse()
        assert (response.read(), response.getheader("Connection")) == (b"2", "close")
    served.thread.join(SECONDS)
    assert not served.thread.is_alive()


def test_what_outlasts_the_end_is_counted(serve: Callable[..., Any]) -> None:
    gate = Gate()
    served = serve(gate)
    with closing(served.connect()) as connection, socket.create_connection(("127.0.0.1", served.port)):
        connection.request("GET", "/")
        assert gate.entered.acquire(timeout=SECONDS)
        served.server.finish(time.monotonic() + 0.1)
        served.thread.join(SECONDS)
        assert not served.thread.is_alive()
        assert served.server.in_hand == 2, "the stream, and the connection that may just be sending its request"
        gate.open.set()


def test_finishing_what_never_ran(serve: Callable[..., Any]) -> None:
    served = serve(_plain, start=False)
    served.server.finish(_soon())
    served.start()
    served.thread.join(SECONDS)
    assert not served.thread.is_alive()


@pytest.mark.parametrize("at_once", [False, True])
def test_stop_before_it_runs(serve: Callable[..., Any], at_once: bool) -> None:
    served = serve(_plain, start=False)
    served.server.stop(at_once=at_once)
    served.start()
    served.thread.join(SECONDS)
    assert not served.thread.is_alive()


def test_it_ends_when_its_parent_changes(serve: Callable[..., Any]) -> None:
    served = serve(_plain, start=False)
    served.server.ppid = 1 << 30
    served.start()
    served.thread.join(SECONDS)
    assert not served.thread.is_alive()


def test_its_errors_go_to_our_log(serve: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    served = serve(_function(lambda _event, _context: _pieces(KeyError("gone"))))
    with caplog.at_level(logging.ERROR, "glowplug.handler"):
        served.raw(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert served.server.wait_idle(_soon())
    assert "the handler's stream broke" in caplog.text


def test_it_retires_only_without_connections_and_leaves_those_that_wait(
    serve: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    served = serve(_function(lambda *_: "ok"))
    answers: list[bool] = []
    with closing(served.connect()) as kept:
        kept.request("GET", "/")
        assert kept.getresponse().read() == b"ok"
        served.server.retire(answers.append)
        eventually(lambda: answers)
        assert answers == [False]
        kept.request("GET", "/")  # the very connection goes on
        assert kept.getresponse().read() == b"ok"
    eventually(lambda: not served.server.nr_conns)
    served.server.retire(answers.append)
    eventually(lambda: len(answers) == 2)
    assert answers[1]
    # The socket is somebody else's, too: whoever holds it finds what came too late.
    served.thread.join(30)
    assert not served.thread.is_alive()


def test_connections_that_were_accepted_before_are_served() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        server = HttpServer(listener, _sends_at_once, capacity=2, on_beat=lambda: None, accepted=[accepted])
        thread = threading.Thread(target=server.run_until_stopped)
        thread.start()
        client.settimeout(30)
        answer = b""
        while data := client.recv(65536):
            answer += data
        server.stop(at_once=True)
        thread.join(30)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"\r\n1"), "it sends at once, too"
