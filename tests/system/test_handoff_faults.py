"""Faults while answers stream, one per round: kill -9 of a worker, an agent or Redis, or a worker that stands still.

Some rounds have the fault while a worker hands its requests over. There are two workers, each with an agent of its own,
and a Redis with its append-only file. After any fault at any time:

- every answer comes whole: sampled text and usage are those of the undisturbed run;
- no token is sent by two owners: none under an old epoch after the next owner has sent a token (`_check_told`);
- the fencing log in the store names one owner per epoch, for just the epochs with tokens;
- nothing is left: in the workers at once, in the store after its expiry.
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
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from toy_worker import Line

from runtime.resume.client import ask

WORKER = Path(__file__).with_name("toy_worker.py")
TTL = 60  # seconds for which the store keeps a request
FAULTS = ("worker", "other worker", "agent", "other agent", "redis", "stop worker", "nothing")
DRAINS = ("worker", "other worker", "redis", "stop other worker", "agent", "other agent", "nothing")
STREAMS = 3
SPACE = "glowplug:snapshot:chat:"
WORDS = " ".join(f"w{n}ü" for n in range(35))


class Cluster:
    """The cluster's processes, to `kill` and `revive` by name."""

    def __init__(self, place: Path, agents: list[Any]) -> None:
        self.place, self.agents = place, agents
        self.port = _free_port()
        self.redis: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[str]] = []
        self.urls: list[str] = []
        self.born = 0
        self.unkept = False  # of workers that are started from here on
        self.told = place / "told"

    def start_redis(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("there is no redis-server on PATH")
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.place)]
        with (self.place / "redis.log").open("ab") as log:
            self.redis = subprocess.Popen([*command, "--appendonly", "yes"], stdout=log, stderr=log)

    def start_worker(self, number: int) -> None:
        """Start a worker beside the agent of that number, or the last one."""
        self.born += 1
        name = f"worker-{number}-{self.born:04}"
        command = [sys.executable, str(WORKER), str(self.agents[min(number, 1)].socket), name, str(self.told)]
        command += ["unkept"] if self.unkept else []
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdout.close()
        if number < len(self.workers):
            self.workers[number], self.urls[number] = process, url
        else:
            self.workers.append(process)
            self.urls.append(url)

    def kill(self, fault: str, chance: random.Random) -> None:
        match fault:
            case "worker" | "other worker":
                self.kill_worker(int(fault != "worker"))
            case "agent" | "other agent":
                agent = self.agents[int(fault != "agent")]
                agent.kill()
                agent.start()
            case "redis":
                assert self.redis is not None
                _kill(self.redis)
                self.start_redis()
            case "stop worker" | "stop other worker":
                worker = self.workers[int(fault != "stop worker")]
                worker.send_signal(signal.SIGSTOP)
                time.sleep(chance.uniform(0.3, 2.5))  # the fault itself: for so long it stands still
                worker.send_signal(signal.SIGCONT)

    def kill_worker(self, number: int) -> None:
        """Start another process in its place."""
        _kill(self.workers[number])
        self.start_worker(number)

    @property
    def store(self) -> Any:
        """Return a client of Redis once the server answers."""
        client = redis.Redis(port=self.port)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(redis.RedisError):
                client.ping()
                return client
            assert time.monotonic() < deadline, "Redis answers"
            time.sleep(0.02)

    def left(self) -> set[int]:
        """Return the numbers of requests, generations and sessions that the workers still have; {0} for none."""
        return {count for number in range(len(self.urls)) for count in self.in_hand(number).values()}

    def in_hand(self, number: int) -> dict[str, int]:
        place = self.urls[number].removeprefix("http://")
        with contextlib.closing(http.client.HTTPConnection(place, timeout=5)) as connection:
            connection.request("GET", "/_toy/left")
            return dict(json.loads(connection.getresponse().read()))

    def drain(self) -> None:
        """Make the first worker hand its requests over."""
        self.workers[0].send_signal(signal.SIGUSR1)

    def close(self) -> None:
        for process in (*self.workers, self.redis):
            if process is not None:
                _kill(process)


def _kill(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait(20)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def cluster(start_agent: Callable[..., Any], tmp_path: Path, eventually: Callable[..., Any]) -> Iterator[Cluster]:
    key = tmp_path / "key"
    key.write_text("k" * 32)
    made = Cluster(tmp_path, [])
    try:
        made.start_redis()
        options = ("--redis-url", f"redis://127.0.0.1:{made.port}", "--cluster-key-file", str(key))
        options += ("--snapshot-ttl", str(TTL))
        for name in ("n1", "n2"):
            listen = f"127.0.0.1:{_free_port()}"
            made.agents.append(start_agent(*options, "--node", name, "--agent-listen", listen))
            made.start_worker(len(made.agents) - 1)
        eventually(lambda: redis.Redis(port=made.port).ping())
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("drain", [False, True], ids=["crash", "drain"])
def test_every_answer_comes_whole_and_has_one_owner_at_a_time(
    cluster: Cluster, rounds: Callable[[int, int], int], eventually: Callable[..., Any], drain: bool
) -> None:
    faults = DRAINS if drain else FAULTS
    count = rounds(4 if drain else len(faults) - 1, 500)  # the last one is none
    outcomes: Counter[str] = Counter()
    for number in range(count):
        chance = random.Random(f"{'drain' if drain else 'handoff'} {number}")
        fault = faults[number % len(faults)]
        what = f"round {number}, {fault}"
        seeds = [chance.randrange(1 << 30) for _ in range(STREAMS)]
        streams = Streams(cluster.urls, seeds, silence=1 if fault.startswith("stop") else 5)
        streams.hear(chance.randint(1, STREAMS * 150))
        if drain:
            cluster.drain()
            # The fault itself: it comes at any moment of the hand-off, or of what follows.
            time.sleep(chance.uniform(0.0, chance.choice((0.15, 0.15, 0.6))))
        cluster.kill(fault, chance)
        for seed, answer in zip(seeds, streams.answers(), strict=True):
            wanted = _expected(seed)
            assert answer == (wanted, len(wanted.encode()) + 1), f"{what}, seed {seed}"
        if drain and "agent" not in fault:
            outcomes.update(each.outcome for each in cluster.agents[0].client.status().handoffs[:STREAMS])
        eventually(lambda: cluster.left() == {0}, 20, f"{what}: nothing is left in a worker")
        _check_told(cluster, what)
        if drain and fault != "worker":  # it has given all away: a new one takes its place
            cluster.kill("worker", chance)
        if number % 50 == 49:
            print(f"{number + 1} rounds of {count}; hand-offs: {dict(outcomes)}", flush=True)
    if count >= 100:
        assert not drain or outcomes["moved"] > count, "the rounds are about hand-offs"
        eventually(lambda: not cluster.store.keys("glowplug:snapshot:*"), 3 * TTL, "all that was kept has expired")


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
def test_a_destination_is_killed_and_no_client_of_the_source_notices(
    cluster: Cluster, rounds: Callable[[int, int], int], eventually: Callable[..., Any], keep: bool
) -> None:
    """Three workers: the first hands its streams over and relays them, then the worker that has them dies."""
    count, killed, long = rounds(int(keep), 100), 0, " ".join([WORDS] * 3)
    if not count:
        pytest.skip("the full count alone; test_drain_exact.py has it on two engines in one process")
    if not keep:
        cluster.unkept = True
        for number in (0, 1):
            cluster.kill_worker(number)
    cluster.start_worker(2)
    for number in range(count):
        chance = random.Random(f"relay {number}")
        what = f"round {number}"
        seeds = [chance.randrange(1 << 30) for _ in range(STREAMS)]
        temperature = chance.choice((0.0, 1.0))
        streams = Streams(cluster.urls[:1], seeds, silence=20, temperature=temperature, patience=0, text=long)
        streams.hear(chance.randint(1, 100))
        cluster.drain()
        eventually(lambda: not cluster.in_hand(0)["engine"], 20, f"{what}: all is moved")
        time.sleep(chance.uniform(0.0, 0.2))  # the fault itself: it comes at any moment of what is relayed
        for holder in [n for n in (1, 2) if cluster.in_hand(n)["engine"]][:1]:
            cluster.kill_worker(holder)
            killed += 1
        for seed, answer in zip(seeds, streams.answers(), strict=True):
            wanted = _expected(seed, temperature, long)
            assert answer == (wanted, len(wanted.encode()) + 1), f"{what}, seed {seed}"
        eventually(lambda: cluster.left() == {0}, 20, f"{what}: nothing is left in a worker")
        if keep:
            _check_told(cluster, what)
        cluster.kill_worker(0)
    assert killed >= count // 2, "the rounds are about destinations that die"


class Streams:
    """Answers that clients read; each client resumes for `patience` seconds (0: an error ends its answer).

    `silence` is the number of seconds without an event after which a client gives a connection up.
    """

    def __init__(
        self, urls: list[str], seeds: list[int], *, silence: float, patience: float = 40, **request: Any
    ) -> None:
        """`request` may have a `text` and a `temperature` of its own."""
        self._urls, self._limits = urls, {"silence": silence, "patience": patience}
        self._said, self._temperature = request.get("text", WORDS), request.get("temperature", 1.0)
        self._heard = threading.Semaphore(0)
        self._answers: list[Any] = [None for _ in seeds]
        self._threads = [threading.Thread(target=self._read, args=(n, seed)) for n, seed in enumerate(seeds)]
        for thread in self._threads:
            thread.start()

    def _read(self, n: int, seed: int) -> None:
        body = {"messages": [{"role": "user", "content": self._said}], "stream": True, "seed": seed}
        body |= {"temperature": self._temperature, "stream_options": {"include_usage": True}}
        text, usage = "", None
        try:
            for event in ask(self._urls, "/v1/chat/completions", body, **self._limits):
                frame = json.loads(event.data)
                text += "".join(one["delta"].get("content", "") for one in frame["choices"])
                usage = frame["usage"] or usage
                self._heard.release()
            self._answers[n] = (text, usage["completion_tokens"] if usage else None)
        except Exception as error:  # told by the test, with the round's number
            self._answers[n] = error

    def hear(self, events: int) -> None:
        """Wait until so many events of all streams together have come, or until no more come."""
        for _ in range(events):
            self._heard.acquire(timeout=20)

    def answers(self) -> list[Any]:
        for thread in self._threads:
            thread.join(90)
        return self._answers


def _expected(seed: int, temperature: float = 1.0, text: str = WORDS) -> str:
    """Return the toy model's text, from the engine alone."""
    from runtime.engine.base import SamplingParams
    from runtime.engine.toy import EOS, ToyCodec, _answer

    prompt = ToyCodec().chat([{"role": "user", "content": text}])
    ids = []
    for token in _answer(prompt, SamplingParams(temperature=temperature, seed=seed)):
        if token == EOS:
            return bytes(ids).decode()
        ids.append(token)
    raise AssertionError("it has an end")


def _check_told(cluster: Cluster, what: str) -> None:
    """Compare the tokens sent, with their epochs and owners, with the store's log; then forget them."""
    lines = sorted(Line.parsed(text) for text in cluster.told.read_text().splitlines())
    cluster.told.write_text("")
    by_request: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_request[line.id].append(line)
    assert len(by_request) >= STREAMS, what
    for request, told in by_request.items():
        logged = dict(line.decode().split(" ") for line in cluster.store.lrange(f"{SPACE}{request}:changes", 0, -1))
        epochs = [int(epoch) for epoch in logged]
        assert epochs == list(range(1, len(epochs) + 1)), f"{what}: {logged}"
        owners, tokens = {}, {}
        begun: dict[tuple[int, int], int] = {}  # (epoch, choice) -> the first token that was told under it
        for line in told:
            about = f"{what}: {line}; {logged}"
            assert owners.setdefault(line.epoch, line.owner) == line.owner == logged.get(str(line.epoch)), about
            assert tokens.setdefault((line.choice, line.index), line.token) == line.token, about
            later = [index for (epoch, choice), index in begun.items() if epoch > line.epoch and choice == line.choice]
            assert line.index < min(later, default=1 << 30), f"told after the next owner had begun with it: {about}"
            begun.setdefault((line.epoch, line.choice), line.index)
    for key in cluster.store.keys("glowplug:snapshot:*"):
        # -1 would be a key that stays for ever; -2 is one that has just gone.
        assert cluster.store.pttl(key) in {-2, *range(2 * TTL * 1000 + 1)}, f"{what}: {key!r} stays too long"
