"""The agent's settings: one frozen value, and the only reader of the environment in this package."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from cache_agent import limits
from cache_agent.errors import BadSetting
from cache_agent.limits import HugePages
from cache_agent.logs import LogFormat

DEFAULT_SOCKET = "/run/glowplug/agent.sock"
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):\d{1,5}")
_ANY = ("0.0.0.0", "[::]")  # noqa: S104  recognised, not bound
# Former settings, and the rule that replaced each.
_GONE = {"GLOWPLUG_SNAPSHOT_SIZE": "16 MiB at most are kept of one request"}
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """The settings, each set by `GLOWPLUG_<NAME IN CAPITALS>` and explained in one README.md of this package.

    `dram` and `ssd_size` in bytes; without `ssd` nothing is kept on disk. `file_roots` are the directories that
    `file://` may name; a socket that other users can reach needs them to be narrower than "/".
    """

    socket: Path = Path(DEFAULT_SOCKET)
    socket_mode: int = 0o600
    node: str = ""
    dram: int = 0
    huge_pages: HugePages = "auto"
    ssd: Path | None = None
    ssd_size: int = 0
    file_roots: tuple[Path, ...] = (Path("/"),)
    s3_endpoint: str = ""
    s3_anonymous: bool = False
    readers: int = 16
    identity: str = ""
    token_file: Path | None = None
    rights: Path | None = None
    revalidate: float = 10.0
    max_connections: int = 1024
    kubernetes: str = ""
    redis_url: str = ""
    redis_password_file: Path | None = None
    cluster_key_file: Path | None = None
    snapshot_ttl: float = 600.0
    snapshot_space: int = 256 << 20
    agent_listen: str = ""
    agent_address: str = ""
    peer_witnesses: int = 1
    stale: float = 86400.0
    log_format: LogFormat = "text"
    status: str = ""
    status_open: tuple[str, ...] = ("healthz",)

    def __post_init__(self) -> None:
        if self.socket_mode & 0o077 and any(_is_root(root) for root in self.file_roots):
            raise BadSetting(
                "other users can reach the agent's socket and could read any safetensors file through it: "
                "name the directories that hold models (--file-root), or keep --socket-mode 600"
            )
        if self.huge_pages not in get_args(HugePages):
            raise BadSetting(f"huge_pages is {self.huge_pages!r}; it can be auto, always or never")
        if self.readers < 1 or self.dram < 0 or self.ssd_size < 0 or self.max_connections < 1:
            raise BadSetting("readers and max_connections must be at least 1, dram and ssd_size at least 0 bytes")
        if not 1 <= self.snapshot_ttl <= 86400 or self.snapshot_space < 1:
            raise BadSetting("snapshot_ttl must be 1 to 86400 seconds, snapshot_space at least a byte")
        for address in (self.agent_listen, self.agent_address):
            if address and not _ADDRESS.fullmatch(address):
                raise BadSetting(f"{address!r} is no address; use host:port, or [v6]:port")
        if not 1 <= self.peer_witnesses <= 8:
            raise BadSetting(f"peer_witnesses is {self.peer_witnesses}; it can be 1 to 8")
        if not self.revalidate >= 0 or not self.stale >= 0:
            raise BadSetting(f"revalidate is {self.revalidate}, stale {self.stale}; both must be at least 0 seconds")
        if self.identity not in ("", "none", "token", "kubernetes"):
            raise BadSetting(f"identity is {self.identity!r}; it can be none, token or kubernetes")
        if not set(self.status_open) <= {"healthz", "metrics"}:
            raise BadSetting(f"status_open is {','.join(self.status_open)!r}; it can name healthz and metrics")
        if self.log_format not in get_args(LogFormat):
            raise BadSetting(f"log_format is {self.log_format!r}; it can be text or json")

    @property
    def capacity(self) -> int:
        """The DRAM budget in bytes: `dram`, or half of what the agent may use, or the free huge pages if more."""
        return self.dram or max(limits.memory_limit() // 2, limits.free_huge_bytes())

    @property
    def advertised(self) -> str:
        """The address at which other nodes reach this agent; "" where they cannot."""
        host, _, port = self.agent_listen.rpartition(":")
        if self.agent_address or not port:
            return self.agent_address
        return f"{socket.gethostname() if host in _ANY else host}:{port}"

    @property
    def node_name(self) -> str:
        return self.node or socket.gethostname()


def from_environment(environment: Mapping[str, str] | None = None) -> AgentConfig:
    """Read the settings from the environment. Raises `BadSetting`, which names the variable."""
    env = os.environ if environment is None else environment
    values: dict[str, object] = {}
    for name, parse in _PARSERS.items():
        variable = f"GLOWPLUG_{name.upper()}"
        if text := env.get(variable, ""):
            try:
                values[name] = parse(text)
            except ValueError as error:
                raise BadSetting(f"{variable}={text!r}: {error}") from error
    return AgentConfig(**values)  # type: ignore[arg-type]


def gone(environment: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable in `environment` that was a setting once and changes nothing now."""
    return [
        f"{name} is no setting any more and changes nothing: {now}; unset it"
        for name, now in _GONE.items()
        if environment.get(name)
    ]


def parse_size(text: str) -> int:
    """Return the bytes of "1536", "800M", "16GiB". Raises `ValueError`."""
    stripped = text.strip().lower().removesuffix("b").removesuffix("i")
    number, unit = (stripped[:-1], stripped[-1:]) if stripped[-1:].isalpha() else (stripped, "")
    if unit not in _UNITS or not number.replace(".", "", 1).isdecimal():
        raise ValueError("use a number of bytes, or one with K, M, G or T")
    return int(float(number) * _UNITS[unit])


def parse_mode(text: str) -> int:
    """Return the file mode of octal digits. Raises `ValueError`."""
    if not re.fullmatch("[0-7]{3,4}", text) or int(text, 8) > 0o777:
        raise ValueError("use three octal digits, like 660")
    return int(text, 8)


def parse_flag(text: str) -> bool:
    """Return the truth of 1, true, yes, 0, false or no. Raises `ValueError`."""
    try:
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.strip().lower()]
    except KeyError:
        raise ValueError("use 1 or 0") from None


def _is_root(path: Path) -> bool:
    resolved = Path(os.path.realpath(path))
    return resolved.parent == resolved


def _roots(text: str) -> tuple[Path, ...]:
    return tuple(Path(part) for part in text.split(":") if part)


def parse_words(text: str) -> tuple[str, ...]:
    """Return the words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


_PARSERS: dict[str, Callable[[str], object]] = {
    "socket": Path,
    "socket_mode": parse_mode,
    "node": str,
    "dram": parse_size,
    "huge_pages": str,
    "ssd": Path,
    "ssd_size": parse_size,
    "file_roots": _roots,
    "s3_endpoint": str,
    "s3_anonymous": parse_flag,
    "readers": int,
    "identity": str,
    "token_file": Path,
    "rights": Path,
    "revalidate": float,
    "max_connections": int,
    "kubernetes": str,
    "redis_url": str,
    "redis_password_file": Path,
    "cluster_key_file": Path,
    "snapshot_ttl": float,
    "snapshot_space": parse_size,
    "agent_listen": str,
    "agent_address": str,
    "peer_witnesses": int,
    "stale": float,
    "log_format": str,
    "status": str,
    "status_open": parse_words,
}
