"""Who may import whom, seen from outside: in processes of their own, and in the source of the pure modules."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cache_agent
import runtime

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "numpy", "tokenizers", "safetensors")
# The folders and top modules of both packages, the lowest first: each may import what stands above it here, and nothing
# below. A line may have several that know nothing of one another.
HOUSE = {
    "cache_agent": """
        errors ledger limits logs stamp
        config
        model
        policy
        wire
        tiers
        loading
        journal
        access
        cluster
        residency
        snapshots
        handoff
        client
        serving
        web
        kube
        daemon
        cli
    """,
    "runtime": """
        errors sse
        config
        process
        layers
        engine
        protocol
        resume
        function
        handler
        http
        handoff
        worker
        zygote
        pool
        container
        shim
        commands
        cli
        __main__
    """,
}
# Modules without I/O, clock or threads, by the design; `policy` is a package of such.
PURE = [
    "cache_agent/model/manifest.py",
    "cache_agent/model/uri.py",
    "cache_agent/model/origin.py",
    "cache_agent/wire/messages.py",
    "cache_agent/wire/operations.py",
    "cache_agent/wire/peers.py",
    "cache_agent/wire/layers.py",
    "cache_agent/wire/protocol.py",
    "cache_agent/model/safetensors.py",
    "cache_agent/residency/machine.py",
    "cache_agent/residency/events.py",
    "cache_agent/web/diagnosis.py",
    "cache_agent/loading/parallelism.py",
    "cache_agent/model/ranges.py",
    "cache_agent/residency/entry.py",
    "cache_agent/residency/catalogue.py",
    "runtime/engine/generation.py",
    "runtime/sse.py",
    "runtime/layers/keys.py",
    "runtime/layers/rule.py",
    "runtime/resume/snapshot.py",
    "runtime/resume/record.py",
    "runtime/resume/position.py",
    "runtime/handoff/migration_table.py",
    "runtime/handoff/messages.py",
    "cache_agent/wire/message.py",
    "cache_agent/wire/requests.py",
    "cache_agent/wire/signing.py",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "cache_agent" / "policy").glob("*.py"))),
]
EFFECTS = {
    "asyncio", "concurrent", "datetime", "http", "io", "mmap", "multiprocessing", "os", "pathlib", "random", "requests",
    "secrets", "select", "selectors", "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "time",
    "urllib",
}  # fmt: skip


def _loaded_by(statement: str, *blocked: str) -> set[str]:
    """Names of all modules after `statement` ran in a new interpreter in which `blocked` cannot be imported."""
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " must not be imported here")
sys.meta_path.insert(0, Blocked())
{statement}
import json
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def _modules(package: str) -> list[str]:
    root = ROOT / package
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(root.rglob("*.py"))]
    return [name.removesuffix(".__init__") for name in names]


def _imports(path: Path, *, everything: bool = False) -> set[str]:
    """Full names of the modules that a file imports; those under TYPE_CHECKING only with `everything`."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) if not everything:
                return
            case ast.Import(names):
                found.update(alias.name for alias in names)
            case ast.ImportFrom(str(module), names):
                found.update({module, *(f"{module}.{alias.name}" for alias in names)})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def _ranks(package: str) -> dict[str, int]:
    lines = [line.split() for line in HOUSE[package].strip().splitlines()]
    return {name: rank for rank, line in enumerate(lines) for name in line}


def _arrows(package: str) -> dict[str, set[str]]:
    """Module -> the modules of its package that it imports, whenever and for whatever reason."""
    known = {name for name in _modules(package) if not name.startswith("runtime.template")}  # a user's, to be copied
    arrows: dict[str, set[str]] = {}
    for name in known:
        path = ROOT.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        found = _imports(file, everything=True)
        # `from a.b import c` names a module or something in one: the longest name that is a module is meant.
        whole = {
            one for one in found if one in known and not any(other.startswith(f"{one}.") for other in found & known)
        }
        parents = {one.rpartition(".")[0] for one in found if one not in known} & known
        arrows[name] = (whole | parents) - {name, package}
    return arrows


@pytest.mark.parametrize("package", HOUSE)
def test_every_folder_has_its_place_in_the_house(package: str) -> None:
    there = {name.split(".")[1] for name in _arrows(package) if "." in name}
    assert there == set(_ranks(package))


@pytest.mark.parametrize("package", HOUSE)
def test_no_arrow_points_up(package: str) -> None:
    ranks = _ranks(package)
    up = [
        f"{source} -> {target}"
        for source, targets in _arrows(package).items()
        for target in targets
        if "." in source and source.split(".")[1] != target.split(".")[1]
        if ranks[source.split(".")[1]] <= ranks[target.split(".")[1]]
    ]
    assert not sorted(up)


@pytest.mark.parametrize("package", HOUSE)
def test_no_modules_import_in_a_circle(package: str) -> None:
    arrows = _arrows(package)
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_agent_needs_neither_the_runtime_nor_torch() -> None:
    statement = "\n".join(f"import {name}" for name in _modules("cache_agent"))
    loaded = _loaded_by(statement, "runtime", *HEAVY)
    assert set(_modules("cache_agent")) <= loaded


def test_nothing_in_the_agents_source_names_the_runtime() -> None:
    for path in sorted((ROOT / "cache_agent").rglob("*.py")):
        assert not {name for name in _imports(path, everything=True) if name.split(".")[0] == "runtime"}, path


def test_the_runtime_uses_only_public_names_of_the_agent() -> None:
    for path in sorted((ROOT / "runtime").rglob("*.py")):
        theirs = {name for name in _imports(path, everything=True) if name.split(".")[0] == "cache_agent"}
        assert not {name for name in theirs if any(part.startswith("_") for part in name.split("."))} - {
            "cache_agent.__version__"
        }, path


def test_the_shim_is_standard_library_and_a_few_modules_of_ours() -> None:
    loaded = _loaded_by("import runtime.container.shim")
    ours = {name for name in loaded if name.split(".")[0] in ("runtime", "cache_agent")}
    process = {
        "process",
        "process.children",
        "process.control",
        "process.messages",
        "process.wakeup",
    }
    container = {
        f"container{name}" for name in ("", ".agent", ".crashes", ".port", ".shim", ".supply", ".watched_worker")
    }
    assert ours == {"runtime", *(f"runtime.{name}" for name in {"config", "errors"} | process | container)}
    before = _loaded_by("pass")
    foreign = {name.split(".")[0] for name in loaded - before} - set(sys.stdlib_module_names) - {"runtime"}
    assert not foreign


@pytest.mark.parametrize(
    "module",
    [
        "runtime.config",
        "runtime.process.control",
        "runtime.errors",
        "runtime.process.messages",
        "runtime.container.standby",
    ],
)
def test_what_the_shim_imports_is_standard_library_alone(module: str) -> None:
    new = {name.split(".")[0] for name in _loaded_by(f"import {module}") - _loaded_by("pass")}
    assert new <= {*sys.stdlib_module_names, "runtime"}


def test_the_workers_http_side_needs_no_torch() -> None:
    """Everything that must be there before the first probe is answered."""
    loaded = _loaded_by(
        "import runtime.worker.worker, runtime.http.application, runtime.http.server, runtime.function.handler", *HEAVY
    )
    assert {"flask", "gunicorn", "runtime.http.routes", "cache_agent.client.cache_client"} <= loaded
    assert "boto3" not in loaded, "the worker talks to its agent only"


def test_the_private_agent_imports_neither_command_line_nor_terminal() -> None:
    assert not {"click", "rich", "boto3", "flask"} & _loaded_by("import cache_agent.daemon")


def test_the_command_line_needs_no_torch() -> None:
    assert "runtime.cli" in _loaded_by("import runtime.cli", *HEAVY)


def test_the_toy_needs_no_torch() -> None:
    assert "runtime.engine.toy" in _loaded_by("import runtime.function.testing", *HEAVY)


@pytest.mark.parametrize("path", PURE)
def test_a_pure_module_touches_nothing(path: str) -> None:
    imported = {name.split(".")[0] for name in _imports(ROOT / path) if not name.startswith("urllib.parse")}
    assert not imported & EFFECTS
    calls = {
        node.func.id
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input", "exec", "eval"}


def test_the_pure_modules_are_there() -> None:
    assert len(PURE) > 7, "the package of policies was found"
    assert all((ROOT / path).is_file() for path in PURE)


@pytest.mark.parametrize("package", [runtime, cache_agent])
def test_only_the_configuration_reads_the_environment(package: object) -> None:
    """Of settings, that is: handing an environment to a child, or a host's name to a handler, is none."""
    for path in sorted(Path(package.__path__[0]).rglob("*.py")):  # type: ignore[attr-defined]
        if path.name in ("config.py", "serve.py"):  # the command sets variables for what it becomes
            continue
        reads = re.findall(r"(?:environ(?:\.get\(|\[)|getenv\()\"GLOWPLUG_\w+", path.read_text())
        assert not reads, path


def test_every_module_says_what_it_is() -> None:
    for package in ("runtime", "cache_agent"):
        for path in sorted((ROOT / package).rglob("*.py")):
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


@pytest.mark.parametrize("package", ["runtime", "cache_agent"])
def test_decoders_are_made_by_the_thread_that_imports(package: str) -> None:
    """Two threads that give msgspec 0.22 a class for the first time at once crash their process: the second one finds

    its fields half described. A `Decoder` of the module describes them before there is a second thread.
    """
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "decode":
                given = [keyword.value for keyword in node.keywords if keyword.arg == "type"]
                found += [
                    f"{path.relative_to(ROOT)}:{node.lineno}: type={ast.unparse(kind)}"
                    for kind in given
                    if isinstance(kind, ast.Name | ast.Attribute)
                ]
    assert not found
