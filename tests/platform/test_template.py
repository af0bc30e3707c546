"""The template itself: what needs neither faas-cli nor of-watchdog."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime import errors
from runtime.config import FunctionConfig
from runtime.function import handler

# python3-http's build arguments, with its defaults where they are not ours to choose.
BUILD_ARGUMENTS = {
    "PYTHON_VERSION": None,
    "DEBIAN_OS": "slim-bookworm",
    "ADDITIONAL_PACKAGE": "",
    "UPGRADE_PACKAGES": "false",
    "TEST_COMMAND": None,
    "TEST_ENABLED": "true",
    "TORCH_INDEX": "",
}
# A stand-in for an interpreter without the model's libraries.
WITHOUT_TORCH = """
    import sys
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("torch", "transformers", "numpy", "safetensors", "tokenizers"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Absent())
    """
SECONDS = 180
FUNCTION = Path(__file__).parents[2] / "templates" / "llm-python" / "function"


def run(*command: object, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.fixture(scope="module")
def settings(template: Path) -> Any:
    return yaml.safe_load((template / "template.yml").read_text())


@pytest.fixture
def function(template: Path, tmp_path: Path) -> Path:
    """The template's function as `faas-cli new` leaves it in a developer's folder."""
    return Path(shutil.copytree(template / "function", tmp_path / "my-chat", ignore=shutil.ignore_patterns("__*__")))


@pytest.fixture(scope="module")
def installed(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """glowplug alone, installed from the folder that the template brings, as the Dockerfile installs it."""
    place = tmp_path_factory.mktemp("installed")
    ignore = shutil.ignore_patterns("__pycache__")
    source = shutil.copytree(template / "glowplug", place / "glowplug", ignore=ignore)
    target = place / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps")
    # Without isolation setuptools is the one that is here, and nothing is fetched.
    done = run(*pip, "--no-build-isolation", "--target", target, f"{source}[model]", cwd=place)
    assert done.returncode == 0, done.stderr
    return target


def test_deploys_what_the_image_runs(settings: Any, dockerfile: Any) -> None:
    """faas-cli's fprocess replaces the image's at deploy, and is split on spaces, without quotes."""
    assert settings["language"] == "llm-python"
    assert settings["fprocess"] == dockerfile.environment["fprocess"]
    assert not set(settings["fprocess"]) & set("'\"\\$")


def test_welcomes_with_what_to_do_next(settings: Any) -> None:
    for word in ("GLOWPLUG_MODEL", "requirements.txt", "handler.py", "pytest", "faas-cli up", "text/event-stream"):
        assert word in settings["welcome_message"]


def test_brings_the_runtime_as_links_that_become_files(template: Path) -> None:
    """Links *inside* a template arrive as files; they must not lead out of the repository or end nowhere."""
    root = template.parents[1]
    links = {path: path.readlink() for path in template.rglob("*") if path.is_symlink()}
    assert {str(link.relative_to(template)) for link in links} == {
        f"glowplug/{name}" for name in ("LICENSE", "README.md", "cache_agent", "pyproject.toml", "runtime")
    }
    for link, target in links.items():
        assert not target.is_absolute()
        assert link.exists(), f"{link} ends nowhere"
        assert link.resolve().is_relative_to(root)
        assert not template.is_relative_to(link.resolve()), f"{link} is a circle"
    assert (root / "template").readlink() == Path("templates")
    assert not template.is_symlink(), "faas-cli would write nothing, without an error"


def test_names_no_place_of_one_machine_and_no_registry(template: Path) -> None:
    for path in template.rglob("*"):
        if path.is_file() and not {"glowplug", "model", "__pycache__"} & set(path.relative_to(template).parts):
            text = path.read_text()
            assert set(re.findall(r"https?://([\w.-]+)", text)) <= {"127.0.0.1", "github.com"}, path
            assert str(template.parents[1]) not in text, path


def test_takes_the_build_arguments_of_python3_http(dockerfile: Any) -> None:
    assert dockerfile.arguments.keys() == BUILD_ARGUMENTS.keys()
    for name, default in BUILD_ARGUMENTS.items():
        assert default is None or dockerfile.arguments[name] == default


def test_an_image_takes_passing_tests(dockerfile: Any) -> None:
    """Builders leave out stages that nothing is taken from."""
    assert [text for text in dockerfile.all("COPY", "ship") if text.startswith("--from=test ")]
    (test,) = dockerfile.all("RUN", "test")
    marker = dockerfile.all("COPY", "ship")[0].split()[1]
    assert test.endswith(f"&& touch {marker}")


@pytest.mark.parametrize(
    ("arguments", "passes", "said"),
    [
        ({"TEST_COMMAND": "true"}, True, ""),
        ({"TEST_COMMAND": "exit 3"}, False, ""),
        ({"TEST_COMMAND": "exit 3", "TEST_ENABLED": "false"}, True, "skipping tests"),
    ],
)
def test_build_arguments_for_tests(
    dockerfile: Any, tmp_path: Path, arguments: dict[str, str], passes: bool, said: str
) -> None:
    """The test stage's own shell line, with pip out of the way."""
    (line,) = dockerfile.all("RUN", "test")
    line = re.sub(r"pip install.*?&&", "true &&", line).replace("/tmp/tested", str(tmp_path / "tested"))
    done = run("sh", "-c", line, cwd=tmp_path, env={**dockerfile.arguments, **arguments})
    assert (done.returncode == 0) == passes
    assert (tmp_path / "tested").exists() == passes
    assert said in done.stdout


def test_images_are_pinned(dockerfile: Any) -> None:
    images = [text.split()[-3] for text in dockerfile.all("FROM") if "/" in text or "python:" in text]
    assert images == ["ghcr.io/openfaas/of-watchdog:0.11.6", "python:${PYTHON_VERSION}-${DEBIAN_OS}"]


def test_runs_as_anybody(dockerfile: Any) -> None:
    """As a user of its own, and as one without a name: whatever modes the developer's files came with."""
    assert dockerfile.all("USER") == dockerfile.all("USER", "ship") == ["app"]
    steps = [text for stage, name, text in dockerfile.instructions if stage == "build" and name in ("COPY", "RUN")]
    assert steps[-1].endswith("&& chmod -R a+rX /home/app")


def test_times_agree(dockerfile: Any) -> None:
    """The watchdog routes for healthcheck_interval after SIGTERM, and a pod has 30 s, the shim's own 5 included."""
    env = dockerfile.environment
    interval = int(env["healthcheck_interval"].removesuffix("s"))
    linger, grace = float(env["GLOWPLUG_DRAIN_LINGER"]), float(env["GLOWPLUG_DRAIN_GRACE"])
    assert interval < linger
    assert linger + grace + 5 < 30
    assert env["exec_timeout"] == env["write_timeout"] == env["read_timeout"]
    assert env["upstream_url"] == f"http://{env['GLOWPLUG_HOST']}:{env['PORT']}"
    assert (env["log_buffer_size"], env["prefix_logs"], env["http_buffer_req_body"]) == ("-1", "false", "false")
    assert (env["mode"], env["ready_path"], env["PYTHONSAFEPATH"]) == ("http", "/_/ready", "1")


def stacks(template: Path) -> dict[str, Any]:
    """File name → the one function in it."""
    found = {}
    for path in (template / "examples").glob("stack*.yaml"):
        (found[path.name],) = yaml.safe_load(path.read_text())["functions"].values()
    return found


def test_the_plain_stack_takes_no_edition_but_the_free_one(template: Path) -> None:
    """What the Community Edition refuses stands in files of its own."""
    found = stacks(template)
    assert found.keys() == {"stack.yaml", "stack-pro.yaml"}
    paid = {f"com.openfaas.scale.{name}" for name in ("zero", "zero-duration", "target", "target-proportion", "type")}
    assert not paid & found["stack.yaml"].get("labels", {}).keys()
    assert "com.openfaas.profile" not in found["stack.yaml"].get("annotations", {})
    assert paid <= found["stack-pro.yaml"]["labels"].keys()
    assert found["stack-pro.yaml"]["labels"]["com.openfaas.scale.target"] == "4"
    assert all(isinstance(value, str) for stack in found.values() for value in stack.get("labels", {}).values())


def test_times_of_the_examples_agree(template: Path) -> None:
    for name, stack in stacks(template).items():
        environment = stack["environment"]
        limits = {environment.get(word, "5m") for word in ("read_timeout", "write_timeout", "exec_timeout")}
        (limit,) = limits
        seconds = int(limit.removesuffix("m")) * 60
        assert int(environment.get("GLOWPLUG_ANSWER_LIMIT", "290")) == seconds - 10, name
        if "GLOWPLUG_DRAIN_GRACE" in environment:
            assert int(environment["GLOWPLUG_DRAIN_GRACE"]) == seconds - 14, name
        for word in environment:
            assert word in ("read_timeout", "write_timeout", "exec_timeout") or word.removeprefix(
                "GLOWPLUG_"
            ).lower() in {field.name for field in dataclasses.fields(FunctionConfig)}, (name, word)


def test_the_store_entry(template: Path) -> None:
    """In the shape of OpenFaaS' templates.json: texts, but for `recommended`."""
    entries = json.loads((template.parent / "store.json").read_text())
    assert {entry["platform"] for entry in entries} == {"x86_64", "arm64"}, "the image is built for both"
    for entry in entries:
        assert entry["template"] == template.name
        assert entry["recommended"] is False
        assert entry["official"] == "false"
        assert all(isinstance(entry[name], str) for name in ("language", "source", "description", "repo"))


def test_function_tests_pass_without_weights_and_torch(function: Path) -> None:
    code = f"{textwrap.dedent(WITHOUT_TORCH)}\nimport pytest\nsys.exit(pytest.main(['-q', '-p', 'no:cacheprovider']))"
    done = run(sys.executable, "-P", "-c", code, cwd=function)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d passed", done.stdout)
    assert "failed" not in done.stdout


def test_function_tests_pass_as_the_build_runs_them(dockerfile: Any, make_image: Callable[..., Any]) -> None:
    image = make_image()
    (paths,) = dockerfile.all("ENV", "test")
    (folder,) = dockerfile.all("WORKDIR", "test")
    path = paths.partition("=")[2].replace("/home/app", str(image.home))
    env = {
        "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{path}:{image.inside('/usr/src/glowplug')}",
        "PYTHONSAFEPATH": "1",
    }
    done = run("sh", "-c", dockerfile.arguments["TEST_COMMAND"], cwd=image.inside(folder), env=env)
    assert done.returncode == 0, done.stdout + done.stderr


def test_installs_from_what_was_pulled(installed: Path) -> None:
    code = (
        "import cache_agent, runtime, runtime.shim, runtime.function.testing, runtime.commands.baseset as b\n"
        "print(runtime.__file__, cache_agent.__file__, len(b.read_lock()))"
    )
    # -S leaves our own environment out; what glowplug needs comes from it again, after glowplug.
    found = [path for path in sys.path if path.endswith("-packages")]
    env = {"PYTHONPATH": os.pathsep.join([str(installed), *found])}
    done = run(sys.executable, "-S", "-c", code, cwd=installed, env=env)
    assert done.returncode == 0, done.stderr
    runtime, agent, pins = done.stdout.split()
    assert Path(runtime).is_relative_to(installed)
    assert Path(agent).is_relative_to(installed)
    assert int(pins) > 20
    assert (installed / "bin" / "glowplug").exists()


def test_what_is_installed_can_make_a_function(installed: Path, tmp_path: Path) -> None:
    """`glowplug init` needs its template, the agent its page; both must be in what is installed."""
    found = [path for path in sys.path if path.endswith("-packages")]
    env = {"PYTHONPATH": os.pathsep.join([str(installed), *found])}
    done = run(sys.executable, "-S", "-m", "runtime", "init", tmp_path / "chat", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "chat" / "handler.py").read_bytes() == (FUNCTION / "handler.py").read_bytes()
    assert (tmp_path / "stack.yaml").exists()
    tested = run(sys.executable, "-S", "-m", "pytest", "-q", tmp_path / "chat", cwd=tmp_path / "chat", env=env)
    assert tested.returncode == 0, tested.stdout


def test_requirements_that_would_change_the_base_fail_the_build(
    installed: Path, dockerfile: Any, tmp_path: Path
) -> None:
    """The Dockerfile's own line, on an index that has nothing, so that it also holds without a network."""
    (line,) = [text for text in dockerfile.all("RUN", "build") if "glowplug base install" in text]
    (tmp_path / "function").mkdir()
    (tmp_path / "function" / "requirements.txt").write_text("flask==1.0\n")
    env = {
        "PATH": f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(installed),
        "PIP_NO_INDEX": "1",
    }
    done = run("sh", "-c", line, cwd=tmp_path, env=env)
    assert done.returncode == 64
    assert "function/requirements.txt cannot be installed beside the base set" in done.stderr
    assert "flask==1.0" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_requirements_install_nothing(installed: Path, dockerfile: Any, tmp_path: Path) -> None:
    (line,) = [text for text in dockerfile.all("RUN", "build") if "glowplug base install" in text]
    (tmp_path / "function").mkdir()
    (tmp_path / "function" / "requirements.txt").write_text("")
    env = {"PATH": f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(installed)}
    done = run("sh", "-c", line, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "nothing" in done.stdout
    assert list((tmp_path / "packages").iterdir()) == []


def test_examples_of_the_readme_run(template: Path) -> None:
    """Each handler in it, on the toy model; those that talk to others are only compiled."""
    blocks = re.findall(r"```python\n(.*?)```", (template / "README.md").read_text(), re.DOTALL)
    bodies = {
        "event.body.decode()": b"some text\nmore text",
        "json.loads": b'{"messages": [{"role": "user", "content": "Hi"}]}',
    }
    ran = 0
    for block in blocks:
        code = compile(block, "README.md", "exec")
        if "def handle" not in block or "..." in block or "import requests" in block:
            continue
        names: dict[str, Any] = {}
        exec(code, names)
        body = next(body for words, body in bodies.items() if words in block)
        context = handler.toy_context()
        with contextlib.closing(context.model.engine):
            result = names["handle"](handler.Event(body=body), context)
            assert result
            assert isinstance(result, (str, dict)) or "".join(result)
        ran += 1
    assert ran == 3


def test_readme_agrees_with_the_template(template: Path, dockerfile: Any) -> None:
    text = (template / "README.md").read_text()
    for name, default in dockerfile.arguments.items():
        assert re.search(rf"`{name}` \|{f' `{default}`' if default else ''} \|", text), name
    codes = dict(re.findall(r"^\| (\d+) \| `(\w+)`", text, re.MULTILINE))
    known = {str(kind.exit_code): kind.code for kind in kinds(errors.FunctionError) if kind.code in codes.values()}
    assert codes == known
    statuses = dict(re.findall(r"^\| `(\w+)` \| (\d{3}) ", text, re.MULTILINE))
    assert statuses == {kind.code: str(kind.status) for kind in kinds(errors.FunctionError) if kind.code in statuses}


def kinds(root: type[errors.FunctionError]) -> list[type[errors.FunctionError]]:
    return [kind for child in root.__subclasses__() for kind in (child, *kinds(child))]


def test_a_taken_port_is_a_sentence(template: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env = {"GLOWPLUG_HOST": "127.0.0.1", "PORT": str(taken.getsockname()[1])}
        done = run(sys.executable, "-I", "-S", template / "listen.py", "true", cwd=tmp_path, env=env)
    assert done.returncode == 64
    assert re.fullmatch(r"glowplug: cannot listen on 127\.0\.0\.1:\d+: .*; set PORT .*\n", done.stderr)


def test_the_port_that_it_opens_sends_at_once(template: Path, tmp_path: Path) -> None:
    """Also for requests that wait there before the function is: their connections inherit the listener's option."""
    successor = (
        "import os, socket\n"
        "held = socket.socket(fileno=int(os.environ['GLOWPLUG_LISTEN_FD']))\n"
        "client = socket.create_connection(held.getsockname())\n"
        "print(held.accept()[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))\n"
    )
    env = {"GLOWPLUG_HOST": "127.0.0.1", "PORT": "0"}
    command = (template / "listen.py", sys.executable, "-c", successor)
    done = run(sys.executable, "-I", "-S", *command, cwd=tmp_path, env=env)
    assert done.stdout == "1\n", done.stderr


def test_nothing_waits_on_the_port_of_a_function_that_has_ended(template: Path, tmp_path: Path) -> None:
    """listen.py's successor holds the socket, too; only the function's own end may close it for both."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # What stands for the watchdog: starts the function, waits for its end, and then knocks at the port.
    successor = (
        "import os, socket, subprocess, sys\n"
        "held = socket.socket(fileno=int(os.environ['GLOWPLUG_LISTEN_FD']))\n"
        "function = subprocess.run(sys.argv[1:], close_fds=False, timeout=30)\n"
        "with socket.socket() as probe:\n"
        "    print(function.returncode, probe.connect_ex(held.getsockname()) != 0)\n"
    )
    env = {"GLOWPLUG_HOST": "127.0.0.1", "PORT": str(port), "GLOWPLUG_MODEL": ""}
    command = (sys.executable, "-c", successor, sys.executable, "-P", "-m", "runtime.shim")
    done = run(sys.executable, "-I", "-S", template / "listen.py", *command, cwd=tmp_path, env=env)
    assert done.stdout.split() == ["64", "True"], done.stderr
    assert "GLOWPLUG_MODEL is not set" in done.stderr
