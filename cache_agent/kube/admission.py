"""The admission of pods that name a model: they get the agent's directory, an identity, a scheduler. Pure.

Clusters without MutatingAdmissionPolicy use this webhook instead of the policies in knative/; a test holds the two
together. The response always allows the pod: without the directory a function starts an agent of its own.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from cache_agent.policy.rights import AUDIENCE

MODEL = "glowplug.dev/model"
INJECT = "glowplug.dev/inject"
_TOKEN_SECONDS = 3600
_PLACES = {"glowplug-agent": "/run/glowplug", "glowplug-identity": "/var/run/secrets/glowplug"}  # by volume
_VARIABLES: list[dict[str, Any]] = [
    {"name": "GLOWPLUG_POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
    {"name": "GLOWPLUG_IDENTITY_FILE", "value": "/var/run/secrets/glowplug/token"},
]
_LONGEST_UID = 256


class NotAReview(ValueError):
    """The refusal of a body that is no AdmissionReview; the text says why."""


def review(body: object, scheduler: str = "") -> dict[str, Any]:
    """Return the response to an AdmissionReview of admission.k8s.io/v1. Raises `NotAReview`."""
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
    """Return the JSON Patch for a pod, which is empty for a pod that has been patched.

    Raises `KeyError`, `TypeError` or `AttributeError` for what is not shaped like a pod.
    """
    annotations = pod["metadata"].get("annotations") or {}
    if not annotations.get(MODEL) or annotations.get(INJECT) == "disabled":
        return []
    spec = pod["spec"]
    patch: list[dict[str, Any]] = []
    if scheduler and spec.get("schedulerName", "") in ("", "default-scheduler"):
        patch.append({"op": "add", "path": "/spec/schedulerName", "value": scheduler})
    if _is_there_already(spec):
        return patch
    patch += _append(spec, "/spec", "volumes", volumes())
    for number, container in enumerate(spec["containers"]):
        if container["name"] != "queue-proxy":
            place = f"/spec/containers/{number}"
            patch += _append(container, place, "volumeMounts", mounts())
            patch += _append(container, place, "env", variables())
    return patch


def volumes() -> list[dict[str, Any]]:
    """Return the volumes: the agent's directory, and a token that is renewed under the running pod."""
    token = {"audience": AUDIENCE, "expirationSeconds": _TOKEN_SECONDS, "path": "token"}
    return [
        {"name": "glowplug-agent", "hostPath": {"path": "/run/glowplug", "type": "DirectoryOrCreate"}},
        {"name": "glowplug-identity", "projected": {"sources": [{"serviceAccountToken": token}]}},
    ]


def mounts() -> list[dict[str, Any]]:
    """Return the mounts of the volumes in a container."""
    return [{"name": name, "mountPath": path, "readOnly": True} for name, path in _PLACES.items()]


def variables() -> list[dict[str, Any]]:
    """Return the environment variables that tell a function its pod and its token."""
    return [dict(variable) for variable in _VARIABLES]


def _is_there_already(spec: dict[str, Any]) -> bool:
    """Return whether the pod brings volumes, mounts or variables of our names; such a pod stays as it is."""
    names = {variable["name"] for variable in _VARIABLES}
    return any(volume["name"] in _PLACES for volume in spec.get("volumes") or ()) or any(
        any(mount["mountPath"] in _PLACES.values() for mount in container.get("volumeMounts") or ())
        or any(variable["name"] in names for variable in container.get("env") or ())
        for container in spec["containers"]
    )


def _append(owner: dict[str, Any], place: str, name: str, values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if owner.get(name):
        return [{"op": "add", "path": f"{place}/{name}/-", "value": value} for value in values]
    return [{"op": "add", "path": f"{place}/{name}", "value": values}]
