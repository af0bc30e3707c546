#!/usr/bin/env python3
"""Stands in for of-watchdog in http mode where the real one is not at hand: its buffering and SIGTERM rules.

Held to the same tests as the real program (OF_WATCHDOG). What it imitates:

    streaming        only for requests that accept text/event-stream or application/x-ndjson; others get all at the end
    closed upstream  500, but an event stream's request gets 200 and no body
    bodies           go on in chunks, without their length
    timeouts         write_timeout cuts an event stream, exec_timeout any other body, both without a word
    SIGTERM          to the function at once; requests are routed for healthcheck_interval more; running ones may end
    function's exit  not 0: the watchdog ends, too; 0: it stays, and answers 500
    max_inflight     429 beyond
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SETTINGS = dict(os.environ)  # of-watchdog writes its own in small letters

STREAMED = ("text/event-stream", "application/x-ndjson")
HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "host"}


def seconds(name: str, default: float) -> float:
    """A Go duration of the environment."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    parts = re.findall(r"([\d.]+)(ms|h|m|s)", SETTINGS.get(name, ""))
    return sum(float(number) * units[unit] for number, unit in parts) or default


WRITE_TIMEOUT = seconds("write_timeout", 30.0)
EXEC_TIMEOUT = seconds("exec_timeout", 30.0)
INTERVAL = seconds("healthcheck_interval", WRITE_TIMEOUT)
MAX_INFLIGHT = int(SETTINGS.get("max_inflight", "0"))
UPSTREAM = urlsplit(SETTINGS["upstream_url"])


class Watchdog(ThreadingHTTPServer):
    daemon_threads = False  # running requests may end
    block_on_close = True
    request_queue_size = 1024
    accepting = True

    def __init__(self) -> None:
        self.places = threading.BoundedSemaphore(MAX_INFLIGHT or 1 << 16)
        super().__init__(("", int(SETTINGS.get("port", "8080"))), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as in every server in Go
    server: Watchdog

    def route(self) -> None:
        if self.path == "/_/health":
            self.answer(200 if self.server.accepting else 503)
        elif not self.server.places.acquire(blocking=False):
            self.answer(429)
        else:
            try:
                ready = self.path == "/_/ready" and SETTINGS.get("ready_path")
                self.pass_on(SETTINGS["ready_path"] if ready else self.path)
            finally:
                self.server.places.release()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_HEAD = route

    def pass_on(self, path: str) -> None:
        accept = self.headers.get("Accept", "")
        streams = any(kind in accept for kind in STREAMED)
        deadline = time.monotonic() + (WRITE_TIMEOUT if streams else EXEC_TIMEOUT)
        upstream = http.client.HTTPConnection(UPSTREAM.hostname or "", UPSTREAM.port, timeout=max(EXEC_TIMEOUT, 1.0))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
        body = self.body()
        try:
            if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
                upstream.request(
                    self.command, path, body, {**headers, "Transfer-Encoding": "chunked"}, encode_chunked=True
                )
            else:
                upstream.request(self.command, path, headers=headers)
            line = upstream.sock
            response = upstream.getresponse()
        except (OSError, http.client.HTTPException):
            self.close_connection = True
            self.answer(200 if streams else 500)
            return
        with contextlib.closing(upstream), response:
            if streams:
                self.stream(response, line, deadline)
            else:
                self.collect(response, line, deadline)

    def stream(self, response: http.client.HTTPResponse, line: socket.socket, deadline: float) -> None:
        self.head(response, {"Transfer-Encoding": "chunked"})
        with self.watched(line, deadline):
            while piece := self.piece(response):
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def collect(self, response: http.client.HTTPResponse, line: socket.socket, deadline: float) -> None:
        with self.watched(line, deadline):
            pieces = list(iter(lambda: self.piece(response), b""))
        body = b"".join(pieces)
        self.head(response, {"Content-Length": str(len(body))})
        self.wfile.write(body)

    @staticmethod
    def piece(response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read1(1 << 16)
        except (OSError, ValueError, http.client.HTTPException):
            return b""

    @contextlib.contextmanager
    def watched(self, line: socket.socket, deadline: float) -> Iterator[None]:
        """Ends the upstream's body at the deadline, and when the client leaves."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                if time.monotonic() > deadline or self.client_left():
                    with contextlib.suppress(OSError):
                        line.shutdown(socket.SHUT_RDWR)
                    return

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def client_left(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            try:
                return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
            except ConnectionError:
                return True
        return False

    def body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        elif length := int(self.headers.get("Content-Length", "0")):
            yield self.rfile.read(length)

    def head(self, response: http.client.HTTPResponse, more: dict[str, str]) -> None:
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in HOP:
                self.send_header(name, value)
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self, status: int) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def main() -> int:
    server = Watchdog()
    kept = os.environ.get("GLOWPLUG_LISTEN_FD")  # an inherited socket stays one, as for every child of of-watchdog
    function = subprocess.Popen(SETTINGS["fprocess"].split(" "), pass_fds=[int(kept)] if kept else [])
    over: list[int] = []

    def follow() -> None:
        if code := function.wait():
            over.append(code)
            os.kill(os.getpid(), signal.SIGTERM)

    signals = (signal.SIGTERM,)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=follow, daemon=True).start()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    signal.sigwait(signals)
    server.accepting = False
    if not over:
        function.send_signal(signal.SIGTERM)
        time.sleep(INTERVAL)
    server.shutdown()
    server.server_close()
    if over:
        return 1
    function.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
