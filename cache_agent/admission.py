"""What a pod that names a model gets when it is created: the agent's directory, its own identity, a scheduler. Pure.

The same as the MutatingAdmissionPolicies in knative/, for clusters that have none; a test holds the two together. An
answer always allows the pod: without the directory a function starts an agent of its own.
"""

from __future__ import annotations

import base64
import json
from typing import Any

MODEL = "glowplug.dev/model"
INJECT = "glowplug.dev/inject"
_VOLUME = "glowplug-agent"
_DIRECTORY = "/run/glowplug"
_VARIABLE = "GLOWPLUG_POD"
_LONGEST_UID = 256


class NotAReview(ValueError):
    """The body is no AdmissionReview that could be answered; the text says why."""


def review(body: object, scheduler: str = "") -> dict[str, Any]:
    """The answer to an AdmissionReview of admission.k8s.io/v1. Raises `NotAReview`."""
    request = body.get("request") if isinstance(body, dict) else None
    uid = request.get("uid") if isinstance(request, dict) else None
    if not isinstance(request, dict) or not isinstance(uid, str) or not 0 < len(uid) <= _LONGEST_UID:
        raise NotAReview("this is no AdmissionReview: request.uid is missing")
    response: dict[str, Any] = {"uid": uid, "allowed": True}
    try:
        patch = operations(request["object"], scheduler) if request.get("operation") == "CREATE" else []
    except (KeyError, TypeError, AttributeError) as error:
        response["warnings"] = [f"glowplug left this pod alone: it is not shaped like one ({type(error).__name__})"]
        patch = []
    if patch:
        encoded = json.dumps(patch, separators=(",", ":")).encode()
        response |= {"patchType": "JSONPatch", "patch": base64.b64encode(encoded).decode()}
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}


def operations(pod: dict[str, Any], scheduler: str = "") -> list[dict[str, Any]]:
    """The JSON Patch for a pod. Applied to its own result it is empty. Raises for what is no pod."""
    annotations = pod["metadata"].get("annotations") or {}
    if not annotations.get(MODEL) or annotations.get(INJECT) == "disabled":
        return []
    spec = pod["spec"]
    patch: list[dict[str, Any]] = []
    if scheduler and spec.get("schedulerName", "") in ("", "default-scheduler"):
        patch.append({"op": "add", "path": "/spec/schedulerName", "value": scheduler})
    if _is_there_already(spec):
        return patch
    volume = {"name": _VOLUME, "hostPath": {"path": _DIRECTORY, "type": "DirectoryOrCreate"}}
    patch.append(_append(spec, "/spec", "volumes", volume))
    mount = {"name": _VOLUME, "mountPath": _DIRECTORY, "readOnly": True}
    variable = {"name": _VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
    for number, container in enumerate(spec["containers"]):
        if container["name"] != "queue-proxy":
            place = f"/spec/containers/{number}"
            patch += [_append(container, place, "volumeMounts", mount), _append(container, place, "env", variable)]
    return patch


def _is_there_already(spec: dict[str, Any]) -> bool:
    """Names of ours that the pod brought, from our renderer or from somewhere worse: it stays as it is."""
    return any(volume["name"] == _VOLUME for volume in spec.get("volumes") or ()) or any(
        any(mount["mountPath"] == _DIRECTORY for mount in container.get("volumeMounts") or ())
        or any(variable["name"] == _VARIABLE for variable in container.get("env") or ())
        for container in spec["containers"]
    )


def _append(owner: dict[str, Any], place: str, name: str, value: object) -> dict[str, Any]:
    if owner.get(name):
        return {"op": "add", "path": f"{place}/{name}/-", "value": value}
    return {"op": "add", "path": f"{place}/{name}", "value": [value]}
