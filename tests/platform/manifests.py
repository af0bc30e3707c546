"""The common parts of tests of the objects in knative/: files, kustomize's objects, strict validation.

GLOWPLUG_TEST_DATA names the folder with Kubernetes' OpenAPI and Knative's CRD; without it tests that validate skip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KNATIVE = ROOT / "knative"
OBJECTS = sorted(
    path
    for path in KNATIVE.rglob("*.yaml")
    if path.name != "kustomization.yaml" and "apiVersion" in path.read_text() and "$patch" not in path.read_text()
)
KUSTOMIZATIONS = sorted(KNATIVE.rglob("kustomization.yaml"))
OVERLAYS = sorted(path.parent for path in (KNATIVE / "overlays").glob("*/kustomization.yaml"))
EXAMPLES = sorted((KNATIVE / "examples").glob("*.yaml"))
# Every way to put the components together that the README names, beside each overlay as it is.
COMBINATIONS = (
    (),
    ("token",),
    ("scheduler", "scheduler-policy"),
    ("scheduler", "scheduler-policy", "scheduler-strict", "redis", "token"),
    ("redis",),
    ("scheduler", "redis-external"),
    ("webhook",),
    ("webhook", "scheduler", "redis"),
    ("rights",),
    ("token", "redis", "peers"),
    ("rights", "redis", "peers", "metrics"),
    ("token", "metrics"),
    ("pool",),
)
POOL = "glowplug-pool"  # the one part that is privileged, and opt-in for that reason
TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, ten times as fast
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|[KMGTPE]i?)?")


# --- schemas ----------------------------------------------------------------------------------------------------------


class Schema:
    """A root schema and what its `$ref`s name; as strict as `kubectl apply --validate=strict`."""

    def __init__(self, root: Mapping[str, Any], definitions: Mapping[str, Any]) -> None:
        self.root = root
        self.definitions = definitions

    def problems(self, value: object) -> list[str]:
        """Return the errors of an object with their places; an unknown field is one."""
        return list(self._check(value, self.root, ""))

    def flags(self, value: object) -> set[str]:
        """Return the Knative feature flags that the fields of a value need, by the fields' own descriptions."""
        return set(self._flags(value, self.root))

    def along(self, names: Sequence[str]) -> list[Mapping[str, Any]]:
        """Return the schemas of a field and of the fields around it, through lists."""
        found, schema = [], self.root
        for name in names:
            schema = self._plain(self._plain(schema)["properties"][name])
            found += [schema, self._plain(schema["items"])] if "items" in schema else [schema]
            schema = found[-1]
        return found

    def _plain(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a schema with its reference resolved, and with the keys beside the reference."""
        name = schema.get("$ref", "").rpartition("/")[2]
        return {**self.definitions[name], **schema} if name else schema

    def _flags(self, value: object, schema: Mapping[str, Any]) -> Iterator[str]:
        if found := re.search(r"behind a feature flag - (\S+)", schema.get("description", "")):
            yield found[1].rstrip(".")
        if isinstance(value, dict):
            for name, part in value.items():
                yield from self._flags(part, schema.get("properties", {}).get(name, {}))
        elif isinstance(value, list):
            for part in value:
                yield from self._flags(part, schema.get("items", {}))

    def _check(self, value: object, schema: Mapping[str, Any], place: str) -> Iterator[str]:
        while "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            schema = self.definitions[name]
            if name.endswith(("IntOrString", "resource.Quantity")):
                yield from self._loose(value, name, place)
                return
        if schema.get("x-kubernetes-int-or-string"):
            yield from self._loose(value, "IntOrString", place)
            return
        kind = schema.get("type", "object" if "properties" in schema else "")
        if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
            yield f"{place}: {value!r} is no {kind}"
            return
        if "enum" in schema and value not in schema["enum"]:
            yield f"{place}: {value!r} is none of {schema['enum']}"
        if isinstance(value, list):
            for number, item in enumerate(value):
                yield from self._check(item, schema.get("items", {}), f"{place}[{number}]")
        elif isinstance(value, dict):
            yield from self._check_object(value, schema, place)

    def _check_object(self, value: dict[str, Any], schema: Mapping[str, Any], place: str) -> Iterator[str]:
        properties, more = schema.get("properties", {}), schema.get("additionalProperties")
        yield from (f"{place}.{name}: missing" for name in schema.get("required", ()) if name not in value)
        for name, part in value.items():
            if name in properties:
                yield from self._check(part, properties[name], f"{place}.{name}")
            elif isinstance(more, Mapping):
                yield from self._check(part, more, f"{place}.{name}")
            elif properties and not schema.get("x-kubernetes-preserve-unknown-fields"):
                yield f"{place}.{name}: unknown field"

    def _loose(self, value: object, name: str, place: str) -> Iterator[str]:
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield f"{place}: {value!r} is neither a number nor text"
        elif name.endswith("Quantity") and not QUANTITY.fullmatch(str(value)):
            yield f"{place}: {value!r} is no quantity"


@pytest.fixture(scope="session")
def data() -> Path:
    place = os.environ.get("GLOWPLUG_TEST_DATA", "")
    if not place:
        pytest.skip("GLOWPLUG_TEST_DATA does not name the folder with Kubernetes' and Knative's schemas")
    return Path(place)


@pytest.fixture(scope="session")
def schema(data: Path) -> Callable[[str, str], Schema]:
    """Give `schema(api_version, kind)`, which fails for a kind that the platforms do not have."""
    document = json.loads((data / "kubernetes" / "openapi-v1.36.json").read_text())
    definitions = document["definitions"]
    by_kind = {
        ("/".join(filter(None, (names["group"], names["version"]))), names["kind"]): definition
        for definition in definitions.values()
        for names in definition.get("x-kubernetes-group-version-kind", ())
    }
    crd = yaml.load((data / "knative" / "crd-service.yaml").read_text(), LOADER)
    (version,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
    service = dict(version["schema"]["openAPIV3Schema"])
    service["properties"] = {
        **service["properties"],
        "apiVersion": {"type": "string"},
        "kind": {"enum": ["Service"]},
        "metadata": {"$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
    }
    by_kind["serving.knative.dev/v1", "Service"] = service

    def find(api_version: str, kind: str) -> Schema:
        assert (api_version, kind) in by_kind, f"there is no {kind} in {api_version}"
        return Schema(by_kind[api_version, kind], definitions)

    return find


# --- what is built of the files ---------------------------------------------------------------------------------------


def load(path: Path) -> Any:
    return yaml.load(path.read_text(), LOADER)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """Give `build(overlay, *components)`: the objects as kustomize builds them."""
    if not shutil.which("kubectl"):
        pytest.skip("there is no kubectl on PATH to run kustomize")
    copy = Path(shutil.copytree(KNATIVE, tmp_path_factory.mktemp("knative") / "knative"))
    built: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def run(overlay: str, *components: str) -> list[dict[str, Any]]:
        if (overlay, *components) not in built:
            place = copy / "overlays" / "-".join((overlay, *components, "test"))
            place.mkdir()
            settings = {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [f"../{overlay}"],
                "components": [f"../../components/{name}" for name in components],
            }
            (place / "kustomization.yaml").write_text(yaml.safe_dump(settings))
            done = subprocess.run(["kubectl", "kustomize", place], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done.stderr
            built[overlay, *components] = list(yaml.load_all(done.stdout, LOADER))
        return built[overlay, *components]

    return run


def pods(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for item in objects:
        if item["kind"] in ("DaemonSet", "Deployment"):
            yield item["metadata"]["name"], item["spec"]["template"]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]
