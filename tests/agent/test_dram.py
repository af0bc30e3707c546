"""Sealed memory: what a client process tries against it, what happens when there is too little, and what is left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cache_agent import limits
from cache_agent.errors import NoCapacity
from cache_agent.tiers.dram import Dram
from cache_agent.wire.blobs import sealed_bytes

PAGE = 2 << 20
PATTERN = b"weights!" * (PAGE // 8)
FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")

# A function that got the fd as its number 3 tries to change what every other function computes with. Prints what
# came of each attempt: the error's name, or "done".
ATTACKER = r"""
import ctypes, errno, fcntl, json, mmap, os, sys

fd, size, small = int(sys.argv[1]), int(sys.argv[2]), 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, MADV_REMOVE = 1, 2, 16, 9

def checked(result):
    if result in (-1, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result

def mapped(fd, protection, flags=mmap.MAP_SHARED):
    return checked(libc.mmap(None, size, protection, flags, fd, 0))

def through_mem(address):
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        if memory.write(b"evil") != 4:
            raise OSError(errno.EIO, "short")

def copied_from_a_file(fd):
    source = os.memfd_create("evil")
    os.write(source, b"evil")
    os.sendfile(fd, source, 0, 4)

def spliced(fd):
    reader, writer = os.pipe()
    os.write(writer, b"evil")
    os.splice(reader, fd, 4, offset_dst=0)

def on(fd):
    return {
        "write": lambda: os.pwrite(fd, b"evil", 0),
        "writev": lambda: os.pwritev(fd, [b"evil"], 8),
        "map writable": lambda: mapped(fd, mmap.PROT_READ | mmap.PROT_WRITE),
        "map, then make writable": lambda: checked(
            libc.mprotect(mapped(fd, mmap.PROT_READ), size, mmap.PROT_READ | mmap.PROT_WRITE)
        ),
        "write through /proc/self/mem": lambda: through_mem(mapped(fd, mmap.PROT_READ)),
        "remove pages of a mapping": lambda: checked(libc.madvise(mapped(fd, mmap.PROT_READ), size, MADV_REMOVE)),
        "shrink": lambda: os.ftruncate(fd, 0),
        "grow": lambda: os.ftruncate(fd, 2 * size),
        "punch a hole": lambda: checked(libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, size)),
        "zero a range": lambda: checked(libc.fallocate(fd, ZERO_RANGE, 0, size)),
        "allocate behind the end": lambda: checked(libc.fallocate(fd, 0, size, size)),
        "sendfile": lambda: copied_from_a_file(fd),
        "splice": lambda: spliced(fd),
    }

attacks = {"fd: " + name: attack for name, attack in on(fd).items()}
attacks["fd: reopen for truncation"] = lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_TRUNC)
attacks["fd: add a seal"] = lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
try:
    writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
except OSError:
    pass
else:
    attacks |= {"reopened: " + name: attack for name, attack in on(writable).items()}

outcome = {}
for name, attack in attacks.items():
    try:
        attack()
        outcome[name] = "done"
    except OSError as error:
        outcome[name] = errno.errorcode.get(error.errno, str(error.errno))
print(json.dumps(outcome))
"""


def as_client(script: str, fd: int, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", "-c", script, str(fd), *map(str, arguments)]
    return subprocess.run(command, pass_fds=[fd], capture_output=True, text=True, timeout=60, **options)


@pytest.fixture(params=["4 KiB pages", "huge pages"])
def kind(request):
    """The `huge_pages` setting for each page kind; with a pool of 8 pages for the second."""
    if request.param == "4 KiB pages":
        return "never"
    request.getfixturevalue("huge_pages")(8)
    return "always"


@pytest.fixture(autouse=True)
def nothing_leaks(eventually):
    def resources():
        memfds = [name for name in map(target, os.listdir("/proc/self/fd")) if "memfd:" in name]
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:glowplug" in line]
        return len(os.listdir("/proc/self/fd")), memfds, maps

    def target(fd):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{fd}")
        return ""

    before = resources()
    yield
    assert resources() == before


def fill(dram: Dram) -> None:
    for segment in dram.segments:
        for start in range(0, segment.size, PAGE):
            segment.view[start : start + PAGE] = PATTERN


def content(fd: int) -> bytes:
    with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        return view[:]


# --- attacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["loading", "ready", "closed by the agent"])
def test_no_client_changes_a_byte(kind, state):
    with Dram([2 * PAGE], huge_pages=kind) as dram:
        assert dram.page == (4096 if kind == "never" else PAGE)
        fill(dram)
        fd = os.dup(dram.fds[0])
        if state != "loading":
            dram.seal()
        if state == "closed by the agent":
            dram.close()
        try:
            result = as_client(ATTACKER, fd, 2 * PAGE)
            assert result.returncode == 0, result.stderr
            outcome = json.loads(result.stdout)
            assert {name for name, what in outcome.items() if what == "done"} == set()
            assert len(outcome) > 13, "root reopens the memfd: both sets of attacks ran"
            assert os.fstat(fd).st_size == 2 * PAGE
            assert content(fd) == PATTERN * 2
        finally:
            os.close(fd)


def test_the_attacks_work_against_memory_without_seals():
    """The attacker itself is tested: against an ordinary memfd every attempt of the reopened fd succeeds."""
    fd = os.memfd_create("plain", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, PATTERN)
        outcome = json.loads(as_client(ATTACKER, fd, PAGE).stdout)
        refused = {name.partition(": ")[2]: what for name, what in outcome.items() if what != "done"}
        assert refused == {"write through /proc/self/mem": "EIO", "zero a range": "ENOTSUP"}, outcome
    finally:
        os.close(fd)


def as_another_user(work: Callable[[], object]) -> str:
    """Return the result of `work` in a child with another user id, or the name of its error."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:  # it may not execute the interpreter again: that can lie in a directory of root's
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            said = repr(work())
        except OSError as error:
            said = errno.errorcode[error.errno]
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


def test_another_user_reads_it_and_cannot_even_reopen_it_writable(kind):
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    with Dram([PAGE], huge_pages=kind) as dram:
        fill(dram)
        assert as_another_user(lambda: content(dram.fds[0])[:8]) == "b'weights!'"
        assert as_another_user(lambda: os.open(f"/proc/self/fd/{dram.fds[0]}", os.O_RDWR)) == "EACCES"


SEALS_THE_SEALS = """
import fcntl, os, sys
fd = os.open(f"/proc/self/fd/{sys.argv[1]}", os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
"""


def test_a_client_that_seals_the_seals_does_not_stop_the_load(kind):
    """A client must not be able to make a load fail: the agent's own seals would be refused at its end."""
    with Dram([PAGE], huge_pages=kind) as dram:
        result = as_client(SEALS_THE_SEALS, dram.fds[0])
        assert result.returncode == 0, result.stderr
        fill(dram)
        dram.seal()
        outcome = json.loads(as_client(ATTACKER, dram.fds[0], PAGE).stdout)
        assert "done" not in outcome.values(), outcome
        assert content(dram.fds[0]) == PATTERN


KEEPS_A_PAGE = """
import ctypes, mmap, os, sys
fd = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
address = libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
reader, writer = os.pipe()
if libc.vmsplice(writer, ctypes.byref(Vector(address, 4096)), 1, 0) != 4096:
    sys.exit(f"vmsplice: {os.strerror(ctypes.get_errno())}")
print("kept", flush=True)
sys.stdin.read()
"""


def test_a_client_that_keeps_a_page_in_a_pipe_does_not_stop_the_load():
    """The kernel refuses the full write seal while anyone else refers to a page (EBUSY)."""
    with Dram([PAGE], huge_pages="never") as dram:
        fill(dram)
        command = [sys.executable, "-I", "-S", "-c", KEEPS_A_PAGE, str(dram.fds[0])]
        with subprocess.Popen(
            command, pass_fds=dram.fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as client:
            assert client.stdout.readline() == "kept\n"
            dram.seal()
            outcome = json.loads(as_client(ATTACKER, dram.fds[0], PAGE).stdout)
            assert "done" not in outcome.values(), outcome
            assert content(dram.fds[0]) == PATTERN
            client.stdin.close()


def test_seals_before_and_after(kind):
    future_write = 0x10
    with Dram([PAGE], huge_pages=kind) as dram:
        fd = dram.fds[0]
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        fixed_size = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == fixed_size | future_write
        dram.seal()
        complete = fixed_size | future_write | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == complete
        dram.seal()
        assert dram.segments[0].view is None


def test_mappings_of_clients_outlive_the_agents_hold(kind):
    dram = Dram([PAGE], huge_pages=kind)
    fill(dram)
    dram.seal()
    (mapping,) = dram.map()
    dram.close()
    with mapping:
        assert mapping[:] == PATTERN


def test_sealed_bytes_are_what_was_given_and_stay_so():
    for data in (b"", b"x", PATTERN):
        fd = sealed_bytes(data, "glowplug:test")
        try:
            assert os.pread(fd, len(data) + 1, 0) == data
            if data:
                outcome = json.loads(as_client(ATTACKER, fd, len(data)).stdout)
                assert "done" not in outcome.values(), outcome
                assert os.pread(fd, len(data) + 1, 0) == data
        finally:
            os.close(fd)


# --- too little memory ------------------------------------------------------------------------------------------------


def test_a_short_pool_is_an_error_at_once_and_takes_nothing(huge_pages):
    huge_pages(4)
    with pytest.raises(NoCapacity, match=r"needs 10 MB of huge pages and the pool has 8 MB free") as caught:
        Dram([5 * PAGE], huge_pages="always")
    assert "vm.nr_hugepages" in caught.value.text
    assert limits.free_huge_bytes() // PAGE == 4


def test_a_pool_that_is_short_for_the_second_segment_gives_the_first_back(huge_pages):
    huge_pages(4)
    with pytest.raises(NoCapacity):
        Dram([2 * PAGE, PAGE, 2 * PAGE], huge_pages="always")
    assert limits.free_huge_bytes() // PAGE == 4


def test_auto_uses_the_pool_when_all_fits_and_ordinary_pages_otherwise(huge_pages):
    huge_pages(4)
    with Dram([2 * PAGE, 2 * PAGE], huge_pages="auto") as first:
        assert (first.page, limits.free_huge_bytes() // PAGE) == (PAGE, 0)
        with Dram([PAGE], huge_pages="auto") as second:
            assert second.page == 4096
    assert limits.free_huge_bytes() // PAGE == 4
    with Dram([5 * PAGE], huge_pages="auto") as third:
        assert (third.page, limits.free_huge_bytes() // PAGE) == (4096, 4), "one page kind for all segments"


def test_never_leaves_the_pool_alone(huge_pages):
    huge_pages(4)
    with Dram([PAGE], huge_pages="never") as dram:
        assert (dram.page, limits.free_huge_bytes() // PAGE) == (4096, 4)


def test_a_model_larger_than_the_machine_is_refused_with_sizes():
    with pytest.raises(NoCapacity, match=r"needs 70368744 MB and \d+ MB of memory are available"):
        Dram([1 << 46], huge_pages="never")


def test_always_without_a_pool_says_how_to_get_one(monkeypatch):
    if FREE.exists() and int(FREE.read_text()):
        pytest.skip("this machine has a pool")
    with pytest.raises(NoCapacity, match=r"vm\.nr_hugepages"):
        Dram([PAGE], huge_pages="always")


def test_a_kernel_that_refuses_is_an_error_with_its_words(monkeypatch):
    def refuse(fd, start, size):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(NoCapacity, match="the kernel refused 4 MB of memory: Cannot allocate memory"):
        Dram([PAGE, PAGE], huge_pages="never")


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """A made-up /sys/fs/cgroup in which this process is at the root, as in a container."""
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path)
    monkeypatch.setattr(limits, "_POOL", tmp_path / "pool")
    return tmp_path


def write(directory: Path, **values: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (directory / name.replace("__", ".")).write_text(f"{value}\n")


def test_version_2_limit_bounds_what_is_available(cgroups):
    write(cgroups, memory__max=100 << 20, memory__current=30 << 20)
    assert limits.available_bytes() == 70 << 20
    assert limits.memory_limit() == 100 << 20


def test_version_1_limit_bounds_what_is_available(cgroups):
    if "memory" not in Path("/proc/self/cgroup").read_text():
        pytest.skip("the memory controller is not in the version 1 hierarchy here")
    write(cgroups / "memory", memory__limit_in_bytes=100 << 20, memory__usage_in_bytes=120 << 20)
    assert limits.available_bytes() == 0
    assert limits.memory_limit() == 100 << 20


def test_no_limit_leaves_the_hosts_memory(cgroups):
    write(cgroups, memory__max="max", memory__current=1)
    write(cgroups / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=1)
    assert limits.memory_limit() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < limits.available_bytes() <= limits.memory_limit()


def test_free_huge_pages_leave_promised_ones_out(cgroups):
    assert limits.free_huge_bytes() == 0, "no pool"
    write(cgroups / "pool", free_hugepages=5, resv_hugepages=2)
    assert limits.free_huge_bytes() == 3 * PAGE
    write(cgroups, hugetlb__2MB__max=PAGE, hugetlb__2MB__current=0)
    assert limits.free_huge_bytes() == PAGE


def test_reserving_huge_pages_is_enough_unless_only_their_use_is_limited(cgroups):
    assert limits.huge_reservations_hold(), "no limit at all"
    write(cgroups, hugetlb__2MB__max=4 * PAGE, hugetlb__2MB__current=0)
    assert not limits.huge_reservations_hold()
    write(cgroups, hugetlb__2MB__rsvd__max=4 * PAGE, hugetlb__2MB__rsvd__current=0)
    assert limits.huge_reservations_hold()
    write(cgroups, hugetlb__2MB__rsvd__max=5 * PAGE)
    assert not limits.huge_reservations_hold()


def test_pages_that_were_only_reserved_are_nobody_elses(huge_pages):
    huge_pages(4)
    with Dram([3 * PAGE], huge_pages="always"):
        assert limits.free_huge_bytes() == PAGE
        with pytest.raises(NoCapacity):
            Dram([2 * PAGE], huge_pages="always")
    assert limits.free_huge_bytes() == 4 * PAGE
