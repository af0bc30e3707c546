"""The images of knative/images: their Dockerfiles are read, the agent's steps carried out, and the result is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cache_agent.client.cache_client import CacheClient
from runtime.commands import baseset, objects

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "knative" / "images"
FILES = sorted(IMAGES.glob("*.Dockerfile"))
SECONDS = 300


@pytest.fixture(scope="module")
def read(dockerfile: Any) -> Callable[[str], Any]:
    """Give `read(name)`: the image's Dockerfile, read like the template's."""
    return lambda name: type(dockerfile)((IMAGES / f"{name}.Dockerfile").read_text())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_contexts_hold_what_is_copied_and_nothing_else(path: Path, read: Callable[[str], Any]) -> None:
    """The ignore file lists the allowed files: neither .git nor an environment goes to the builder."""
    file = read(path.stem)
    rules = path.with_name(path.name + ".dockerignore").read_text().splitlines()
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source.rstrip("/") for text in file.all("COPY") if not text.startswith("--from") for source in text.split()[:-1]
    }
    assert {source.split("/")[0] for source in copied} <= allowed
    assert all((ROOT / name).exists() for name in allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_images_are_pinned_and_unprivileged(path: Path, read: Callable[[str], Any]) -> None:
    file = read(path.stem)
    for text in file.all("FROM"):
        image = text.split()[0]
        if image in {stage for stage, *_ in file.instructions}:
            continue  # one of its own
        assert re.fullmatch(r"python:\$\{PYTHON_VERSION\}-\$\{DEBIAN_OS\}", image)
    assert all(file.arguments[name] for name in ("PYTHON_VERSION", "DEBIAN_OS"))
    for text in file.all("RUN"):
        for install in re.findall(r"pip install [^&;]*", text):
            assert "base.lock" in install or "--no-deps" in install, install
    (user,) = file.all("USER", "ship")
    number = re.fullmatch(r"(\d+):\1", user)
    assert number, "Kubernetes' runAsNonRoot knows numbers only"
    assert int(number[1]) > 0


def test_image_and_manifests_agree(read: Callable[[str], Any]) -> None:
    agent = read("agent")
    assert agent.all("ENTRYPOINT") == ['["glowplug", "agent"]']
    for path in (ROOT / "knative").rglob("*.yaml"):
        item = yaml.safe_load(path.read_text())
        if isinstance(item, list):  # a patch by operations
            continue
        for container in item.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ()):
            if container.get("image") == "glowplug-agent":
                assert "command" not in container, "the entrypoint is the command"
                context = item["spec"]["template"]["spec"]["securityContext"]
                assert agent.all("USER") == [f"{context['runAsUser']}:{context['runAsGroup']}"]
    function = read("function")
    (service,) = objects.knative(objects.Function(name="chat", image="a", model="s3://b/c"))
    (container,) = service["spec"]["template"]["spec"]["containers"]
    assert function.command == container["command"]
    assert function.all("USER") == ["{0}:{0}".format(container["securityContext"]["runAsUser"])]


def test_function_image_and_template_share_their_base(read: Callable[[str], Any], dockerfile: Any) -> None:
    """Both install one base set in the same way, so that a node keeps one set warm for both."""

    def steps(file: Any) -> list[str]:
        runs = [re.sub(r"\s+", " ", text) for text in file.all("RUN", "build", "ship")]
        return [text for text in runs if "base.lock" in text]

    assert steps(read("function")) == steps(dockerfile)


# --- the agent's image, as far as it goes without a builder -----------------------------------------------------------


@pytest.fixture(scope="module")
def built(read: Callable[[str], Any]) -> Iterator[SimpleNamespace]:
    """Give `root` with the results of the build stage's steps, and `environment` of the image."""
    root = Path(tempfile.mkdtemp(prefix="gp-agent-image-"))
    root.chmod(0o755)
    try:
        file = read("agent")
        for text in file.all("COPY", "build"):
            *sources, target = text.split()
            for source in sources:
                place = root / target[1:]
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / source, place)
        (step,) = file.all("RUN", "build")
        step = re.sub(r"(?<=[\s])/(opt|usr/src)/", lambda found: f"{root}/{found[1]}/", " " + step)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GLOWPLUG_"))}
        environment = {**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"}
        done = subprocess.run(["sh", "-c", step], env=environment, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            unreachable = "No matching distribution" in done.stderr or "connection" in done.stderr.lower()
            if unreachable and os.environ.get("CI") != "true":
                pytest.skip("pip cannot fetch what the agent's image needs")
            pytest.fail(done.stderr)
        own = {name: value.replace("/opt/", f"{root}/opt/") for name, value in file.environment.items()}
        yield SimpleNamespace(root=root, environment={"PATH": os.environ["PATH"]} | own)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def test_the_agents_image_is_small_and_has_no_torch(built: SimpleNamespace) -> None:
    packages = {path.name for path in (built.root / "opt/glowplug/lib").glob("python*/site-packages/*")}
    assert {"cache_agent", "runtime", "boto3", "flask"} <= packages
    assert not {"torch", "transformers", "numpy", "pip"} & packages
    size = sum(path.stat().st_size for path in (built.root / "opt").rglob("*") if path.is_file())
    assert size < 200 << 20, f"{size >> 20} MiB"


def test_the_agents_image_has_what_the_lock_says(built: SimpleNamespace) -> None:
    lock = baseset.read_lock()
    found = {}
    for path in (built.root / "opt/glowplug/lib").glob("python*/site-packages/*.dist-info"):
        name, _, version = path.name.removesuffix(".dist-info").rpartition("-")
        found[name.replace("_", "-").lower()] = version
    assert found.pop("glowplug")
    assert found.pop("prometheus-client"), "an agent's own: what functions share does not need it"
    assert {name: version for name, version in found.items() if lock.get(name) != version} == {}


def test_the_agent_runs_as_its_daemonset_says(
    built: SimpleNamespace, write_checkpoint: Callable[..., Path], eventually: Callable[..., Any]
) -> None:
    """The init container's script and the agent without a capability work on the kubelet's directories."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("becoming the agent's user takes root and setpriv")
    spec = yaml.safe_load((ROOT / "knative/base/agent-daemonset.yaml").read_text())["spec"]["template"]["spec"]
    (init,), (agent,) = spec["initContainers"], spec["containers"]
    node = built.root / "node"
    places = {"/run/glowplug": node / "run", "/var/lib/glowplug": node / "lib"}
    for place in places.values():
        place.mkdir(parents=True, mode=0o755)

    def mapped(text: str) -> str:
        return re.sub("|".join(places), lambda found: str(places[found[0]]), text)

    def become(user: int, group: int) -> list[str]:
        caps = "-all"
        command = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs"]
        if user and not all(folder.stat().st_mode & 0o001 for folder in Path(sys.executable).resolve().parents):
            caps = "-all,+dac_read_search"  # our interpreter, unlike an image's, lies where only root may look
            command.append(f"--ambient-caps={caps}")
        return [*command, f"--inh-caps={caps}", f"--bounding-set={caps}"]

    context = init["securityContext"]
    command = [*become(context["runAsUser"], context["runAsGroup"]), *map(mapped, init["command"])]
    subprocess.run(command, check=True, timeout=30, env=built.environment)
    settings = {item["name"]: mapped(item["value"]) for item in agent["env"] if "value" in item}
    settings |= {"GLOWPLUG_DRAM": "64Mi", "GLOWPLUG_NODE": "node-1", "GLOWPLUG_KUBERNETES": "", "HOME": "/nonexistent"}
    models = Path(settings["GLOWPLUG_FILE_ROOTS"])
    folder = write_checkpoint(models / "small")
    for path in (models, *models.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    user = become(spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"])
    log = built.root / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*user, "glowplug", "agent", *agent["args"]],
            env={**built.environment, **settings},
            cwd="/",
            stdout=output,
            stderr=output,
        )
    try:
        probe = [*user, *agent["livenessProbe"]["exec"]["command"]]

        def alive() -> bool:
            assert process.poll() is None, log.read_text()
            environment = {**built.environment, **settings}
            return subprocess.run(probe, env=environment, capture_output=True, timeout=30).returncode == 0

        eventually(alive, 30, "the probe of its DaemonSet succeeds")
        path = places["/run/glowplug"] / "agent.sock"
        script = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        foreign = [*become(12000, 12000), sys.executable, "-I", "-c", script, str(path)]
        subprocess.run(foreign, check=True, timeout=30, capture_output=True)
        with CacheClient(path, timeout=30).lease(f"file://{folder}") as lease:
            lease.wait_ready(time.monotonic() + 30)
            assert lease.ready
        process.terminate()
        assert process.wait(20) == 0, log.read_text()
    finally:
        process.kill()
        process.wait(20)
