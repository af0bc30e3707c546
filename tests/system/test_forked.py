"""What a worker that was forked from a model's layer does up to its first token, seen from inside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# A layer is made as a zygote makes it, and a worker forked from it as it forks one. It tells what it was the only one
# to have when its first token is there.
PROGRAM = """
import http.client, json, os, socket, sys, time
from collections import deque
from cache_agent.client.cache_client import CacheClient
from runtime.process import children
from runtime.worker import assembly, worker
from runtime.zygote import forkserver
from runtime.zygote.warm import Warm

agent, uri, handler = sys.argv[1:]
lease = CacheClient(agent).lease(uri)
lease.wait_ready(time.monotonic() + 60)
warm = Warm.lang(("llama",)).with_model(lease.manifest_bytes, *map(os.dup, (lease.manifest_fd, *lease.segments)))
lease.close()
forkserver.seal()
for rehearsed in (False, True):
    listener, (ours, theirs) = socket.create_server(("127.0.0.1", 0)), socket.socketpair()
    if os.fork() == 0:
        environment = {"GLOWPLUG_MODEL": uri, "GLOWPLUG_SOCKET": agent, "GLOWPLUG_HANDLER": handler}
        forkserver.keep_only({0, 1, 2, listener.fileno(), theirs.fileno()})
        forkserver.become(environment)
        if rehearsed:
            deque(warm.rehearse(), 0)
        known, before, threads = set(sys.modules), children.private_bytes(), len(os.listdir("/proc/self/task"))
        told = assembly.Assembly._first_token

        def first_token(self, asked):
            told(self, asked)
            imported, private = [name for name in sys.modules if name not in known], children.private_bytes()
            seen = {"imported": imported, "threads": threads, "private": private, "more": private - before}
            print(json.dumps({**seen, "environment": dict(os.environ)}))
            sys.stdout.flush()

        assembly.Assembly._first_token = first_token
        os._exit(worker.serve(listener.fileno(), theirs.fileno(), "0" * 16, [], warm, why=""))
    theirs.close()
    asking = http.client.HTTPConnection(*listener.getsockname(), timeout=60)
    asking.request("POST", "/", "a glow plug")
    print(json.dumps({"answer": asking.getresponse().read().decode()}))
    sys.stdout.flush()
    ours.close()  # the worker ends with its shim
    os.wait()
"""


def test_a_worker_of_a_models_layer_has_all_it_needs(agent: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Nothing but the function's own code is imported after the fork, and little memory is copied."""
    (tmp_path / "handler.py").write_text(
        "def handle(event, context):\n"
        "    return context.model.generate(event.body.decode(), max_tokens=4, temperature=0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, str(agent.socket), f"file://{checkpoint}", str(tmp_path)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "LEFT": "behind"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({each["answer"] for each in told if "answer" in each} - {""}) == 1, done.stderr
    first, rehearsed = (each for each in told if "private" in each)
    for each in (first, rehearsed):
        assert [name for name in each["imported"] if not name.startswith("function")] == []
        assert each["environment"].keys() == {"GLOWPLUG_MODEL", "GLOWPLUG_SOCKET", "GLOWPLUG_HANDLER"}
        assert (each["threads"], each["private"] < 36 << 20) == (1, True), each
    assert rehearsed["more"] < first["more"] - (1 << 20), "a rehearsal copies ahead what the first request writes to"
