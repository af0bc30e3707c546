"""The platform's objects for one function, Knative's or OpenFaaS's, from the facts that its developer knows. Pure.

The two platforms count time differently. All times in the objects follow from one number of seconds, `timeout`: how
long one answer may take.

    Knative    a deleted pod has `timeout` seconds in all, and SIGTERM comes 30 s after its last request arrived
    OpenFaaS   a deleted pod has write_timeout + 2 s in all, SIGTERM comes at once, and for healthcheck_interval more
               requests are sent
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from cache_agent.errors import AgentError
from cache_agent.kube import admission
from cache_agent.model.uri import parse_uri
from runtime.config import FunctionConfig
from runtime.errors import BadConfig

Inject = Literal["policy", "fields", "tcp", "none"]
Objects = list[dict[str, Any]]

MODEL_ANNOTATION = "glowplug.dev/model"
INJECT_ANNOTATION = "glowplug.dev/inject"
AGENT_ADDRESS = "tcp://glowplug-agent.glowplug-system.svc:8091"  # knative/components/peers: the agent of the pod's node

_LATE_SIGTERM, _MARGIN = 30, 10  # Knative's quiet time before SIGTERM, and what routes and exits may take
_OPENFAAS_LINGER, _OPENFAAS_MARGIN = 6, 14  # a second above the template's healthcheck_interval; grace and that
_KNATIVE_MAX = 600
_USER = 12000
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|[kMGT]i?|Ki)?")
_DURATION = re.compile(r"([0-9]+(h|m|s))+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OWN = {f"GLOWPLUG_{name}" for name in ("MODEL", "HOST", "SLOTS", "ANSWER_LIMIT", "DRAIN_LINGER", "DRAIN_GRACE")}
_OWN |= {"PORT"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """The facts about a function. `timeout` and `start_timeout` in seconds; `memory`, `cpu` as Kubernetes quantities.

    `inject` says how a pod gets to its agent: by the cluster's `policy`, by `fields` of the Service (Knative), which
    need feature flags, over `tcp`, for a copy of the weights of its own, or not at all (`none`: it keeps an agent of
    its own). `retention` is how long the last replica stays after its last request, "" for the platform's default.
    Raises `BadConfig`.
    """

    name: str
    image: str
    model: str
    namespace: str = ""
    slots: int = FunctionConfig.slots
    timeout: int = 300
    start_timeout: int = 600
    memory: str = "4Gi"
    cpu: str = "1"
    min_scale: int = 0
    max_scale: int = 0
    retention: str = ""
    inject: Inject = "policy"
    scheduler: str = ""
    token_secret: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, text in (("name", self.name), ("namespace", self.namespace), ("token secret", self.token_secret)):
            if (text or what == "name") and not _NAME.fullmatch(text):
                raise BadConfig(
                    f"the {what} {text!r} is none for Kubernetes: lower-case letters, digits and -, 63 at most"
                )
        if not self.image or self.image != "".join(self.image.split()):
            raise BadConfig(f"the image {self.image!r} is none; name it like registry.example.com/team/chat:1")
        for option, quantity in (("memory", self.memory), ("cpu", self.cpu)):
            if not _QUANTITY.fullmatch(quantity):
                raise BadConfig(f"--{option} is {quantity!r}; use a Kubernetes quantity, like 4Gi or 500m")
        if self.retention and not _DURATION.fullmatch(self.retention):
            raise BadConfig(f"--retention is {self.retention!r}; use a duration like 10m or 1h30m")
        if self.slots < 1 or self.min_scale < 0 or self.max_scale < 0 or self.start_timeout < 1:
            raise BadConfig("slots and start timeout must be at least 1; scales at least 0")
        if self.max_scale and self.max_scale < self.min_scale:
            raise BadConfig(f"--max-scale {self.max_scale} is below --min-scale {self.min_scale}")
        if self.inject not in get_args(Inject):
            raise BadConfig(f"inject is {self.inject!r}; it can be policy, fields, tcp or none")
        if self.inject == "tcp" and not self.token_secret:
            raise BadConfig("--inject tcp needs --token-secret: over TCP an agent asks everybody who he is")
        for name in self.environment:
            if not _VARIABLE.fullmatch(name) or name in _OWN:
                raise BadConfig(f"--env {name}: " + ("an option sets it" if name in _OWN else "no name of a variable"))
        try:
            if "://" in self.model:
                parse_uri(self.model)
            elif not self.model.startswith("/"):
                raise BadConfig(f"the model {self.model!r} is neither a URI nor an absolute directory of the image")
        except AgentError as error:
            raise BadConfig(error.text) from error


def knative(function: Function) -> Objects:
    """Return Knative's Service. Raises `BadConfig` for a timeout that Knative does not allow."""
    least = _LATE_SIGTERM + 2 * _MARGIN
    if not least <= function.timeout <= _KNATIVE_MAX:
        raise BadConfig(
            f"--timeout is {function.timeout}; Knative allows {_KNATIVE_MAX} at most, and below {least} "
            "nothing is left for a request when SIGTERM comes"
        )
    fields = function.inject == "fields"
    spec: dict[str, Any] = {
        # One request per slot: the others wait in queue-proxy, where the autoscaler counts them.
        "containerConcurrency": function.slots,
        "timeoutSeconds": function.timeout,
        "responseStartTimeoutSeconds": function.timeout,
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
    }
    if fields and function.scheduler:
        spec["schedulerName"] = function.scheduler
    spec |= {"containers": [_container(function)], "volumes": _volumes(function)}
    metadata: dict[str, Any] = {"name": function.name}
    if function.namespace:
        metadata["namespace"] = function.namespace
    template = {"metadata": {"annotations": _annotations(function)}, "spec": spec}
    return [
        {
            "apiVersion": "serving.knative.dev/v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"template": template},
        }
    ]


def openfaas(function: Function, gateway: str = "http://127.0.0.1:8080") -> Objects:
    """Return OpenFaaS's stack file. Scaling to zero is not in it: labels of the Pro edition do that.

    Raises `BadConfig` for options that OpenFaaS cannot express.
    """
    for wanted, option in (
        (function.retention, "--retention: on OpenFaaS scaling down is a label of the Pro edition"),
        (function.inject == "fields", "--inject fields: no edition of OpenFaaS lets a function mount a directory"),
        (function.timeout <= _OPENFAAS_MARGIN, f"--timeout: more than {_OPENFAAS_MARGIN} s are needed to end well"),
    ):
        if wanted:
            raise BadConfig(option)
    seconds = f"{function.timeout}s"
    environment = {
        "GLOWPLUG_MODEL": function.model,
        "GLOWPLUG_SLOTS": str(function.slots),
        "GLOWPLUG_START_TIMEOUT": str(function.start_timeout),
        "GLOWPLUG_ANSWER_LIMIT": str(function.timeout - _MARGIN),
        "read_timeout": seconds,
        "write_timeout": seconds,
        "exec_timeout": seconds,
        "healthcheck_interval": f"{_OPENFAAS_LINGER - 1}s",
        "GLOWPLUG_DRAIN_LINGER": str(_OPENFAAS_LINGER),
        "GLOWPLUG_DRAIN_GRACE": str(function.timeout - _OPENFAAS_MARGIN),
    }
    entry: dict[str, Any] = {
        "lang": "llm-python",
        "handler": f"./{function.name}",
        "image": function.image,
        "annotations": _model_annotations(function),
        "environment": environment,
        "requests": {"memory": function.memory, "cpu": function.cpu},
        "limits": {"memory": function.memory},
    }
    if function.namespace:
        entry["namespace"] = function.namespace
    environment |= _hand_off(function)
    if function.inject == "tcp":
        environment["GLOWPLUG_SOCKET"] = AGENT_ADDRESS
    if function.token_secret:
        environment["GLOWPLUG_TOKEN_FILE"] = f"/var/openfaas/secrets/{function.token_secret}"
        entry["secrets"] = [function.token_secret]
    environment.update(function.environment)
    labels = {
        label: str(scale)
        for label, scale in (
            ("com.openfaas.scale.min", function.min_scale),
            ("com.openfaas.scale.max", function.max_scale),
        )
        if scale
    }
    if labels:
        entry["labels"] = labels
    stack = {"version": 1.0, "provider": {"name": "openfaas", "gateway": gateway}, "functions": {function.name: entry}}
    return [stack]


def _hand_off(function: Function) -> dict[str, str]:
    """Turn hand-off on for a function with several replicas that share an agent by its socket.

    The namespace in the name keeps functions of the same name apart.
    """
    if max(function.min_scale, function.max_scale) < 2 or function.inject not in ("policy", "fields"):
        return {}
    return {"GLOWPLUG_HANDOFF": f"{function.namespace}/{function.name}" if function.namespace else function.name}


def _model_annotations(function: Function) -> dict[str, str]:
    annotations = {MODEL_ANNOTATION: function.model}
    if function.inject != "policy":
        annotations[INJECT_ANNOTATION] = "disabled"
    return annotations


def _annotations(function: Function) -> dict[str, str]:
    annotations = _model_annotations(function)
    annotations["serving.knative.dev/progress-deadline"] = f"{function.start_timeout}s"
    scaling = {
        "min-scale": str(function.min_scale or ""),
        "max-scale": str(function.max_scale or ""),
        "scale-to-zero-pod-retention-period": function.retention,
    }
    return annotations | {f"autoscaling.knative.dev/{name}": text for name, text in scaling.items() if text}


def _container(function: Function) -> dict[str, Any]:
    environment = {
        "GLOWPLUG_MODEL": function.model,
        # The image listens on loopback, for its watchdog; here queue-proxy connects from outside.
        "GLOWPLUG_HOST": "0.0.0.0",  # noqa: S104
        "GLOWPLUG_SLOTS": str(function.slots),
        "GLOWPLUG_START_TIMEOUT": str(function.start_timeout),
        # Knative would end a stream with a text of its own and status 200.
        "GLOWPLUG_ANSWER_LIMIT": str(function.timeout - _MARGIN),
        # When SIGTERM comes, no request has come for 30 s.
        "GLOWPLUG_DRAIN_LINGER": "0",
        "GLOWPLUG_DRAIN_GRACE": str(function.timeout - _LATE_SIGTERM - _MARGIN),
    }
    environment |= _hand_off(function)
    if function.inject == "tcp":
        environment["GLOWPLUG_SOCKET"] = AGENT_ADDRESS
    mounts: Objects = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108  the container's own
    if function.token_secret:
        environment["GLOWPLUG_TOKEN_FILE"] = "/etc/glowplug/token/token"  # noqa: S105
        mounts.append({"name": "glowplug-token", "mountPath": "/etc/glowplug/token", "readOnly": True})
    environment.update(function.environment)
    variables: Objects = [{"name": name, "value": value} for name, value in environment.items()]
    if function.inject == "fields":
        mounts += admission.mounts()
        variables += admission.variables()
    return {
        "name": "function",
        "image": function.image,
        # The image's own command starts of-watchdog, which Knative's queue-proxy stands in for.
        "command": ["glowplug-shim"],
        "ports": [{"containerPort": 8080}],
        "env": variables,
        "resources": {
            "requests": {"cpu": function.cpu, "memory": function.memory},
            "limits": {"memory": function.memory},
        },
        # A period of 0 lets queue-proxy probe every few milliseconds until it is ready.
        "readinessProbe": {"httpGet": {"path": "/_/ready"}, "periodSeconds": 0, "successThreshold": 1},
        "livenessProbe": {
            "httpGet": {"path": "/_/health"},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
        },
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": mounts,
    }


def _volumes(function: Function) -> Objects:
    volumes: Objects = [{"name": "tmp", "emptyDir": {}}]
    if function.token_secret:
        volumes.append({"name": "glowplug-token", "secret": {"secretName": function.token_secret}})
    if function.inject == "fields":
        volumes += admission.volumes()
    return volumes
