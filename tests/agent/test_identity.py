"""Who asks: secrets in files, and ServiceAccount tokens that an API server reviews, a stand-in one behind real TLS."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cache_agent.access import tokenreview
from cache_agent.access.control import Access
from cache_agent.access.identity import Identities, Tokens, identities
from cache_agent.access.kubernetes import Api
from cache_agent.access.tokenreview import TokenReview
from cache_agent.client import credentials
from cache_agent.client.cache_client import CacheClient
from cache_agent.errors import AccessDenied, BadSetting, IdentityUnavailable
from cache_agent.policy.rights import Caller
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.wire.messages import Drain, Identity

ACCOUNT = "the agent's own"


class ApiServer(ThreadingHTTPServer):
    """Reviews `tokens`, token → status of its TokenReview, for whoever shows the agent's token."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.tokens: dict[str, dict[str, Any]] = {}
        self.reviews: list[dict[str, Any]] = []
        self.answer: tuple[int, bytes] | None = None  # instead of a review
        self.gate = threading.Event()
        self.gate.set()
        self.inside = self.most = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "ca.crt", folder / "tls.key")
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server_address[1]}"

    def knows(self, token: str, user: str, pod: str = "", audiences: tuple[str, ...] = ("glowplug",)) -> None:
        extra = {"authentication.kubernetes.io/pod-uid": [pod]} if pod else None
        self.tokens[token] = {
            "authenticated": True,
            "user": {"username": user, "uid": "1", "groups": ["system:serviceaccounts"], "extra": extra},
            "audiences": list(audiences),
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that does not trust the certificate breaks off, which is what a test wants."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ApiServer

    def do_POST(self) -> None:
        server = self.server
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.reviews.append(review)
            server.inside += 1
            server.most = max(server.most, server.inside)
        server.gate.wait(20)
        with server.lock:
            server.inside -= 1
        assert self.path == "/apis/authentication.k8s.io/v1/tokenreviews"
        if server.answer is not None:
            self._send(*server.answer)
        elif self.headers["Authorization"] != f"Bearer {ACCOUNT}":
            self._send(401, b'{"kind": "Status"}')
        else:
            status = server.tokens.get(review["spec"]["token"], {"authenticated": False, "error": "unknown"})
            self._send(201, json.dumps({**review, "status": status}).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def make_certificate(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=kubernetes", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    done = subprocess.run(
        [*command, "-keyout", folder / "tls.key", "-out", folder / "ca.crt"], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the kubelet mounts for the agent: its token, and the API server's authority."""
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make a certificate with")
    folder = tmp_path_factory.mktemp("account")
    make_certificate(folder)
    (folder / "token").write_text(ACCOUNT + "\n")
    return folder


@pytest.fixture
def api(account: Path) -> Iterator[ApiServer]:
    with ApiServer(account) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def review(api: ApiServer, account: Path, clock: Any) -> TokenReview:
    return TokenReview(Api(api.url, account), clock)


def shows(token: str) -> Identity:
    return Identity("kubernetes", token)


# --- TokenReview ------------------------------------------------------------------------------------------------------


def test_a_reviewed_token_names_namespace_account_and_pod(api: ApiServer, review: TokenReview) -> None:
    api.knows("t", "system:serviceaccount:llm:chat", pod="uid-1")
    assert review.check(shows("t")) == Caller("llm", "chat", "kubernetes", "uid-1")
    (asked,) = api.reviews
    assert asked == {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": "t", "audiences": ["glowplug"]},
    }


def test_a_review_is_believed_for_a_minute(api: ApiServer, review: TokenReview, clock: Any) -> None:
    api.knows("t", "system:serviceaccount:llm:chat")
    for _ in range(10):
        review.check(shows("t"))
    clock.now += tokenreview.BELIEVED_SECONDS - 0.001
    review.check(shows("t"))
    assert len(api.reviews) == 1
    clock.now += 0.001
    del api.tokens["t"]
    with pytest.raises(AccessDenied):
        review.check(shows("t"))
    assert len(api.reviews) == 2


def test_a_refusal_is_believed_for_a_moment(api: ApiServer, review: TokenReview, clock: Any) -> None:
    """A token may be good a second later, and whoever guesses must not have the API server asked each time."""
    for _ in range(10):
        with pytest.raises(AccessDenied, match="ServiceAccount"):
            review.check(shows("t"))
    assert len(api.reviews) == 1
    api.knows("t", "system:serviceaccount:llm:chat")
    clock.now += tokenreview.REFUSED_SECONDS
    assert review.check(shows("t")).namespace == "llm"


@pytest.mark.parametrize(
    ("user", "audiences"),
    [
        ("system:serviceaccount:llm:chat", ()),
        ("system:serviceaccount:llm:chat", ("https://kubernetes.default.svc",)),
        ("system:node:n1", ("glowplug",)),
        ("system:serviceaccount:llm", ("glowplug",)),
        ("system:serviceaccount:llm:chat:more", ("glowplug",)),
        ("system:serviceaccount::chat", ("glowplug",)),
        ("", ("glowplug",)),
    ],
)
def test_only_service_accounts_and_only_for_us(
    user: str, audiences: tuple[str, ...], api: ApiServer, review: TokenReview
) -> None:
    """A token for the API server itself, stolen or shown by mistake, is none for the agent."""
    api.knows("t", user, audiences=audiences)
    with pytest.raises(AccessDenied):
        review.check(shows("t"))


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        ((500, b""), "answers 500"),
        ((429, b""), "answers 429"),
        ((401, b""), "its own token|own token mounted"),
        ((403, b""), "may create tokenreviews"),
        ((201, b""), "cannot review"),
        ((201, b"\xff\xfe"), "cannot review"),
        ((201, b"[]"), "cannot review"),
        ((201, b'{"status": {"authenticated": "yes"}}'), "cannot review"),
        ((201, b'{"status": ' * 50_000), "cannot review"),
        ((201, b'"' + b"x" * (2 << 20) + b'"'), "cannot review"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_no_answer_is_no_refusal(answer: tuple[int, bytes], match: str, api: ApiServer, review: TokenReview) -> None:
    api.answer = answer
    with pytest.raises(IdentityUnavailable, match=match):
        review.check(shows("t"))
    api.answer = None
    api.knows("t", "system:serviceaccount:llm:chat")
    assert review.check(shows("t")).name == "chat", "failing is not remembered"


def test_a_status_without_a_word_is_a_refusal(api: ApiServer, review: TokenReview) -> None:
    api.answer = (201, b"{}")
    with pytest.raises(AccessDenied):
        review.check(shows("t"))


def test_an_api_server_that_is_none_of_ours_is_told_nothing(
    api: ApiServer, account: Path, tmp_path: Path, clock: Any
) -> None:
    make_certificate(tmp_path)
    (tmp_path / "token").write_text(ACCOUNT)
    with pytest.raises(IdentityUnavailable, match="certificate"):
        TokenReview(Api(api.url, tmp_path), clock).check(shows("t"))
    assert api.reviews == []


def test_an_api_server_that_is_away_is_named(account: Path, clock: Any) -> None:
    with pytest.raises(IdentityUnavailable, match="Kubernetes API") as caught:
        TokenReview(Api("https://127.0.0.1:1", account), clock).check(shows("t"))
    assert caught.value.retryable


def test_few_reviews_at_once(api: ApiServer, review: TokenReview, eventually: Callable[..., Any]) -> None:
    """A node's functions that all come back at once are no load for the API server."""
    api.gate.clear()
    for number in range(30):
        api.knows(f"t{number}", "system:serviceaccount:llm:chat")
    found: list[Caller] = []
    threads = [
        threading.Thread(target=lambda number=number: found.append(review.check(shows(f"t{number}"))))
        for number in range(30)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: api.inside == tokenreview._REVIEWS_AT_ONCE, what="the first reviews are under way")
    api.gate.set()
    for thread in threads:
        thread.join(20)
    assert (len(found), api.most) == (30, tokenreview._REVIEWS_AT_ONCE)


def test_what_is_remembered_is_bounded(api: ApiServer, review: TokenReview, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenreview, "_REMEMBERED", 3)
    for number in range(6):
        with pytest.raises(AccessDenied):
            review.check(shows(f"t{number}"))
    assert len(review._known) == 3
    assert "t0" not in str(review._known), "digests are kept, no tokens"


# --- secrets in files -------------------------------------------------------------------------------------------------


def test_a_directory_of_secrets_names_their_owners(tmp_path: Path) -> None:
    (tmp_path / "..data").mkdir()
    (tmp_path / "ops").write_text("a\n")
    (tmp_path / "chat").write_text("b")
    check = Tokens(tmp_path)
    assert check.check(Identity("token", "a")) == Caller("", "ops", "token")
    assert check.check(Identity("token", "b")) == Caller("", "chat", "token")
    for wrong in ("", "c", "a\n", "ab"):
        with pytest.raises(AccessDenied):
            check.check(Identity("token", wrong))


def test_a_secret_is_replaced_without_a_restart(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("old")
    check = Tokens(tmp_path / "token")
    assert check.check(Identity("token", "old")).name == "token"
    (tmp_path / "new").write_text("young")
    (tmp_path / "new").replace(tmp_path / "token")
    assert check.check(Identity("token", "young")).name == "token"
    with pytest.raises(AccessDenied):
        check.check(Identity("token", "old"))
    (tmp_path / "token").unlink()
    assert check.check(Identity("token", "young")).name == "token", (
        "a secret that is gone for a moment locks nobody out"
    )


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").write_text(" \n")
    for path in (tmp_path / "absent", tmp_path / "empty", tmp_path / "blank"):
        with pytest.raises(BadSetting, match="GLOWPLUG_TOKEN_FILE="):
            identities("", path, "")
    with pytest.raises(BadSetting, match="needs GLOWPLUG_TOKEN_FILE"):
        identities("token", None, "")
    with pytest.raises(BadSetting, match="needs GLOWPLUG_KUBERNETES"):
        identities("kubernetes", None, "")
    with pytest.raises(BadSetting, match="is no URL"):
        identities("kubernetes", None, "kubernetes.default")


def test_what_a_client_shows(tmp_path: Path) -> None:
    secret, account = tmp_path / "secret", tmp_path / "account"
    secret.write_text("s\n")
    account.write_text("jwt\n")
    assert credentials.shown(None)() == Identity()
    assert credentials.shown(secret, account)() == Identity("token", "s")
    shown = credentials.shown(None, account)
    assert shown() == Identity("kubernetes", "jwt")
    account.write_text("renewed")
    assert shown() == Identity("kubernetes", "renewed")
    assert credentials.shown(None, tmp_path / "absent")() == Identity("kubernetes", "")
    with pytest.raises(BadSetting, match="operator"):
        credentials.shown(tmp_path)()
    (tmp_path / "operator").write_text("o")
    assert credentials.shown(tmp_path)() == Identity("token", "o")


# --- at the agent -----------------------------------------------------------------------------------------------------


def test_functions_prove_who_they_are_by_their_pods_token(
    api: ApiServer, review: TokenReview, clock: Any, start_local_agent, checkpoint_files, tmp_path, refused
) -> None:
    """With the API server gone, who has weights keeps them and hears its events; who is new is told to try again."""
    api.knows("first", "system:serviceaccount:llm:chat", pod="uid-1")
    (tmp_path / "token").write_text("first")
    agent = start_local_agent(
        {"fake://m": FakeOrigin("fake://m", checkpoint_files())}, Access(Identities({"kubernetes": review}))
    )
    client = CacheClient(
        agent.socket, identity=credentials.shown(None, tmp_path / "token"), pod="a pod of its own choice"
    )
    with client.lease("fake://m") as lease:
        lease.wait_ready(time.monotonic() + 20)
        api.shutdown()
        api.server_close()
        clock.now += tokenreview.BELIEVED_SECONDS
        with refused("identity_unavailable") as seen:
            client.lease("fake://m")
        assert seen.error.retryable
        assert agent.agent.push_drain("x", 1.0, pod="a pod of its own choice") == 0, "the proved pod is what counts"
        assert agent.agent.push_drain("removed", 1.0, pod="uid-1") == 1
        while not isinstance(event := lease.next_event(20), Drain):
            pass
        assert event.reason == "removed"
        assert agent.agent.status()[2][0].leases == 1


def test_who_shows_nothing_is_told_what_is_asked_for(
    api: ApiServer, review: TokenReview, start_local_agent, refused
) -> None:
    agent = start_local_agent({}, Access(Identities({"kubernetes": review})))
    for identity in (Identity(), Identity("token", "x"), Identity("kubernetes", ""), Identity("nonsense", "x" * 8192)):
        with refused("denied") as seen:
            CacheClient(agent.socket, identity=lambda identity=identity: identity).status()
        assert "GLOWPLUG_IDENTITY_FILE" in seen.text
    assert api.reviews == []
