"""Chaos: an agent and two functions under clients, while things are killed, stopped, filled up and corrupted.

`ACTIONS` and `INVARIANTS` are tables of small functions; whoever builds a new part adds what may befall it and what
must hold. A run is a seeded sequence of actions with clients asking all the time; then everything settles and all
invariants are checked. The sampled run does every cheap action once and two dear ones; the soak does hundreds and
checks after every few. A failure prints its seed and the actions so far.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

MODEL = Path(__file__).parents[2] / "templates" / "llm-python" / "model"
SAMPLED_SEED, SOAK_SEEDS = 20, range(1, 9)
DEAR_IN_SAMPLE, SOAK_ACTIONS, CHECK_EVERY = 2, 60, 12
QUESTIONS = ("What is Glowplug?", "Hello", "What is a lease?", "Who are you?")
TOKENS = 24
DRAM = 256 << 20
SETTLE_SECONDS = 180.0
# What a client may be told while things break; each is a code of the tables of errors.
EXPECTED_CODES = {"busy", "starting", "weights_unavailable", "engine_failed", "drain_incomplete", "worker_crashed"}
# What a function may end with then: SIGTERM's 0, the documented codes, and SIGKILL where we sent it.
EXPECTED_EXITS = {0, 66, 67, 68, 69, 71, 128 + signal.SIGKILL, -signal.SIGKILL}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", SOAK_SEEDS if metafunc.config.getoption("--soak") else [SAMPLED_SEED])


# --- the world --------------------------------------------------------------------------------------------------------


class Replica:
    """One function as a platform keeps it: started again whenever it ends, and only its exit codes are asked about."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self.routed = True  # a platform sends nothing to a replica that it takes away
        self._stack = contextlib.ExitStack()
        self.function: Any = self._stack.enter_context(start())

    def revive(self) -> None:
        if self.function.process.poll() is None:
            return
        code = self.function.process.returncode
        assert code in EXPECTED_EXITS, f"the function ended with {code}:\n{self.function.output()}"
        if code == -signal.SIGKILL:
            # Nobody can tidy up after SIGKILL; a container's TMPDIR goes with it. Its processes are still looked for.
            for left in self.function.temporary.iterdir():
                shutil.rmtree(left, ignore_errors=True)
        self._stack.close()  # nothing of it may be left: no process, no file
        self.function = self._stack.enter_context(self._start())

    def close(self) -> None:
        self._stack.close()


@dataclass
class World:
    agent: Any
    replicas: list[Replica]
    origin: Path
    random: random.Random
    eventually: Callable[..., Any]
    reference: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # what clients saw and should not have
    answered: int = 0
    done: list[str] = field(default_factory=list)
    memfds: int = 0
    fds: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def uri(self) -> str:
        return f"file://{self.origin}"

    def any(self) -> Any:
        """A running function, out of its very first instants, in which SIGTERM finds a bare interpreter."""
        replica = self.random.choice(self.replicas)
        replica.revive()
        assert replica.function.port
        return replica.function

    def settle(self) -> None:
        """Until both functions are ready again: broken ones are started anew, as their platform does."""

        def ready() -> bool:
            for replica in self.replicas:
                replica.revive()
            with contextlib.suppress(OSError, http.client.HTTPException):
                return all(r.function.request("/_/ready", seconds=5).status == 200 for r in self.replicas)
            return False

        self.eventually(ready, SETTLE_SECONDS, "both functions are ready again")


class Heard(NamedTuple):
    """What one request brought: the text, and whether the answer says that it is complete."""

    text: str
    complete: bool


def ask(world: World, function: Any, question: str, *, stream: bool) -> Heard | None:
    """One request, judged: None when it was refused or broke off in a way that is allowed; else what it brought."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "temperature": 0}
    try:
        with contextlib.closing(function.connect(30.0)) as connection:
            sent = json.dumps({**body, "stream": stream})
            connection.request("POST", "/v1/chat/completions", sent, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                error = json.loads(response.read())["error"]
                if error["code"] not in EXPECTED_CODES or not error["message"]:
                    world.wrong.append(f"status {response.status}: {error}")
                return None
            return _stream(world, response) if stream else _whole(response)
    except (OSError, http.client.HTTPException):
        return None  # the process that served it was killed
    except (ValueError, KeyError, TypeError) as error:
        world.wrong.append(f"{question!r}: an answer that is none: {error!r}")
        return None


def _whole(response: http.client.HTTPResponse) -> Heard:
    found = json.loads(response.read())
    return Heard(found["choices"][0]["message"]["content"], True)


def _stream(world: World, response: http.client.HTTPResponse) -> Heard:
    """The pieces of a stream; one that broke off is heard up to there."""
    text, lines = "", []
    with contextlib.suppress(OSError, http.client.HTTPException):
        while line := response.readline():
            lines.append(line)
    for line in lines:
        if not (line.startswith(b"data: ") and line.endswith(b"\n")):
            continue
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return Heard(text, True)
        event = json.loads(data)
        if "error" in event:
            if event["error"].get("code") not in EXPECTED_CODES:
                world.wrong.append(f"error in a stream: {event}")
            return Heard(text, False)
        text += event["choices"][0]["delta"].get("content") or ""
    return Heard(text, False)


def client(world: World, replica: Replica, number: int) -> None:
    """Asks until the end, and notes whatever is not the reference, or its beginning where the connection broke."""
    own = random.Random(f"{world.random.random()}-{number}")
    while not world.stopping.is_set():
        question, stream = own.choice(QUESTIONS), own.random() < 0.7
        heard = ask(world, replica.function, question, stream=stream) if replica.routed else None
        if heard is None:
            world.stopping.wait(0.02)
            continue
        expected = world.reference[question]
        if heard.text != expected if heard.complete else not expected.startswith(heard.text):
            world.wrong.append(f"{question!r} ({heard.complete=}): {heard.text!r} instead of {expected!r}")
        world.answered += heard.complete


# --- what may befall it -----------------------------------------------------------------------------------------------


def kill_worker(world: World) -> None:
    function = world.any()
    with contextlib.suppress(ProcessLookupError):
        os.kill(function.worker(), signal.SIGKILL)


def kill_function(world: World) -> None:
    """The shim dies without a word; what it started must end by itself."""
    function = world.any()
    function.process.kill()
    function.wait()


def drain_function(world: World) -> None:
    """SIGTERM, as a platform scales down: every request that was inside is answered."""
    world.settle()  # one whose worker was just killed has nothing left to answer with
    replica = world.random.choice(world.replicas)
    replica.routed = False
    try:
        assert replica.function.stop() == 0, replica.function.output()
        replica.revive()
    finally:
        replica.routed = True


def kill_agent(world: World) -> None:
    """Functions serve on with what they map, and lease again from the next agent."""
    world.agent.kill()
    world.agent.start()


def stop_worker(world: World) -> None:
    _stop(world, world.any().worker())


def stop_agent(world: World) -> None:
    _stop(world, world.agent.pid)


def _stop(world: World, pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        try:
            world.stopping.wait(world.random.uniform(0.05, 0.5))
        finally:
            os.kill(pid, signal.SIGCONT)


def fill_memory(world: World) -> None:
    """A model that cannot fit is refused at once, and nobody loses anything for it."""
    from cache_agent.errors import AgentError

    large = world.origin.parent / "large"
    if not large.exists():
        _write_hole(large, 2 * DRAM)
    with pytest.raises(AgentError) as refused, world.agent.client.lease(f"file://{large}") as lease:
        lease.wait_ready(time.monotonic() + 30)
    assert refused.value.code == "no_capacity", refused.value.text


def fill_disk(world: World) -> None:
    """The origin's disk runs full while a model is uploaded to it: the half is refused, the others are served."""
    from cache_agent.errors import AgentError

    place = world.origin.parent / "small-disk"
    place.mkdir(exist_ok=True)
    size = (MODEL / "model.safetensors").stat().st_size
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", str(place)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0
    try:
        shutil.copy(MODEL / "config.json", place)
        if mounted:
            with pytest.raises(OSError, match="No space left"):
                shutil.copy(MODEL / "model.safetensors", place)
        else:
            (place / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[: size // 2])
        with pytest.raises(AgentError) as refused, world.agent.client.lease(f"file://{place}") as lease:
            lease.wait_ready(time.monotonic() + 30)
        assert refused.value.code == "bad_checkpoint", refused.value.text
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def corrupt_origin(world: World) -> None:
    """The weights are overwritten with garbage for a while. Who has them keeps them, who asks anew is told why not."""
    file = world.origin / "model.safetensors"
    good = file.read_bytes()
    junk = world.random.choice([good[: len(good) // 3], world.random.randbytes(4096), b"", good[:-1]])
    file.write_bytes(junk)
    try:
        world.stopping.wait(world.random.uniform(0.05, 0.3))
    finally:
        file.write_bytes(good)


def overwrite_while_loading(world: World) -> None:
    """Another version replaces the first while it is read: one of them arrives whole, or an error does."""
    from cache_agent.errors import AgentError

    place = world.origin.parent / "changing"
    place.mkdir(exist_ok=True)
    shutil.copy(MODEL / "config.json", place)
    header, old = _split((MODEL / "model.safetensors").read_bytes())
    new = bytes(len(old))
    versions = [header + data for data in (old, new)]
    world.random.shuffle(versions)
    (place / "model.safetensors").write_bytes(versions[0])
    writer = threading.Thread(target=(place / "model.safetensors").write_bytes, args=(versions[1],))
    try:
        with world.agent.client.lease(f"file://{place}") as lease:
            writer.start()
            lease.wait_ready(time.monotonic() + 30)
            assert _bytes(lease) in (_sorted(header, old), _sorted(header, new)), "a mixture of two versions"
    except AgentError as error:
        if error.code not in ("origin_changed", "bad_checkpoint"):
            raise
    finally:
        if writer.ident:
            writer.join()
    world.eventually(lambda: _forget(world, f"file://{place}"), what="the changed model is evicted")


def _split(data: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack_from("<Q", data)
    return data[: 8 + length], data[8 + length :]


def _sorted(header: bytes, data: bytes) -> dict[str, bytes]:
    entries = json.loads(header[8:])
    entries.pop("__metadata__", None)
    return {name: data[slice(*entry["data_offsets"])] for name, entry in entries.items()}


def _bytes(lease: Any) -> dict[str, bytes]:
    return {t.name: os.pread(lease.segments[t.segment], t.size, t.offset) for t in lease.manifest.tensors}


def evict_what_is_in_use(world: World) -> None:
    """What somebody holds is never evicted; when the origin has changed the URI may mean what nobody holds yet."""
    from cache_agent.errors import AgentError

    with world.agent.client.lease(world.uri) as lease:
        lease.wait_ready(time.monotonic() + 30)
        try:
            world.agent.client.evict(world.uri)
        except AgentError as error:
            if error.code not in ("in_use", "not_found"):
                raise
        assert any(model.leases for model in world.agent.client.status().models)
        header, data = _split((MODEL / "model.safetensors").read_bytes())
        assert _bytes(lease) == _sorted(header, data)


def leave_streams(world: World) -> None:
    """Clients that ask for long answers and go."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 200, "stream": True}
    for _ in range(4):
        with contextlib.suppress(OSError), contextlib.closing(world.any().connect(5.0)) as connection:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})


def storm_of_leases(world: World) -> None:
    """Many holders at once, gone without a goodbye."""
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(world.agent.client.lease(world.uri))


def garbage_to_the_agent(world: World) -> None:
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.settimeout(5.0)
            sock.connect(str(world.agent.socket))
            sock.sendall(world.random.randbytes(world.random.choice([1, 100, 100_000])))


def garbage_to_a_function(world: World) -> None:
    for _ in range(5):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", world.any().port), 5.0) as sock:
            sock.sendall(world.random.randbytes(world.random.choice([1, 100, 10_000])))


class Action(NamedTuple):
    """`dear` ones make a function import torch again."""

    happen: Callable[[World], None]
    dear: bool = False


ACTIONS = [
    Action(kill_worker, dear=True),
    Action(kill_function, dear=True),
    Action(drain_function, dear=True),
    Action(kill_agent),
    Action(stop_worker),
    Action(stop_agent),
    Action(fill_memory),
    Action(fill_disk),
    Action(corrupt_origin),
    Action(overwrite_while_loading),
    Action(evict_what_is_in_use),
    Action(leave_streams),
    Action(storm_of_leases),
    Action(garbage_to_the_agent),
    Action(garbage_to_a_function),
]


# --- what must hold ---------------------------------------------------------------------------------------------------


def no_wrong_byte(world: World) -> None:
    """No client has seen a token twice, lost or wrong, nor an error without a known code."""
    assert not world.wrong, "\n".join(world.wrong[:10])


def all_answer_like_the_reference(world: World) -> None:
    for replica in world.replicas:
        for question, expected in world.reference.items():
            for stream in (False, True):
                assert ask(world, replica.function, question, stream=stream) == Heard(expected, True)


def no_leaked_process(world: World) -> None:
    for replica in world.replicas:
        function = replica.function
        world.eventually(
            lambda f=function: len(f.alive()) == 2, what=f"only shim and worker run: {function.children()}"
        )


def no_leaked_lease(world: World) -> None:
    """As many as there are workers on it: those of an agent that was killed have nobody to give them back to."""

    def leases() -> int:
        return sum(model.leases for model in world.agent.client.status().models)

    world.eventually(lambda: leases() <= len(world.replicas), what="leases of clients that left are given back")


def no_leaked_memory(world: World) -> None:
    """What the agent holds is the functions' model alone."""
    for model in world.agent.client.status().models:
        if model.leases == 0 and model.model != world.uri:
            world.eventually(lambda m=model.model: _forget(world, m), what=f"{model.model} can be evicted")
    world.eventually(lambda: len(world.agent.memfds()) <= world.memfds, what="the agent gave its memory back")


def no_leaked_fd(world: World) -> None:
    world.eventually(
        lambda: len(world.agent.fds()) <= world.fds, what=f"the agent's fds: {world.fds} at first, {world.agent.fds()}"
    )


def no_leaked_file(world: World) -> None:
    for replica in world.replicas:
        left = [path.name for path in replica.function.temporary.iterdir()]
        assert not left, f"in a function's TMPDIR: {left}"
    beside = {path.name for path in world.agent.socket.parent.iterdir()}
    assert beside <= {world.agent.socket.name, world.agent.log.name}


def _forget(world: World, uri: str) -> bool:
    from cache_agent.errors import AgentError

    with contextlib.suppress(AgentError):
        if any(model.model == uri for model in world.agent.client.status().models):
            world.agent.client.evict(uri)
    return all(model.model != uri for model in world.agent.client.status().models)


def _write_hole(place: Path, size: int) -> None:
    place.mkdir()
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"weight": entry}).encode()
    with (place / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    (place / "config.json").write_text('{"model_type": "llama"}')


INVARIANTS = [
    no_wrong_byte,
    all_answer_like_the_reference,
    no_leaked_process,
    no_leaked_lease,
    no_leaked_memory,
    no_leaked_fd,
    no_leaked_file,
]


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(
    seed: int,
    agent_process: Callable[..., Any],
    serving: Callable[..., Any],
    tmp_path: Path,
    eventually: Callable[..., Any],
) -> Iterator[World]:
    origin = tmp_path / "model"
    shutil.copytree(MODEL, origin)
    with contextlib.ExitStack() as stack:
        options = ["--dram", str(DRAM)]
        agent = stack.enter_context(agent_process(*options, env={"GLOWPLUG_REVALIDATE": "0.1"}))
        agent.may_fail = True  # its processes are killed while they log

        def start() -> Any:
            # torch keeps a cache directory in TMPDIR; it is no leak of ours.
            env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch")}
            return serving(model=origin, socket=agent.socket, slots=2, queue=8, drain_grace=20, env=env)

        replicas = [Replica(start) for _ in range(2)]
        for replica in replicas:
            stack.callback(replica.close)
        world = World(agent, replicas, origin, random.Random(seed), eventually)
        world.settle()
        for question in QUESTIONS:
            answers = {ask(world, r.function, question, stream=s) for r in replicas for s in (False, True)}
            assert len(answers) == 1, answers
            heard = answers.pop()
            assert heard is not None, world.wrong
            assert heard.complete
            assert heard.text
            world.reference[question] = heard.text
        world.memfds, world.fds = len(agent.memfds()), len(agent.fds())
        yield world


def test_chaos(world: World, pytestconfig: pytest.Config) -> None:
    soak = pytestconfig.getoption("--soak")
    threads = [threading.Thread(target=client, args=(world, world.replicas[n % 2], n)) for n in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number, action in enumerate(_sequence(world.random, soak=soak), 1):
            world.done.append(action.happen.__name__)
            action.happen(world)
            world.stopping.wait(world.random.uniform(0, 0.1))
            if soak and number % CHECK_EVERY == 0:
                world.settle()
                _check(world, calm=False)
        world.settle()
    except BaseException:
        print("actions so far:", *world.done)
        raise
    finally:
        world.stopping.set()
        for thread in threads:
            thread.join(60)
    assert world.answered > 0, "the clients heard nothing at all"
    _check(world, calm=True)


def _check(world: World, *, calm: bool) -> None:
    """All invariants, or without those that running clients would disturb."""
    for invariant in INVARIANTS:
        if calm or invariant is no_wrong_byte or invariant is no_leaked_process:
            try:
                invariant(world)
            except BaseException:
                print(f"{invariant.__name__} does not hold after:", *world.done)
                raise


def _sequence(source: random.Random, *, soak: bool) -> list[Action]:
    if soak:
        return [source.choice(ACTIONS) for _ in range(SOAK_ACTIONS)]
    cheap = [action for action in ACTIONS if not action.dear]
    dear = source.sample([action for action in ACTIONS if action.dear], DEAR_IN_SAMPLE)
    sequence = [*cheap, *dear]
    source.shuffle(sequence)
    return sequence
