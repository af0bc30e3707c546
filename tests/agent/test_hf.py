"""Models on a hub: a small server of its API, with a second host for the large files, as the real one has."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from cache_agent.errors import (
    AccessDenied,
    BadModelURI,
    ModelNotFound,
    OriginChanged,
    OriginUnavailable,
    UnsafeCheckpoint,
)
from cache_agent.loading.loader import ModelLoad
from cache_agent.model.checkpoint import describe
from cache_agent.model.uri import parse_uri
from cache_agent.tiers.dram import Dram
from cache_agent.tiers.hf import Hub, HubOrigin
from cache_agent.tiers.origin import FileOrigin

COMMIT = "c0ffee" * 6 + "beef"


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """One repository `org/name`, branches main and v2; weights are LFS files on another port, behind signed URLs."""

    def __init__(self, files: dict[str, bytes], token: str = "") -> None:
        self.branches = {"main": dict(files), "v2": dict(files), "refs/pr/1": dict(files)}
        self.token = token
        self.signature = "first"
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.misbehave = lambda handler, where, path: False
        self.servers = [self._serve(self.hub), self._serve(self.store)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def _serve(self, answer) -> ThreadingHTTPServer:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def commit(self, branch: str) -> str:
        return hashlib.sha1((COMMIT + branch).encode()).hexdigest()

    def reply(self, handler, status: int, body: bytes = b"", **headers: str) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def hub(self, handler) -> None:
        parts = urlsplit(handler.path)
        self.seen.append(("hub", parts.path, dict(handler.headers)))
        if self.misbehave(handler, "hub", parts.path):
            return None
        if self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            return self.reply(handler, 401, X_Error_Message="Repository Not Found")
        if match := re.fullmatch(r"/api/models/org/name/revision/(.+)", parts.path):
            branch = unquote(match[1])
            if branch not in self.branches:
                return self.reply(handler, 404, X_Error_Message="Invalid rev id")
            items = []
            for name, content in self.branches[branch].items():
                item = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
                if name.endswith(".safetensors"):
                    item["lfs"] = {
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 1,
                    }
                items.append(item)
            if parse_qs(parts.query).get("blobs") != ["true"]:
                items = [{"rfilename": name} for name in self.branches[branch]]
            body = json.dumps({"id": "org/name", "sha": self.commit(branch), "siblings": items, "tags": []}).encode()
            return self.reply(handler, 200, body)
        if match := re.fullmatch(r"/api/models/org/name/tree/([0-9a-f]{40})", parts.path):  # asked by `hf download`
            files = next(f for b, f in self.branches.items() if self.commit(b) == match[1])
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
                for name, content in files.items()
            ]
            return self.reply(handler, 200, json.dumps(entries).encode(), Content_Type="application/json")
        if match := re.fullmatch(r"/org/name/resolve/([0-9a-f]{40})/([^/]+)", parts.path):
            files = next((f for b, f in self.branches.items() if self.commit(b) == match[1]), {})
            content = files.get(unquote(match[2]))
            if content is None:
                return self.reply(handler, 404, X_Error_Message="Entry not found")
            if match[2].endswith(".safetensors"):
                digest = hashlib.sha256(content).hexdigest()
                headers = {
                    "X_Linked_Etag": f'"{digest}"',
                    "X_Linked_Size": str(len(content)),
                    "X_Repo_Commit": match[1],
                }
                place = f"{self.cdn}/{match[1]}/{match[2]}?sig={self.signature}"
                return self.reply(handler, 302, Location=place, **headers)
            return self.ranged(handler, content, f'"{blob_id(content)}"', X_Repo_Commit=match[1])
        return self.reply(handler, 404)

    def store(self, handler) -> None:
        parts = urlsplit(handler.path)
        self.seen.append(("store", parts.path, dict(handler.headers)))
        if self.misbehave(handler, "store", parts.path):
            return None
        if parse_qs(parts.query).get("sig") != [self.signature]:
            return self.reply(handler, 403, b"expired")
        commit, name = parts.path.strip("/").split("/")
        files = next(f for b, f in self.branches.items() if self.commit(b) == commit)
        return self.ranged(handler, files[name], '"an etag of its own"')

    def ranged(self, handler, content: bytes, etag: str, **more: str) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if match is None:
            return self.reply(handler, 200, content, ETag=etag, **more)
        start, end = int(match[1]), min(int(match[2]), len(content) - 1)
        self.reply(
            handler,
            206,
            content[start : end + 1],
            ETag=etag,
            Content_Range=f"bytes {start}-{end}/{len(content)}",
            **more,
        )
        return None


@pytest.fixture
def hub(checkpoint_files):
    server = FakeHub(checkpoint_files(seed=4))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def opened(hub, uri="hf://org/name", **options):
    return HubOrigin(parse_uri(uri), Hub(endpoint=hub.endpoint, patience=1.0, **options))


def load(origin):
    description = describe(origin)
    with Dram(description.manifest.segments, huge_pages="never") as dram:
        ModelLoad(description, origin, dram).run()
        (mapping,) = dram.map()
        with mapping:
            return {t.name: mapping[t.offset : t.offset + t.size] for t in description.manifest.tensors}


def test_files_sizes_and_hashes(hub):
    listed = {file.name: file for file in opened(hub).files()}
    weights = hub.branches["main"]["model.safetensors"]
    assert listed["model.safetensors"].size == len(weights)
    assert listed["model.safetensors"].etag == hashlib.sha256(weights).hexdigest()
    assert listed["config.json"].etag == blob_id(hub.branches["main"]["config.json"])


def test_a_model_is_loaded_and_the_hub_is_asked_once_where_its_weights_are(hub, random_tensors):
    hub.branches["main"]["sub/dir.json"] = b"{}"
    assert load(opened(hub)) == {name: content for name, (_, _, content) in random_tensors(4).items()}
    assert sum(where == "hub" and "safetensors" in path for where, path, _ in hub.seen) == 1
    assert sum(where == "store" for where, _, _ in hub.seen) >= 2


def test_the_agent_serves_it_with_the_hubs_own_variables(hub, start_agent, random_tensors):
    import time

    hub.token = "secret"
    agent = start_agent(env={"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "secret"})
    with agent.client.lease("hf://org/name@v2", deadline=time.monotonic() + 30) as lease:
        lease.wait_ready(time.monotonic() + 30)
        assert lease.manifest.tensors
    for where, _, headers in hub.seen:
        assert ("Authorization" in headers) == (where == "hub"), "the token is the hub's, not the store's"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("hf://org/name", "main"),
        ("hf://org/name/", "main"),
        ("hf://org/name@v2", "v2"),
        ("hf://org/name@refs/pr/1", "refs%2Fpr%2F1"),
        ("hf://org/name@v2@rev-" + "0" * 40, "v2"),
        ("hf://org/name@rev-" + "0" * 40, "main"),
    ],
)
def test_branches_and_pins(uri, path, hub):
    opened(hub, uri).files()
    assert hub.seen[-1][1] == f"/api/models/org/name/revision/{path}"


@pytest.mark.parametrize("place", ["", "a/b/c", "../x", "org/na me", "org/..", "/@main", "-x/y"])
def test_what_is_no_repository(place, hub):
    with pytest.raises(BadModelURI):
        opened(hub, f"hf://{place}")


@pytest.mark.parametrize(
    ("uri", "token", "error"),
    [
        ("hf://org/other", "", ModelNotFound),
        ("hf://org/name@nope", "", ModelNotFound),
        ("hf://org/name", "s", AccessDenied),
    ],
)
def test_what_the_hub_does_not_give(uri, token, error, hub):
    hub.token = token
    with pytest.raises(error):
        opened(hub, uri).files()


def test_pickled_weights_only(hub):
    content = hub.branches["main"].pop("model.safetensors")
    hub.branches["main"]["pytorch_model.bin"] = content
    with pytest.raises(UnsafeCheckpoint, match="save_pretrained"):
        describe(opened(hub))


def test_a_signed_address_that_expired_is_asked_for_anew(hub):
    origin = opened(hub)
    (weights,) = [file for file in origin.files() if file.name == "model.safetensors"]
    origin.read(weights, 0, 10)
    hub.signature = "second"
    assert origin.read(weights, 10, 10) == hub.branches["main"]["model.safetensors"][10:20]


def test_a_branch_that_moves_does_not_mix(hub, checkpoint_files):
    origin = opened(hub)
    listed = {file.name: file for file in origin.files()}
    hub.branches["main"] = checkpoint_files(seed=5)
    for name in ("config.json", "model.safetensors"):
        file = listed[name]
        if hub.branches["main"][name] != hub.branches["v2"][name]:
            with pytest.raises(OriginChanged):
                origin.read(file, 0, 10)


@pytest.mark.parametrize("how", ["all of it", "other range", "short", "503", "429", "loop", "not json", "no size"])
def test_a_hub_that_misbehaves(how, hub):
    origin = opened(hub)
    if how in ("not json", "no size"):
        body = b"<html>" if how == "not json" else b'{"sha": "x", "siblings": [{"rfilename": "a"}]}'
        hub.misbehave = lambda handler, where, path: hub.reply(handler, 200, body) or True
        with pytest.raises(OriginUnavailable):
            origin.files()
        return
    (weights,) = [file for file in origin.files() if file.name == "model.safetensors"]
    content = hub.branches["main"]["model.safetensors"]

    def misbehave(handler, where, path):
        if how == "loop":
            hub.reply(handler, 302, Location=handler.path)
        elif where == "hub":
            return False
        elif how == "all of it":
            hub.reply(handler, 200, content)
        elif how == "other range":
            hub.reply(handler, 206, content[1:11], Content_Range=f"bytes 1-10/{len(content)}")
        elif how == "short":
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes 10-19/{len(content)}")
            handler.send_header("Content-Length", "10")
            handler.end_headers()
            handler.wfile.write(content[10:15])
            handler.close_connection = True
        else:
            hub.reply(handler, int(how), b"slow down")
        return True

    hub.misbehave = misbehave
    with pytest.raises(OriginUnavailable):
        origin.read(weights, 10, 10)


def test_nobody_listens(hub):
    hub.close()
    with pytest.raises(OriginUnavailable):
        opened(hub).files()


def test_without_a_setting_the_endpoint_is_the_hub_clients_own():
    from huggingface_hub.constants import ENDPOINT

    assert Hub().endpoint == ENDPOINT.rstrip("/")


def test_the_hubs_own_client_brings_a_directory_that_is_a_model(hub, tmp_path):
    """`hf download`, as cache_agent/tiers/README.md says it; an agent reads what it has brought."""
    program = Path(sys.prefix) / "bin" / "hf"
    if not program.exists():
        pytest.skip("huggingface-hub has no command hf here")
    hub.branches["main"]["pytorch_model.bin"] = b"pickle"
    page = (Path(__file__).parents[2] / "cache_agent" / "tiers" / "README.md").read_text()
    command = next(line.removeprefix("$ hf ") for line in page.splitlines() if line.startswith("$ hf download"))
    command = command.replace("org/llama-1b", "org/name")
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [program, *shlex.split(command)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    brought = {path.name: path.read_bytes() for path in (tmp_path / "llama-1b").iterdir() if path.is_file()}
    assert brought == {name: body for name, body in hub.branches["main"].items() if name != "pytorch_model.bin"}
    origin = FileOrigin(parse_uri(f"file://{tmp_path / 'llama-1b'}"), [tmp_path])
    assert {file.name for file in describe(origin).source.files} <= brought.keys()
