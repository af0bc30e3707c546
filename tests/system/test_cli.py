"""The `glowplug` command as people and programs use it, against a real agent and a real function."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.prefix) / "bin"
MODEL = ROOT / "templates" / "llm-python" / "model"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def glowplug(*arguments: object, cwd: Path, env: Mapping[str, str] | None = None, stdin: str | None = None) -> Any:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GLOWPLUG_", "AWS_")) and k != "PORT"}
    return subprocess.run(
        [sys.executable, str(BIN / "glowplug"), *map(str, arguments)],
        cwd=cwd,
        env={**kept, "COLUMNS": "200", "AWS_EC2_METADATA_DISABLED": "true", **(env or {})},
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def node(agent_process: Callable[..., Any]) -> Iterator[Any]:
    with agent_process("--node", "node-a") as agent:
        yield agent


@pytest.fixture(scope="module")
def function(serving: Callable[..., Any], node: Any, place: Path) -> Iterator[Any]:
    """What `glowplug init` makes, served with --reload."""
    made = glowplug("init", "chat", "--json", cwd=place)
    assert made.returncode == 0, made.stderr
    with serving("--reload", handler=place / "chat", model=MODEL, socket=node.socket) as function:
        yield function


@pytest.fixture
def run(node: Any, place: Path) -> Run:
    """Runs a command that shall work."""

    def call(*arguments: object, env: Mapping[str, str] | None = None, stdin: str | None = None) -> Any:
        ours = {"GLOWPLUG_SOCKET": str(node.socket), **(env or {})}
        done = glowplug(*arguments, cwd=place, env=ours, stdin=stdin)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done

    return call


# --- a function's life ------------------------------------------------------------------------------------------------


def test_a_cold_function_answers_and_says_what_its_start_took(run: Run, function: Any) -> None:
    done = run("ask", "--handler", "What is Glowplug?", "--url", f"http://127.0.0.1:{function.port}")
    assert "Glowplug" in done.stdout
    assert "cold start: worker-" in done.stderr
    assert "first text after" in done.stderr
    again = run("ask", "What is Glowplug?", "--url", f"127.0.0.1:{function.port}", "--temperature", "0")
    assert again.stdout == done.stdout
    assert "tokens/s" in again.stderr
    assert "start" not in again.stderr


def test_a_prompt_from_a_pipe(run: Run, function: Any) -> None:
    arguments = ("--url", f"127.0.0.1:{function.port}", "--max-tokens", "3", "--json", "--seed", "1", "--system", "Be.")
    asked = json.loads(run("ask", "-", *arguments, stdin="What is a zygote?").stdout)
    assert (asked["tokens"], asked["finish_reason"], asked["model"]) == (3, "length", "model")
    assert asked["first_text_ms"] <= asked["total_ms"]


def test_a_change_is_served_and_an_error_is_shown(run: Run, function: Any, place: Path) -> None:
    file, url = place / "chat" / "handler.py", f"127.0.0.1:{function.port}"
    good = file.read_text()
    try:
        file.write_text("def handle(event, context):\n    return event.body.decode().upper()\n")
        assert run("ask", "--handler", "loud", "--url", url).stdout == "LOUD\n"
        file.write_text("import nonesuch\n")
        done = glowplug("ask", "--handler", "loud", "--url", url, cwd=place)
        assert (done.returncode, done.stdout) == (1, "")
        assert "No module named 'nonesuch'" in done.stderr
        assert "(at handler.py, line 1) [handler_import]" in done.stderr
    finally:
        file.write_text(good)
    assert function.worker() == function.worker(), "the same process all the time"
    assert "Glowplug" in run("ask", "--handler", "What is Glowplug?", "--url", url).stdout


def test_models_are_warmed_and_shown(
    run: Run, node: Any, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    first, second = (write_checkpoint(tmp_path / name, seed=n) for n, name in enumerate(("one", "two")))
    assert "2.1 MB from origin in" in run("warm", first).stdout
    warmed = json.loads(run("warm", first, second, "--pin", "--json").stdout)["models"]
    assert [(model["tier"], model["pinned"]) for model in warmed] == [("dram", True), ("origin", True)]
    table = run("models").stdout
    row = next(line for line in table.splitlines() if line.startswith(f"file://{second} "))
    assert "ready, pinned" in row
    found = json.loads(run("models", "--json").stdout)
    assert {f"file://{first}", f"file://{second}"} <= {model["model"] for model in found["models"]}
    for model in (first, second):
        assert node.client.pin(f"file://{model}", pinned=False)
    assert run("warm", first, "--no-wait").stdout == f"file://{first} is on its way\n"


def test_the_doctor_names_the_bottleneck(run: Run, function: Any, node: Any) -> None:
    run("ask", "hello", "--max-tokens", "1", "--url", f"127.0.0.1:{function.port}")
    function.until(lambda: any(s.name == "first token" for s in node.client.starts()[0].spans), "the start is reported")
    told = json.loads(run("doctor", "--json", "--model", MODEL).stdout)
    states = {finding["check"]: finding["state"] for finding in told["findings"]}
    assert (states["agent"], states["SSD tier"], states["model"]) == ("ok", "note", "ok")
    last = told["last_start"]
    assert (last["function"], last["kind"], last["error"]) == ("model", "cold", "")
    assert abs(sum(last["phases"].values()) - last["seconds"]) < 1e-3
    assert f"{last['bottleneck']} took" in last["sentence"]
    text = run("doctor").stdout
    assert "✓ agent" in text
    assert f"The last start (model, cold): {last['bottleneck']} took" in text


# --- what programs see ------------------------------------------------------------------------------------------------


def shape(value: Any) -> Any:
    """The types in a JSON value; a list has the shapes of its elements, as one where they are alike."""
    match value:
        case dict():
            return {key: shape(each) for key, each in value.items()}
        case list():
            shapes: list[Any] = []
            for each in map(shape, value):
                if each not in shapes:
                    shapes.append(each)
            return shapes
    return type(value).__name__


def test_json_of_every_command_keeps_its_shape(
    run: Run, function: Any, place: Path, tmp_path: Path, golden: Callable[..., None]
) -> None:
    """A change here breaks programs that read the output."""
    url = f"127.0.0.1:{function.port}"
    (tmp_path / "requirements.txt").write_text("")
    calls: dict[str, tuple[object, ...]] = {
        "init": ("init", tmp_path / "new"),
        "ask": ("ask", "hi", "--max-tokens", "2", "--url", url),
        "warm": ("warm", MODEL),
        "warm --no-wait": ("warm", MODEL, "--no-wait"),
        "models": ("models",),
        "place": ("place", MODEL),
        "render": ("render", "chat", "--platform", "openfaas", "--image", "i", "--model", "s3://b/m"),
        "base check": ("base", "check"),
        "base install": ("base", "install", "-r", tmp_path / "requirements.txt", "--target", tmp_path / "packages"),
        "completion": ("completion", "bash"),
    }
    shapes = {name: shape(json.loads(run(*arguments, "--json").stdout)) for name, arguments in calls.items()}
    ask = shapes["ask"]
    ask["first_text_ms"], ask["phases_ms"] = "float", {}
    shapes["render"]["functions"] = {}  # the platform's words; test_render.py holds them
    doctor = json.loads(run("doctor", "--json").stdout)
    doctor["last_start"]["phases"] = {}
    shapes["doctor"] = shape(doctor)
    golden("cli/shapes.json", shapes)


def test_serve_says_what_it_serves_and_then_serves_it(
    started: Callable[..., Any], node: Any, golden: Callable[..., None]
) -> None:
    function = started("--json", model=MODEL, socket=node.socket)
    line, _, _ = function.says("is open").partition("\n")
    told = json.loads(line)
    assert (told["pid"], told["model"], told["reload"]) == (function.pid, f"file://{MODEL}", False)
    golden("cli/serve.json", shape(told))
    function.wait_ready()


# --- what is wrong is said in one sentence ----------------------------------------------------------------------------

WRONG: list[tuple[tuple[str, ...], int, str]] = [
    (("srve",), 2, "did you mean serve?"),
    (("frobnicate",), 2, "there is no command 'frobnicate'"),
    (("--frobnicate",), 2, "no such option '--frobnicate'"),
    (("serve", "no-such-folder"), 2, "'no-such-folder' does not exist"),
    (("serve", "--reload"), 2, "no FOLDER was named"),
    (("serve",), 64, "GLOWPLUG_MODEL is not set; name the model"),
    (("serve", "--model", "s3://b/m", "--port", "70000"), 64, "ports go from 0"),
    (("serve", ".", "--model", "s3://b/m", "--slots", "0"), 64, "GLOWPLUG_SLOTS is 0; it must be at least 1"),
    (("init", "Not_A_Name"), 2, "use lower-case letters"),
    (("init", "full"), 2, "is not empty; choose another name"),
    (("ask", "hello", "--url", "127.0.0.1:9"), 1, "start a function with glowplug serve"),
    (("ask", "hello", "--url", "ftp://host"), 2, "use http://HOST:PORT"),
    (("ask", "hello", "--handler", "--top-p", "1"), 2, "--top-p is not for a handler"),
    (("ask", "hello", "--temprature", "1"), 2, "Did you mean '--temperature'?"),
    (("warm",), 2, "missing argument 'MODEL...'"),
    (("warm", "s3://b/m", "--pin", "--no-wait"), 2, "--pin needs the model to be there"),
    (("warm", "gs://bucket/m"), 1, "[bad_uri]"),
    (("warm", "/no/such/model"), 1, "[not_found]"),
    (("models", "--socket", "/no/agent.sock"), 1, "start one with `glowplug agent serve`"),
    (("doctor", "--socket"), 2, "requires an argument"),
    (("doctor", "--url", "ftp://host"), 2, "use http://HOST:PORT"),
    (("render", "chat", "--image", "i", "--model", "m"), 2, "choose from: knative, openfaas"),
    (("place",), 2, "missing argument 'MODEL'"),
    (("base", "install"), 2, "missing option"),
    (("completion", "tcsh"), 2, "'bash', 'zsh', 'fish'"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG, ids=[" ".join(row[0])[:40] for row in WRONG])
def test_a_wrong_invocation_gets_one_sentence(
    arguments: tuple[str, ...], code: int, words: str, node: Any, place: Path
) -> None:
    (place / "full").mkdir(exist_ok=True)
    (place / "full" / "file").touch()
    done = glowplug(*arguments, cwd=place, env={"GLOWPLUG_SOCKET": str(node.socket)})
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    sentences = done.stderr.splitlines()
    assert len(sentences) == 1, done.stderr
    assert sentences[0].startswith("glowplug: ")
    assert words.lower() in sentences[0].lower()


def test_an_answer_that_is_none_of_ours(place: Path, node: Any, function: Any) -> None:
    url = f"127.0.0.1:{function.port}"
    wrong = glowplug("ask", "hi", "--url", f"{url}/a-route-of-the-handler", cwd=place)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "ask with --handler" in wrong.stderr
    refused = glowplug("ask", "hi", "--url", url, "--model", "another", cwd=place)
    assert refused.returncode == 1
    assert "another" in refused.stderr
    assert glowplug("ask", "hi", "--url", url, "--max-tokens", "-1", cwd=place).stderr.endswith("[bad_request]\n")


def test_a_reader_that_has_had_enough(place: Path) -> None:
    command = f"{sys.executable} {BIN / 'glowplug'} render a --platform openfaas --image i --model s3://b/m | true"
    done = subprocess.run(["bash", "-c", command], cwd=place, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


# --- completion -------------------------------------------------------------------------------------------------------

COMPLETES = {
    "bash": """
        eval "$(glowplug completion bash)"
        COMP_WORDS=(glowplug {word}); COMP_CWORD=1
        _glowplug_completion glowplug
        printf '%s\n' "${{COMPREPLY[@]}}"
        """,
    "zsh": """
        autoload -U compinit && compinit -u -D
        eval "$(glowplug completion zsh)"
        [[ ${{_comps[glowplug]}} == _glowplug_completion ]] || exit 3
        compadd() {{ :; }}
        _describe() {{ for entry in ${{(P)3}}; do print -r -- ${{entry%%:*}}; done }}
        words=(glowplug {word}) CURRENT=2
        _glowplug_completion
        """,
    "fish": """
        glowplug completion fish | source
        complete --do-complete "glowplug {word}" | cut -f 1
        """,
}


@pytest.mark.parametrize("shell", COMPLETES)
def test_shells_complete_commands_and_options(shell: str, place: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HOME": str(place)}
    for word, expected in (("mo", "models"), ("co", "completion")):
        script = COMPLETES[shell].format(word=word)
        flags = ["-f"] if shell == "zsh" else ["--norc"] if shell == "bash" else ["--no-config"]
        done = subprocess.run(
            [shell, *flags, "-c", script], cwd=place, env=env, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.split() == [expected], (done.stdout, done.stderr)
