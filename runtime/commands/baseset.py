"""The locked base set: the distributions that every function of a node shares, so that one warm layer serves them all.

`runtime/base.lock` pins them, one `name==version` per line, where need be with a marker as pip has it. A
function's own requirements are installed *beside* the base, into a directory that comes last on `sys.path`; a
requirement of another version of a base distribution is refused at build time, because that function would have no
warm starts.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from packaging.markers import Marker

from runtime.errors import BadConfig

LOCK = Path(__file__).parents[1] / "base.lock"

_NAME = re.compile(r"[-_.]+")
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


def read_lock(path: Path = LOCK) -> dict[str, str]:
    """Read a lock: normalised name → version. Raises `BadConfig`."""
    pins: dict[str, str] = {}
    for line in path.read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        pin, _, marker = (part.strip() for part in text.partition(";"))
        name, separator, version = pin.partition("==")
        if not separator:
            raise BadConfig(f"{path}: {text!r} is no pin; write name==version")
        if not marker or Marker(marker).evaluate():
            pins[normalised(name)] = version
    return pins


def differences(pins: Mapping[str, str]) -> list[str]:
    """Return the differences between the installed distributions and the lock, a sentence each."""
    found = []
    for name, version in sorted(pins.items()):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} is not installed; the base has {version}")
        else:
            if installed.partition("+")[0] != version:
                found.append(f"{name} is {installed}; the base has {version}")
    return found


def digest(pins: Mapping[str, str]) -> str:
    """Return the identity of the base set on this kind of machine; functions with the same one can share a layer."""
    lines = [f"{name}=={version}" for name, version in sorted(pins.items())]
    place = (platform.machine(), platform.python_implementation(), platform.python_version())
    return hashlib.sha256("\n".join([*place, *lines]).encode()).hexdigest()


def closure(root: str) -> dict[str, str]:
    """Return name → installed version of all that a distribution like `glowplug[model]` needs, without itself."""
    found: dict[str, str] = {}
    queue, seen = [_parse(root)], set()
    while queue:
        name, extras = queue.pop()
        for extra in ("", *extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                distribution = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue  # needed on another platform or Python only
            found[name] = distribution.version.partition("+")[0]
            for requirement in distribution.requires or ():
                wanted = _EXTRA.search(requirement.partition(";")[2])
                if (wanted.group(1) if wanted else "") == extra:
                    queue.append(_parse(requirement))
    found.pop(_parse(root)[0], None)
    return found


def install(requirements: Path, target: Path, pins: Mapping[str, str]) -> list[str]:
    """Install into `target` what `requirements` needs beyond the base; return it, as `name==version`.

    Raises `BadConfig` when a requirement, or something that it needs, conflicts with the base.
    """
    with tempfile.TemporaryDirectory() as directory:
        report, constraints = Path(directory, "report.json"), Path(directory, "constraints.txt")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        resolved = _pip("install", "--dry-run", "--report", report, "-c", constraints, "-r", requirements)
        if resolved.returncode:
            raise BadConfig(
                f"{requirements} cannot be installed beside the base set that all functions share:\n"
                f"{_complaint(resolved)}\nAsk for versions that go with {LOCK.name}, or drop the package"
            )
        items = json.loads(report.read_text())["install"]
        extra = [f"{item['metadata']['name']}=={item['metadata']['version']}" for item in items]
        changed = [pin for pin in extra if normalised(pin.partition("==")[0]) in pins]
        if changed:
            raise BadConfig(f"{requirements} would change the base set ({', '.join(changed)}); is the base installed?")
        if extra:
            # The resolved links, so that requirements by URL or with hashes are installed as resolved.
            wanted = Path(directory, "wanted.txt")
            wanted.write_text("".join(f"{_link(item)}\n" for item in items))
            done = _pip("install", "--no-deps", "--target", target, "-r", wanted)
            if done.returncode:
                raise BadConfig(f"installing {', '.join(extra)} failed:\n{done.stderr.strip()}")
        return extra


def normalised(name: str) -> str:
    """Return a distribution's name as PEP 503 compares it."""
    return _NAME.sub("-", name.strip()).lower()


def _parse(requirement: str) -> tuple[str, tuple[str, ...]]:
    match = _REQUIREMENT.match(requirement)
    assert match is not None, "installed metadata holds valid requirements"
    extras = (match.group(2) or "").split(",")
    return normalised(match.group(1)), tuple(normalised(extra) for extra in extras if extra.strip())


def _link(item: Mapping[str, object]) -> str:
    metadata, download = item["metadata"], item["download_info"]
    assert isinstance(metadata, dict), "pip's report, version 1"
    assert isinstance(download, dict), "pip's report, version 1"
    if item.get("is_direct"):
        return f"{metadata['name']} @ {download['url']}"
    return f"{metadata['name']}=={metadata['version']}"


def _complaint(failed: subprocess.CompletedProcess[str]) -> str:
    """Return pip's error, and the conflicting requirements, which pip prints to its standard output."""
    cause = failed.stdout.partition("The conflict is caused by:")[2].strip().partition("\n\n")[0]
    return f"{failed.stderr.strip()}\n{cause}".strip()


def _pip(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
