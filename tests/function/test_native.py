"""The static shim's text: Python reads what it writes, and what it takes for JSON Python does, too. Its hand-over."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import takeover
from runtime.errors import BadConfig, FunctionError
from runtime.zygote import native

pytestmark = pytest.mark.clock  # a shim's times are another program's from there on

HARNESS = """
#include "text.h"

/* Of each line: whether it is an object, its member "a" as a whole number and as plain text, and itself as a string. */
int main(void) {
    static char line[1 << 16], bytes[1 << 19];
    while (fgets(line, sizeof line, stdin)) {
        char *end = line + strcspn(line, "\\n");
        Text text = {bytes, 0, sizeof bytes, false};
        long long value = 0;
        bool valid = object(line, end);
        const char *a = valid ? member(line, end, "a", 0) : NULL;
        put(&text, "%s", valid && whole(a, end, &value) ? "n" : valid ? "o" : "-");
        put(&text, "%lld ", value);
        if (a && *a == '"')
            put_plain(&text, a);
        put(&text, "\\t");
        put_string(&text, line, (size_t)(end - line));
        puts(bytes);
    }
    return 0;
}
"""
PIECES = [
    b'{"a":', b"{", b"}", b"[", b"]", b",", b":", b'"', b'"a"', b'"b"', b"1", b"-0", b"1.5e-3", b"1.", b"01", b"true",
    b"nul", b"null", b"\\u00e9", b"\\ud83d\\ude00", b"\\ud83d", b"\\x", b"\\\\", b'\\"', b"\xc3\xbc", b"\xff",
    b"\xed\xa0\x80", b"\x01", b" ", b"9" * 25,
]  # fmt: skip


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[bytes]], list[bytes]]:
    if not native.compiler():
        pytest.skip("needs a C compiler")
    place = tmp_path_factory.mktemp("text")
    (place / "text.c").write_text(HARNESS)
    flags = ["-std=gnu11", "-O1", "-fsanitize=undefined", f"-I{Path(native.SOURCE).parent}"]
    subprocess.run([native.compiler(), *flags, "-o", place / "text", place / "text.c"], check=True)

    def scan(lines: list[bytes]) -> list[bytes]:
        done = subprocess.run([place / "text"], input=b"\n".join(lines) + b"\n", stdout=subprocess.PIPE, check=True)
        return done.stdout.split(b"\n")[:-1]

    return scan


def parsed(line: bytes) -> object:
    def refuse(text: str) -> object:
        raise ValueError(text)

    try:
        return json.loads(line.decode(), parse_constant=refuse)
    except ValueError:
        return None


def test_it_takes_for_json_what_python_does(
    scanned: Callable[[list[bytes]], list[bytes]], rounds: Callable[[int, int], int]
) -> None:
    draw = random.Random(5)
    lines = [b"".join(draw.choices(PIECES, k=draw.randrange(12))) for _ in range(rounds(3000, 200_000))]
    whole = json.dumps({"a": [1, {"b": "ü\n\U0001f600"}, -2.5e-3, None, True], "c": {}}, ensure_ascii=False).encode()
    for _ in range(rounds(2000, 100_000)):
        at = draw.randrange(len(whole))
        lines.append(whole[:at] + draw.choice(PIECES) + whole[at + draw.randrange(3) :])
    lines += [b'{"a":%d}' % value for value in (0, -1, 2**63 - 1, 2**63)] + [b'{"a":"x \\u00fc \\ud83d\\ude00"}', whole]
    valid = 0
    for line, found in zip(lines, scanned(lines), strict=True):
        expected = parsed(line)
        mark, told = found[:1], found.split(b"\t")[-1]
        assert json.loads(told).encode("utf-8", "surrogateescape") == line
        assert (mark != b"-") == isinstance(expected, dict), line
        if isinstance(expected, dict):
            valid += 1
            value = expected.get("a")
            number = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
            assert (mark == b"n") == number, line
            if number:
                assert found[1:].split()[0] == str(value).encode(), line
            if isinstance(value, str) and value.isprintable():
                assert found.split(b"\t")[0].split(b" ", 1)[1].decode() == value
    assert valid > 100, "else nothing was tried"


VALUES = {
    "why": "a test", "ask_pool": True, "greeted": True, "start_id": "0" * 16, "spans": [["shim", "exec", 1, 2]],
    "number": 1, "turn": 3, "worker": 0, "agent": "/a", "retired": False, "finished": False, "parked": True,
    "stopping": False, "forking": False, "known": {"load": 0}, "unread": '{"x\udcff', "pool": -1, "line": -1,
    "theirs": -1, "pidfd": -1, "arrived": -1, "asked_at": 1.0, "heard": 2.0,
}  # fmt: skip


def test_what_it_hands_over_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def left(**changes: object) -> None:
        file = os.memfd_create("state", 0)
        os.write(file, json.dumps({**VALUES, **changes}).encode())
        monkeypatch.setenv(takeover.VARIABLE, str(file))

    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    left(listener=reading)
    found = takeover.handed()
    assert found is not None
    assert (found.unread, found.spans, found.kill_at) == (b'{"x\xff', [("shim", "exec", 1, 2)], float("inf"))
    assert not os.get_inheritable(reading)
    assert takeover.handed() is None
    left()
    with pytest.raises(FunctionError, match="of another version"):
        takeover.handed()
    os.close(reading)
    os.close(writing)


def test_a_worker_whose_line_has_ended_is_as_silent_as_it_was(tmp_path: Path) -> None:
    """Not as long as the machine is up: it would be killed at once."""
    code = f"""
import os, signal, socket, subprocess, time
import runtime.shim as shim
from runtime.config import FunctionConfig
from runtime.takeover import Handed

worker = subprocess.Popen(["sleep", "600"])
values = {VALUES!r}
values |= dict(
    unread=b"", worker=worker.pid, pidfd=os.pidfd_open(worker.pid), listener=socket.create_server(("", 0)).detach(),
    parked=False, heard=time.monotonic(),
)
taken = shim.Shim(FunctionConfig(model="/m", layers="off", worker_timeout=1000.0), Handed(**values))
taken._take_over(taken._handed)
shim.time.monotonic = lambda: values["heard"] + 999.0
taken._enforce_deadlines()
os.write(2, b"--\\n")
shim.time.monotonic = lambda: values["heard"] + 1001.0
taken._enforce_deadlines()
assert worker.wait(30) == -signal.SIGKILL
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    before, after = done.stderr.split("--")
    assert "was silent" not in before
    assert "the worker was silent for 1000 s and is killed" in after


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "/no/compiler")
    with pytest.raises(BadConfig, match="no C compiler is there"):
        native.build(str(tmp_path / "shim"))
