"""Answers kube-scheduler: which nodes would start a pod's model soonest, and which may run the pod at all.

    POST /scheduler/prioritize   {"Pod": …, "Nodes": null, "NodeNames": [name, …]}
                                 →  [{"Host": name, "Score": 0 … 10}, …]
    POST /scheduler/filter       the same  →  the nodes that may run the pod, and why the others may not

The field names are Go's. Without knowledge all nodes get an equal score, and the scheduler decides by its other
criteria. A pod with the annotation glowplug.dev/require-agent=true passes the filter only for nodes whose agent is
known to live, and for none while that is unknown; all other pods pass for all nodes.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from cache_agent.kube.admission import MODEL
from cache_agent.kube.outlook import Outlook, Unavailable
from cache_agent.kube.routes import JsonAnswer, RequestRefused
from cache_agent.policy import placement

log = logging.getLogger("glowplug.extender")

REQUIRE = "glowplug.dev/require-agent"
_LONGEST_URI = 2048


class _PodMetadata(msgspec.Struct):
    name: str = ""
    generateName: str = ""  # noqa: N815  Kubernetes' name
    namespace: str = ""
    annotations: dict[str, str] | None = None


class _ScheduledPod(msgspec.Struct):
    metadata: _PodMetadata = msgspec.field(default_factory=_PodMetadata)


class _ExtenderArguments(msgspec.Struct):
    """A request of the scheduler. Pods' specifications are not read; whole Node objects go back as they came."""

    Pod: _ScheduledPod
    Nodes: dict[str, Any] | None = None
    NodeNames: list[str] | None = None


_decoder = msgspec.json.Decoder(_ExtenderArguments)


class Extender:
    """The two verbs, each from a request's body to a response."""

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook
        self._complaint = ""  # the last logged reason why nothing is known

    def prioritize(self, body: bytes) -> JsonAnswer:
        """Score the nodes, 0 to 10. Raises `RequestRefused` for what is no request of a scheduler."""
        arguments = _decode(body)
        names = _names(arguments)
        found = placement.scores(self._decisions(arguments, names), names)
        return JsonAnswer(200, msgspec.json.encode([{"Host": name, "Score": found[name]} for name in names]))

    def filter(self, body: bytes) -> JsonAnswer:
        """Divide the nodes into those that may run the pod and the others. Raises `RequestRefused`."""
        arguments = _decode(body)
        names = _names(arguments)
        failed: dict[str, str] = {}
        if (arguments.Pod.metadata.annotations or {}).get(REQUIRE) == "true":
            try:
                alive = self._outlook.alive()
                failed = {name: "no glowplug agent is known to live there" for name in names if name not in alive}
            except Unavailable as error:
                self._complain(error)
                failed = dict.fromkeys(names, f"this pod requires a glowplug agent, and {error}")
            except Exception:
                log.exception("the outlook failed")
                failed = dict.fromkeys(names, "this pod requires a glowplug agent, and where one lives is not known")
        passed = [name for name in names if name not in failed]
        nodes = None
        if arguments.NodeNames is None and arguments.Nodes is not None:
            kept = set(passed)
            nodes = {**arguments.Nodes, "items": [n for n in arguments.Nodes["items"] if n["metadata"]["name"] in kept]}
        result = {
            "Nodes": nodes,
            "NodeNames": passed if nodes is None else None,
            "FailedNodes": failed,
            "FailedAndUnresolvableNodes": {},
            "Error": "",
        }
        return JsonAnswer(200, msgspec.json.encode(result))

    def _decisions(self, arguments: _ExtenderArguments, names: list[str]) -> list[placement.PlacementDecision]:
        metadata = arguments.Pod.metadata
        model = (metadata.annotations or {}).get(MODEL, "")
        if not model or len(model) > _LONGEST_URI:
            return []
        try:
            view = self._outlook.look(model)
        except Unavailable as error:
            self._complain(error)
            return []
        except Exception:
            log.exception("the outlook failed; placing without knowledge")
            return []
        if self._complaint:
            log.warning("placing by what the nodes tell again")
            self._complaint = ""
        return placement.rank(placement.covering(view, names)) if view is not None else []

    def _complain(self, error: Unavailable) -> None:
        """Log a reason once, however many pods come while it lasts."""
        if str(error) != self._complaint:
            self._complaint = str(error)
            log.warning("placing without knowledge, all nodes are equal: %s", error)


def _decode(body: bytes) -> _ExtenderArguments:
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRefused(400, f"this is no request of a scheduler extender: {error}") from error


def _names(arguments: _ExtenderArguments) -> list[str]:
    if arguments.NodeNames is not None:
        return arguments.NodeNames
    if arguments.Nodes is None:
        return []
    try:
        return [str(node["metadata"]["name"]) for node in arguments.Nodes["items"] or ()]
    except (KeyError, TypeError) as error:
        raise RequestRefused(400, "the field Nodes is no list of nodes") from error
