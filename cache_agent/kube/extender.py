"""Answers kube-scheduler: which of these nodes would start this pod's model soonest, and which may run it at all.

    POST /scheduler/prioritize   {"Pod": …, "Nodes": null, "NodeNames": [name, …]}
                                 →  [{"Host": name, "Score": 0 … 10}, …]
    POST /scheduler/filter       the same  →  which nodes may, and why the others may not

The field names are Go's. Prioritizing never fails for want of knowledge: then all nodes are equal, and the scheduler
goes by its own reasons. Filtering lets every pod through, except those that ask not to run without an agent
(annotation glowplug.dev/require-agent=true): they go where an agent is known to live, and nowhere if nobody knows.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from cache_agent.kube.admission import MODEL
from cache_agent.kube.outlook import Outlook, Unavailable
from cache_agent.kube.routes import Answer, Refused
from cache_agent.policy import placement

log = logging.getLogger("glowplug.extender")

REQUIRE = "glowplug.dev/require-agent"
_LONGEST_URI = 2048


class _Metadata(msgspec.Struct):
    name: str = ""
    generateName: str = ""  # noqa: N815  Kubernetes' name
    namespace: str = ""
    annotations: dict[str, str] | None = None


class _Pod(msgspec.Struct):
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)


class _Arguments(msgspec.Struct):
    """Of the pod's specification nothing is read; whole Node objects, where they come, are kept as they are."""

    Pod: _Pod
    Nodes: dict[str, Any] | None = None
    NodeNames: list[str] | None = None


_decoder = msgspec.json.Decoder(_Arguments)


class Extender:
    """The two verbs, as functions from a request's body to an answer."""

    def __init__(self, outlook: Outlook) -> None:
        self._outlook = outlook
        self._said = ""  # why nothing is known, as the log has it

    def prioritize(self, body: bytes) -> Answer:
        """Raises `Refused` for what is no request of a scheduler."""
        arguments = _decode(body)
        names = _names(arguments)
        found = placement.scores(self._decisions(arguments, names), names)
        return Answer(200, msgspec.json.encode([{"Host": name, "Score": found[name]} for name in names]))

    def filter(self, body: bytes) -> Answer:
        """Raises `Refused`."""
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
        return Answer(200, msgspec.json.encode(result))

    def _decisions(self, arguments: _Arguments, names: list[str]) -> list[placement.PlacementDecision]:
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
        if self._said:
            log.warning("placing by what the nodes tell again")
            self._said = ""
        return placement.rank(placement.covering(view, names)) if view is not None else []

    def _complain(self, error: Unavailable) -> None:
        """Once per reason: many pods may come while it lasts."""
        if str(error) != self._said:
            self._said = str(error)
            log.warning("placing without knowledge, all nodes are equal: %s", error)


def _decode(body: bytes) -> _Arguments:
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, f"this is no request of a scheduler extender: {error}") from error


def _names(arguments: _Arguments) -> list[str]:
    if arguments.NodeNames is not None:
        return arguments.NodeNames
    if arguments.Nodes is None:
        return []
    try:
        return [str(node["metadata"]["name"]) for node in arguments.Nodes["items"] or ()]
    except (KeyError, TypeError) as error:
        raise Refused(400, "the field Nodes is no list of nodes") from error
