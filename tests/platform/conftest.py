"""Fixtures of the platform tests: the template as faas-cli delivers it, laid out as its Dockerfile says, and run.

FAAS_CLI and OF_WATCHDOG name the real programs. Without the first the tests that need it skip and say so; without the
second a stand-in runs, which keeps to the rules of the real one.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from manifests import build, data, schema  # noqa: F401  fixtures
from programs import program

from runtime.container import native

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "templates" / "llm-python"
STAND_IN = Path(__file__).parent / "stand_in_watchdog.py"
HOME = "/home/app"  # of the function, in its image
METRICS_PORT = 8081  # of-watchdog's, and nobody can change it
START_SECONDS = 180.0
COMMAND_SECONDS = 180


@pytest.fixture(scope="session")
def template() -> Path:
    """The template's folder in this repository."""
    return TEMPLATE


# --- the Dockerfile ---------------------------------------------------------------------------------------------------


class Dockerfile:
    """Its instructions, by stage, with the lines that belong together joined."""

    def __init__(self, text: str) -> None:
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
        self.instructions: list[tuple[str, str, str]] = []  # stage, instruction, arguments
        stage = ""
        for line in filter(None, map(str.strip, joined.splitlines())):
            instruction, _, arguments = line.partition(" ")
            if instruction == "FROM":
                stage = arguments.rpartition(" AS ")[2]
            self.instructions.append((stage, instruction, arguments.strip()))

    def all(self, instruction: str, *stages: str) -> list[str]:
        """The arguments of each, in these stages or in all."""
        found = [(stage, text) for stage, name, text in self.instructions if name == instruction]
        return [text for stage, text in found if not stages or stage in stages]

    @property
    def arguments(self) -> dict[str, str]:
        """Build arguments: name → default."""
        return {name: value for name, _, value in (text.partition("=") for text in self.all("ARG"))}

    @property
    def environment(self) -> dict[str, str]:
        """What the image's environment holds."""
        found = {}
        for text in self.all("ENV", "build", "ship"):
            found |= {name: quoted or bare for name, quoted, bare in re.findall(r'(\w+)=(?:"([^"]*)"|(\S*))', text)}
        return found

    @property
    def command(self) -> list[str]:
        (text,) = self.all("CMD", "ship")
        return [str(word) for word in json.loads(text)]


@pytest.fixture(scope="session")
def dockerfile() -> Dockerfile:
    """The template's Dockerfile, read; see `Dockerfile`."""
    return Dockerfile((TEMPLATE / "Dockerfile").read_text())


# --- faas-cli ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository with one commit, tagged v1: the files of this working tree that git does not ignore."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("this is no git working tree, or there is no git")
    place = tmp_path_factory.mktemp("repository")
    names = _git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, place / name
        if os.path.lexists(source):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    _git(place, "init", "--quiet", "--initial-branch=main")
    _git(place, "add", "--all")
    _git(place, "commit", "--quiet", "--message=as it is")
    _git(place, "tag", "v1")
    return place


def _git(place: Path, *arguments: str) -> str:
    own = {"GIT_AUTHOR_NAME": "test", "GIT_AUTHOR_EMAIL": "test@localhost", "GIT_CONFIG_GLOBAL": os.devnull}
    own |= {"GIT_COMMITTER_NAME": "test", "GIT_COMMITTER_EMAIL": "test@localhost"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(place), *arguments],
        env={**kept, **own},
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def faas_cli() -> Callable[..., str]:
    """`faas_cli(folder, *arguments, env=None)` runs the real program there; what it printed. It must succeed."""
    executable = program("FAAS_CLI")

    def run(folder: Path, *arguments: object, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            [executable, *map(str, arguments)],
            cwd=folder,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


@pytest.fixture(scope="session")
def project(
    faas_cli: Callable[..., str], repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """What a newcomer has after pull, `new chat` and `build --shrinkwrap`: `folder`, `build`, `said` by `new`."""
    folder = tmp_path_factory.mktemp("project")
    faas_cli(folder, "template", "pull", repository)
    said = faas_cli(folder, "new", "chat", "--lang", "llm-python", "--prefix", "example")
    faas_cli(folder, "build", "--shrinkwrap")
    return SimpleNamespace(folder=folder, build=folder / "build" / "chat", said=said)


# --- the image --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, or a checkpoint of random weights where it has not been made."""
    if (TEMPLATE / "model" / "config.json").exists():
        return TEMPLATE / "model"
    place = tmp_path_factory.mktemp("model")
    command = [str(ROOT / "scripts" / "make_tiny_model"), "random", "--out", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="session")
def build_context(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """The folder that `docker build` gets: from the real faas-cli, or else copied as it would copy it."""
    if os.environ.get("FAAS_CLI"):
        place: Path = request.getfixturevalue("project").build
    else:
        place = tmp_path_factory.mktemp("context") / "chat"
        shutil.copytree(TEMPLATE, place, ignore=shutil.ignore_patterns("__pycache__", "model"))
    if not (place / "model").exists():
        shutil.copytree(model_folder, place / "model")
    return place


class Image:
    """A folder that holds what the image's root would: the Dockerfile's COPY instructions carried out."""

    def __init__(self, root: Path, context: Path, dockerfile: Dockerfile) -> None:
        self.root = root
        self.home = root / HOME[1:]
        self.dockerfile = dockerfile
        for text in dockerfile.all("COPY", "build"):
            if text.startswith("--from"):
                continue
            *sources, target = text.split()
            place = self.inside(target)
            for source in sources:
                if (context / source).is_dir():
                    shutil.copytree(context / source, place, dirs_exist_ok=True)
                else:
                    place = place / Path(source).name if target.endswith("/") else place
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(context / source, place)
                    place = self.inside(target)
        self.shim = self.inside("/usr/local/bin/glowplug-shim")
        if native.compiler():
            self.shim.parent.mkdir(parents=True)
            native.build(str(self.shim))
        (self.home / "packages").mkdir()
        (self.home / "function" / "__init__.py").touch()
        for path in (root, *root.rglob("*")):
            path.chmod(path.stat().st_mode | (0o555 if path.is_dir() else 0o444))

    def inside(self, path: str) -> Path:
        """Where a path of the image lies; relative ones start at the function's home."""
        return self.root / (path[1:] if path.startswith("/") else f"{HOME[1:]}/{path}")


@pytest.fixture(scope="session")
def make_image(build_context: Path, dockerfile: Dockerfile) -> Iterator[Callable[..., Image]]:
    """`make_image(handler=None)`: the image of the template's function, or of one with this handler.py."""
    with contextlib.ExitStack() as stack:

        def make(handler: str | None = None) -> Image:
            place = Path(tempfile.mkdtemp(prefix="gp-image-"))
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            image = Image(place, build_context, dockerfile)
            if handler is not None:
                (image.home / "function" / "handler.py").write_text(handler)
            return image

        yield make


# --- of-watchdog ------------------------------------------------------------------------------------------------------


class Answer(SimpleNamespace):
    """`status`, `headers`, `body` of a whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Watchdog:
    """The image's command under the real of-watchdog, on ports of its own. Leaving it kills what is left of it."""

    def __init__(self, program: str, image: Image, *, env: Mapping[str, str], locked_down: bool) -> None:
        """`locked_down`: as OpenFaaS runs it, as user 12000 on a read-only root."""
        self.image = image
        self.port, self.upstream = _free_port(), _free_port()
        self._tmp = Path(tempfile.mkdtemp(prefix="gp-tmp-"))
        self._tmp.chmod(0o1777)
        self.log = self._tmp / "log"
        (image.root / "usr" / "bin").mkdir(parents=True, exist_ok=True)
        command = image.root / "usr" / "bin" / "fwatchdog"
        command.unlink(missing_ok=True)
        shutil.copy(program, command)
        command.chmod(0o755)
        path = [str(command.parent), str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]
        places = {HOME: str(image.home), "/tmp": str(self._tmp)}
        settings = {
            name: re.sub(r"^(/home/app|/tmp)\b", lambda found: places[found[0]], value)
            for name, value in image.dockerfile.environment.items()
        }
        settings |= {
            "PATH": os.pathsep.join(path),
            "HOME": str(image.home),
            "TMPDIR": str(self._tmp),
            "PYTHONPATH": str(image.inside("/usr/src/glowplug")),  # where the image has it installed
            "port": str(self.port),
            "PORT": str(self.upstream),
            "upstream_url": f"http://127.0.0.1:{self.upstream}",
            "healthcheck_interval": "1s",
            "GLOWPLUG_DRAIN_LINGER": "2",
            "GLOWPLUG_THREADS": "1",
            **env,
        }
        self.command = [*(_locked_down(self._tmp) if locked_down else ()), *image.dockerfile.command]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=image.home,
                env=settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def connect(self, timeout: float = START_SECONDS) -> http.client.HTTPConnection:
        """A connection, as soon as the port takes one."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
            try:
                connection.connect()
            except ConnectionRefusedError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    pytest.fail(f"the watchdog does not listen:\n{self.output()}")
            else:
                return connection

    @contextlib.contextmanager
    def open(
        self, path: str, body: Any = b"", *, method: str = "POST", **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer as it comes; `headers` with _ for -."""
        with contextlib.closing(self.connect()) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named, encode_chunked="Transfer-Encoding" in named)
            yield connection.getresponse()

    def ask(self, path: str, body: Any = b"", *, method: str = "POST", **headers: str) -> Answer:
        """The whole answer."""
        with self.open(path, body, method=method, **headers) as response:
            return Answer(status=response.status, headers=dict(response.getheaders()), body=response.read())

    def terminate(self) -> None:
        """SIGTERM to the watchdog alone, as a container's runtime sends it to the first process."""
        self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        deadline = time.monotonic() + 30
        while _alive(self.process.pid):
            assert time.monotonic() < deadline, "processes of the function do not end"
            time.sleep(0.01)
        shutil.rmtree(self._tmp, ignore_errors=True)


def _locked_down(tmp: Path) -> list[str]:
    """Puts a command on a read-only root, except for `tmp`, as a user without a name."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv"))):
        pytest.skip("a read-only root and another user take root, unshare and setpriv")
    mounts = 'mount --bind "$0" "$0" && mount -o remount,bind,ro /'
    if subprocess.run(["unshare", "--mount", "sh", "-c", mounts, str(tmp)], capture_output=True, timeout=30).returncode:
        pytest.skip("this machine does not let us mount")
    become = "setpriv --reuid 12000 --regid 12000 --clear-groups --no-new-privs --bounding-set=-all"
    if not all(folder.stat().st_mode & 0o001 for folder in Path(sys.executable).resolve().parents):
        # Our interpreter, unlike an image's, lies where only root may look: that much is allowed, and nothing else.
        become += ",+dac_read_search --inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search"
    return ["unshare", "--mount", "sh", "-c", f'{mounts} && exec {become} "$@"', str(tmp)]


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, owner = stat.read_text().rpartition(")")[2].split()[:3]
            if int(owner) == group and state != "Z":
                return True
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _metrics_port() -> Iterator[None]:
    """Holds the one port that every watchdog of this machine wants."""

    def free() -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", METRICS_PORT))
                return True
        return False

    with (Path(tempfile.gettempdir()) / "glowplug-metrics-port.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        deadline = time.monotonic() + 30
        while not free():
            if time.monotonic() > deadline:
                pytest.skip(f"port {METRICS_PORT}, which of-watchdog needs, is taken on this machine")
            time.sleep(0.05)
        yield


@pytest.fixture(scope="module")
def start_watchdog() -> Callable[..., Any]:
    """`with start_watchdog(image, env=None, locked_down=False) as function:` runs it; see `Watchdog`."""
    executable = program("OF_WATCHDOG") if os.environ.get("OF_WATCHDOG") else str(STAND_IN)

    @contextlib.contextmanager
    def start(image: Image, *, env: Mapping[str, str] | None = None, locked_down: bool = False) -> Iterator[Watchdog]:
        with _metrics_port():
            function = Watchdog(executable, image, env=env or {}, locked_down=locked_down)
            try:
                yield function
            except BaseException:
                sys.stderr.write(function.output())  # pytest shows it beside the failure
                raise
            finally:
                function.close()

    return start


@pytest.fixture(scope="session")
def at_once() -> Callable[..., list[Any]]:
    """`at_once([call, …])` runs them in threads that begin together; their results in order."""

    def run(calls: Sequence[Callable[[], Any]]) -> list[Any]:
        results: list[Any] = [None] * len(calls)
        barrier = threading.Barrier(len(calls))

        def one(number: int) -> None:
            barrier.wait()
            try:
                results[number] = calls[number]()
            except BaseException as error:
                results[number] = error

        threads = [threading.Thread(target=one, args=(number,)) for number in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run
