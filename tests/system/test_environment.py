"""What the scripts do before they begin: which torch they are about to install, and which clocks the tests have."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HINT = "set GLOWPLUG_TORCH_INDEX to an index with CPU builds of torch"
# An environment's Python that installs nothing, and says what it was asked for. The real pip reads its settings.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
    "-m pip show"*) exit {there} ;;
    "-m pip config list") exec {python} -m pip config list ;;
    "-m pip install"*) echo "installed: $*" >&2 ;;
    *" -m pytest "* | "-m pytest "*) echo "tests: $*"; exec {python} -c 'import time; print("up", time.monotonic())' ;;
    "-c "*) exec {python} "$@" ;;
    *) echo "ran: $*" ;;
esac
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run(script, *arguments, there=False, programs={}, **variables)`, in a checkout whose environment is a stand-in.

    `there`: torch is installed already. `programs` are scripts, by name, that are found before all others.
    """
    (tmp_path / "scripts").mkdir()
    (tmp_path / "runtime").mkdir()
    for name in ("scripts/environment", "scripts/test", "scripts/demo", "runtime/base.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "programs").mkdir()
    nothing = {"zsh": "", "fish": "", "redis-server": "", "nvidia-smi": "exit 9"}

    def program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def start(
        script: str, *arguments: str, there: bool = False, programs: dict[str, str] | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        program(tmp_path / ".venv/bin/python", STAND_IN.format(there=int(not there), python=sys.executable))
        for name, body in {**nothing, **(programs or {})}.items():
            program(tmp_path / "programs" / name, f"#!/usr/bin/env bash\n{body}\n")
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "GLOWPLUG_"))}
        env |= {"PIP_CONFIG_FILE": os.devnull, "PATH": f"{tmp_path}/programs{os.pathsep}{os.environ['PATH']}"}
        command = [tmp_path / "scripts" / script, *arguments]
        return subprocess.run(command, env={**env, **variables}, capture_output=True, text=True, timeout=60)

    return start


# --- torch ------------------------------------------------------------------------------------------------------------

no_device = pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="an NVIDIA device is here")


@no_device
@pytest.mark.parametrize("script", ["demo", "test"])
def test_who_would_get_cuda_for_nothing_is_told_first(script: str, run: Run) -> None:
    done = run(script)
    assert done.returncode == 0, done.stderr
    before, installed, _ = done.stderr.partition("installed: -m pip install -q torch==")
    assert installed, "it goes on"
    assert "some 3 GB of CUDA libraries" in before
    assert HINT in before


@no_device
@pytest.mark.parametrize(
    "variables",
    [
        {"GLOWPLUG_TORCH_INDEX": "https://index.example/cpu"},
        {"PIP_INDEX_URL": "https://index.example/simple"},
        {"PIP_EXTRA_INDEX_URL": "https://index.example/simple"},
        {"PIP_FIND_LINKS": "/wheels"},
        {"PIP_NO_INDEX": "1"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_who_has_an_index_is_told_nothing(variables: dict[str, str], run: Run) -> None:
    done = run("demo", **variables)
    assert "installed: -m pip install" in done.stderr
    assert "CUDA" not in done.stderr


@no_device
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("[global]\nfind-links = /wheels", False),
        ("[install]\nindex-url = https://index.example/simple", False),
        ("[global]\nextra-index-url =\n    https://index.example/one\n    https://index.example/two", False),
        ("[global]\nindex-url =", True),
        ("[global]\ntimeout = 60", True),
    ],
)
def test_pips_own_files_count_too(settings: str, told: bool, run: Run, tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text(settings + "\n")
    done = run("demo", PIP_CONFIG_FILE=str(tmp_path / "pip.conf"))
    assert "installed: -m pip install" in done.stderr
    assert (HINT in done.stderr) == told, done.stderr


def test_who_has_a_device_or_torch_is_told_nothing(run: Run) -> None:
    assert "CUDA" not in run("demo", programs={"nvidia-smi": "echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'"}).stderr
    done = run("demo", there=True)
    assert "CUDA" not in done.stderr
    assert "torch==" not in done.stderr


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "least", "most"), [("--young", 5, 65), ("--old", 3e8, 4e8)])
def test_the_tests_have_the_clocks_of_such_a_machine(option: str, least: float, most: float, run: Run) -> None:
    if os.geteuid() or subprocess.run("unshare --time --fork true", shell=True, capture_output=True).returncode:
        pytest.skip("needs root and time namespaces")
    done = run("test", "-x", option, "tests/some name")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].endswith("--no-loadscope-reorder -x tests/some name")
    (up,) = re.findall(r"^up ([0-9.]+)$", done.stdout, re.MULTILINE)
    assert least <= float(up) < most


def test_without_the_right_it_says_what_it_needs(run: Run) -> None:
    refuses = "echo 'unshare: unshare failed: Operation not permitted' >&2; exit 1"
    done = run("test", "--young", programs={"unshare": refuses})
    assert done.returncode == 1
    assert "root alone may make (Linux 5.6, util-linux 2.36): Operation not permitted\n" in done.stderr
    assert "tests:" not in done.stdout


def test_what_is_handed_times_is_found_when_tests_are_collected() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--collect-only", "-m", "clock", "tests/function"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100).stdout
    modules = set(re.findall(r"^tests/function/(\w+)[.]py", found, re.MULTILINE))
    assert {"test_pool_models", "test_layers_command", "test_native", "test_zygote"} <= modules
    assert not {"test_errors", "test_sse"} & modules
