"""Reading from S3 servers that lie, stall, break and refuse: a small server here does all of that on demand."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import mmap
import random
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from cache_agent.errors import AccessDenied, OriginChanged, OriginUnavailable
from cache_agent.loading.loader import ModelLoad
from cache_agent.model.checkpoint import describe
from cache_agent.model.manifest import CHUNK
from cache_agent.model.uri import parse_uri
from cache_agent.tiers.dram import Dram
from cache_agent.tiers.s3 import S3, S3Origin

PATIENCE = 2.0


class Request(SimpleNamespace):
    """A ranged GET as it came: `key`, `start`, `end` (inclusive), `match` (its If-Match), `number`, `auth`."""


class HostileS3:
    """A server of two operations of S3, list and ranged GET.

    `misbehave(handler, request, content)` is called before each GET that begins beyond the headers. It answers the
    request and returns True, or returns False for a correct answer.
    """

    def __init__(self, files: dict[str, bytes], context: ssl.SSLContext | None = None) -> None:
        self.files = dict(files)
        self.requests: list[Request] = []
        self.misbehave: Callable[[BaseHTTPRequestHandler, Request, bytes], bool] = lambda *_: False
        self.listing_status = 200
        self.ignores_if_match = False
        self.checks_dates = False
        self.lock = threading.Lock()
        self.closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                with contextlib.suppress(OSError):
                    outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        scheme = "http"
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
            scheme = "https"
        self.endpoint = f"{scheme}://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @staticmethod
    @functools.cache
    def etag(content: bytes) -> str:
        return f'"{hashlib.md5(content).hexdigest()}"'

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        if self.checks_dates:
            told = datetime.strptime(handler.headers["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
            if abs(told - datetime.now(UTC)) > timedelta(minutes=15):
                return self.error(handler, 403, "RequestTimeTooSkewed")
        if "list-type" in parse_qs(parts.query):
            return self.list(handler)
        name = unquote(parts.path).rsplit("/", 1)[1]
        content = self.files.get(name)
        if content is None:
            return self.error(handler, 404, "NoSuchKey")
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        start, end = (int(match[1]), min(int(match[2]), len(content) - 1)) if match else (0, len(content) - 1)
        with self.lock:
            request = Request(
                key=name,
                start=start,
                end=end,
                match=handler.headers.get("If-Match"),
                number=len(self.requests),
                auth=handler.headers.get("Authorization"),
            )
            self.requests.append(request)
        if start > 0 and self.misbehave(handler, request, content):
            return None
        if not self.ignores_if_match and request.match not in (None, self.etag(content)):
            return self.error(handler, 412, "PreconditionFailed")
        return self.send(handler, content, start, end)

    def send(self, handler, content, start, end, *, status=206, body=None, **headers: str | None) -> None:
        """An honest answer, but for what is given; a header of None is left out."""
        body = content[start : end + 1] if body is None else body
        handler.send_response(status)
        fields = {
            "ETag": self.etag(content),
            "Content-Length": str(len(body)),
            "Content-Range": f"bytes {start}-{end}/{len(content)}",
        } | {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in fields.items():
            if value is not None:
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def error(self, handler, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>".encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def list(self, handler) -> None:
        if self.listing_status != 200:
            return self.error(
                handler, self.listing_status, "SlowDown" if self.listing_status == 503 else "AccessDenied"
            )
        items = "".join(
            f"<Contents><Key>m/{name}</Key><Size>{len(data)}</Size><ETag>{self.etag(data)}</ETag></Contents>"
            for name, data in self.files.items()
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/xml")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        return None

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


def weights(chunks: int = 4) -> dict:
    source = random.Random(3)
    return {f"model.layers.{n}.w": ("U8", (CHUNK - 64 * n,), source.randbytes(CHUNK - 64 * n)) for n in range(chunks)}


@pytest.fixture
def store(checkpoint_files):
    server = HostileS3(checkpoint_files(weights()))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _credentials(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


class Loading:
    """One model from a store into memory of this process."""

    def __init__(self, store: HostileS3, readers: int = 4, **options: object) -> None:
        self.s3 = S3(**{"endpoint": store.endpoint, "patience": PATIENCE, **options})
        self.origin = S3Origin(parse_uri("s3://bucket/m"), self.s3)
        self.description = describe(self.origin)
        store.requests.clear()
        self.dram = Dram(self.description.manifest.segments, huge_pages="never")
        self.load = ModelLoad(self.description, self.origin, self.dram, readers=readers)

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *_: object) -> None:
        self.dram.close()
        self.s3.client().close()

    def check(self, tensors) -> None:
        maps = self.dram.map()
        for tensor in self.description.manifest.tensors:
            expected = tensors[tensor.name][2]
            assert maps[tensor.segment][tensor.offset : tensor.offset + tensor.size] == expected, tensor.name
        for mapping in maps:
            assert isinstance(mapping, mmap.mmap)
            mapping.close()


def once(what):
    """Misbehaves at the first GET of every range, and is honest when it is asked again."""
    seen = set()

    def misbehave(handler, request, content):
        if request.end in seen:
            return False
        seen.add(request.end)
        what(handler, request, content)
        return True

    return misbehave


def reset(handler) -> None:
    handler.close_connection = True
    handler.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER 0: a reset, no orderly end
    handler.connection.close()


def cut(store, part):
    def what(handler, request, content):
        size = request.end - request.start + 1
        body = content[request.start : request.start + int(size * part)]
        store.send(handler, content, request.start, request.end, body=body, Content_Length=str(size))
        handler.wfile.flush()
        reset(handler)

    return what


def test_an_honest_server_is_read_once(store):
    with Loading(store) as loading:
        loading.load.run()
        loading.check(weights())
        spans = sorted((request.start, request.end) for request in store.requests)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))
        assert {request.match for request in store.requests} == {store.etag(store.files["model.safetensors"])}


@pytest.mark.parametrize(
    "fault", ["wrong range", "wrong length", "range missing", "200 with all", "reset", "503", "eof"]
)
def test_a_fault_that_passes_is_cured(fault, store):
    def what(handler, request, content):
        start, end = request.start, request.end
        match fault:
            case "wrong range":
                store.send(handler, content, start - 1, end - 1)
            case "wrong length":
                store.send(handler, content, start, end, body=content[start:end])
            case "range missing":
                store.send(handler, content, start, end, Content_Range=None)
            case "200 with all":
                store.send(handler, content, 0, len(content) - 1, status=200, Content_Range=None)
            case "reset":
                reset(handler)
            case "503":
                store.error(handler, 503, "SlowDown")
            case "eof":
                body = content[start : start + 1000]
                store.send(handler, content, start, end, body=body, Content_Length=str(end - start + 1))
                handler.close_connection = True

    store.misbehave = once(what)
    with Loading(store) as loading:
        loading.load.run()
        loading.check(weights())


def test_a_range_answered_with_200_and_the_right_content_range_is_accepted(store):
    def what(handler, request, content):
        store.send(handler, content, request.start, request.end, status=200)
        return True

    store.misbehave = what
    with Loading(store) as loading:
        loading.load.run()
        loading.check(weights())


@pytest.mark.parametrize(
    ("fault", "error"),
    [("range", OriginUnavailable), ("403", AccessDenied), ("503", OriginUnavailable), ("404", Exception)],
)
def test_a_fault_that_stays_ends_the_load_with_its_name(fault, error, store, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # botocore's waits between its own tries

    def what(handler, request, content):
        if fault == "range":
            store.send(handler, content, request.start - 1, request.end - 1)
        else:
            store.error(handler, int(fault), {"403": "AccessDenied", "503": "SlowDown", "404": "NoSuchKey"}[fault])
        return True

    store.misbehave = what
    with Loading(store) as loading, pytest.raises(error) as caught:
        loading.load.run()
    assert "s3://bucket/m" in caught.value.text
    assert loading.load.finished.is_set()


def test_bytes_that_came_before_a_reset_are_not_asked_for_again(store):
    store.misbehave = once(cut(store, 0.5))
    with Loading(store) as loading:
        loading.load.run()
        loading.check(weights())
        asked = sum(request.end - request.start + 1 for request in store.requests)
        starts = {request.start for request in store.requests}
        assert len(starts) == len(store.requests), "every retry starts where the last one broke off"
        total = len(store.files["model.safetensors"])
        assert asked < 1.75 * total


def test_a_load_goes_on_with_what_is_missing(store, monkeypatch):
    """A whole round fails for some ranges; the next one asks for those only."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.0)
    down = threading.Event()
    down.set()
    refusals = []

    def what(handler, request, content):
        if request.start > 2 * CHUNK and down.is_set():
            refusals.append(request)
            if len(refusals) > 24:
                down.clear()
            reset(handler)
            return True
        return False

    store.misbehave = what
    with Loading(store, readers=2) as loading:
        loading.load.run()
        loading.check(weights())
    answered = [request.start for request in store.requests if request not in refusals]
    assert len(answered) == len(set(answered)), "what was there was not read again"


@pytest.mark.parametrize("how", ["silent", "silent in the middle", "dribbling"])
def test_a_stalled_range_is_given_up_and_read_over_another_connection(how, store):
    ports = []

    def what(handler, request, content):
        ports.append(handler.client_address[1])
        size = request.end - request.start + 1
        if how != "silent":
            body = content[request.start : request.start + size // 2]
            store.send(handler, content, request.start, request.end, body=body, Content_Length=str(size))
            handler.wfile.flush()
        position = request.start + size // 2
        while not store.closing.wait(0.1):
            if how == "dribbling":
                handler.wfile.write(content[position : position + 1])
                position += 1

    store.misbehave = once(what)
    start = time.monotonic()
    with Loading(store, patience=0.6) as loading:
        loading.load.run()
        loading.check(weights())
    assert ports
    assert time.monotonic() - start < 40 * PATIENCE


@pytest.mark.parametrize("ignores", [False, True], ids=["If-Match honoured", "If-Match ignored"])
def test_an_object_overwritten_while_it_loads_is_no_mixture(ignores, store, checkpoint_files):
    other = checkpoint_files({name: (d, s, bytes(len(b))) for name, (d, s, b) in weights().items()})
    store.ignores_if_match = ignores
    with Loading(store, readers=1) as loading:

        def overwrite(handler, request, content):
            if request.start > CHUNK:
                store.files = dict(other)
            return False

        store.misbehave = overwrite
        with pytest.raises(OriginChanged, match="overwritten"):
            loading.load.run()


def test_another_etag_in_the_middle_is_noticed_at_once(store):
    def what(handler, request, content):
        store.send(handler, content, request.start, request.end, ETag='"other"')
        return True

    store.misbehave = what
    with Loading(store) as loading, pytest.raises(OriginChanged):
        loading.load.run()


def test_listing_that_is_refused_or_slowed_down(store):
    origin = S3Origin(parse_uri("s3://bucket/m"), S3(endpoint=store.endpoint))
    store.listing_status = 403
    with pytest.raises(AccessDenied):
        origin.files()
    timer = threading.Timer(0.3, lambda: setattr(store, "listing_status", 200))
    store.listing_status = 503
    timer.start()
    assert origin.files()


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_the_store_finds_wrong_is_named_and_once_it_is_right_all_goes_on(hours, store, monkeypatch):
    store.checks_dates = True
    with Loading(store) as loading, monkeypatch.context() as patch:
        patch.setattr(
            "botocore.auth.get_current_datetime",
            lambda: datetime.now(UTC).replace(tzinfo=None) + timedelta(hours=hours),
        )
        with pytest.raises(OriginUnavailable, match="this node's clock is wrong"):
            loading.origin.files()
        patch.undo()
        loading.load.run()
        loading.check(weights())


def test_anonymous_requests_carry_no_signature(store, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with Loading(store, anonymous=True) as loading:
        loading.load.run()
        loading.check(weights())
    assert {request.auth for request in store.requests} == {None}


def test_tls_with_a_ca_of_ones_own(tmp_path, checkpoint_files, monkeypatch):
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-nodes"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", "key.pem", "-out", "cert.pem", *subject]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = HostileS3(checkpoint_files(weights()), context)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(OriginUnavailable, match=r"SSL|certificate"):
        S3Origin(parse_uri("s3://bucket/m"), S3(endpoint=server.endpoint)).files()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "cert.pem"))
    with Loading(server) as loading:
        loading.load.run()
        loading.check(weights())
    server.close()


def test_the_connection_of_a_range_that_was_read_serves_the_next(store):
    ports = set()

    def what(handler, request, content):
        ports.add(handler.client_address[1])
        return False

    store.misbehave = what
    with Loading(store, readers=1) as loading:
        loading.load.run()
    assert len(store.requests) >= 3
    assert len(ports) == 1
