"""System calls that Python has no names for. All raise `OSError` with the call's name."""

from __future__ import annotations

import ctypes
import os
import signal
import struct

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
SO_PEERPIDFD = 77

_LIBC = ctypes.CDLL(None, use_errno=True)
_PYTHON = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter's lock while it calls
_OPEN_TREE, _MOVE_MOUNT, _CLONE3, _MOUNT_SETATTR = 428, 429, 435, 442  # the same numbers on every machine
_CLONE_CHILD_CLEARTID, _CLONE_CHILD_SETTID, _CLONE_INTO_CGROUP = 0x00200000, 0x01000000, 0x200000000
_PR_GET_TID_ADDRESS = 40
_MADV_COLLAPSE, _HUGE = 25, 2 << 20
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 4, 22, 23, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_SECCOMP_MODE_FILTER = 2
_CAP_VERSION = 0x20080522
_FILTER_INSTRUCTION = 8  # bytes of a struct sock_filter


def setns(fd: int, kinds: int) -> None:
    """Join the namespaces, of these kinds, of the process that a pidfd names."""
    _call("setns", _LIBC.setns(fd, kinds))


def fork_into_cgroup(cgroup: int) -> int:
    """Fork a process with one thread into a cgroup of version 2 (an fd of its directory); return as `os.fork` does.

    Python's own preparations are made as `os.fork` makes them. Of the C library's only one matters to a single thread:
    the thread's number, which the kernel writes where the C library has it. Handlers of `pthread_atfork` are not
    called. Moving a process into a cgroup costs a grace period of the kernel's, some 10 ms; beginning there is free.
    """
    thread_id = ctypes.c_ulong()  # where the C library has the number of the thread
    _call("prctl(PR_GET_TID_ADDRESS)", _LIBC.prctl(_PR_GET_TID_ADDRESS, ctypes.byref(thread_id), 0, 0, 0))
    flags = _CLONE_INTO_CGROUP | _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
    arguments = struct.pack("=11Q", flags, 0, thread_id.value, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, cgroup)
    before, child, parent = (
        getattr(ctypes.pythonapi, f"PyOS_{name}") for name in ("BeforeFork", "AfterFork_Child", "AfterFork_Parent")
    )
    for each in (before, child, parent):
        each.restype = None
    before()
    pid = int(_PYTHON.syscall(ctypes.c_long(_CLONE3), arguments, ctypes.c_size_t(len(arguments))))
    (parent if pid else child)()
    return _call("clone3", pid)


def dumpable(allowed: bool) -> None:
    """Set whether processes of the same user may look into this one. Changing ids undoes the setting."""
    _call("prctl(PR_SET_DUMPABLE)", _LIBC.prctl(_PR_SET_DUMPABLE, int(allowed), 0, 0, 0))


def collapse() -> None:
    """Put this process's own memory into huge pages, as far as the kernel can and will (Linux 6.1).

    No thread may be changing the memory meanwhile.
    """
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        maps = [line.split() for line in file]
    for addresses, rights, _, _, inode, *name in maps:
        if rights == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            first, last = (int(end, 16) for end in addresses.split("-"))
            begin, end = -(-first // _HUGE) * _HUGE, last // _HUGE * _HUGE
            if begin < end:
                _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_COLLAPSE)


def open_tree(path: str) -> int:
    """Return an fd of a detached copy of the mounts at `path`: read-only, without setuid programs and devices."""
    fd = _call(
        "open_tree",
        _syscall(_OPEN_TREE, _AT_FDCWD, path.encode(), _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE),
    )
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV, 0, 0, 0)
    try:
        flags = _AT_EMPTY_PATH | _AT_RECURSIVE
        _call("mount_setattr", _syscall(_MOUNT_SETATTR, fd, b"", flags, attributes, ctypes.c_size_t(len(attributes))))
    except OSError:
        os.close(fd)
        raise
    return fd


def move_mount(fd: int, target: str) -> None:
    """Attach a copy from `open_tree` to a directory."""
    _call("move_mount", _syscall(_MOVE_MOUNT, fd, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH))


def drop_privileges(uid: int, gid: int, groups: list[int], filter_program: bytes = b"") -> None:
    """Become this user for good, with no capability and no way to get one, closed to processes of the same user."""
    capability = 0
    while _LIBC.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        _call("prctl(PR_CAPBSET_DROP)", _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0))
        capability += 1
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _call("prctl(PR_CAP_AMBIENT)", _LIBC.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    header, nothing = struct.pack("=Ii", _CAP_VERSION, 0), bytes(24)
    _call("capset", _LIBC.capset(header, nothing))
    _call("prctl(PR_SET_NO_NEW_PRIVS)", _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    dumpable(False)
    if filter_program:
        _filter(filter_program)


def _filter(program: bytes) -> None:
    """Install a seccomp filter: struct sock_filter after struct sock_filter, as libseccomp exports it."""
    if not program or len(program) % _FILTER_INSTRUCTION:
        raise OSError(22, "a seccomp filter consists of instructions of 8 bytes")
    instructions = ctypes.create_string_buffer(program, len(program))
    description = struct.pack("@HP", len(program) // _FILTER_INSTRUCTION, ctypes.addressof(instructions))
    _call("prctl(PR_SET_SECCOMP)", _LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, description, 0, 0))


def _syscall(number: int, *arguments: object) -> int:
    return int(_LIBC.syscall(ctypes.c_long(number), *arguments))


def _call(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
