"""The static shim: messages and constants are those of the shim in Python, which takes over from it."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from runtime.container import native, takeover
from runtime.errors import BadConfig, FunctionError
from runtime.process import messages

pytestmark = pytest.mark.clock  # a shim's times are another program's from there on

HARNESS = r"""
#include "text.h"
#include <stdint.h>

static void show(const char *bytes, size_t count) {
    for (size_t i = 0; i < count; i++)
        printf("%02x", (unsigned char)bytes[i]);
    putchar(' ');
}

/* Of each record: its fields "a" and "n", the latter as a number, its spans as they are written again, "a" in plain. */
int main(void) {
    for (uint32_t size; fread(&size, sizeof size, 1, stdin) == 1; putchar('\n')) {
        char *at = malloc(size), *end = at + size, *row = at; /* of this size, so that each byte beyond is noticed */
        if (fread(at, 1, size, stdin) != size)
            return 1;
        if (size && !end[-1]) {
            long long number = 0, stop = 0;
            char *a = field(at, end, "a"), bytes[ROOM];
            Text text = {bytes, 0, sizeof bytes, false};
            printf(a ? "a " : "- ");
            show(a ? a : "", a ? strlen(a) : 0);
            bool there = whole(field(at, end, "n"), &number);
            printf(there ? "%lld " : "- ", number);
            for (; (row = field(row, end, "span")); row += strlen(row) + 1) {
                char *what = span(row, &number, &stop);
                if (what)
                    put_field(&text, "span=%lld %lld %s", number, stop, what);
            }
            show(bytes, text.used);
            printf("%d ", text.over);
            if (a)
                show(a, strlen(plain(a)));
        }
        free(at);
    }
    return 0;
}
"""
ROOM = 32  # bytes, for the spans of a record
PIECES = [
    b"\0", b"\0", b"\0", b"a=", b"n=", b"span=", b"environment=", b"1", b"-0", b"1 2 ", b"-7 08 o ", b"3", b" ", b"=",
    b"9" * 18, b"9" * 19, b"two words", b"\xc3\xbc", b"\xff", b"\v", b"\x1b", b"\n", b"a", b"n",
]  # fmt: skip


class Read(NamedTuple):
    """The fields that C found in a record, which ends with a NUL."""

    a: bytes | None
    number: int | None
    spans: bytes
    over: bool
    plain: bytes


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[bytes]], list[Read | None]]:
    if not native.compiler():
        pytest.skip("needs a C compiler")
    place = tmp_path_factory.mktemp("text")
    (place / "text.c").write_text(HARNESS)
    flags = ["-std=gnu11", "-O1", f"-DROOM={ROOM}", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [native.compiler(), *flags, f"-I{Path(native.SOURCE).parent}", "-o", place / "text", place / "text.c"]
    subprocess.run(command, check=True)

    def one(line: bytes) -> Read | None:
        if not line:
            return None
        there, a, number, spans, over, plain = line.split(b" ")[:6]
        return Read(
            bytes.fromhex(a.decode()) if there == b"a" else None, None if number == b"-" else int(number),
            bytes.fromhex(spans.decode()), over == b"1", bytes.fromhex(plain.decode()),
        )  # fmt: skip

    def run(records: list[bytes]) -> list[Read | None]:
        sent = b"".join(struct.pack("=I", len(each)) + each for each in records)
        done = subprocess.run([place / "text"], input=sent, stdout=subprocess.PIPE, check=True)
        return [one(line) for line in done.stdout.split(b"\n")[:-1]]

    return run


def understood(record: bytes) -> Read:
    """Return the fields of a record, each decoded alone by Python."""
    fields = list(itertools.takewhile(bool, record.split(b"\0")))
    first = {name: next((field for field in fields if field.startswith(name)), None) for name in (b"a=", b"n=")}
    text = None if first[b"a="] is None else first[b"a="][2:]
    number, spans, over = None, b"", False
    with contextlib.suppress(ValueError):
        number = messages.unpack((first[b"n="] or b"") + b"\0", {"n": messages.whole})["n"]
    for field in fields:
        with contextlib.suppress(ValueError, KeyError):
            row = messages.pack({"spans": messages.unpack(field + b"\0")["spans"]})
            over = over or len(spans) + len(row) > ROOM
            spans += b"" if over else row
    plain = re.sub(rb"[\x00-\x08\x0a\x0c-\x1f\x7f]", b" ", text or b"").replace(b"\v", b"\n")
    return Read(text, number, spans, over, plain)


def test_c_reads_in_a_message_what_python_does(
    read: Callable[[list[bytes]], list[Read | None]], rounds: Callable[[int, int], int]
) -> None:
    draw = random.Random(5)
    records = [b"".join(draw.choices(PIECES, k=draw.randrange(14))) for _ in range(rounds(4000, 300_000))]
    for _ in range(rounds(4000, 200_000)):
        fields = [draw.choice([b"a=", b"n=", b"span=1 2 "]) + draw.choice(PIECES[7:]) for _ in range(draw.randrange(4))]
        records.append(b"".join(field + b"\0" for field in fields))
    records += [b"span=1 2 o " + b"n" * size + b"\0a=b\0" for size in range(2 * ROOM)]
    for record, found in zip(records, read(records), strict=True):
        assert (found is None) == (not record.endswith(b"\0"))
        if found is None:
            continue
        assert found == understood(record), record
        try:
            message = messages.unpack(record, {"n": messages.whole})
        except ValueError:  # of which C passes over a part
            continue
        assert found.a == (messages.pack({"a": message["a"]})[2:-1] if "a" in message else None), record
        assert found.number == message.get("n"), record


def test_what_both_shims_have_to_agree_on_stands_in_python() -> None:
    """Names, defaults and texts of shared.h are nowhere repeated in the C source."""
    sources = sorted(Path(native.SOURCE).parent.glob("*.[ch]"))
    code = re.sub(r"/\*.*?\*/", "", "".join(path.read_text() for path in sources), flags=re.DOTALL)
    assert not re.findall(r'"[^"\n]*(?:GLOWPLUG_|/run/|HTTP/|/_/|8080|0\.0\.0\.0)[^"\n]*"', code)
    defined = {line.split()[1] for line in native.header().splitlines() if line.startswith("#define")}
    pasted = {f"{kind}_{name}" for name in re.findall(r"\bSETTING\((\w+)\)", code) for kind in ("NAME", "DEFAULT")}
    for name in re.findall(r"\bNUMBER\((\w+)\)", code):
        pasted |= {f"NAME_{name}", f"DEFAULT_{name}", f"LEAST_{name}"}
    assert defined - pasted <= set(re.findall(r"\w+", code)), "nothing is said that nobody asks for"
    assert len(sources) == 4
    assert sum(len(path.read_text().splitlines()) for path in sources) < 750


def test_a_header_says_any_value(tmp_path: Path) -> None:
    values: list[str | bytes | int | float] = ['a "b" \\ c??/ü%d', b"\r\n\x011", -1, 0.5, "/a b"]
    if not native.compiler():
        pytest.skip("needs a C compiler")
    formats = "".join({str: "%s", bytes: "%s", int: "%d", float: "%g"}[type(value)] + "|" for value in values)
    arguments = ", ".join(native._literal(value) for value in values)
    (tmp_path / "a.c").write_text(f'#include <stdio.h>\nint main(void) {{ printf("{formats}", {arguments}); }}\n')
    subprocess.run([native.compiler(), "-std=c11", "-o", tmp_path / "a", tmp_path / "a.c"], check=True)
    said = subprocess.run([tmp_path / "a"], stdout=subprocess.PIPE, check=True).stdout
    assert said == 'a "b" \\ c??/ü%d|'.encode() + b"\r\n\x011|-1|0.5|/a b|"


STATE = {
    "why": "a test", "ask_pool": 1, "greeted": 1, "start_id": "0" * 16, "spans": [("shim", "exec", 1, 2)],
    "number": 1, "turn": 3, "worker": 0, "agent": "/a", "retired": 0, "finished": 0, "parked": 1, "stopping": 0,
    "forking": 0, "load": 0, "serves": 0.25, "pool": -1, "line": -1, "theirs": -1, "pidfd": -1, "arrived": -1,
    "asked_at": 1.0, "heard": 2.0,
}  # fmt: skip


def left(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    file = os.memfd_create("state", 0)
    os.write(file, data)
    monkeypatch.setenv(takeover.VARIABLE, str(file))


def test_what_it_hands_over_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    left(monkeypatch, messages.pack({**STATE, "listener": reading}) + b"\0load=1\0tu\0\0\xff")
    found = takeover.handed()
    assert found is not None
    assert (found.unread, found.spans, found.kill_at) == (b"load=1\0tu\0\0\xff", [("shim", "exec", 1, 2)], float("inf"))
    assert (found.parked, found.stopping, found.known) == (True, False, {"load": 0, "serves": 0.25})
    assert not os.get_inheritable(reading)
    assert takeover.handed() is None
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    "data", [messages.pack(STATE) + b"\0", messages.pack({**STATE, "listener": "x"}) + b"\0", b'{"why":"a=b"}', b""]
)
def test_what_another_version_hands_over_is_refused(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    left(monkeypatch, data)
    with pytest.raises(FunctionError, match="of another version"):
        takeover.handed()


HANDED = {
    "why": "a test", "ask_pool": True, "greeted": True, "start_id": "0" * 16, "spans": [("shim", "exec", 1, 2)],
    "number": 1, "turn": 3, "worker": 0, "agent": "/a", "retired": False, "finished": False, "parked": True,
    "stopping": False, "forking": False, "known": {"load": 0}, "unread": b"", "pool": -1, "line": -1,
    "theirs": -1, "pidfd": -1, "arrived": -1, "asked_at": 1.0, "heard": 2.0,
}  # fmt: skip


def test_a_worker_whose_line_has_ended_is_as_silent_as_it_was(tmp_path: Path) -> None:
    """Silence counts from the worker's last message, not from the boot of the machine: that would kill the worker."""
    code = f"""
import os, signal, socket, subprocess, time
import runtime.container.shim as shim
from runtime.config import FunctionConfig
from runtime.container.takeover import ShimState

worker = subprocess.Popen(["sleep", "600"])
values = {HANDED!r}
values |= dict(
    worker=worker.pid, pidfd=os.pidfd_open(worker.pid), listener=socket.create_server(("", 0)).detach(),
    parked=False, heard=time.monotonic(),
)
taken = shim.Shim(FunctionConfig(model="/m", layers="off", worker_timeout=1000.0), ShimState(**values))
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
