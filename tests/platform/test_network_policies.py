"""The network policies as kustomize builds them: the agent's ports, and the callers that they admit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from manifests import COMBINATIONS, pods

from cache_agent.config import AgentConfig, from_environment
from runtime.commands import objects as render

Objects = list[dict[str, Any]]
Labels = Mapping[str, str]

OURS = "glowplug-system"
AGENT = {"app.kubernetes.io/name": "glowplug-agent"}
REDIS = {"app.kubernetes.io/name": "glowplug-redis"}
PEER_PORT, STATUS_PORT = 8091, 9480


class Who(NamedTuple):
    """A pod somewhere: its namespace with that one's labels, and its own."""

    namespace: str
    namespace_labels: Labels
    labels: Labels


EVERYBODY = {
    "agent": Who(OURS, {}, AGENT),
    "redis": Who(OURS, {}, REDIS),
    "pretender": Who("elsewhere", {}, AGENT),
    "function": Who("llm", {"glowplug.dev/inject": "enabled"}, {"app": "chat"}),
    "declined": Who("llm-2", {"glowplug.dev/inject": "disabled"}, {"app": "chat"}),
    "prometheus": Who("monitoring", {"glowplug.dev/metrics": "enabled"}, {"app": "prometheus"}),
    "stranger": Who("elsewhere", {}, {"app": "anything"}),
}


def selects(selector: Mapping[str, Any], labels: Labels) -> bool:
    """Return whether a label selector selects; an empty one selects everything."""
    assert selector.keys() <= {"matchLabels"}, "the tests know no other"
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def admitted(rules: list[dict[str, Any]], side: str, who: Who, port: int, names: Mapping[str, int]) -> bool:
    """Return whether rules of a policy in our namespace admit traffic from or to (`side`) a pod, by Kubernetes' rules.

    Selectors of one peer must all fit; without a namespace selector it is a pod of the policy's own namespace.
    """
    for rule in rules:
        ports = [names.get(each["port"], each["port"]) for each in rule.get("ports", ()) if each["protocol"] == "TCP"]
        if rule.get("ports") and port not in ports:
            continue
        if not rule.get(side):
            return True
        for peer in rule[side]:
            assert peer.keys() <= {"podSelector", "namespaceSelector"}
            near = (
                selects(peer["namespaceSelector"], who.namespace_labels)
                if "namespaceSelector" in peer
                else who.namespace == OURS
            )
            if near and selects(peer.get("podSelector", {}), who.labels):
                return True
    return False


class Agent(NamedTuple):
    """The agent's objects as kustomize builds them."""

    policy: dict[str, Any]
    ports: dict[str, int]
    settings: AgentConfig

    def lets_in(self, port: int) -> set[str]:
        rules = self.policy["spec"]["ingress"]
        return {name for name, who in EVERYBODY.items() if admitted(rules, "from", who, port, self.ports)}

    def reaches(self, port: int) -> set[str]:
        rules = self.policy["spec"]["egress"]
        return {name for name, who in EVERYBODY.items() if admitted(rules, "to", who, port, self.ports)}


def read(objects: Objects) -> Agent:
    (policy,) = [
        item
        for item in objects
        if item["kind"] == "NetworkPolicy" and selects(item["spec"]["podSelector"], AGENT | {"x": "y"})
    ]
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    pod = dict(pods(objects))["glowplug-agent"]
    (container,) = pod["spec"]["containers"]
    values = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    filled = {name: value.replace("$(POD_IP)", "10.1.2.3") for name, value in values.items()}
    ports = {each["name"]: each["containerPort"] for each in container.get("ports", ())}
    return Agent(policy, ports, from_environment(filled))


@pytest.fixture
def agent(build: Callable[..., Objects]) -> Callable[..., Agent]:
    """Give `agent(*components)`: the agent's objects with these components."""
    return lambda *components: read(build("cpu", *components))


def test_nobody_connects_to_an_agent_that_nothing_was_added_to(agent: Callable[..., Agent]) -> None:
    plain = agent()
    assert plain.lets_in(PEER_PORT) == plain.lets_in(STATUS_PORT) == set()
    assert not plain.settings.agent_listen
    assert plain.settings.status == f"127.0.0.1:{STATUS_PORT}", "for whoever may forward a port into the pod"
    assert plain.reaches(PEER_PORT) == set()


@pytest.mark.parametrize("more", [("token",), ("rights", "metrics")])
def test_agents_and_functions_of_allowed_namespaces_reach_the_peer_port(
    more: tuple[str, ...], agent: Callable[..., Agent]
) -> None:
    found = agent(*more, "redis", "peers")
    assert found.lets_in(PEER_PORT) == {"agent", "function"}
    assert found.reaches(PEER_PORT) == {"agent"}
    assert found.lets_in(STATUS_PORT) == ({"prometheus"} if "metrics" in more else set())
    assert found.ports["agent"] == PEER_PORT
    assert found.settings.agent_listen == f"0.0.0.0:{PEER_PORT}"
    assert found.settings.advertised == f"10.1.2.3:{PEER_PORT}", "where other nodes' agents find it"
    assert found.settings.cluster_key_file is not None
    assert found.settings.redis_url, "which tells agents of each other"


def test_metrics_are_for_namespaces_that_are_labelled_so(agent: Callable[..., Agent]) -> None:
    found = agent("token", "metrics")
    assert found.lets_in(STATUS_PORT) == {"prometheus"}
    assert found.lets_in(PEER_PORT) == set()
    assert found.ports["status"] == STATUS_PORT
    assert found.settings.status == f"0.0.0.0:{STATUS_PORT}"
    assert found.settings.status_open == ("healthz", "metrics")


def test_what_others_can_reach_asks_who_they_are(build: Callable[..., Objects]) -> None:
    for components in COMBINATIONS:
        settings = read(build("cpu", *components)).settings
        beyond = settings.agent_listen or not settings.status.startswith("127.0.0.1:")
        asks = settings.identity == "kubernetes" or settings.token_file is not None
        assert asks or not beyond, components


def test_every_container_port_is_one_that_the_agent_listens_on(build: Callable[..., Objects]) -> None:
    for components in COMBINATIONS:
        found = read(build("cpu", *components))
        listens = [found.settings.agent_listen, found.settings.status]
        own = {int(port) for _, _, port in (each.rpartition(":") for each in listens if each.startswith("0.0.0.0:"))}
        assert set(found.ports.values()) == own, components


@pytest.mark.parametrize("platform", ["knative", "openfaas"])
def test_a_function_without_a_mount_finds_its_own_nodes_agent(platform: str, build: Callable[..., Objects]) -> None:
    (service,) = [
        item
        for item in build("cpu", "token", "redis", "peers")
        if item["kind"] == "Service" and item["metadata"]["name"] == "glowplug-agent"
    ]
    assert service["spec"]["internalTrafficPolicy"] == "Local"
    assert selects({"matchLabels": service["spec"]["selector"]}, AGENT)
    function = render.Function(name="chat", image="i", model="s3://m/a", inject="tcp", token_secret="glowplug-token")
    (made,) = getattr(render, platform)(function)
    (address,) = [value for name, value in environment(made) if name == "GLOWPLUG_SOCKET"]
    url = urlsplit(address)
    host = "{name}.{namespace}.svc".format(**service["metadata"])
    assert (url.scheme, url.hostname, url.port) == ("tcp", host, service["spec"]["ports"][0]["port"])
    assert "glowplug-token" in str(made), "it shows a token"


def environment(made: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "functions" in made:
        (function,) = made["functions"].values()
        yield from function["environment"].items()
    else:
        (container,) = made["spec"]["template"]["spec"]["containers"]
        yield from ((each["name"], each.get("value", "")) for each in container["env"])
