"""A node in node mode, for tests: a pool, containers that obey, functions whose shims live in such containers.

As root only: these containers are real namespaces, with a root directory and a user of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
INSIDE = Path(__file__).with_name("contained.py")
PYTHON_SHIM = (sys.executable, "-P", "-m", "runtime.shim")
UNSHARE = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
SECONDS = 180.0
POSSIBLE = os.geteuid() == 0 and shutil.which("unshare") is not None


class Pool:
    """A `glowplug pool` of its own process."""

    def __init__(self, place: Path, *options: str) -> None:
        (place / "run").mkdir(mode=0o755)
        self.socket = place / "run/pool.sock"
        self.log = place / "pool.log"
        command = [
            sys.executable,
            "-P",
            "-c",
            "from runtime.cli import main; main()",
            "pool",
            "--socket",
            str(self.socket),
        ]
        with self.log.open("wb") as log:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(
                [*command, "--kind", "llama", *options], stderr=log, stdout=log, env=environment
            )
        wait(lambda: self.socket.exists(), "the pool listens", self.log)

    def ready(self) -> Pool:
        """Return this pool, once it has a layer."""
        wait(lambda: "the lang layer is warm" in self.log.read_text(), "it has a layer", self.log)
        return self

    def children(self) -> list[int]:
        return children(self.process.pid)

    def grandchildren(self, name: str) -> list[int]:
        """Return the processes that the pool's zygotes have forked, by name."""
        return [each for child in self.children() for each in children(child) if comm(each) == name]

    def layers(self) -> list[dict[str, Any]]:
        """Return the layers that the pool publishes."""
        from runtime.layers import published

        (found,) = [each for each in published.read() if each["pid"] == self.process.pid]
        return list(found["layers"])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(SECONDS)


class Container:
    """A container whose first process obeys."""

    def __init__(self, pool: Pool, place: Path, uid: int, **options: Any) -> None:
        root = place / f"root-{time.monotonic_ns()}"
        root.mkdir(parents=True)
        binds = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", str(ROOT)]
        binds += [os.path.realpath(path) for path in (sys.base_prefix, sys.prefix)]
        binds += options.pop("more", [])
        binds = [path for path in dict.fromkeys(binds) if os.path.exists(path)]
        self.options = {
            "pool": str(pool.socket.parent), "root": str(root), "uid": uid, "filtered": False,
            "shim": [], "cgroups": [],
            "binds": [b for b in binds if not any(b.startswith(f"{o}/") for o in binds)],
            "environment": {
                "GLOWPLUG_MODEL": "/no/model", "GLOWPLUG_LAYERS": "lang", "GLOWPLUG_SOCKET": "/no/agent",
                "SECRET": "hunter2",
            },
            **options,
        }  # fmt: skip
        network = [] if self.options["shim"] else ["--net"]
        self.log = place / f"{root.name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*UNSHARE, *network, sys.executable, "-P", str(INSIDE), json.dumps(self.options)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
            )  # fmt: skip
        self.said: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.put(json.loads(line))

    def order(self, **what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, *names: str) -> dict[str, Any]:
        """Return the container's next message that has one of these fields."""
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                said = self.said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"nothing of {names} was said; {self.log.read_text()}") from None
            said = said.get("heard", said)
            if any(name in said for name in names):
                return said
            assert "failed" not in said, said

    def attack(self, source: str) -> Any:
        self.order(attack=source)
        said = self.hear("attack")
        assert said["error"] == "", said["error"]
        return json.loads(said["attack"])

    def introduce(self) -> None:
        """Have the pool serve the container."""
        self.order(wants={})
        self.hear("ready")

    def worker(self) -> int:
        """Ask for a worker; return its pid in the container."""
        self.introduce()
        self.order(ask=1)
        said = self.hear("forked", "refused", "failed")
        assert "forked" in said, said
        outside = self.outside(int(said["pid"]))
        wait(lambda: status(outside)["NoNewPrivs"] == "1", "it has entered the container", self.log)
        return int(said["pid"])

    def outside(self, pid: int) -> int:
        """Return the pid, outside, of a process of the container."""
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                found = next(
                    (line.split()[1:] for line in status.read_text().splitlines() if line.startswith("NSpid:")), []
                )
                if len(found) > 1 and int(found[-1]) == pid and self._mine(status.parent):
                    return int(status.parent.name)
        raise AssertionError(f"no process {pid} in the container")

    def _mine(self, process: Path) -> bool:
        (first,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return os.stat(process / "ns/pid").st_ino == os.stat(f"/proc/{first}/ns/pid").st_ino

    def named(self, name: str) -> int:
        """Return the pid, outside, of the container's process with this name, once there is one."""

        return int(wait(lambda: self.find(name), f"there is a {name}", self.log))

    def find(self, name: str) -> int:
        """Return as `named`, or 0 if there is none now."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if comm(int(process.name)) == name and self._mine(process):
                    return int(process.name)
        return 0

    def first(self) -> int:
        return self.outside(1)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(SECONDS)


def wait(condition: Callable[[], Any], what: str, log: Path | None = None) -> Any:
    """Wait until the condition gives something true, and return that."""
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {SECONDS:.0f} s; {log.read_text() if log else ''}"
        time.sleep(0.02)
    return found


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def ended(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


class Function:
    """A function's shim in a container, with an agent; the pool's socket is at its default path."""

    def __init__(
        self,
        container: Callable[..., Container],
        agent: Path,
        shim: Sequence[str] = PYTHON_SHIM,
        more: Sequence[str] = (),
        which: Pool | None = None,
        **environment: str,
    ) -> None:
        agent.parent.chmod(0o755)
        environment = {"GLOWPLUG_LAYERS": "lang", **environment}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        variables = {"GLOWPLUG_MODEL": str(ROOT / "templates/llm-python/model"), "PORT": str(self.port)}
        variables |= {"GLOWPLUG_SOCKET": str(agent), **environment}
        options = {} if which is None else {"which": which}
        binds = [str(agent.parent), shim[0], *more]
        self.container = container(shim=[*shim], environment=variables, more=binds, **options)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=SECONDS) as answer:
            return json.loads(answer.read())

    def ready(self) -> dict[str, Any]:
        """Return the function's ledger, once it is ready."""

        def asked() -> bool:
            with contextlib.suppress(OSError):
                return bool(self.get("/_/ledger")["state"] == "ready")
            return False

        wait(asked, "the function is ready", self.container.log)
        return dict(self.get("/_/ledger"))

    def answer(self) -> str:
        body = json.dumps({"prompt": "What is a lease?", "max_tokens": 8, "temperature": 0}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/completions", body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return str(json.loads(answer.read())["choices"][0]["text"])

    def crash(self) -> dict[str, Any]:
        """Crash the worker; return the ledger of the next one."""
        first = self.ready()
        os.kill(self.container.named("glowplug-worker"), signal.SIGSEGV)
        wait(lambda: self.ready()["start_id"] != first["start_id"], "another start", self.container.log)
        return self.ready()


def names(ledger: dict[str, Any], owner: str) -> list[str]:
    return [span["name"] for span in ledger["spans"] if span["owner"] == owner]
