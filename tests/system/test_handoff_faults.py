"""One fault per round while answers stream: kill -9 of a worker, an agent or Redis, or a worker that stands still; and

the same while one of them hands its work over. Two workers, each with an agent of its own, and a Redis with its
append-only file. Every answer must come whole, each token once, whatever happens when; the fencing log of every request
must name one owner per epoch, in order.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from runtime.handoff.client import ask

WORKER = Path(__file__).with_name("toy_worker.py")
FAULTS = ("worker", "other worker", "agent", "other agent", "redis", "stop worker", "nothing")
DRAINS = ("worker", "other worker", "redis", "stop other worker", "agent", "other agent", "nothing")
STREAMS = 3
WORDS = " ".join(f"w{n}ü" for n in range(50))


class Cluster:
    """All of its processes; `kill` and `revive` by name."""

    def __init__(self, place: Path, agents: list[Any]) -> None:
        self.place, self.agents = place, agents
        self.port = _free_port()
        self.redis: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[str]] = []
        self.urls: list[str] = []
        self.born = 0

    def start_redis(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("there is no redis-server on PATH")
        command = [program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.place)]
        with (self.place / "redis.log").open("ab") as log:
            self.redis = subprocess.Popen([*command, "--appendonly", "yes"], stdout=log, stderr=log)

    def start_worker(self, number: int) -> None:
        self.born += 1
        command = [sys.executable, str(WORKER), str(self.agents[number].socket), f"worker-{number}-{self.born:04}"]
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
                number = int(fault != "worker")
                _kill(self.workers[number])
                self.start_worker(number)
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

    def drain(self) -> None:
        """Has the first worker hand its work over."""
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
    cluster: Cluster, rounds: Callable[[int, int], int], drain: bool
) -> None:
    faults = DRAINS if drain else FAULTS
    for number in range(rounds(4 if drain else len(faults), 500)):
        chance = random.Random(f"{'drain' if drain else 'handoff'} {number}")
        fault = faults[number % len(faults)]
        answers: dict[int, Any] = {}
        heard, enough = threading.Semaphore(0), chance.randint(1, 3 * 150)

        def stream(n: int, seed: int, answers: dict[int, Any] = answers, heard: Any = heard) -> None:
            body = {"messages": [{"role": "user", "content": WORDS}], "stream": True, "seed": seed}
            body |= {"temperature": 1.0, "stream_options": {"include_usage": True}}
            text, usage = "", None
            try:
                for event in ask(cluster.urls, "/v1/chat/completions", body, patience=40, silence=5):
                    frame = json.loads(event.data)
                    text += "".join(one["delta"].get("content", "") for one in frame["choices"])
                    usage = frame["usage"] or usage
                    heard.release()
                answers[n] = (text, usage["completion_tokens"] if usage else None)
            except Exception as error:  # told by the test, with the round's number
                answers[n] = error

        seeds = [chance.randrange(1 << 30) for _ in range(STREAMS)]
        threads = [threading.Thread(target=stream, args=(n, seed)) for n, seed in enumerate(seeds)]
        for thread in threads:
            thread.start()
        for _ in range(enough):
            heard.acquire(timeout=20)
        if drain:
            cluster.drain()
            time.sleep(chance.uniform(0.0, 0.15))  # the fault itself: it comes at any moment of the hand-off
        cluster.kill(fault, chance)
        for thread in threads:
            thread.join(90)
        for n, seed in enumerate(seeds):
            wanted = _expected(seed)
            assert answers.get(n) == (wanted, len(wanted.encode()) + 1), f"round {number}, {fault}, stream {n}"
        _check_owners(cluster, f"round {number}, {fault}")
        if drain and fault != "worker":  # it has given all away: a new one takes its place
            cluster.kill("worker", chance)


def _expected(seed: int) -> str:
    """What the toy says, without anything in between."""
    from runtime.engine.base import SamplingParams
    from runtime.engine.toy import EOS, ToyCodec, _answer

    prompt = ToyCodec().chat([{"role": "user", "content": WORDS}])
    ids = []
    for token in _answer(prompt, SamplingParams(temperature=1.0, seed=seed)):
        if token == EOS:
            return bytes(ids).decode()
        ids.append(token)
    raise AssertionError("it has an end")


def _check_owners(cluster: Cluster, what: str) -> None:
    client = redis.Redis(port=cluster.port)
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(redis.RedisError):
            client.ping()
            break
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    for key in client.scan_iter("glowplug:snapshot:chat:*:changes"):
        changes = [line.decode().split(" ") for line in client.lrange(key, 0, -1)]
        epochs = [int(epoch) for epoch, _ in changes]
        assert epochs == sorted(set(epochs)), f"{what}: {changes}"
        assert epochs[0] == 1, f"{what}: {changes}"
    client.close()
