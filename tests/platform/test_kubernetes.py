"""The objects in knative/ in a real API server, and pods placed by a real scheduler with our configuration.

ETCD, KUBE_APISERVER and KUBE_SCHEDULER name the programs; without them these tests skip. What needs a kubelet, a
controller or a cluster's network is not here.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from control_plane import ControlPlane, control_plane, free_ports
from documented import commands
from manifests import COMBINATIONS, EXAMPLES, KNATIVE, LOADER, OVERLAYS, load
from programs import program

from cache_agent.access.kubernetes import Api
from cache_agent.access.tokenreview import TokenReview
from cache_agent.errors import AccessDenied
from cache_agent.kube import admission
from cache_agent.kube.witness import Removal, Witness
from cache_agent.wire.messages import Identity

Objects = list[dict[str, Any]]

MODEL, OTHER = "s3://models/a", "s3://models/b"
OURS = "glowplug-system"
GB = 10**9
_names = (f"pod-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def cluster(build: Callable[..., Objects], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Give a cluster on which the pages' commands have run, with more components; `plain` has no label."""
    with control_plane() as made:
        for name in ("worker-1", "worker-2"):
            made.node(name)
        made.namespace("llm")
        made.namespace("plain")
        install(made, tmp_path_factory.mktemp("install"))
        more = {
            "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding",
            "MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding",
        }  # fmt: skip
        made.applied(
            *(item for item in build("cpu", "rights", "scheduler", "scheduler-policy") if item["kind"] in more)
        )
        in_force = {"schedulerName": "warm-scheduler"}.items()
        made.until(
            lambda: (
                in_force <= made.create(pod(), dry=True).json.get("spec", {}).items()
                and mounts(made.create(pod(), dry=True).json)
            ),
            "the policies are in force",
        )
        yield made


def install(made: ControlPlane, place: Path) -> None:
    """Run the pages' kubectl commands, in their order, in a checkout with the files of the secrets."""
    kubectl = os.environ.get("KUBECTL") or shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl on PATH, and KUBECTL does not name one")
    if data := os.environ.get("GLOWPLUG_TEST_DATA"):
        definition = yaml.load((Path(data) / "knative" / "crd-service.yaml").read_text(), LOADER)
        definition["spec"].pop("conversion", None)  # nothing converts here
        made.applied(definition)
        services = f"/apis/{definition['spec']['group']}/v1/services"
        made.until(lambda: made.ask("GET", services).status == 200, "Knative's kind is served")
    (place / "knative").symlink_to(KNATIVE)
    for name in ("agent-password", "placer-password", "tls.crt", "tls.key", "ca.crt", "s3.env"):
        (place / name).write_text("NAME=value\n")
    (place / "bin").mkdir()
    (place / "bin" / "kubectl").symlink_to(kubectl)
    path = os.pathsep.join([str(place / "bin"), str(Path(sys.prefix) / "bin"), os.environ["PATH"]])
    env = {**os.environ, "KUBECONFIG": str(made.kubeconfig(place / "kubeconfig")), "HOME": str(place), "PATH": path}
    for command in [*commands("knative/README.md"), *commands("knative/components/README.md")]:
        if "kubectl" not in command or "port-forward" in command:
            continue  # what forwards a port needs a kubelet
        if "kubectl apply -f -" in command and not data:
            continue
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], cwd=place, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)


def pod(namespace: str = "llm", model: str = MODEL, **spec: Any) -> dict[str, Any]:
    annotations = {"glowplug.dev/model": model} if model else {}
    container = {"name": "function", "image": "chat:1", "resources": {"requests": {"cpu": "100m"}}}
    metadata = {"name": next(_names), "namespace": namespace, "annotations": annotations, "labels": {"app": "chat"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container], **spec}}


def mounts(made: Mapping[str, Any], container: int = 0) -> dict[str, str]:
    """Return our volumes by mount path."""
    found = made["spec"]["containers"][container].get("volumeMounts", ())
    return {each["mountPath"]: each["name"] for each in found if each["name"].startswith("glowplug-")}


INJECTED = {"/run/glowplug": "glowplug-agent", "/var/run/secrets/glowplug": "glowplug-identity"}


# --- what the API server says of our objects --------------------------------------------------------------------------


@pytest.mark.parametrize("components", COMBINATIONS, ids="+".join)
def test_every_object_is_taken(
    components: tuple[str, ...], cluster: ControlPlane, build: Callable[..., Objects]
) -> None:
    """The server validates strictly: unknown fields, wrong CEL and impossible values are refused."""
    for item in build("cpu", *components):
        reply = cluster.apply(item, dry=True)
        assert (reply.status in (200, 201), reply.warnings) == (True, []), (item["metadata"]["name"], reply)


@pytest.mark.parametrize("overlay", [path.name for path in OVERLAYS])
def test_every_overlay_is_taken(overlay: str, cluster: ControlPlane, build: Callable[..., Objects]) -> None:
    for item in build(overlay):
        reply = cluster.apply(item, dry=True)
        assert (reply.status in (200, 201), reply.warnings) == (True, []), (item["metadata"]["name"], reply)


def test_what_is_wrong_is_refused(cluster: ControlPlane, build: Callable[..., Objects]) -> None:
    """The validation of the test above refuses wrong objects."""
    (agent,) = [item for item in build("cpu") if item["kind"] == "DaemonSet"]
    unknown, impossible = copy.deepcopy(agent), copy.deepcopy(agent)
    unknown["spec"]["template"]["spec"]["containers"][0]["lifecycles"] = {}
    impossible["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "many"
    assert cluster.apply(unknown, dry=True).status in (400, 500)
    assert cluster.apply(impossible, dry=True).status in (400, 422, 500)
    (policy,) = [each for each in build("cpu") if each["kind"] == "MutatingAdmissionPolicy"]
    wrong = copy.deepcopy(policy)
    wrong["spec"]["matchConditions"][0]["expression"] = "has(object."
    assert cluster.apply(wrong, dry=True).status == 422


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_services_fit_knatives_definition(path: Path, cluster: ControlPlane, data: Path) -> None:
    service = load(path)
    service["metadata"]["namespace"] = "llm"
    reply = cluster.apply(service, dry=True)
    assert (reply.status in (200, 201), reply.warnings) == (True, []), reply


def test_what_the_document_says_was_done(cluster: ControlPlane, data: Path) -> None:
    def found(path: str) -> Any:
        reply = cluster.ask("GET", path)
        assert reply.status == 200, reply.json
        return reply.json

    for name in ("worker-1", "worker-2"):
        assert found(f"/api/v1/nodes/{name}")["metadata"]["labels"]["glowplug.dev/agent"] == "true"
    agent = found(f"/apis/apps/v1/namespaces/{OURS}/daemonsets/glowplug-agent")
    assert agent["spec"]["template"]["spec"]["nodeSelector"] == {"glowplug.dev/agent": "true"}
    service = found("/apis/serving.knative.dev/v1/namespaces/llm/services/chat")
    assert service["spec"]["template"]["metadata"]["annotations"]["glowplug.dev/model"] == "s3://models/llama-1b"
    for name in ("glowplug-s3", "glowplug-redis", "glowplug-redis-tls", "glowplug-cluster"):
        found(f"/api/v1/namespaces/{OURS}/secrets/{name}")


# --- what becomes of a pod --------------------------------------------------------------------------------------------


def test_a_pod_that_names_a_model_is_given_its_agent(cluster: ControlPlane) -> None:
    """The policies in the server do what the webhook does for older clusters."""
    asked = pod()
    reply = cluster.create(asked, dry=True)
    assert reply.status == 201, reply.json
    assert mounts(reply.json) == INJECTED
    assert reply.json["spec"]["schedulerName"] == "warm-scheduler"
    body = {"request": {"uid": "1", "operation": "CREATE", "object": asked}}
    assert admission.review(body)["response"]["patch"]
    given = reply.json["spec"]
    volumes = {each["name"]: each for each in given["volumes"]}
    assert volumes["glowplug-agent"]["hostPath"] == {"path": "/run/glowplug", "type": "DirectoryOrCreate"}
    (source,) = volumes["glowplug-identity"]["projected"]["sources"]
    assert source["serviceAccountToken"] == {"audience": "glowplug", "expirationSeconds": 3600, "path": "token"}
    variables = {each["name"]: each for each in given["containers"][0]["env"]}
    assert variables["GLOWPLUG_POD"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.uid"
    assert variables["GLOWPLUG_IDENTITY_FILE"]["value"] == "/var/run/secrets/glowplug/token"
    assert all(each["readOnly"] for each in given["containers"][0]["volumeMounts"] if each["name"] in INJECTED.values())


def test_knatives_own_container_is_given_nothing(cluster: ControlPlane) -> None:
    asked = pod()
    asked["spec"]["containers"].append({"name": "queue-proxy", "image": "queue:1"})
    made = cluster.create(asked, dry=True).json
    assert (mounts(made), mounts(made, 1)) == (INJECTED, {})


@pytest.mark.parametrize(
    ("asked", "scheduler"),
    [
        (pod(model=""), "default-scheduler"),
        (pod("plain"), "default-scheduler"),
        (pod(schedulerName="mine"), "mine"),
    ],
    ids=["no model", "namespace not labelled", "scheduler of its own"],
)
def test_whose_scheduler_stays(asked: dict[str, Any], scheduler: str, cluster: ControlPlane) -> None:
    made = cluster.create(asked, dry=True).json
    assert made["spec"]["schedulerName"] == scheduler
    assert mounts(made) == (INJECTED if scheduler == "mine" else {})


@pytest.mark.parametrize(
    "annotations",
    [
        {"glowplug.dev/model": MODEL, "glowplug.dev/inject": "disabled"},
        {"glowplug.dev/model": ""},
        {"glowplug.dev/inject": "enabled"},
    ],
)
def test_who_is_given_nothing(annotations: dict[str, str], cluster: ControlPlane) -> None:
    asked = pod()
    asked["metadata"]["annotations"] = annotations
    reply = cluster.create(asked, dry=True)
    assert (reply.status, mounts(reply.json)) == (201, {})


@pytest.mark.parametrize(
    "model", ["x" * 100_000, "'; drop table", "\u202e\u0000".replace("\u0000", ""), "{{.}}", "$(id)", "a\nb"]
)
def test_hostile_annotations_stay_text(model: str, cluster: ControlPlane) -> None:
    reply = cluster.create(pod(model=model), dry=True)
    assert (reply.status, mounts(reply.json)) == (201, INJECTED)
    assert reply.json["metadata"]["annotations"]["glowplug.dev/model"] == model


def test_a_pod_with_a_mount_of_its_own_stays_as_it_is(cluster: ControlPlane) -> None:
    asked = pod()
    asked["spec"]["volumes"] = [{"name": "glowplug-agent", "emptyDir": {}}]
    asked["spec"]["containers"][0]["volumeMounts"] = [{"name": "glowplug-agent", "mountPath": "/elsewhere"}]
    made = cluster.create(asked, dry=True).json
    assert mounts(made) == {"/elsewhere": "glowplug-agent"}


def test_a_webhook_that_is_down_holds_no_pod_up(cluster: ControlPlane) -> None:
    hook = load(KNATIVE / "components" / "webhook" / "webhook.yaml")
    (port,) = free_ports(1)
    hook["webhooks"][0]["clientConfig"] = {"url": f"https://127.0.0.1:{port}/admission"}
    hook["webhooks"][0]["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": "plain"}}
    cluster.applied(hook)
    try:
        assert cluster.create(pod("plain"), dry=True).status == 201
    finally:
        cluster.delete(hook)


# --- rights -----------------------------------------------------------------------------------------------------------


def test_the_agents_account_may_do_what_it_must_and_no_more(cluster: ControlPlane) -> None:
    token = cluster.token(OURS, "glowplug-agent")

    def may(method: str, path: str, body: Any = None) -> int:
        return cluster.ask(method, path, body, token=token).status

    assert may("GET", "/api/v1/pods?fieldSelector=spec.nodeName%3Dnode-1") == 200
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
    assert may("POST", "/apis/authentication.k8s.io/v1/tokenreviews", review) == 201
    for path in ("/api/v1/secrets", "/api/v1/nodes", "/api/v1/namespaces/llm/configmaps", "/apis/apps/v1/deployments"):
        assert may("GET", path) == 403, path
    assert may("POST", "/api/v1/namespaces/llm/pods", pod()) == 403
    assert may("DELETE", "/api/v1/namespaces/llm/pods/any") == 403


def test_the_agent_hears_that_a_pod_is_being_removed(cluster: ControlPlane, tmp_path: Path) -> None:
    """The kubelet of the pod's node does not confirm its end, as while the pod is being stopped."""
    mine, elsewhere = pod(nodeName="node-w"), pod(nodeName="node-x")
    (uid, other) = (cluster.create(each).json["metadata"]["uid"] for each in (mine, elsewhere))
    heard: queue.Queue[Removal] = queue.Queue()
    account = cluster.account(tmp_path / "account", cluster.token(OURS, "glowplug-agent"))
    witness = Witness(cluster.url, "node-w", heard.put, account)
    witness.start()
    try:
        for each in (elsewhere, mine):
            assert cluster.delete(each, gracePeriodSeconds=77).status == 200
        removal = heard.get(timeout=30)
        assert (removal.uid, removal.name) == (uid, f"llm/{mine['metadata']['name']}")
        assert 60 < removal.grace <= 77
        assert heard.empty(), f"{other} is another node's"
    finally:
        witness.close(5.0)
        for each in (mine, elsewhere):
            cluster.delete(each, gracePeriodSeconds=0)


def test_whose_a_token_is(cluster: ControlPlane, tmp_path: Path) -> None:
    account = cluster.account(tmp_path / "account", cluster.token(OURS, "glowplug-agent"))
    review = TokenReview(Api(cluster.url, account))
    caller = review.check(Identity("kubernetes", cluster.token("llm", "default", "glowplug")))
    assert (caller.namespace, caller.kind) == ("llm", "kubernetes")
    for stranger in (cluster.token("llm", "default"), "e30.e30.c2ln"):  # for another audience; of nobody
        with pytest.raises(AccessDenied):
            review.check(Identity("kubernetes", stranger))


# --- placement --------------------------------------------------------------------------------------------------------


class Placement:
    """A real kube-scheduler with a ConfigMap's configuration, as its ServiceAccount, and our extender beside it."""

    def __init__(self, cluster: ControlPlane, directory: Path, settings: str) -> None:
        self.cluster, self.directory = cluster, directory
        self.port, https = free_ports(2)
        token = cluster.token(OURS, "warm-scheduler")
        config = yaml.safe_load(settings)
        config["clientConnection"] = {"kubeconfig": str(cluster.kubeconfig(directory / "kubeconfig", token))}
        (extender,) = config["extenders"]
        extender["urlPrefix"] = extender["urlPrefix"].replace(":9479/", f":{self.port}/")
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        warm = {name: [f"node-{name}"] for name in ("a", "b")}
        nodes = {name: [self._node(f"node-{each}", warm[name]) for each in "abc"] for name in ("a", "b")}
        models = {f"s3://models/{name}": {"bytes": 4 * GB, "nodes": rows} for name, rows in nodes.items()}
        (directory / "estimates.json").write_text(json.dumps({"models": models}))
        self.extender: subprocess.Popen[bytes] | None = None
        self.start_extender()
        options = [f"--config={directory / 'config.yaml'}", f"--secure-port={https}", "--bind-address=127.0.0.1"]
        self.scheduler = cluster.run([program("KUBE_SCHEDULER"), *options])

    @staticmethod
    def _node(name: str, warm: list[str]) -> dict[str, Any]:
        return {"name": name, "tiers": [{"name": "dram", "bytes": 4 * GB}] if name in warm else []}

    def start_extender(self) -> None:
        command = [sys.executable, "-c", "from cache_agent.cli.main import agent as main; main()", "extender"]
        command += ["--port", str(self.port), "--estimates", str(self.directory / "estimates.json")]
        with (self.directory / "extender.log").open("ab") as log:
            self.extender = subprocess.Popen(command, env=dict(os.environ), stdout=log, stderr=log)
        alive = [*command[:4], "--port", str(self.port), "--check"]
        self.cluster.until(
            lambda: subprocess.run(alive, capture_output=True, timeout=60).returncode == 0, "the extender"
        )

    def stop_extender(self) -> None:
        if self.extender is not None:
            self.extender.terminate()
            self.extender.wait(30)
            self.extender = None

    def put(self, model: str, **annotations: str) -> dict[str, Any]:
        """Create a pod to be placed, with the anti-affinity that Knative gives a revision's replicas."""
        term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "chat"}}}
        shun = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}
        asked = pod(model=model, affinity={"podAntiAffinity": shun})
        asked["metadata"]["annotations"] |= {f"glowplug.dev/{k.replace('_', '-')}": v for k, v in annotations.items()}
        reply = self.cluster.create(asked)
        assert reply.status == 201, reply.json
        return asked

    def node_of(self, asked: Mapping[str, Any]) -> str:
        return str(
            self.cluster.until(lambda: self.cluster.get(asked)["spec"].get("nodeName"), "the pod has a node", 60)
        )

    def close(self) -> None:
        self.stop_extender()
        self.cluster.stop(self.scheduler)


@pytest.fixture(scope="module")
def nodes(cluster: ControlPlane) -> None:
    for name in "abc":
        cluster.node(f"node-{name}")


@pytest.fixture
def placement(
    cluster: ControlPlane, nodes: None, build: Callable[..., Objects], tmp_path: Path
) -> Iterator[Callable[..., Placement]]:
    """Give `placement(*components)`: the scheduler as these components configure it."""
    program("KUBE_SCHEDULER")
    with contextlib.ExitStack() as stack:

        def start(*components: str) -> Placement:
            (settings,) = [
                item["data"]["config.yaml"]
                for item in build("cpu", "scheduler", *components)
                if item["kind"] == "ConfigMap" and item["metadata"]["name"] == "warm-scheduler"
            ]
            made = Placement(cluster, tmp_path, settings)
            stack.callback(made.close)
            return made

        yield start


def test_the_scheduler_asks_the_extender(placement: Callable[..., Placement]) -> None:
    """Replicas go where their model is, against the anti-affinity of their revision, and also without an extender."""
    placed = placement("scheduler-policy")
    pods = [placed.put(model) for model in (MODEL, OTHER) * 3]
    assert [placed.node_of(each) for each in pods] == ["node-a", "node-b"] * 3
    assert placed.node_of(placed.put("s3://models/unknown"))
    placed.stop_extender()
    assert placed.node_of(placed.put(MODEL)), "it is ignorable"


def test_who_must_have_an_agent_waits_for_one(placement: Callable[..., Placement]) -> None:
    """The strict configuration fails closed, and goes on by itself once the extender answers again."""
    placed = placement("scheduler-policy", "scheduler-strict")
    assert placed.node_of(placed.put(MODEL, require_agent="true")) == "node-a"
    placed.stop_extender()
    asked = placed.put(MODEL, require_agent="true")

    def refused() -> bool:
        conditions = placed.cluster.get(asked).get("status", {}).get("conditions", ())
        return any(each["type"] == "PodScheduled" and each["status"] == "False" for each in conditions)

    placed.cluster.until(refused, "the scheduler says that it cannot place the pod", 60)
    assert "nodeName" not in placed.cluster.get(asked)["spec"]
    placed.start_extender()
    assert placed.node_of(asked) == "node-a"
