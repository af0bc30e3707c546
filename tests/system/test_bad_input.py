"""What goes wrong is told: on stderr, in the answer of whoever waits, and by the exit code. Nothing else suffers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest

COMPLETION = {"prompt": "a", "max_tokens": 1}


def _hostile(directory: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def _no_room(directory: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [128 << 20], "data_offsets": [0, 128 << 20]}}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (128 << 20))  # sparse: nothing is to be read of it


def _pickled(directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _shard_missing(directory: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _nothing(directory: Path) -> None:
    pass


MODELS: list[tuple[str, Callable[[Path], None], str, str]] = [
    # name, what makes it bad, the agent's code, words of the sentence
    ("pickled", _pickled, "unsafe_checkpoint", "save_pretrained(NEW_DIR) writes safetensors"),
    ("hostile", _hostile, "bad_checkpoint", "model.safetensors"),
    ("shard", _shard_missing, "bad_checkpoint", "which is not there; upload the shard"),
    ("huge", _no_room, "no_capacity", "MB"),
    ("empty", _nothing, "bad_checkpoint", "has neither model.safetensors nor"),
]


@pytest.fixture(scope="module")
def small_agent(agent_process: Callable[..., Any]) -> Iterator[Any]:
    """The node's agent of this module, with little memory. It must outlive every bad model, and serve a good one."""
    with agent_process("--dram", "64M") as agent:
        yield agent


def _refused(function: Any) -> tuple[Any, str]:
    """The answer to a request that waited from the first instant, and the log, once the function has given up."""
    answer = function.request("/v1/completions", COMPLETION)
    assert function.wait() == 68
    return answer, function.output()


@pytest.mark.parametrize(("name", "spoil", "code", "words"), MODELS, ids=[row[0] for row in MODELS])
def test_a_model_that_cannot_be_had(
    small_agent: Any,
    started: Callable[..., Any],
    tmp_path: Path,
    name: str,
    spoil: Callable[[Path], None],
    code: str,
    words: str,
) -> None:
    directory = tmp_path / name
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    spoil(directory)
    answer, log = _refused(started(model=directory, socket=small_agent.socket))
    assert (answer.status, answer.code) == (503, "weights_unavailable")
    for text in (answer.text, log):
        assert f"[{code}]" in text
        assert words in text
    assert f"glowplug: {answer.text} [weights_unavailable]\n" in log
    assert small_agent.running.poll() is None


@pytest.mark.parametrize(
    ("uri", "code"),
    [("/no/such/directory", "not_found"), ("gopher://bucket/model", "bad_uri"), ("s3://", "bad_uri")],
)
def test_a_uri_that_names_nothing(small_agent: Any, started: Callable[..., Any], uri: str, code: str) -> None:
    answer, log = _refused(started(model=uri, socket=small_agent.socket))
    assert (answer.status, answer.code) == (503, "weights_unavailable")
    assert f"[{code}]" in answer.text
    assert f"[{code}]" in log
    assert "Traceback" not in log


def test_a_private_agent_refuses_alike(started: Callable[..., Any]) -> None:
    function = started(model="/no/such/directory")
    answer, log = _refused(function)
    assert (answer.status, answer.code) == (503, "weights_unavailable")
    assert "[not_found]" in log
    function.assert_nothing_left()


@pytest.fixture
def odd_agent() -> Iterator[Callable[[bytes], Path]]:
    """`odd_agent(reply)`: the socket of an agent that answers every hello so, and with nothing if that is b""."""
    with ExitStack() as stack:

        def start(reply: bytes) -> Path:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gp-odd-")))
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(place / "agent.sock"))
            listener.listen(16)

            def answer() -> None:
                with suppress(OSError):
                    while True:
                        connection = stack.enter_context(listener.accept()[0])
                        if reply:
                            connection.recv(65536)
                            connection.sendall(reply)
                            connection.close()

            threading.Thread(target=answer, daemon=True).start()
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return place / "agent.sock"

        yield start


@pytest.fixture
def other_version(start_agent: Callable[..., Any], tmp_path: Path) -> Any:
    """A real agent that speaks version 9 of the protocol."""
    (tmp_path / "sitecustomize.py").write_text("import cache_agent.wire.protocol as p\np.VERSION = 9\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    return start_agent("--dram", "64M", env={"PYTHONPATH": path})


SENTENCE = "the client speaks protocol 1, this agent 9: update the older of the two [version]"


def test_an_agent_of_another_version(started: Callable[..., Any], other_version: Any, checkpoint: Path) -> None:
    """It is as good as none: the function loads by itself, says why, and so do those that start after it."""
    function = started(model=checkpoint, socket=other_version.socket)
    assert function.request("/v1/completions", COMPLETION).status == 200
    assert f"private agent: {SENTENCE}" in {span["name"] for span in function.spans()}
    assert f"{SENTENCE}; a private cache agent is asked instead" in function.output()
    private, worker = function.agent(), function.worker()
    os.kill(worker, signal.SIGKILL)
    again = function.worker(worker)
    assert function.request("/v1/completions", COMPLETION).status == 200
    assert not [span["name"] for span in function.spans() if span["name"].startswith("private agent")], "it was told"
    assert (function.agent(), function.worker()) == (private, again)


def test_neither_that_agent_nor_a_private_one(started: Callable[..., Any], other_version: Any) -> None:
    """What a private agent cannot cure is told as ever; that there was another one is in the log."""
    answer, log = _refused(started(model="/no/such/directory", socket=other_version.socket))
    assert (answer.status, answer.code) == (503, "weights_unavailable")
    assert SENTENCE in log
    assert "[not_found]" in log


def test_an_agent_that_stays_away(started: Callable[..., Any], checkpoint: Path) -> None:
    """Its address was configured, so it is waited for: a twentieth of the time for a start, half a minute at most."""
    function = started(model=checkpoint, socket="tcp://127.0.0.1:9", start_timeout=20)
    assert function.request("/v1/completions", COMPLETION).status == 200
    (span,) = [span["name"] for span in function.spans() if span["name"].startswith("private agent")]
    assert "no cache agent answers at tcp://127.0.0.1:9" in span
    assert span.endswith("[agent_unreachable]")


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff" * 64, struct.pack("!I", 2) + b"{}"])
def test_an_agent_that_is_none(started: Callable[..., Any], odd_agent: Callable[[bytes], Path], reply: bytes) -> None:
    answer, log = _refused(started(model="/models/any", socket=odd_agent(reply), start_timeout=20))
    assert (answer.status, answer.code) == (503, "weights_unavailable")
    assert "[protocol]" in log
    assert "Traceback" not in log


def test_an_agent_that_says_nothing(started: Callable[..., Any], odd_agent: Callable[[bytes], Path]) -> None:
    """It accepts, and hangs: whoever waits is told to come back, and a SIGTERM still ends it in order."""
    function = started(model="/models/any", socket=odd_agent(b""), start_timeout=2)
    answer = function.request("/v1/completions", COMPLETION)
    assert (answer.status, answer.code, "Retry-After" in answer.headers) == (503, "starting", True)
    assert function.request("/_/health").status == 200
    assert function.stop() == 0


def test_a_stream_that_waits_is_told_as_well(started: Callable[..., Any], small_agent: Any) -> None:
    function = started(model="/no/such/directory", socket=small_agent.socket)
    answer = function.request("/v1/completions", {**COMPLETION, "stream": True})
    assert b"weights_unavailable" in answer.body
    assert function.wait() == 68


def test_every_request_that_waits_is_told(started: Callable[..., Any], small_agent: Any) -> None:
    function = started(model="/no/such/directory", socket=small_agent.socket)
    function.port  # noqa: B018  waits for it
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: function.request("/v1/completions", COMPLETION), range(16)))
    assert {(answer.status, answer.code) for answer in answers} == {(503, "weights_unavailable")}
    assert function.wait() == 68


def test_an_architecture_that_transformers_does_not_have(
    small_agent: Any, started: Callable[..., Any], tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    directory = write_checkpoint(tmp_path / "model", config={"model_type": "from_the_future"})
    function = started(model=directory, socket=small_agent.socket)
    answer = function.request("/v1/completions", COMPLETION)
    assert (answer.status, answer.code) == (500, "model_unusable")
    assert "from_the_future" in answer.text
    assert function.wait() == 67
    assert "[model_unusable]" in function.output()


def test_the_agent_serves_on_after_all_of_that(small_agent: Any, started: Callable[..., Any], checkpoint: Path) -> None:
    function = started(model=checkpoint, socket=small_agent.socket)
    assert function.request("/v1/completions", COMPLETION).status == 200


# --- settings ---------------------------------------------------------------------------------------------------------


def test_no_model(started: Callable[..., Any]) -> None:
    function = started()
    assert function.wait() == 64
    assert "GLOWPLUG_MODEL is not set; name the model" in function.output()
    assert "Traceback" not in function.output()
    function.assert_nothing_left()


@pytest.mark.parametrize(
    ("variable", "text"),
    [("GLOWPLUG_SLOTS", "many"), ("GLOWPLUG_DRAIN_LINGER", "-1"), ("PORT", "http"), ("GLOWPLUG_LOG_LEVEL", "loud")],
)
def test_a_setting_without_sense(started: Callable[..., Any], variable: str, text: str) -> None:
    function = started(model="/models/any", env={variable: text})
    assert function.wait() == 64
    assert variable in function.output()
    assert "[bad_config]" in function.output()
    assert "Traceback" not in function.output()


def test_a_token_file_that_is_not_there(started: Callable[..., Any]) -> None:
    function = started(model="/models/any", token_file="/no/such/file")
    assert function.wait() == 64
    assert "GLOWPLUG_TOKEN_FILE=/no/such/file cannot be read" in function.output()
    assert "Traceback" not in function.output()
    function.assert_nothing_left()


def test_a_port_that_somebody_else_has(started: Callable[..., Any], taken_port: int) -> None:
    function = started(model="/models/any", port=taken_port)
    assert function.wait() == 64
    assert f"cannot listen on 127.0.0.1:{taken_port}: Address already in use; set PORT" in function.output()
    function.assert_nothing_left()


def test_a_private_agents_setting_without_sense(started: Callable[..., Any]) -> None:
    """The shim cannot know the agent's settings; it must not try again, nor call it a success."""
    function = started(model="/models/any", env={"GLOWPLUG_DRAM": "plenty"}, drain_grace=1)
    assert function.wait() == 64
    assert "GLOWPLUG_DRAM='plenty'" in function.output()
    assert "Traceback" not in function.output()
    function.assert_nothing_left()


def test_a_folder_that_is_not_there() -> None:
    command = [sys.executable, str(Path(sys.prefix) / "bin" / "glowplug"), "serve", "/no/such/folder"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "does not exist" in done.stderr


# --- handlers that cannot be had --------------------------------------------------------------------------------------

HANDLERS = [
    ("syntax", "def handle(event, context)\n    pass\n", 66, "handler_import", "SyntaxError"),
    ("module", "import no_such_module\n", 66, "handler_import", "requirements.txt"),
    (
        "load",
        "def load(context):\n    raise OSError('no disk')\ndef handle(e, c): ...\n",
        66,
        "handler_import",
        "no disk",
    ),
    ("exits", "import sys\nsys.exit(3)\n", 66, "handler_import", "SystemExit: 3"),
    ("nothing", "def handler(event, context): ...\n", 65, "handler_not_found", "defines no handle(event, context)"),
]


@pytest.mark.parametrize(("name", "source", "exit_code", "code", "words"), HANDLERS, ids=[row[0] for row in HANDLERS])
def test_a_handler_that_cannot_be_had(
    small_agent: Any,
    started: Callable[..., Any],
    checkpoint: Path,
    rounds: Callable[[int, int], int],
    name: str,
    source: str,
    exit_code: int,
    code: str,
    words: str,
) -> None:
    if name not in ("module", "nothing") and rounds(0, 1) == 0:
        pytest.skip("test_handler.py has this in one process; the soak also starts a function for it")
    function = started(handler=source, model=checkpoint, socket=small_agent.socket)
    answer = function.request("/")
    assert (answer.status, answer.code) == (500, code)
    assert words in answer.text
    assert function.wait() == exit_code
    assert f"[{code}]" in function.output()
    assert words in function.output()


# --- handlers that go wrong while they serve --------------------------------------------------------------------------

MISBEHAVING = """
    import sys

    kept = None


    def load(context):
        global kept
        kept = context.model.raw


    def handle(event, context):
        weight = kept.lm_head.weight
        match event.path:
            case "/raise":
                raise KeyError("not there")
            case "/exit":
                sys.exit(3)
            case "/type":
                return object()
            case "/status":
                return {"statusCode": "fine", "body": ""}
            case "/stream":
                return broken()
            case "/write":
                context.model.raw.lm_head.weight.zero_()
            case "/write-kept":
                weight.zero_()
            case "/write-later":
                return written_later(weight)
            case "/exit-later":
                return exits_later()
            case "/checksum":
                return str(weight.double().sum().item())
        return "fine"


    def broken():
        yield "begun "
        raise RuntimeError("half-way")


    def written_later(weight):
        yield "begun "
        weight.zero_()
        yield "written"


    def exits_later():
        yield "begun "
        sys.exit(3)
    """


@pytest.fixture(scope="module")
def misbehaving(small_agent: Any, serving: Callable[..., Any], checkpoint: Path) -> Iterator[Any]:
    with serving(handler=MISBEHAVING, model=checkpoint, socket=small_agent.socket, slots=2, queue=2) as function:
        function.wait_ready()
        function.checksum = function.request("/checksum").body
        yield function


@pytest.fixture
def unharmed(misbehaving: Any) -> Iterator[Any]:
    """The function; afterwards it must serve on: the same worker, the same weights, all of its turns."""
    worker = misbehaving.worker()
    yield misbehaving
    with ThreadPoolExecutor(2) as pool:
        assert [a.body for a in pool.map(misbehaving.request, ["/fine"] * 4)] == [b"fine"] * 4
    assert misbehaving.request("/checksum").body == misbehaving.checksum
    assert misbehaving.worker() == worker, misbehaving.output()


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("/raise", "handler_raised", "KeyError"),
        ("/exit", "handler_raised", "SystemExit: 3"),
        ("/type", "handler_result", "return text, bytes, a dict"),
        ("/status", "handler_result", "from 100 to 599"),
        ("/write", "shared_weights", "set GLOWPLUG_PRIVATE_WEIGHTS=1"),
        ("/write-kept", "shared_weights", "set GLOWPLUG_PRIVATE_WEIGHTS=1"),
    ],
)
def test_a_handler_that_fails_at_once(unharmed: Any, path: str, code: str, words: str) -> None:
    answer = unharmed.request(path)
    assert (answer.status, answer.code) == (500, code)
    assert words in answer.text


@pytest.mark.parametrize("path", ["/stream", "/write-later", "/exit-later"])
def test_a_plain_stream_that_breaks_is_cut_visibly(unharmed: Any, path: str) -> None:
    with closing(unharmed.connect()) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
        assert caught.value.partial == b"begun "


@pytest.mark.parametrize(
    ("path", "code"),
    [("/stream", "handler_raised"), ("/write-later", "shared_weights"), ("/exit-later", "handler_raised")],
)
def test_an_event_stream_that_breaks_says_so(unharmed: Any, path: str, code: str) -> None:
    answer = unharmed.request(path, headers={"Accept": "text/event-stream"})
    first, second, done = answer.body.decode().rstrip("\n").split("\n\n")
    assert (first, done) == ("data: begun ", "data: [DONE]")
    event, data = second.split("\n")
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == code


def test_private_weights_may_be_written(small_agent: Any, started: Callable[..., Any], checkpoint: Path) -> None:
    source = """
        def handle(event, context):
            context.model.raw.lm_head.weight.zero_()
            return str(context.model.raw.lm_head.weight.abs().sum().item())
        """
    function = started(handler=source, model=checkpoint, socket=small_agent.socket, private_weights=1)
    assert function.request("/").body == b"0.0"
