"""The first process of a container that a test makes: it takes orders as JSON lines, and reports the results.

    {"wants": {…}}           tells the pool what it is, by the environment that the test gave, and goes on as this says
    {"ask": 1}               asks the pool for a worker
    {"tell": {…}}            tells the pool this of it
    {"attack": "source"}     runs Python in a child, as an attacker in the container would

The container has a root of its own, in which nothing of the host is but what Python needs. With `shim`, a command, it
becomes a function's shim instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import socket
import struct
import subprocess
import sys
from typing import Any

DOCKERS = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)  # the capabilities that Docker leaves to a container's root
LIBC = ctypes.CDLL(None, use_errno=True)


def confine(root: str, binds: list[str], pool: str, uid: int, filtered: bool) -> None:
    def mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True)

    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "tmpfs", root)
    for path in binds:
        inside = root + path
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            open(inside, "w").close()
        mount("--rbind", path, inside)
    for name in ("proc", "tmp", "run/glowplug"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    mount("--bind", pool, f"{root}/run/glowplug")
    os.chmod(f"{root}/tmp", 0o1777)
    mount("-t", "proc", "proc", f"{root}/proc")
    os.chroot(root)
    os.chdir("/")
    for capability in range(64):
        if (uid or capability not in DOCKERS) and LIBC.prctl(23, capability, 0, 0, 0) > 0:
            assert LIBC.prctl(24, capability, 0, 0, 0) == 0
    if uid:
        os.setgroups([uid + 1])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    else:
        allowed = sum(1 << capability for capability in DOCKERS)
        low, high = allowed & 0xFFFFFFFF, allowed >> 32
        assert LIBC.capset(struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", low, low, 0, high, high, 0)) == 0
    if filtered:
        assert LIBC.prctl(38, 1, 0, 0, 0) == 0
        program = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000))  # allow
        assert LIBC.prctl(22, 2, struct.pack("@HP", 1, ctypes.addressof(program)), 0, 0) == 0


def main() -> None:
    options = json.loads(sys.argv[1])
    pool = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for file in options["cgroups"]:
        with open(file, "w") as group:
            group.write("0")
    confine(options["root"], options["binds"], options["pool"], options["uid"], options["filtered"])
    if options["shim"]:
        environment = {
            **os.environb,
            **{os.fsencode(name): os.fsencode(value) for name, value in options["environment"].items()},
        }
        command = options["shim"]
        os.execve(command[0], command, environment)
    from runtime.process.wire import Gone, Wire

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    pool.connect("/run/glowplug/pool.sock")
    wire: Wire | None = Wire(pool)
    say({"pid": os.getpid(), "port": listener.getsockname()[1]})
    orders = b""
    while True:
        poller = select.poll()
        poller.register(0, select.POLLIN)
        poller.register(ours, select.POLLIN)
        if wire is not None:
            poller.register(wire, select.POLLIN)
        poller.poll(1000)
        try:
            while wire is not None and (received := wire.receive()) is not None:
                if "beat" not in received[0]:
                    say({"heard": received[0]})
        except Gone:
            wire = None
            say({"heard": {"closed": 1}})
        with contextlib.suppress(BlockingIOError):
            ours.recv(1 << 20)
        if select.select([0], [], [], 0)[0]:
            more = os.read(0, 1 << 16)
            if not more:
                return
            orders += more
            while b"\n" in orders:
                line, _, orders = orders.partition(b"\n")
                obey(json.loads(line), wire, [listener.fileno(), theirs.fileno(), 0, 1, 2], options)


def obey(order: dict[str, Any], wire: Any, fds: list[int], options: dict[str, Any]) -> None:
    match order:
        case {"ask": number}:
            environment = {**options["environment"], "PATH": os.environ["PATH"]}
            request = {"fork": number, "environment": environment, "cwd": "/"}
            with open(os.devnull) as nothing:
                fds = [*fds[:2], nothing.fileno(), 2, 2]
                wire.send({**request, "start_id": "0" * 16, "spans": [("shim", "exec", 1, 2)]}, fds)
        case {"wants": dict(changes)}:
            from runtime.layers import identity
            from runtime.process.messages import VERSION

            needs = identity.needs()
            made_of = {"wants": VERSION, "machine": needs.machine, "python": needs.python, "base": needs.base}
            environment = {**dict(needs.environment), **options["environment"]}
            wire.send({**made_of, **changes, "environment": environment, "cwd": "/"})
        case {"tell": dict(what)}:
            wire.send(what)
        case {"attack": str(source)}:
            done = subprocess.run(
                [sys.executable, "-P", "-c", source], capture_output=True, text=True, stdin=subprocess.DEVNULL
            )
            say({"attack": done.stdout, "error": done.stderr})


def say(what: dict[str, Any]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
