"""The build of the static twin of the shim, shim.c, for this interpreter and this runtime.

    python -m runtime.container.native FILE

Names, defaults, limits and texts of both shims stand in Python only: `shared` gathers them, and shared.h, which is
written for the compiler and deleted afterwards, has them for C. Building takes a C compiler with the static C library
(Debian: gcc, libc6-dev); the program that is built needs neither.
"""

from __future__ import annotations

import os
import shutil
import string
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from runtime import config
from runtime.container import node, port, shim, standby, supply, takeover, watched_worker
from runtime.errors import BadConfig, FunctionError
from runtime.layers import identity, spawn
from runtime.process import control, messages, wire

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shim.c")
_FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror")
_OPTIMISED = ("-O2", "-static")
_NAMED = ("listen_fd", "reload", "socket")  # settings whose default is that there is none
_TEXTS = ("host", "layers", "model", "pool", "port")
_NUMBERS = ("drain_grace", "drain_linger", "worker_timeout")
_PLAIN = frozenset(string.printable) - frozenset(string.whitespace) - frozenset('"?\\') | {" "}

Value = str | int | float | bytes


def shared() -> dict[str, Value]:
    """Return the names and values of shared.h, which both shims keep to."""
    needs, defaults = identity.needs(), config.FunctionConfig()
    found: dict[str, Value] = {
        "PYTHON": sys.executable,
        "MACHINE": needs.machine,
        "PYTHON_VERSION": needs.python,
        "BASE": needs.base,
        "VERSION": messages.VERSION,
        "STATE": takeover.VARIABLE,
        "AGENT_SOCKET": config.DEFAULT_SOCKET,
        "MAX_PACKET": wire.MAX_PACKET,
        "MAX_LINE": control.MAX_LINE,
        "BACKLOG": port.BACKLOG,
        "POOL_SECONDS": node.POOL_SECONDS,
        "FORK_SECONDS": supply.FORK_SECONDS,
        "SILENCE_SECONDS": spawn.SILENCE,
        "ORPHAN_SECONDS": watched_worker.ORPHAN_SECONDS,
        "HANG_SECONDS": shim.HANG_SECONDS,
        "EXIT_FAILED": FunctionError.exit_code,
        "REPORTED_FIRST": shim.REPORTED[0],
        "REPORTED_LAST": shim.REPORTED[-1],
        "PROBE_MS": standby.PROBE_MS,
        "PROBE_BYTES": standby.PROBE_BYTES,
        "PROBE_HEAD": standby.PROBE_HEAD,
    }
    found |= {name: getattr(shim, name) for name in vars(shim) if name.startswith("SAYS_")}
    for name in (*_NAMED, *_TEXTS, *_NUMBERS):
        found[f"NAME_{name.upper()}"] = f"GLOWPLUG_{name.upper()}"
    for name in _TEXTS:
        found[f"DEFAULT_{name.upper()}"] = str(getattr(defaults, name))
    for name in _NUMBERS:
        found[f"DEFAULT_{name.upper()}"] = float(getattr(defaults, name))
        found[f"LEAST_{name.upper()}"] = config.AT_LEAST[name]
    return found


def header() -> str:
    """Return the text of shared.h."""
    lines = [f"#define {name} {_literal(value)}" for name, value in shared().items()]
    probes = (f"{{{_literal(request)}, {_literal(body)}}}" for request, body in standby.PROBES.items())
    lines.append(f"#define PROBES {', '.join(probes)}")
    return "\n".join(("/* Made by native.py of what the shim in Python has; see there. */", *lines, ""))


def _literal(value: Value) -> str:
    if isinstance(value, int | float):
        return repr(value)
    data = value if isinstance(value, bytes) else os.fsencode(value)
    return '"' + "".join(chr(byte) if chr(byte) in _PLAIN else f"\\{byte:03o}" for byte in data) + '"'


def compiler() -> str:
    """Return the path of the C compiler, or ""."""
    return shutil.which(os.environ.get("CC") or "cc") or ""


def build(target: str, flags: Sequence[str] = _OPTIMISED) -> None:
    """Write the program to `target`. Raises `BadConfig` where there is no compiler, or where it fails."""
    program = compiler()
    if not program:
        raise BadConfig("no C compiler is there; install one (Debian: gcc, libc6-dev), or start runtime.shim itself")
    new = f"{target}.{os.getpid()}"  # another process may be starting the old program
    with tempfile.TemporaryDirectory() as place:
        Path(place, "shared.h").write_text(header())
        done = subprocess.run(
            [program, *_FLAGS, *flags, f"-I{place}", SOURCE, "-o", new], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise BadConfig(f"{program} does not build {SOURCE}: {done.stderr.strip()}")
    os.replace(new, target)


if __name__ == "__main__":
    build(sys.argv[1])
