"""A Kubernetes control plane on loopback: a real etcd, kube-apiserver and, where asked for, kube-scheduler. No kubelet.

ETCD, KUBE_APISERVER and KUBE_SCHEDULER name the programs. What is created stays as it is: nothing runs a pod, and
nothing makes a pod of a DaemonSet.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from programs import program

START_SECONDS = 180.0
SECONDS = 120.0
_VERBS = {"POST": "application/json", "PATCH": "application/apply-patch+yaml", "PUT": "application/json"}


class Reply(NamedTuple):
    """A reply of the API server; `warnings` are those that kubectl shows."""

    status: int
    json: Any
    warnings: list[str]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def path_of(item: Mapping[str, Any], *, of_one: bool = True) -> str:
    """Return the API's path of an object, or of the objects of its kind."""
    kind = str(item["kind"]).lower()
    plural = kind[:-1] + "ies" if kind.endswith("y") else kind + ("es" if kind.endswith("s") else "s")
    version, namespace = item["apiVersion"], item["metadata"].get("namespace")
    group = f"/api/{version}" if "/" not in version else f"/apis/{version}"
    return f"{group}/{f'namespaces/{namespace}/' if namespace else ''}{plural}" + (
        f"/{item['metadata']['name']}" if of_one else ""
    )


class ControlPlane:
    """The control plane, a context manager. Requests are an administrator's unless another token is given."""

    def __init__(self, directory: Path, etcd: str, apiserver: str) -> None:
        self.directory = directory
        self.admin = secrets.token_hex(16)
        store, peer, self.port = free_ports(3)
        urls = [f"http://127.0.0.1:{port}" for port in (store, peer)]
        self._commands = [
            [
                etcd, "--data-dir", str(directory / "etcd"), "--listen-client-urls", urls[0],
                "--advertise-client-urls", urls[0], "--listen-peer-urls", urls[1], "--initial-advertise-peer-urls",
                urls[1], "--initial-cluster", f"default={urls[1]}",
            ],
            [
                apiserver, f"--etcd-servers={urls[0]}", f"--secure-port={self.port}", "--bind-address=127.0.0.1",
                "--advertise-address=127.0.0.1", f"--cert-dir={directory / 'certificates'}",
                "--authorization-mode=RBAC", f"--token-auth-file={directory / 'tokens.csv'}",
                "--service-account-issuer=https://kubernetes.default.svc", "--api-audiences=https://kubernetes.default.svc",
                f"--service-account-key-file={directory / 'accounts.pem'}",
                f"--service-account-signing-key-file={directory / 'accounts.pem'}",
                "--service-cluster-ip-range=10.0.0.0/24", "--allow-privileged=true",
                "--enable-priority-and-fairness=false",
            ],
        ]  # fmt: skip
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def authority(self) -> Path:
        """Return the certificate that the API server signed itself."""
        return self.directory / "certificates" / "apiserver.crt"

    def __enter__(self) -> ControlPlane:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        (self.directory / "tokens.csv").write_text(f"{self.admin},admin,admin,system:masters\n")
        key = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"]
        subprocess.run([*key, "-out", self.directory / "accounts.pem"], check=True, capture_output=True, timeout=60)
        for command in self._commands:
            self.run(command)
        self.until(self._is_ready, "the API server is ready", START_SECONDS)

    def run(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a part of the control plane, which `close` ends."""
        with (self.directory / f"{Path(command[0]).name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(SECONDS)
        self._processes.remove(process)

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes[:]):
            self.stop(process)

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError, HTTPException):
            # The roles that Kubernetes brings are made after it first says that it is alive.
            return self.ask("GET", "/readyz").status == 200
        return False

    def until(self, condition: Any, what: str, seconds: float = SECONDS) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            for process in self._processes:
                assert process.poll() is None, f"{process.args!r} ended:\n{self.logs()}"
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}\n{self.logs()}"
            time.sleep(0.05)
        return found

    def logs(self) -> str:
        return "\n".join(
            f"{path.name}: …{path.read_text(errors='replace')[-3000:]}" for path in self.directory.glob("*.log")
        )

    # --- asking -------------------------------------------------------------------------------------------------------

    def ask(self, method: str, path: str, body: Any = None, *, token: str = "", kind: str = "") -> Reply:
        headers = {"Authorization": f"Bearer {token or self.admin}", "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = kind or _VERBS[method]
        # Its certificate is made when it starts; that the agent's client checks one is for the tests of that client.
        context = ssl._create_unverified_context()
        with contextlib.closing(
            HTTPSConnection("127.0.0.1", self.port, timeout=SECONDS, context=context)
        ) as connection:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            data = response.read()
            warnings = response.headers.get_all("Warning") or []
        is_json = response.headers.get_content_type() == "application/json"
        return Reply(response.status, json.loads(data) if is_json else data.decode(), warnings)

    def apply(self, item: Mapping[str, Any], *, dry: bool = False) -> Reply:
        """Apply an object like `kubectl apply --server-side --validate=strict`."""
        query = "fieldManager=tests&force=true&fieldValidation=Strict" + ("&dryRun=All" if dry else "")
        return self.ask("PATCH", f"{path_of(item)}?{query}", item)

    def applied(self, *items: Mapping[str, Any]) -> None:
        for item in items:
            reply = self.apply(item)
            assert reply.status in (200, 201), (item["kind"], item["metadata"]["name"], reply.json)

    def create(self, item: Mapping[str, Any], *, dry: bool = False, token: str = "") -> Reply:
        return self.ask("POST", path_of(item, of_one=False) + ("?dryRun=All" if dry else ""), item, token=token)

    def get(self, item: Mapping[str, Any]) -> Any:
        return self.ask("GET", path_of(item)).json

    def delete(self, item: Mapping[str, Any], **options: Any) -> Reply:
        return self.ask(
            "DELETE", path_of(item), {"kind": "DeleteOptions", "apiVersion": "v1", **options}, kind="application/json"
        )

    # --- what a cluster has otherwise ---------------------------------------------------------------------------------

    def namespace(self, name: str, **labels: str) -> None:
        """Create a namespace with its default account, for want of the controller that makes accounts."""
        labelled = {label.replace("__", "/").replace("_", "."): value for label, value in labels.items()}
        self.applied(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labelled}},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name}},
        )

    def node(self, name: str) -> None:
        """Create a node that is ready and empty, without a kubelet."""
        labels = {"kubernetes.io/hostname": name}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}
        assert self.create(node).status == 201
        room = {"cpu": "32", "memory": "64Gi", "pods": "110", "ephemeral-storage": "100Gi"}
        ready = {"type": "Ready", "status": "True", "reason": "Told", "message": ""}
        status = {"status": {"capacity": room, "allocatable": room, "conditions": [ready]}}
        patch = "application/merge-patch+json"
        assert self.ask("PATCH", f"/api/v1/nodes/{name}/status", status, kind=patch).status == 200
        assert self.ask("PATCH", f"/api/v1/nodes/{name}", {"spec": {"taints": None}}, kind=patch).status == 200

    def token(self, namespace: str, account: str, *audiences: str) -> str:
        """Return a token of a ServiceAccount, like the kubelet's for a pod."""
        wanted = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"audiences": list(audiences)},
        }
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        reply = self.ask("POST", path, wanted)
        assert reply.status == 201, reply.json
        return str(reply.json["status"]["token"])

    def account(self, directory: Path, token: str) -> Path:
        """Write the files that a pod finds of its ServiceAccount."""
        directory.mkdir(exist_ok=True)
        (directory / "token").write_text(token)
        (directory / "ca.crt").write_bytes(self.authority.read_bytes())
        return directory

    def kubeconfig(self, path: Path, token: str = "") -> Path:
        authority = base64.b64encode(self.authority.read_bytes()).decode()
        settings = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.url, "certificate-authority-data": authority}}],
            "users": [{"name": "u", "user": {"token": token or self.admin}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        path.write_text(yaml.safe_dump(settings))
        return path


@contextlib.contextmanager
def control_plane() -> Iterator[ControlPlane]:
    """Give a control plane; skip where its programs are missing."""
    etcd, apiserver = program("ETCD"), program("KUBE_APISERVER")
    with tempfile.TemporaryDirectory(prefix="gp-kube-") as place, ControlPlane(Path(place), etcd, apiserver) as made:
        yield made
