"""The template in the hands of the real faas-cli: pull, new, shrinkwrap, generate, remote build, and a first answer."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

# What of a build context is not ours to keep constant: faas-cli's own note, and the packages, which are compared.
PACKAGES = ("runtime", "cache_agent")
CONTEXT = {
    ".dockerignore",
    "Dockerfile",
    "function/handler.py",
    "function/handler_test.py",
    "function/pytest.ini",
    "function/requirements.txt",
    "glowplug/LICENSE",
    "glowplug/README.md",
    "glowplug/pyproject.toml",
    "listen.py",
    "template.yml",
}
# For the developer; they come along and stay out of the image.
EXAMPLES = ("stack.yaml", "stack-pro.yaml")
FACTS = {"README.md", *(f"examples/{name}" for name in EXAMPLES)}


def files(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}


def test_pull_brings_everything_and_no_link(project: SimpleNamespace, repository: Path) -> None:
    pulled = project.folder / "template" / "llm-python"
    assert not [path for path in pulled.rglob("*") if path.is_symlink()]
    for name in PACKAGES:
        assert files(pulled / "glowplug" / name) == files(repository / name)
        for path in files(repository / name):
            assert (pulled / "glowplug" / name / path).read_bytes() == (repository / name / path).read_bytes()


def test_pull_by_tag(faas_cli: Callable[..., str], repository: Path, tmp_path: Path) -> None:
    """As from a forge, whose address git finds in this repository instead."""
    url = "https://github.com/example/glowplug"
    here = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": url,
    }
    faas_cli(tmp_path, "template", "pull", f"{url}#v1", env=here)
    (pulled,) = (tmp_path / "template").iterdir()
    assert pulled.name in ("llm-python", "llm-python@v1")
    assert files(pulled / "glowplug" / "runtime") == files(repository / "runtime")


def test_new_writes_what_is_edited_and_says_what_next(project: SimpleNamespace) -> None:
    assert files(project.folder / "chat") == {"handler.py", "handler_test.py", "pytest.ini", "requirements.txt"}
    stack = yaml.safe_load((project.folder / "stack.yaml").read_text())
    assert stack["functions"] == {"chat": {"lang": "llm-python", "handler": "./chat", "image": "example/chat:latest"}}
    assert "GLOWPLUG_MODEL" in project.said


def test_shrinkwrap(project: SimpleNamespace) -> None:
    model = {path for path in files(project.build) if path.startswith("model/")}
    packages = {path for path in files(project.build) if path.startswith(tuple(f"glowplug/{p}/" for p in PACKAGES))}
    assert files(project.build) - model - packages - {"meta.json"} == CONTEXT | FACTS
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json"} <= model
    assert {
        "glowplug/runtime/base.lock",
        "glowplug/runtime/container/shim.py",
        "glowplug/cache_agent/daemon.py",
    } <= packages


def test_copies_name_files_of_the_context(project: SimpleNamespace, dockerfile: Any) -> None:
    ignored = (project.build / ".dockerignore").read_text().split()
    for text in dockerfile.all("COPY", "build"):
        if not text.startswith("--from"):
            for source in text.split()[:-1]:
                assert (project.build / source).exists(), source
                assert source.rstrip("/") not in ignored


def test_generate(faas_cli: Callable[..., str], project: SimpleNamespace, template: Path) -> None:
    """The examples in the README and beside it are read by faas-cli, and keep to what the Community Edition takes."""
    stack = template / "examples" / "stack.yaml"
    objects = list(yaml.safe_load_all(faas_cli(project.folder, "generate", "-f", stack)))
    (function,) = [item for item in objects if item]
    assert function["kind"] == "Function"
    environment = function["spec"]["environment"]
    assert "GLOWPLUG_MODEL" in environment
    for word in ("com.openfaas.scale.zero", "zero-duration", "target", "type", "profile", "constraints"):
        assert word not in json.dumps(function["spec"].get("labels", {})), word
        assert word not in json.dumps(function["spec"].get("annotations", {})), word
    times = {name: environment[name] for name in ("read_timeout", "write_timeout", "exec_timeout")}
    assert len(set(times.values())) == 1, times
    assert yaml.safe_load(faas_cli(project.folder, "generate", "-f", project.folder / "stack.yaml"))


def test_generate_what_other_editions_take(
    faas_cli: Callable[..., str], project: SimpleNamespace, template: Path
) -> None:
    stack = template / "examples" / "stack-pro.yaml"
    environment = {"TORCH_INDEX": "http://127.0.0.1/cpu"}
    (function,) = [
        item for item in yaml.safe_load_all(faas_cli(project.folder, "generate", "-f", stack, env=environment)) if item
    ]
    assert function["spec"]["annotations"]["glowplug.dev/model"] == function["spec"]["environment"]["GLOWPLUG_MODEL"]


@contextmanager
def store(template: Path) -> Iterator[str]:
    """The URL of a template store that holds our entry."""

    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = (template.parent / "store.json").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/templates.json"
        finally:
            server.shutdown()
            thread.join()


def test_store_entry(faas_cli: Callable[..., str], repository: Path, template: Path, tmp_path: Path) -> None:
    """Listed, described and pulled from a store as its own tool reads it; the forge is this repository."""
    (entry, _) = json.loads((template.parent / "store.json").read_text())
    here = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": entry["repo"],
    }
    with store(template) as url:
        for platform in ("x86_64", "arm64"):
            assert "llm-python" in faas_cli(tmp_path, "template", "store", "list", "--platform", platform, "--url", url)
        assert entry["description"] in faas_cli(tmp_path, "template", "store", "describe", "llm-python", "--url", url)
        faas_cli(tmp_path, "template", "store", "pull", "llm-python", "--url", url, env=here)
        assert (tmp_path / "template" / "llm-python" / "Dockerfile").exists()
        assert [path.name for path in (tmp_path / "template").iterdir()] == ["llm-python"]


@contextmanager
def builder() -> Iterator[SimpleNamespace]:
    """A stand-in for OpenFaaS' remote builder that takes one build and keeps it."""
    seen = SimpleNamespace(body=b"", signature="", url="")

    class Builder(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.signature = self.headers.get("X-Build-Signature", "")
            answer = json.dumps({"log": [], "image": "example/chat:latest", "status": "success"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Builder) as server:
        seen.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()


def test_remote_builder_gets_the_whole_context(
    faas_cli: Callable[..., str], project: SimpleNamespace, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("only for this test")
    with builder() as seen:
        options = ("--remote-builder", seen.url, "--payload-secret", secret, "--platforms", "linux/amd64,linux/arm64")
        faas_cli(project.folder, "publish", *options)
    digest = hmac.new(secret.read_bytes(), seen.body, hashlib.sha256).hexdigest()
    assert seen.signature == f"sha256={digest}"
    with tarfile.open(fileobj=io.BytesIO(seen.body)) as tar:
        sent = {member.name.removeprefix("context/"): member for member in tar if member.isfile()}
        assert {name for name in sent if "/" in name or name in CONTEXT} - {"com.openfaas.docker.config"} >= CONTEXT
        for name in files(project.build):
            content = tar.extractfile(sent[name])
            assert content is not None
            assert content.read() == (project.build / name).read_bytes()


@pytest.mark.timeout(180)
def test_a_new_function_answers_at_once(
    project: SimpleNamespace, make_image: Callable[..., Any], start_watchdog: Callable[..., Any]
) -> None:
    """From `new` to a streamed answer without an edit: the function as it was shrinkwrapped, on the demo model."""
    image = make_image()
    assert (image.home / "function" / "handler.py").read_text() == (project.folder / "chat" / "handler.py").read_text()
    with start_watchdog(image) as function:
        question = b"What is Glowplug?"
        with function.open("/", question, Accept="text/event-stream") as stream:
            assert (stream.status, stream.getheader("Content-Type")) == (200, "text/event-stream; charset=utf-8")
            assert stream.getheader("X-Glowplug-Start") == "cold"
            events = stream.read().decode()
        assert events.startswith("data: ")
        assert events.endswith("data: [DONE]\n\n")
        whole = function.ask("/", question)
        assert (whole.status, whole.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        assert whole.body
        (card,) = function.ask("/v1/models", method="GET").json["data"]
        assert card["id"] == "glowplug-demo"
