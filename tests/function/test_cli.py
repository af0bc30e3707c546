"""The `glowplug` command: `serve` passes its options on and becomes the shim; `base` compares with the lock."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from cache_agent import __version__
from cache_agent.wire.operations import ClusterReply, HoldingStatus, ModelStatus, StatusReply
from runtime import cli
from runtime.commands import ask, baseset, models
from runtime.errors import BadConfig

ROOT = Path(__file__).parents[2]


class Executed(Exception):
    """Stand for the process that `execv` would have become."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Result, list[Any]]]:
    """`run(*arguments, env={})`: the result, and the arguments of `execv` with our variables, if it came to that."""
    for name in list(os.environ):
        if name.startswith("GLOWPLUG_") or name == "PORT":
            monkeypatch.delenv(name)

    def call(*arguments: str, **env: str) -> tuple[Result, list[Any]]:
        executed: list[Any] = []

        def execv(path: str, argv: list[str]) -> None:
            ours = {k: v for k, v in os.environ.items() if k.startswith("GLOWPLUG_") or k == "PORT"}
            executed.append((path, argv, ours))
            raise Executed

        monkeypatch.setattr(os, "execv", execv)
        before = dict(os.environ)
        try:
            return CliRunner().invoke(cli.main, arguments, env=env), executed
        finally:  # the command sets variables for what it becomes
            os.environ.clear()
            os.environ.update(before)

    return call


def test_serve_becomes_the_shim(run: Callable[..., Any]) -> None:
    _, [(path, argv, ours)] = run("serve")
    assert (path, argv) == (sys.executable, [sys.executable, "-P", "-m", "runtime.shim"])
    assert ours == {}


def test_every_option_becomes_a_variable(run: Callable[..., Any], tmp_path: Path) -> None:
    given = {
        "--model": "s3://b/m", "--port": "81", "--host": "::1", "--socket": "/s", "--slots": "2", "--threads": "3",
        "--name": "n", "--log-level": "debug",
    }  # fmt: skip
    _, [(_, _, ours)] = run("serve", str(tmp_path), *(word for pair in given.items() for word in pair))
    expected = {f"GLOWPLUG_{name[2:].replace('-', '_').upper()}": value for name, value in given.items()}
    assert ours == expected | {"GLOWPLUG_HANDLER": str(tmp_path)}


def test_an_option_goes_before_the_environment(run: Callable[..., Any]) -> None:
    _, [(_, _, ours)] = run("serve", "--port", "81", "--model", "mine", PORT="80", GLOWPLUG_MODEL="theirs")
    assert ours == {"GLOWPLUG_PORT": "81", "GLOWPLUG_MODEL": "mine"}
    _, [(_, _, ours)] = run("serve", PORT="80", GLOWPLUG_MODEL="theirs")
    assert ours == {"PORT": "80", "GLOWPLUG_MODEL": "theirs"}


@pytest.mark.parametrize("arguments", [["serve", "/no/such/folder"], ["serve", "--port", "x"], ["serve", "--nothing"]])
def test_what_click_refuses(run: Callable[..., Any], arguments: list[str]) -> None:
    result, executed = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("glowplug: ")
    assert result.stderr.endswith(" (glowplug serve --help says more)\n")
    assert result.stderr.count("\n") == 1
    assert not executed


def test_help_and_version(run: Callable[..., Any]) -> None:
    assert __version__ in run("--version")[0].output
    for command in (
        [],
        ["serve"],
        ["base"],
        ["base", "check"],
        ["base", "install"],
        ["base", "lock"],
    ):
        result, _ = run(*command, "-h")
        assert result.exit_code == 0
        assert "Usage:" in result.output


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_list_says_what_the_commands_say(name: str) -> None:
    command = cli.main.get_command(click.Context(cli.main), name)
    assert command is not None
    first, _, _ = (command.help or "").partition("\n\n")
    assert command.name == name
    assert len(first.split()) >= 4
    assert cli.COMMANDS[name].help.endswith(".")


def commands(group: click.Group) -> Iterator[click.Command]:
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command)
        else:
            yield command


def test_every_command_that_answers_has_json() -> None:
    without = [command.name for command in commands(cli.main) if not any("--json" in p.opts for p in command.params)]
    assert sorted(filter(None, without)) == ["extender", "serve", "webhook"], "those of the agent that serve"


def test_the_agents_former_name_is_the_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["glowplug-agent", "--version"])
    with pytest.raises(SystemExit) as ended:
        cli.former_agent()
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert said.out.startswith("glowplug agent, version ")
    assert "`glowplug agent`" in said.err


def test_the_list_of_commands_imports_none_of_them() -> None:
    code = "import sys; from runtime.cli import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "serve " in done.stdout
    assert {name for name in loaded if name.startswith("runtime.commands.")} == {"runtime.commands.registry"}
    assert not loaded & {"rich", "msgspec", "requests", "boto3", "flask", "yaml", "cache_agent.daemon"}


def test_alone_it_says_what_it_can_do(run: Callable[..., Any]) -> None:
    result, _ = run()
    assert result.exit_code == 0
    assert "\n  doctor      Check this machine" in result.output


def test_ask_waits_for_a_port_that_is_being_opened(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A user who types `glowplug serve` in one terminal and asks in another is quicker than Python starts."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    servers: list[ThreadingHTTPServer] = []

    def opened(_seconds: float) -> None:
        if not servers:
            servers.append(ThreadingHTTPServer(("127.0.0.1", port), Handled))
            threading.Thread(target=servers[0].serve_forever, daemon=True).start()

    monkeypatch.setattr(ask.time, "sleep", opened)
    result, _ = run("ask", "--handler", "hi", "--url", f"127.0.0.1:{port}")
    assert (result.exit_code, "answered" in result.output) == (0, True), result.output
    servers[0].shutdown()
    servers[0].server_close()


class Handled(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "8")
        self.end_headers()
        self.wfile.write(b"answered")

    def log_message(self, *arguments: Any) -> None:
        pass


def test_init_makes_what_the_template_has(run: Callable[..., Any], tmp_path: Path) -> None:
    template = ROOT / "templates" / "llm-python"
    result, _ = run("init", str(tmp_path / "my-chat"), "--model", "s3://b/m")
    assert result.exit_code == 0, result.stderr
    for name in ("handler.py", "handler_test.py", "pytest.ini", "requirements.txt"):
        assert (tmp_path / "my-chat" / name).read_bytes() == (template / "function" / name).read_bytes()
    stack = yaml.safe_load((tmp_path / "stack.yaml").read_text())
    example = yaml.safe_load((template / "examples" / "stack.yaml").read_text())
    function = example["functions"].pop("chat")
    environment = {**function["environment"], "GLOWPLUG_MODEL": "s3://b/m"}
    image = function["image"].replace("chat", "my-chat")
    expected = {**function, "handler": "./my-chat", "image": image, "environment": environment}
    assert stack == {**example, "functions": {"my-chat": expected}}


def test_init_leaves_what_is_there(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "stack.yaml").write_text("mine")
    result, _ = run("init", str(tmp_path / "chat"))
    assert "add chat to its functions" in result.output
    assert (tmp_path / "stack.yaml").read_text() == "mine"
    (tmp_path / "chat" / "handler.py").write_text("mine, too")
    assert run("init", str(tmp_path / "chat"))[0].exit_code == 2
    assert (tmp_path / "chat" / "handler.py").read_text() == "mine, too"


def test_the_tests_of_a_new_function_run_within_any_project(run: Callable[..., Any], tmp_path: Path) -> None:
    """Run the tests as a new user does, in a checkout whose settings of pytest must not reach them."""
    theirs = '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib -k nothing"\n'
    (tmp_path / "pyproject.toml").write_text(theirs)
    assert run("init", str(tmp_path / "chat"))[0].exit_code == 0
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "chat", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["handler.py", "handler_test.py", "pytest.ini", "requirements.txt", "stack.yaml"])
def test_what_init_copies_is_the_templates(name: str) -> None:
    folder = "examples" if name == "stack.yaml" else "function"
    theirs = ROOT / "templates" / "llm-python" / folder / name
    assert (ROOT / "runtime" / "template" / name).read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("", {}),
        ("a;dur=1.5, b;dur=2", {"a": 1.5, "b": 2.0}),
        ("a;dur=1, a;dur=2", {"a": 3.0}),
        ("a, b;dur=x, ;dur=3, c;desc=x;dur=1", {"": 3.0, "c;desc=x": 1.0}),
    ],
)
def test_phases_of_a_header(header: str, found: dict[str, float]) -> None:
    assert ask.phases(header) == found


def test_what_other_nodes_hold_has_its_name_where_this_node_knows_it() -> None:
    mine = ModelStatus("s3://b/m", "src-1", "rev-1", "ready", "dram", 9, 9, 4096, 0, 1.0)
    status = StatusReply("a", 1, 64, 9, [mine])
    held = [
        HoldingStatus("rev-1", "a", "dram", 9, 9),
        HoldingStatus("rev-1", "b", "ssd", 9, 9),
        HoldingStatus("src-2", "b", "dram", 4, 9),
    ]
    rows = models.elsewhere(ClusterReply([], held), status)
    assert [(row["model"], row["node"], row["tier"], row["state"]) for row in rows] == [
        ("s3://b/m", "b", "ssd", "ready"),
        ("src-2", "b", "dram", "loading"),
    ]
    assert all(row.keys() == models.rows(status)[0].keys() for row in rows)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (86400 * 3, "3 d")],
)
def test_ages(seconds: float | None, text: str) -> None:
    assert models.age(seconds) == text


def test_check_agrees(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseset, "differences", lambda pins: [])
    result, _ = run("base", "check")
    assert result.exit_code == 0
    assert baseset.digest(baseset.read_lock())[:12] in result.output


def test_check_names_the_differences(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseset, "differences", lambda pins: ["torch is 1; the base has 2"])
    result, _ = run("base", "check")
    assert result.exit_code == 64
    assert "torch is 1; the base has 2" in result.output
    assert "install with: pip install -c base.lock" in result.output


def test_install_says_what_it_did(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("x\n")
    arguments = ("base", "install", "-r", str(tmp_path / "r.txt"), "--target", str(tmp_path / "t"))
    for installed, words in (["x==1", "y==2"], "x==1, y==2"), ([], "nothing, the base has it all"):
        monkeypatch.setattr(baseset, "install", lambda *_, installed=installed: installed)
        result, _ = run(*arguments)
        assert (result.exit_code, result.output) == (0, f"installed beside the base: {words}\n")


def test_install_fails_with_the_sentence(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> list[str]:
        raise BadConfig("it would change torch; drop it")

    monkeypatch.setattr(baseset, "install", refuse)
    (tmp_path / "r.txt").write_text("x\n")
    result, _ = run("base", "install", "-r", str(tmp_path / "r.txt"), "--target", str(tmp_path / "t"))
    assert result.exit_code == 64
    assert result.output == "glowplug: it would change torch; drop it [bad_config]\n"


def test_lock_prints_pins_that_can_be_read_back(run: Callable[..., Any], tmp_path: Path) -> None:
    result, _ = run("base", "lock")
    assert result.exit_code == 0
    (tmp_path / "lock").write_text(result.output)
    assert baseset.read_lock(tmp_path / "lock") == baseset.closure("glowplug[model]")
