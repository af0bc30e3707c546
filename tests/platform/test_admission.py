"""What a pod is given when it is created: the policies' own CEL, and the webhook for older clusters, do the same."""

from __future__ import annotations

import base64
import contextlib
import copy
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import celpy
import pytest
import yaml
from celpy.adapter import json_to_cel

from cache_agent.errors import BadSetting
from cache_agent.kube import admission, certificate
from cache_agent.kube.certificate import Certificate
from cache_agent.kube.routes import RoutesServer
from runtime.config import FunctionConfig

KNATIVE = Path(__file__).parents[2] / "knative"
KEYS = {"volumes": "name", "containers": "name", "env": "name", "volumeMounts": "mountPath"}  # of Kubernetes' list maps
MODEL = {"glowplug.dev/model": "s3://models/a"}
MOUNTS = [
    {"name": "glowplug-agent", "mountPath": "/run/glowplug", "readOnly": True},
    {"name": "glowplug-identity", "mountPath": "/var/run/secrets/glowplug", "readOnly": True},
]


class Policy:
    """A MutatingAdmissionPolicy, carried out: conditions, variables and its one mutation by a CEL interpreter.

    What a real API server makes of it is test_kubernetes.py's.
    """

    def __init__(self, path: Path) -> None:
        spec = yaml.safe_load(path.read_text())["spec"]
        (mutation,) = spec["mutations"]
        self._patches = mutation["patchType"] == "JSONPatch"
        text = mutation["jsonPatch" if self._patches else "applyConfiguration"]["expression"]
        self._conditions = [_program(condition["expression"]) for condition in spec["matchConditions"]]
        self._variables = {each["name"]: _program(each["expression"]) for each in spec.get("variables", ())}
        self._change = _program(_as_maps(text))

    def apply(self, pod: Mapping[str, Any]) -> dict[str, Any]:
        result = copy.deepcopy(dict(pod))
        given = {"object": json_to_cel(result)}
        if all(condition.evaluate(given) for condition in self._conditions):
            found = {name: program.evaluate(given) for name, program in self._variables.items()}
            given["variables"] = json_to_cel({name: _plain(value) for name, value in found.items()})
            change = _plain(self._change.evaluate(given))
            patch(result, change) if self._patches else merge(result, change)
        return result


def _as_maps(expression: str) -> str:
    """Object literals of the admission library, as the maps that they stand for."""
    maps = re.sub(r"\b(JSONPatch|Object(\.\w+)*)\s*\{", "{", expression)
    return re.sub(r"(?<=[{,\s])(\w+):\s", r'"\1": ', maps)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, cls=celpy.CELJSONEncoder))


def _program(expression: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(expression))


def merge(target: dict[str, Any], change: Mapping[str, Any]) -> None:
    """As the API server merges an apply configuration: maps by field, lists by their key."""
    for name, value in change.items():
        if isinstance(value, dict):
            merge(target.setdefault(name, {}), value)
        elif isinstance(value, list) and name in KEYS:
            items = target.setdefault(name, [])
            for item in value:
                same = [old for old in items if old[KEYS[name]] == item[KEYS[name]]]
                if same:
                    merge(same[0], item)
                else:
                    items.append(item)
        else:
            target[name] = value


def patched(pod: Mapping[str, Any], scheduler: str = "") -> dict[str, Any]:
    """The pod as the webhook's answer leaves it."""
    body = {"request": {"uid": "1", "operation": "CREATE", "object": pod}}
    response = admission.review(body, scheduler)["response"]
    assert (response["uid"], response["allowed"]) == ("1", True)
    result = copy.deepcopy(dict(pod))
    patch(result, json.loads(base64.b64decode(response.get("patch", "W10="))))
    return result


def patch(target: dict[str, Any], operations: list[dict[str, Any]]) -> None:
    """Carries out a JSON patch that only adds."""
    for operation in operations:
        assert operation["op"] == "add"
        *parents, last = operation["path"].split("/")[1:]
        place: Any = target
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if isinstance(place, list):
            assert last == "-"
            place.append(operation["value"])
        else:
            place[last] = operation["value"]


def pod(annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"generateName": "chat-"}
    if annotations is not None:
        metadata["annotations"] = annotations
    spec.setdefault("containers", [{"name": "function"}, {"name": "queue-proxy"}])
    return {"metadata": metadata, "spec": {"schedulerName": "default-scheduler", **spec}}


ANNOTATIONS = [
    None,
    {},
    {"glowplug.dev/model": ""},
    MODEL,
    {**MODEL, "glowplug.dev/inject": "disabled"},
    {**MODEL, "glowplug.dev/inject": "yes"},
    {"glowplug.dev/model": '"}}; ${{x}} \n' + "a" * 5000},
]
VOLUMES = [
    None,
    [{"name": "tmp", "emptyDir": {}}],
    [{"name": "glowplug-agent", "emptyDir": {}}],
    [{"name": "glowplug-identity", "emptyDir": {}}],
]
CONTAINERS = [
    [{"name": "function"}, {"name": "queue-proxy"}],
    [
        {
            "name": "function",
            "env": [{"name": "A", "value": "b"}],
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
        }
    ],
    [{"name": "a"}, {"name": "b", "volumeMounts": [{"name": "x", "mountPath": "/run/glowplug"}]}],
    [{"name": "a", "env": [{"name": "GLOWPLUG_POD", "value": "another's"}]}],
    [{"name": "a", "env": [{"name": "GLOWPLUG_IDENTITY_FILE", "value": "/another's"}]}],
    [{"name": "a", "volumeMounts": [{"name": "x", "mountPath": "/var/run/secrets/glowplug"}]}],
]
SCHEDULERS = ["default-scheduler", "another"]


@pytest.fixture(scope="module")
def inject() -> Policy:
    return Policy(KNATIVE / "base" / "inject-policy.yaml")


@pytest.fixture(scope="module")
def schedule() -> Policy:
    return Policy(KNATIVE / "components" / "scheduler-policy" / "policy.yaml")


def test_policy_and_webhook_agree_and_are_idempotent(inject: Policy, schedule: Policy) -> None:
    changed = 0
    for notes, volumes, containers, scheduler in itertools.product(ANNOTATIONS, VOLUMES, CONTAINERS, SCHEDULERS):
        before = pod(notes, containers=containers, schedulerName=scheduler)
        if volumes is not None:
            before["spec"]["volumes"] = volumes
        after = inject.apply(before)
        assert patched(before) == after
        assert inject.apply(after) == after == patched(after)
        both = schedule.apply(after)
        assert patched(before, "warm-scheduler") == both
        assert schedule.apply(both) == both == patched(both, "warm-scheduler")
        changed += after != before
    assert changed == 3 * 2 * 2 * 2  # models, volumes, containers that are not taken, schedulers


def test_what_a_pod_gets(inject: Policy, schedule: Policy) -> None:
    result = schedule.apply(inject.apply(pod(MODEL)))["spec"]
    assert result["schedulerName"] == "warm-scheduler"
    token = {"audience": "glowplug", "expirationSeconds": 3600, "path": "token"}
    assert result["volumes"] == [
        {"name": "glowplug-agent", "hostPath": {"path": "/run/glowplug", "type": "DirectoryOrCreate"}},
        {"name": "glowplug-identity", "projected": {"sources": [{"serviceAccountToken": token}]}},
    ]
    function, proxy = result["containers"]
    assert function["volumeMounts"] == MOUNTS
    assert function["env"] == [
        {"name": "GLOWPLUG_POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
        {"name": "GLOWPLUG_IDENTITY_FILE", "value": "/var/run/secrets/glowplug/token"},
    ]
    assert FunctionConfig().identity_file == "", "without the injection no file is looked for"
    assert proxy == {"name": "queue-proxy"}


@pytest.mark.parametrize(
    "model",
    [
        "s3://models/unknown",
        "no uri at all",
        "x" * 200_000,
        'a"}]},{"op":"remove","path":"/spec"}',
        "../../../etc/shadow\n- name: evil",
        "\u0000\U0001f600 {{.Values}} ${HOME} $(id)",
    ],
)
def test_what_a_pod_calls_its_model_changes_nothing(inject: Policy, schedule: Policy, model: str) -> None:
    """Whether there is such a model is the function's business; no text of a pod gets into what it is given."""
    before, usual = pod({"glowplug.dev/model": model}), pod(MODEL)
    assert admission.operations(before, "warm-scheduler") == admission.operations(usual, "warm-scheduler")
    assert schedule.apply(inject.apply(before))["spec"] == schedule.apply(inject.apply(usual))["spec"]


@pytest.mark.parametrize("body", [None, [], {}, {"request": None}, {"request": {"uid": 3}}, {"request": {"uid": ""}}])
def test_what_is_no_review_has_no_answer(body: Any) -> None:
    with pytest.raises(admission.NotAReview, match="AdmissionReview"):
        admission.review(body)


@pytest.mark.parametrize(
    "broken",
    [
        None,
        {},
        {"metadata": {"annotations": MODEL}},
        {"metadata": {"annotations": MODEL}, "spec": {"containers": [{}]}},
        {"metadata": {"annotations": MODEL}, "spec": {"containers": None}},
        {"metadata": {"annotations": MODEL}, "spec": {"containers": [], "volumes": [3]}},
        {"metadata": {"annotations": "glowplug.dev/model"}, "spec": {}},
    ],
)
def test_a_pod_of_another_shape_is_let_through(broken: Any) -> None:
    """Refusing is Kubernetes' business: what is no pod never becomes one."""
    body = {"request": {"uid": "u", "operation": "CREATE", "object": broken}}
    response = admission.review(body, "warm-scheduler")["response"]
    assert response["allowed"] is True
    assert "patch" not in response


def test_only_creation_is_of_interest() -> None:
    body = {"request": {"uid": "u", "operation": "UPDATE", "object": pod(MODEL)}}
    assert admission.review(body)["response"] == {"uid": "u", "allowed": True}


# --- the webhook's server ---------------------------------------------------------------------------------------------


def make_certificate(folder: Path, name: str) -> Certificate:
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make a certificate with")
    chain, key = folder / "tls.crt", folder / "tls.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-days", "2"]
    done = subprocess.run([*command, "-keyout", key, "-out", chain], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return Certificate(chain, key)


def call(port: int, certificate: Path, name: str, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
    """Over TLS that trusts this certificate alone, and by this name."""
    context = ssl.create_default_context(cafile=str(certificate))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=name) as secured,
    ):
        head = f"{method} {path} HTTP/1.1\r\nHost: {name}\r\nContent-Length: {len(body)}\r\n\r\n"
        secured.sendall(head.encode() + body)
        response = http.client.HTTPResponse(secured)
        response.begin()
        return response.status, json.loads(response.read())


def test_webhook_command(tmp_path: Path, eventually: Callable[..., Any]) -> None:
    """As its pod runs it: TLS, a certificate that is renewed under it, and callers that do not speak TLS."""
    name = "glowplug-webhook.glowplug-system.svc"
    pair = make_certificate(tmp_path, name)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-c",
        "from runtime.cli import main; main()",
        "agent",
        "webhook",
        "--host",
        "127.0.0.1",
    ]
    command += ["--port", str(port), "--certificate", str(pair.chain), "--key", str(pair.key)]
    process = subprocess.Popen([*command, "--scheduler", "warm-scheduler"], env=dict(os.environ))
    try:

        def healthy() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return call(port, pair.chain, name, "GET", "/healthz")[0] == 200
            return False

        eventually(healthy, 30, "the webhook answers")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP/1.1 200" not in plain.recv(100)
        review = {"request": {"uid": "7", "operation": "CREATE", "object": pod(MODEL)}}
        status, answer = call(port, pair.chain, name, "POST", "/admission", json.dumps(review).encode())
        assert (status, answer["response"]["uid"], answer["kind"]) == (200, "7", "AdmissionReview")
        assert b"warm-scheduler" in base64.b64decode(answer["response"]["patch"])
        for broken in (b"", b"[]", b"\xff", b'{"a": ' * 30_000):
            assert call(port, pair.chain, name, "POST", "/admission", broken)[0] == 400
        make_certificate(tmp_path, name)
        eventually(healthy, 30, "the new certificate is served")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[RoutesServer, ssl.SSLContext]]:
    """A server with TLS, and what trusts it."""
    pair = make_certificate(tmp_path, "localhost")
    server = RoutesServer("127.0.0.1", 0, {}, pair)
    server.start()
    yield server, ssl.create_default_context(cafile=str(pair.chain))
    server.stop()


def test_many_answers_on_one_secured_connection(
    secured: tuple[RoutesServer, ssl.SSLContext], eventually: Callable[..., Any]
) -> None:
    """Ten within less than half of what ten delayed acknowledgements take; a body larger than a record of TLS, too."""
    server, context = secured
    with contextlib.closing(http.client.HTTPSConnection("localhost", server.port, timeout=10, context=context)) as kept:

        def ten() -> float:
            start = time.perf_counter()
            for _ in range(10):
                kept.request("GET", "/healthz", b" " * 100_000)
                assert json.loads(kept.getresponse().read()) == {"status": "ok"}
            return time.perf_counter() - start

        eventually(lambda: ten() < 0.2, 30, "ten answers come at once")


def test_requests_that_share_a_record_of_tls_are_all_answered(secured: tuple[RoutesServer, ssl.SSLContext]) -> None:
    server, context = secured
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as client,
    ):
        head = b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 8000\r\nPadding: \r\n\r\n"
        head = head.replace(b"Padding: ", b"Padding: " + b"a" * (8192 - 8000 - len(head)))
        client.sendall((head + b" " * 8000) * 2)  # of 8 KiB each, which is what gunicorn reads at a time
        for _ in range(2):
            response = http.client.HTTPResponse(client)
            response.begin()
            assert json.loads(response.read()) == {"status": "ok"}


def test_a_handshake_has_a_deadline(
    secured: tuple[RoutesServer, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = secured
    monkeypatch.setattr(certificate, "_HANDSHAKE_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as silent:
        assert silent.recv(100) == b""


def test_webhook_without_its_certificate_says_so(tmp_path: Path) -> None:
    (tmp_path / "nonsense").write_text("nonsense")
    for chain in (tmp_path / "absent", tmp_path / "nonsense"):
        with pytest.raises(BadSetting, match="no certificate and key"):
            Certificate(chain, chain)
