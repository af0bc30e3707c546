"""Owns a worker's way into a container: looking at the container, forking into it, entering it step by step.

The pool calls `look` with a pidfd of the container's first process, and learns what a worker there has to be. The
zygote calls `fork_into`, whose child is in the container's pid namespace. The child calls `enter` before it runs code
of the function:

    closed to processes of the same user → cgroups → the copied runtime → namespaces, all at once → root
    → the runtime's place → limits → ids, no capability, no new privileges, the filter

Each step needs rights that later ones take away. The pid namespace comes first of all, because only a child can be in
it; so does the cgroup of version 2, in which a child can begin. Moving a process (`cgroup.procs`) would cost more than
all the rest, a grace period of the kernel's. Moving the only thread (`tasks`, version 1) does not. Standard library
only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.process import kernel

_CGROUPS = Path("/sys/fs/cgroup")
_NAMESPACES = (
    kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS | kernel.CLONE_NEWIPC | kernel.CLONE_NEWCGROUP
)
_LIMITS = {
    "Max cpu time": resource.RLIMIT_CPU, "Max file size": resource.RLIMIT_FSIZE, "Max data size": resource.RLIMIT_DATA,
    "Max stack size": resource.RLIMIT_STACK, "Max core file size": resource.RLIMIT_CORE,
    "Max processes": resource.RLIMIT_NPROC, "Max open files": resource.RLIMIT_NOFILE,
    "Max locked memory": resource.RLIMIT_MEMLOCK, "Max address space": resource.RLIMIT_AS,
    "Max pending signals": resource.RLIMIT_SIGPENDING, "Max msgqueue size": resource.RLIMIT_MSGQUEUE,
    "Max nice priority": resource.RLIMIT_NICE, "Max realtime priority": resource.RLIMIT_RTPRIO,
    "Max realtime timeout": resource.RLIMIT_RTTIME,
}  # fmt: skip
_V1 = ("memory", "pids", "cpu", "cpuacct", "cpuset", "blkio", "freezer", "devices")


class JoinRefused(Exception):
    """A container that no worker can be placed in; the text is the reason that the ledger gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerPlace:
    """The attributes of a container's first process that a worker there has to have, its rights apart."""

    pid: int  # of the container's first process, in the pool's namespace
    container: int  # inode of its pid namespace
    uid: int
    gid: int
    groups: tuple[int, ...]
    cgroup: str  # directory of the cgroup of version 2; "" if the pool is in the same
    cgroups: tuple[str, ...]  # files by which a thread moves itself into those of version 1 that the pool is not in
    limits: tuple[tuple[int, int, int], ...]  # which, soft, hard
    umask: int
    oom: int
    filtered: bool  # whether a seccomp filter is on the process

    def dump(self) -> str:
        return json.dumps(asdict(self))


def peer(sock: socket.socket) -> tuple[int, ContainerPlace]:
    """Return a pidfd of the process that has connected, the caller's to close, and its place. Raises `JoinRefused`."""
    try:
        pidfd = sock.getsockopt(socket.SOL_SOCKET, kernel.SO_PEERPIDFD)
    except OSError as error:
        raise JoinRefused("this kernel does not say who connects (SO_PEERPIDFD, Linux 6.5)") from error
    try:
        return pidfd, look(pidfd)
    except JoinRefused:
        os.close(pidfd)
        raise


def look(pidfd: int) -> ContainerPlace:
    """Return the place of a worker in the container of this process.

    Raises `JoinRefused` where a worker of the pool would not be confined as the container's own processes are, and
    where the process is not the container's first.
    """
    pid = _pid(pidfd)
    base = Path("/proc") / str(pid)
    try:
        status = dict(re.findall(r"^(\w+):[ \t]*(.*)$", (base / "status").read_text(), re.MULTILINE))
        spaces = {name: os.stat(base / "ns" / name).st_ino for name in ("pid", "user", "mnt")}
        ours = {name: os.stat(f"/proc/self/ns/{name}").st_ino for name in spaces}
        label, our_label = (_label(each) for each in (base, Path("/proc/self")))
        clocks, our_clocks = (_clocks(each) for each in (base, Path("/proc/self")))
        cgroup, cgroups = _cgroups((base / "cgroup").read_text(), Path("/proc/self/cgroup").read_text())
        oom = int((base / "oom_score_adj").read_text())
        limits = _limits((base / "limits").read_text())
    except (OSError, ValueError, KeyError) as error:
        raise JoinRefused(f"its container cannot be looked at ({error})") from error
    if not lives(pidfd):
        raise JoinRefused("it is gone")  # what was read may be of another process, which has the number now
    if spaces["pid"] == ours["pid"] or int(status["NSpid"].split()[-1]) != 1:
        raise JoinRefused("only the first process of a container is served")
    if spaces["mnt"] == ours["mnt"]:
        raise JoinRefused("it has no mount namespace of its own")
    if clocks != our_clocks:
        raise JoinRefused("its container has a time namespace, whose clocks a worker of the pool would not have")
    if spaces["user"] != ours["user"]:
        raise JoinRefused("its container has a user namespace, which a worker of the pool would not have")
    if label != our_label:
        raise JoinRefused(f"its container is confined as {label}, which a worker of the pool would not be")
    ids = [(int(part) for part in status[name].split()) for name in ("Uid", "Gid")]
    (uid, *uids), (gid, *gids) = ids
    if {uid} != {*uids[:2]} or {gid} != {*gids[:2]}:
        raise JoinRefused("its real and its effective user or group differ")
    return ContainerPlace(
        pid=pid,
        container=spaces["pid"],
        uid=uid,
        gid=gid,
        groups=tuple(int(group) for group in status["Groups"].split()),
        cgroup=cgroup,
        cgroups=cgroups,
        limits=limits,
        umask=int(status["Umask"], 8),
        oom=oom,
        filtered=status.get("Seccomp", "0") != "0",
    )


def fork_into(place: dict[str, Any], pidfd: int, home: int) -> int:
    """Fork a child into the pid namespace of the process that `pidfd` names; return as `os.fork` does.

    `home` is a pidfd of the caller. `place` has no cgroup of version 2 for `enter` any more, if the child begins there.
    Raises `OSError`.
    """
    kernel.setns(pidfd, kernel.CLONE_NEWPID)
    child = -1
    try:
        child = _fork(place)
        return child
    finally:
        if child:  # not in the child, whose own children must be in the container, too
            kernel.setns(home, kernel.CLONE_NEWPID)


def _fork(place: dict[str, Any]) -> int:
    if not place["cgroup"]:
        return os.fork()
    cgroup = os.open(place["cgroup"], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        child = kernel.fork_into_cgroup(cgroup)
    except OSError:
        return os.fork()  # the child tries to move there, and says what is wrong with the cgroup
    finally:
        os.close(cgroup)
    if child == 0:
        place["cgroup"] = ""
    return child


def enter(
    place: dict[str, Any],
    *,
    pidfd: int,
    root: int,
    prefixes: tuple[str, ...],
    seccomp: bytes = b"",
) -> int:
    """Make this process, which was just forked, one of the container. Raises `OSError` for the step that failed.

    `root` is an fd of the container's root directory. `prefixes` are directories with the runtime that the pool runs,
    which must lie in the container at the same path: modules that are imported later come from there. Returns when the
    process was in the cgroups, in ns of CLOCK_MONOTONIC.
    """
    kernel.dumpable(False)
    for file in (*place["cgroups"], *(f"{each}/cgroup.procs" for each in [place["cgroup"]] if each)):
        _write(file, "0")
    charged = time.monotonic_ns()
    _write("/proc/self/oom_score_adj", str(place["oom"]), needed=False)
    trees = [(prefix, os.stat(prefix), kernel.open_tree(prefix)) for prefix in prefixes]
    kernel.setns(pidfd, _NAMESPACES)
    os.fchdir(root)
    os.chroot(".")
    os.chdir("/")
    for prefix, ours, tree in trees:
        _graft(prefix, ours, tree)
    os.umask(place["umask"])
    for which, soft, hard in place["limits"]:
        with contextlib.suppress(ValueError, OSError):  # raising a limit needs a right that the pool may not have
            resource.setrlimit(which, (soft, hard))
    kernel.drop_privileges(place["uid"], place["gid"], list(place["groups"]), seccomp)
    return charged


def _graft(prefix: str, ours: os.stat_result, tree: int) -> None:
    """Mount the pool's directory of the runtime, read-only, unless the container has the very same."""
    try:
        if not os.path.isdir(prefix):
            os.makedirs(prefix, 0o755)
        theirs = os.stat(prefix)
        if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
            kernel.move_mount(tree, prefix)
    finally:
        os.close(tree)


def _pid(pidfd: int) -> int:
    text = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    found = re.search(r"^Pid:\s*(-?\d+)$", text, re.MULTILINE)
    if found is None or int(found[1]) <= 0:
        raise JoinRefused("it is gone, or it is in none of the pool's pid namespaces")
    return int(found[1])


def lives(pidfd: int) -> bool:
    """Return whether the process has not ended."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return not poller.poll(0)


def _clocks(base: Path) -> int:
    """Return the inode of a process's time namespace; 0 where the kernel has none."""
    try:
        return os.stat(base / "ns" / "time").st_ino
    except OSError:
        return 0


def _label(base: Path) -> str:
    """Return the label of AppArmor or SELinux; "" where neither is."""
    try:
        return (base / "attr/current").read_text().strip().rstrip("\0")
    except OSError:
        return ""


def _limits(text: str) -> tuple[tuple[int, int, int], ...]:
    """Parse /proc/PID/limits. `prlimit` would need a right that an unprivileged container's root lacks."""
    found = re.findall(r"^(Max [a-z ]+?) {2,}(unlimited|\d+) +(unlimited|\d+)", text, re.MULTILINE)
    ends = [
        (name, *(resource.RLIM_INFINITY if end == "unlimited" else int(end) for end in both)) for name, *both in found
    ]
    return tuple((_LIMITS[name], soft, hard) for name, soft, hard in ends if name in _LIMITS)


def _cgroups(text: str, ours: str) -> tuple[str, tuple[str, ...]]:
    """Return `cgroup` and `cgroups` of a place, from the text of /proc/PID/cgroup of its process and of this one."""
    unified, found = "", []
    for line in sorted({*text.splitlines()} - {*ours.splitlines()}):
        _, controllers, path = line.split(":", 2)
        relative = path.lstrip("/")
        if not controllers:
            root = _CGROUPS / "unified" if (_CGROUPS / "unified").is_dir() else _CGROUPS
            unified = str(root / relative) if (root / relative / "cgroup.procs").exists() else ""
        found += [_CGROUPS / each / relative / "tasks" for each in controllers.split(",") if each in _V1]
    return unified, tuple(str(file) for file in dict.fromkeys(found) if file.exists())


def _write(file: str, text: str, *, needed: bool = True) -> None:
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError:
        if needed:
            raise
