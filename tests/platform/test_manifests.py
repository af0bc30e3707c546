"""The Kubernetes objects in knative/: strictly valid, consistent with each other, with as few rights as they say."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import click
import pytest
import redis
import yaml
from manifests import (
    COMBINATIONS,
    EXAMPLES,
    KNATIVE,
    KUSTOMIZATIONS,
    OBJECTS,
    OVERLAYS,
    POOL,
    ROOT,
    Schema,
    containers,
    load,
    pods,
)
from redis.backoff import NoBackoff
from redis.retry import Retry

from cache_agent.access import rights
from cache_agent.cli.main import agent as main
from cache_agent.config import AgentConfig, from_environment, parse_size
from cache_agent.policy.rights import Caller
from runtime.cli import main as glowplug
from runtime.commands.pool import pool
from runtime.config import DEFAULT_SOCKET, FunctionConfig


@pytest.fixture(params=[overlay.name for overlay in OVERLAYS])
def overlay(request: pytest.FixtureRequest, build: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return build(request.param)


@pytest.fixture(params=COMBINATIONS, ids="+".join)
def combined(request: pytest.FixtureRequest, build: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return build("cpu", *request.param)


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: str(path.relative_to(KNATIVE)))
def test_each_file_holds_one_object(path: Path) -> None:
    objects = list(yaml.safe_load_all(path.read_text()))
    assert len(objects) == 1
    assert objects[0]["metadata"]["name"]


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: str(path.parent.relative_to(KNATIVE)))
def test_a_kustomization_lists_the_files_beside_it(path: Path) -> None:
    settings = load(path)
    patches = [patch["path"] for patch in settings.get("patches", ())]
    named = [*settings.get("resources", ()), *patches]
    local = {name for name in named if not name.startswith("../")}
    assert local == {file.name for file in path.parent.glob("*.yaml")} - {path.name}
    for name in [*named, *settings.get("components", ())]:
        assert (path.parent / name).exists(), name


def test_manifests_are_strictly_valid(combined: list[dict[str, Any]], schema: Callable[[str, str], Schema]) -> None:
    for item in combined:
        assert not schema(item["apiVersion"], item["kind"]).problems(item), item["metadata"]["name"]


def test_overlays_are_strictly_valid(overlay: list[dict[str, Any]], schema: Callable[[str, str], Schema]) -> None:
    for item in overlay:
        assert not schema(item["apiVersion"], item["kind"]).problems(item), item["metadata"]["name"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_services_are_strictly_valid(path: Path, schema: Callable[[str, str], Schema]) -> None:
    service = load(path)
    assert not schema(service["apiVersion"], service["kind"]).problems(service)


def test_validation_is_strict(schema: Callable[[str, str], Schema]) -> None:
    """The validation finds what Kubernetes refuses, and what it silently forgets."""
    service = load(KNATIVE / "examples" / "function.yaml")
    spec = service["spec"]["template"]["spec"]
    spec["containers"][0] |= {"lifecycle": {}, "imagePullPolicy": 3}
    spec["terminationGracePeriodSeconds"] = 60
    found = schema("serving.knative.dev/v1", "Service").problems(service)
    assert [problem.rpartition(".")[2] for problem in found] == [
        "lifecycle: unknown field",
        "imagePullPolicy: 3 is no string",
        "terminationGracePeriodSeconds: unknown field",
    ]
    agent = load(KNATIVE / "base" / "agent-daemonset.yaml")
    agent["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "many"
    del agent["spec"]["selector"]
    found = schema("apps/v1", "DaemonSet").problems(agent)
    assert [problem.partition(": ")[2] for problem in found] == ["missing", "'many' is no quantity"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_gated_field_has_its_flag(path: Path, schema: Callable[[str, str], Schema], data: Path) -> None:
    patch = load(KNATIVE / "config-features.patch.yaml")["data"]
    service = load(path)
    needed = schema(service["apiVersion"], service["kind"]).flags(service)
    if "fieldRef" in path.read_text():
        needed.add("kubernetes.podspec-fieldref")
    known = yaml.safe_load(load(data / "knative" / "config-features.reference.yaml")["data"]["_example"])
    needed = {flag for flag in needed if known[flag] != "enabled"}
    assert needed == (set(patch) if path.name == "function-fields.yaml" else set())
    # Knative takes the word itself and nothing like it: "true" or "Enabled " leave a flag as it was.
    assert set(patch.values()) == {"enabled"}
    assert set(patch) <= set(known)


def test_nothing_is_privileged(combined: list[dict[str, Any]]) -> None:
    for name, pod in pods(combined):
        if name == POOL:
            continue
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & spec.keys(), name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["securityContext"]["runAsNonRoot"]
        for container in containers(pod):
            context = container["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}, container["name"]
            assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
            assert "privileged" not in context
            # One exception: it owns the directories that the kubelet made.
            assert (context.get("runAsUser") == 0) == (container["name"] == "directories")
        paths = {volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
        assert paths == ({"/run/glowplug", "/var/lib/glowplug"} if name == "glowplug-agent" else set())


def test_the_pool_is_as_privileged_as_it_must_be_and_no_more(build: Callable[..., list[dict[str, Any]]]) -> None:
    objects = build("cpu", "pool")
    (pod,) = [pod for name, pod in pods(objects) if name == POOL]
    spec = pod["spec"]
    (container,) = containers(pod)
    assert spec["hostPID"]
    assert not {"hostNetwork", "hostIPC"} & spec.keys()
    assert container["securityContext"] == {"privileged": True, "runAsUser": 0, "readOnlyRootFilesystem": True}
    assert spec["nodeSelector"], "only on nodes that were chosen"
    (policy,) = [item for item in objects if item["kind"] == "NetworkPolicy" and item["metadata"]["name"] == POOL]
    assert (policy["spec"]["ingress"], policy["spec"]["egress"]) == ([], [])
    # Its socket, and the agent's, are where both are looked for.
    assert {str(Path(FunctionConfig.pool).parent), str(Path(DEFAULT_SOCKET).parent)} <= {
        mount["mountPath"] for mount in container["volumeMounts"]
    }
    program, command, *_ = container["command"]
    assert (program, command) == ("glowplug", "pool")
    parsed = understood(glowplug, pool, container["args"])
    assert parsed["kinds"] == ("llama", "qwen2")
    assert (parsed["path"], parsed["agent"]) == (FunctionConfig.pool, DEFAULT_SOCKET)
    # Both images have it, and what is imported by different settings is not shared.
    images = (ROOT / "templates/llm-python/Dockerfile", KNATIVE / "images/function.Dockerfile")
    for variable in container["env"]:
        assert all(f"{variable['name']}={variable['value']} " in image.read_text() for image in images)


def test_every_container_has_bounds(combined: list[dict[str, Any]]) -> None:
    for _, pod in pods(combined):
        for container in containers(pod):
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert "memory" in container["resources"]["limits"]


def test_memory_covers_the_weights(overlay: list[dict[str, Any]]) -> None:
    """Pages of a memfd are charged to the agent's container; without room it would be killed with all its models."""
    ((_, pod),) = pods(overlay)
    (agent,) = pod["spec"]["containers"]
    settings = {variable["name"]: variable.get("value") for variable in agent["env"]}
    limits, requests = agent["resources"]["limits"], agent["resources"]["requests"]
    huge = settings["GLOWPLUG_HUGE_PAGES"] == "always"
    assert ("hugepages-2Mi" in limits) == huge
    room = parse_size(limits["hugepages-2Mi"]) if huge else parse_size(limits["memory"]) - (1 << 30)
    assert parse_size(settings["GLOWPLUG_DRAM"]) <= room
    for name in limits:
        assert requests[name] == limits[name], "memory that weights are promised must be the agent's own"


def test_settings_exist(combined: list[dict[str, Any]]) -> None:
    agent = {f"GLOWPLUG_{field.name.upper()}" for field in dataclasses.fields(AgentConfig)}
    for part, pod in pods(combined):
        for container in containers(pod) if part != POOL else ():  # its variables are a function's
            variables = {variable["name"]: variable.get("value", "") for variable in container.get("env", ())}
            referred = {name for value in variables.values() for name in re.findall(r"\$\((\w+)\)", value)}
            assert variables.keys() - referred <= agent
            order = list(variables)  # Kubernetes fills in only what stands before
            for name, value in variables.items():
                for other in re.findall(r"\$\((\w+)\)", value):
                    assert order.index(other) < order.index(name)
    function = {f"GLOWPLUG_{field.name.upper()}" for field in dataclasses.fields(FunctionConfig)}
    for path in EXAMPLES:
        (container,) = load(path)["spec"]["template"]["spec"]["containers"]
        assert {variable["name"] for variable in container["env"]} <= function


def test_rights_are_the_least(combined: list[dict[str, Any]]) -> None:
    rules = [rule for item in combined if item["kind"] in ("Role", "ClusterRole") for rule in item["rules"]]
    asked = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    allowed = {("pods", "list"), ("pods", "watch"), ("leases", "create"), ("leases", "get"), ("leases", "update")}
    if any(item["metadata"]["name"] == "glowplug-rights" for item in combined):
        allowed.add(("tokenreviews", "create"))
    assert asked <= allowed
    accounts = {item["metadata"]["name"] for item in combined if item["kind"] == "ServiceAccount"}
    bound = set()
    for item in combined:
        if item["kind"] in ("RoleBinding", "ClusterRoleBinding"):
            assert {subject["namespace"] for subject in item["subjects"]} == {"glowplug-system"}
            bound |= {subject["name"] for subject in item["subjects"]}
    assert bound <= accounts
    for name, pod in pods(combined):
        account = pod["spec"]["serviceAccountName"]
        assert account in accounts, name
        assert pod["spec"]["automountServiceAccountToken"] == (account in bound), f"{name} needs no token"


def test_the_rights_are_some_that_the_agent_reads(tmp_path: Path) -> None:
    text = load(KNATIVE / "components" / "rights" / "configmap.yaml")["data"]["rights.toml"]
    (tmp_path / "rights.toml").write_text(text)
    found = rights.read(tmp_path / "rights.toml")
    assert found.of(Caller("", "operator", "token")).admin
    assert not found.of(Caller("other", "default", "kubernetes")).models
    (patch,) = load(KNATIVE / "components" / "rights" / "agent.yaml")["spec"]["template"]["spec"]["containers"]
    settings = from_environment({variable["name"]: variable["value"] for variable in patch["env"]})
    assert (settings.identity, settings.rights) == ("kubernetes", Path("/etc/glowplug/rights/rights.toml"))


def test_names_and_labels_agree(combined: list[dict[str, Any]]) -> None:
    labelled = {name: pod["metadata"]["labels"] for name, pod in pods(combined)}
    ports = {port["name"] for _, pod in pods(combined) for part in containers(pod) for port in part.get("ports", ())}
    maps = {item["metadata"]["name"] for item in combined if item["kind"] == "ConfigMap"}
    policies = {item["metadata"]["name"] for item in combined if item["kind"] == "MutatingAdmissionPolicy"}
    for item in combined:
        kind, spec = item["kind"], item.get("spec", {})
        if kind in ("DaemonSet", "Deployment"):
            assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
        selector = {
            "Service": lambda spec: spec["selector"],
            "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
        }.get(kind)
        if selector:
            assert selector(spec).items() <= labelled[item["metadata"]["name"]].items()
        if kind == "Service":
            assert {port["targetPort"] for port in spec["ports"]} <= ports
        if kind == "MutatingAdmissionPolicyBinding":
            assert spec["policyName"] in policies
        if item["metadata"].get("namespace"):
            assert item["metadata"]["namespace"] == "glowplug-system"
    for _, pod in pods(combined):
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", ())}
        for container in containers(pod):
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes.keys()
        assert {volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume} <= maps
    assert set(labelled) == {item["metadata"]["name"] for item in combined if item["kind"] == "NetworkPolicy"}


def test_overlays_name_an_image(overlay: list[dict[str, Any]]) -> None:
    for _, pod in pods(overlay):
        for container in containers(pod):
            name, _, tag = container["image"].rpartition(":")
            assert "/" in name
            assert tag != "latest"


def test_scheduler_asks_the_extender_where_it_listens(build: Callable[..., list[dict[str, Any]]]) -> None:
    for strict in (False, True):
        objects = build("cpu", "scheduler", *(["scheduler-strict"] if strict else []))
        found = {item["kind"]: item for item in objects if item["metadata"]["name"] == "warm-scheduler"}
        settings = yaml.safe_load(found["ConfigMap"]["data"]["config.yaml"])
        (extender,) = settings["extenders"]
        assert extender["ignorable"] == (not strict), "closed only where that is the point"
        assert ("filterVerb" in extender) == strict
        assert (extender["weight"], extender["nodeCacheCapable"], extender["httpTimeout"]) == (10, True, "200ms")
        assert settings["percentageOfNodesToScore"] == 100
        assert settings["profiles"] == [{"schedulerName": "warm-scheduler"}]
        lease = settings["leaderElection"]
        role = found["Role"]
        assert role["metadata"]["namespace"] == lease["resourceNamespace"]
        assert role["rules"][1]["resourceNames"] == [lease["resourceName"]]
        scheduler, beside = found["Deployment"]["spec"]["template"]["spec"]["containers"]
        assert re.search(r"127\.0\.0\.1:(\d+)/scheduler", extender["urlPrefix"])[1] in beside["args"]  # type: ignore[index]
        (mount,) = scheduler["volumeMounts"]
        assert f"--config={mount['mountPath']}/config.yaml" in scheduler["command"]


def test_what_is_down_or_slow_holds_no_pod_up(combined: list[dict[str, Any]]) -> None:
    """Policies and the webhook fail open, the webhook within two seconds, and neither runs twice."""
    for item in combined:
        if item["kind"] == "MutatingAdmissionPolicy":
            assert item["spec"]["failurePolicy"] == "Ignore"
        for webhook in item.get("webhooks", ()):
            assert (webhook["failurePolicy"], webhook["reinvocationPolicy"]) == ("Ignore", "Never")
            assert webhook["timeoutSeconds"] <= 2
            assert webhook["namespaceSelector"] == {"matchLabels": {"glowplug.dev/inject": "enabled"}}, "ours only"


def test_no_apply_configuration_sets_what_is_atomic(schema: Callable[[str, str], Schema]) -> None:
    """The API server accepts such a policy, fails to carry it out for every pod, and ignores the failure."""
    paths = set()
    for policy in [load(path) for path in OBJECTS if path.name in ("policy.yaml", "inject-policy.yaml")]:
        assert policy["kind"] == "MutatingAdmissionPolicy"
        for mutation in policy["spec"]["mutations"]:
            text = mutation.get("applyConfiguration", {}).get("expression", "")
            paths |= set(re.findall(r"\bObject((?:\.\w+)*)\s*\{", text))
            paths |= {f".spec.{name}" for name in re.findall(r"Object\.spec\{(\w+):", text)}
    assert paths, "there is one"
    pod = schema("v1", "Pod")
    for place in paths:
        for part in pod.along(list(filter(None, place.split(".")))):
            kinds = {part.get(f"x-kubernetes-{kind}-type") for kind in ("list", "map")}
            assert "atomic" not in kinds, place


def test_the_injection_is_not_one(schema: Callable[[str, str], Schema]) -> None:
    """An apply configuration could not set what a function needs."""
    pod = schema("v1", "Pod")
    for place in ("spec.volumes.projected.sources", "spec.containers.env.valueFrom.fieldRef"):
        found = pod.along(place.split("."))
        assert "atomic" in {part.get(f"x-kubernetes-{kind}-type") for part in found for kind in ("list", "map")}


def understood(group: click.Group, command: click.Command, arguments: list[str]) -> dict[str, Any]:
    """Parse arguments like the command line: below the command's group."""
    parent = click.Context(group, **group.context_settings)
    return command.make_context(command.name, list(arguments), parent=parent).params


def test_commands_take_their_arguments(combined: list[dict[str, Any]]) -> None:
    """The command line of our image parses the manifests' arguments and probes."""
    for name, pod in pods(combined):
        for container in pod["spec"]["containers"]:
            lines = (
                [container["args"]] if "glowplug-agent" in container["image"] or "/agent:" in container["image"] else []
            )
            probes = [container.get(f"{kind}Probe", {}).get("exec") for kind in ("startup", "liveness", "readiness")]
            lines += [
                probe["command"][2:] for probe in probes if probe and probe["command"][:2] == ["glowplug", "agent"]
            ]
            assert lines or "args" not in container or name == POOL, name
            for command, *arguments in lines:
                understood(main, main.commands[command], arguments)


def test_names_no_place_of_one_machine() -> None:
    allowed = {"127.0.0.1", "github.com", "kubernetes.default.svc"}
    for path in KNATIVE.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert set(re.findall(r"https?://([\w.-]+)", text)) <= allowed, path
            assert str(ROOT) not in text, path


def test_redis_and_its_clients_agree(build: Callable[..., list[dict[str, Any]]]) -> None:
    """Each role gets its own URL, over TLS, and its own password of the secret."""
    objects = build("cpu", "scheduler", "redis")
    found = {name: pod["spec"] for name, pod in pods(objects)}
    (service,) = [item for item in objects if item["kind"] == "Service"]
    (maps,) = [item for item in objects if item["kind"] == "ConfigMap" and item["metadata"]["name"] == "glowplug-redis"]
    users = dict(re.findall(r"^user (\w+) on #(\w+)", maps["data"]["users.acl"], re.MULTILINE))
    asked = set()
    for owner, part, role in (("glowplug-agent", "agent", "agent"), ("warm-scheduler", "extender", "placer")):
        (container,) = [each for each in found[owner]["containers"] if each["name"] == part]
        config = from_environment({item["name"]: item["value"] for item in container["env"] if "value" in item})
        url = urlsplit(config.redis_url)
        host = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
        assert (url.scheme, url.username, url.hostname, url.password) == ("rediss", role, host, None)
        assert url.port == service["spec"]["ports"][0]["port"]
        assert role in users
        (mount,) = [each for each in container["volumeMounts"] if each["name"] == "redis"]
        (volume,) = [each for each in found[owner]["volumes"] if each["name"] == "redis"]
        items = {source["secret"]["items"][0]["path"]: source["secret"] for source in volume["projected"]["sources"]}
        assert {str(config.redis_password_file), parse_qs(url.query)["ssl_ca_certs"][0]} == {
            f"{mount['mountPath']}/{path}" for path in items
        }
        assert items[f"{role}-password"]["items"][0]["key"] == f"{role}-password"
        asked |= {secret["secretName"] if "secretName" in secret else secret["name"] for secret in items.values()}
    own = {volume["secret"]["secretName"] for volume in found["glowplug-redis"]["volumes"] if "secret" in volume}
    assert asked == own


# --- Redis' roles, in a real server -----------------------------------------------------------------------------------


@pytest.fixture
def roles(redis_roles: Callable[[str], tuple[str, Path]]) -> Iterator[Callable[[str, str], redis.Redis]]:
    """Give `roles(user, password)`: a client of a server with the ConfigMap's ACL; the right password by default."""
    with contextlib.ExitStack() as stack:

        def client(user: str, password: str | None = None) -> redis.Redis:
            url, path = redis_roles(user or "agent")
            word = path.read_text().strip() if password is None and path.exists() else password
            options = {"username": user or None, "password": word or None, "decode_responses": True}
            options["retry"] = Retry(NoBackoff(), 0)  # a refusal is what is looked for
            return stack.enter_context(redis.Redis(unix_socket_path=url.partition("@")[2], **options))

        yield client


def test_redis_roles(roles: Callable[..., redis.Redis]) -> None:
    agent, placer = roles("agent"), roles("placer")
    for key in ("glowplug:node:a:heartbeat", "glowplug:claim:x", "glowplug:snapshot:y"):
        assert agent.set(key, "1", px=60_000)
        assert agent.eval("return redis.call('get', KEYS[1])", 1, key) == "1"
        assert placer.get(key) == "1"
        with pytest.raises(redis.exceptions.NoPermissionError):
            placer.set(key, "2")
    assert agent.get("glowplug:model:z") is None
    for refused in (
        lambda: agent.set("glowplug:model:z", "1"),
        lambda: agent.get("another's"),
        lambda: agent.eval("return redis.call('set', 'elsewhere', '1')", 0),
        lambda: agent.flushall(),
        lambda: agent.config_get(),
        lambda: agent.acl_list(),
        lambda: agent.keys("*"),
        lambda: placer.eval("return 1", 0),
        lambda: placer.publish("glowplug:x", "1"),
    ):
        with pytest.raises(redis.exceptions.ResponseError):
            refused()
    for nobody in (roles("", ""), roles("agent", "guess"), roles("default", "")):
        with pytest.raises((redis.exceptions.AuthenticationError, redis.exceptions.ResponseError)):
            nobody.get("glowplug:claim:x")
