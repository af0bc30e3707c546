"""The Dockerfiles' steps carried out, where no builder runs: in copies of a Debian root, each in its own namespaces.

GLOWPLUG_REPLAY_ROOT names the root, which stands for the image python:3.11-slim-bookworm and is not changed:

    debootstrap --variant=minbase --include=python3-pip,python3-venv,ca-certificates bookworm DIR

Each stage is a copy of the one it comes from. pip's and apt's settings of this machine go along, and the folders on it
that they name. What is replayed is every COPY and RUN; what is not is the base image itself, layers and caches.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "knative" / "images"
STAND_IN = Path(__file__).parent / "stand_in_watchdog.py"
SECONDS = 1500
pytestmark = pytest.mark.timeout(2 * SECONDS)


@pytest.fixture(scope="module")
def base() -> Path:
    place = os.environ.get("GLOWPLUG_REPLAY_ROOT", "")
    if not place:
        pytest.skip("GLOWPLUG_REPLAY_ROOT does not name a Debian root to replay the Dockerfiles in")
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "chroot", "mount"))):
        pytest.skip("replaying takes root, unshare, chroot and mount")
    return Path(place)


def pip_settings() -> dict[str, str]:
    """This machine's settings of pip, as its environment variables."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60, check=True
    )
    found = re.findall(r"^(?:global|install|:env:)\.\.?([\w-]+)='(.*)'$", done.stdout, re.MULTILINE)
    return {f"PIP_{name.upper().replace('-', '_')}": value for name, value in found}


class Replay:
    """The stages of one Dockerfile, each a folder below `place`."""

    def __init__(self, base: Path, place: Path, file: Any, context: Path, images: Mapping[str, Path]) -> None:
        """`images` are files that stand for other images: name of the stage → what it has at its root."""
        self.base, self.place, self.file, self.context, self.images = base, place, file, context, images
        self.settings = pip_settings()
        named = " ".join([*self.settings.values(), os.environ.get("SSL_CERT_DIR", "")])
        places = {Path(path) for path in re.findall(r"(?<!file:/)(?<!file:)(?<![\w/])/[^\s:]+", named)}
        # An index on this machine's disk names files that lie beside it.
        places |= {Path(path).parent for path in re.findall(r"file://(/[^\s:]+)", named)}
        self.binds = [*sorted(str(path) for path in places if path.exists()), "/etc/resolv.conf", "/etc/apt"]
        self.seconds: list[tuple[str, float]] = []

    def stage(self, name: str) -> Path:
        return self.place / name

    def build(self, **arguments: str) -> Path:
        """Carries all stages out; the last one's folder. `arguments` are build arguments that get another value."""
        values: dict[str, str] = {}
        environment: dict[str, dict[str, str]] = {}
        folders: dict[str, str] = {}
        stage = ""
        for _, instruction, text in self.file.instructions:
            match instruction:
                case "ARG":
                    name, _, default = text.partition("=")
                    values[name] = arguments.get(name, default)
                case "FROM":
                    words = [word for word in text.split() if not word.startswith("--")]
                    stage, source = words[2], words[0]
                    if stage in self.images:
                        continue
                    self._copy_root(self.stage(source) if self.stage(source).is_dir() else self.base, stage)
                    environment[stage] = dict(environment.get(source, {}))
                    folders[stage] = folders.get(source, "/")
                case "ENV":
                    pairs = re.findall(r'(\w+)=(?:"([^"]*)"|(\S*))', text)
                    environment[stage] |= {name: quoted or bare for name, quoted, bare in pairs}
                case "WORKDIR":
                    folders[stage] = text
                    self._inside(stage, text).mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self._copy(stage, folders[stage], text)
                case "RUN":
                    begun = time.monotonic()
                    self.run(stage, ["sh", "-c", text], {**values, **environment[stage]}, folders[stage])
                    self.seconds.append((f"{stage}: {' '.join(text.split())[:60]}", time.monotonic() - begun))
        self.environment, self.folder = environment[stage], folders[stage]
        return self.stage(stage)

    def command(self, stage: str, folder: str, *words: str, user: int = 0) -> list[str]:
        """What runs `words` in a stage, with /proc, and what of this machine pip and apt need."""
        root = self.stage(stage)
        script = ['mount -t proc proc "$0/proc"', 'mount --bind /dev "$0/dev"']
        for path in self.binds:
            target = f'"$0{path}"'
            make = f"mkdir -p {target}" if Path(path).is_dir() else f'mkdir -p "$0{Path(path).parent}" && : >> {target}'
            script.append(f"{make} && mount --bind {path} {target}")
        become = f"--userspec={user}:{user} " if user else ""
        script.append(f'exec {shutil.which("chroot")} {become}"$0" sh -c \'cd "$0" && exec "$@"\' {folder} "$@"')
        return [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-euc",
            "\n".join(script),
            str(root),
            *words,
        ]

    def run(self, stage: str, words: list[str], environment: Mapping[str, str], folder: str) -> str:
        settings = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", "LANG": "C.UTF-8"}
        settings |= {
            "DEBIAN_FRONTEND": "noninteractive",
            "PIP_BREAK_SYSTEM_PACKAGES": "1",
            **self.settings,
            **environment,
        }
        done = subprocess.run(
            self.command(stage, folder, *words), env=settings, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, (words, done.stdout[-4000:], done.stderr[-4000:])
        return done.stdout

    def _inside(self, stage: str, path: str) -> Path:
        return self.stage(stage) / path.lstrip("/")

    def _copy_root(self, source: Path, stage: str) -> None:
        target = self.stage(stage)
        target.mkdir(parents=True)
        subprocess.run(["cp", "-a", "--reflink=auto", f"{source}/.", str(target)], check=True, timeout=SECONDS)
        if source == self.base:  # what the Python image has under its own names
            for name in ("python", "python3"):
                link = target / "usr/local/bin" / name
                link.unlink(missing_ok=True)
                link.symlink_to("/usr/bin/python3")

    def _copy(self, stage: str, folder: str, text: str) -> None:
        words = text.split()
        options = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.startswith("--")}
        *sources, target = [word for word in words if not word.startswith("--")]
        place = self._inside(stage, target if target.startswith("/") else f"{folder}/{target}")
        for source in sources:
            if (origin := options.get("--from", "")) in self.images:
                found = self.images[origin]
            else:
                found = (self.stage(origin) if origin else self.context) / source.lstrip("/")
            if found.is_dir():
                shutil.copytree(found, place, dirs_exist_ok=True, symlinks=bool(origin))
            else:
                to = place / found.name if target.endswith("/") else place
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(found, to)


def size(place: Path) -> int:
    """Bytes on disk below a folder, in MB."""
    done = subprocess.run(["du", "-sxm", str(place)], capture_output=True, text=True, timeout=300, check=True)
    return int(done.stdout.split()[0])


@pytest.fixture(scope="module")
def replay(base: Path, dockerfile: Any) -> Iterator[Callable[..., Replay]]:
    """`replay(path, context, images)`: the stages of a Dockerfile, on a disk that is cleared afterwards."""
    with contextlib.ExitStack() as stack:

        def make(path: Path, context: Path, images: Mapping[str, Path] | None = None) -> Replay:
            place = Path(tempfile.mkdtemp(prefix="gp-replay-", dir=base.parent))
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            return Replay(base, place, type(dockerfile)(path.read_text()), context, images or {})

        yield make


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ignore files of knative/images let through."""
    place = tmp_path_factory.mktemp("context")
    rules = (IMAGES / "agent.Dockerfile.dockerignore").read_text().splitlines()
    for name in (rule[1:] for rule in rules if rule.startswith("!")):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, place / name)
    return place


def test_the_agents_image(replay: Callable[..., Replay], checkout: Path, base: Path) -> None:
    made = replay(IMAGES / "agent.Dockerfile", checkout)
    ship = made.build()
    own = size(ship) - size(base)
    print(f"agent: {own} MB above its base of {size(base)} MB; {made.seconds}")
    said = made.run("ship", ["glowplug", "agent", "--version"], made.environment, made.folder)
    assert "glowplug agent" in said
    check = "import importlib.util as u, cache_agent.daemon, boto3; print(u.find_spec('torch'), u.find_spec('pip'))"
    assert made.run("ship", ["/opt/glowplug/bin/python", "-c", check], made.environment, "/").split() == [
        "None",
        "None",
    ]
    assert own < 150


def test_the_functions_image(replay: Callable[..., Replay], checkout: Path, base: Path) -> None:
    made = replay(IMAGES / "function.Dockerfile", checkout)
    ship = made.build()
    print(f"function: {size(ship) - size(base)} MB above its base; {made.seconds}")
    assert "agrees with its lock" in made.run("ship", ["glowplug", "base", "check"], made.environment, made.folder)


def test_the_templates_image_answers(
    replay: Callable[..., Replay], build_context: Path, template: Path, base: Path, tmp_path: Path
) -> None:
    """Built as `faas-cli build` has it built, tests included; then started by its own command, as user 12000."""
    watchdog = tmp_path / "fwatchdog"
    if program := os.environ.get("OF_WATCHDOG"):
        shutil.copy2(program, watchdog)
    else:
        watchdog.write_text(STAND_IN.read_text().replace("#!/usr/bin/env python3", "#!/usr/bin/python3"))
    watchdog.chmod(0o755)
    made = replay(template / "Dockerfile", build_context, {"watchdog": watchdog})
    ship = made.build()
    assert (ship / "usr/src/tested").exists(), "it takes what only passing tests leave"
    models = size(ship / "home/app/models")
    print(f"template: {size(ship) - size(base)} MB above its base, the demo model {models} MB; {made.seconds}")
    assert models < 16, "no weights but the demo model's"
    settings = {"PATH": "/usr/local/bin:/usr/bin:/bin", **made.environment, "port": "18080", "HOME": "/home/app"}
    command = made.command("ship", made.folder, *made.file.command, user=12000)
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=settings, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline, log.read_text()
            assert process.poll() is None, log.read_text()
            connection = http.client.HTTPConnection("127.0.0.1", 18080, timeout=120)
            with contextlib.closing(connection), contextlib.suppress(ConnectionRefusedError):
                connection.request("POST", "/", b"What is Glowplug?", {"Accept": "text/event-stream"})
                response = connection.getresponse()
                assert response.status == 200
                body = response.read().decode()
                break
            time.sleep(0.05)
        assert body.startswith("data: "), json.dumps(body)
        assert body.endswith("data: [DONE]\n\n")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
