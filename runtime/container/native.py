"""Builds the static twin of the shim, shim.c, for this interpreter and this runtime.

    python -m runtime.container.native FILE

Takes a C compiler, with the static C library (Debian: gcc, libc6-dev). What is built needs neither.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from runtime.errors import BadConfig
from runtime.layers import identity

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shim.c")
_FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror")
_OPTIMISED = ("-O2", "-static")


def compiler() -> str:
    """Its path, or ""."""
    return shutil.which(os.environ.get("CC") or "cc") or ""


def build(target: str, flags: Sequence[str] = _OPTIMISED) -> None:
    """Raises `BadConfig` where there is no compiler, or it refuses."""
    program = compiler()
    if not program:
        raise BadConfig("no C compiler is there; install one (Debian: gcc, libc6-dev), or start runtime.shim itself")
    known = {"PYTHON": sys.executable, "VERSION": identity.needs().python, "LOCK": identity.LOCK}
    defined = [f'-D{name}="{value}"' for name, value in known.items()]
    new = f"{target}.{os.getpid()}"  # somebody may be starting the old one
    done = subprocess.run(
        [program, *_FLAGS, *flags, *defined, SOURCE, "-o", new], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BadConfig(f"{program} does not build {SOURCE}: {done.stderr.strip()}")
    os.replace(new, target)


if __name__ == "__main__":
    build(sys.argv[1])
