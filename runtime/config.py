"""The function's settings: one frozen value, the only reader of the environment in this package. Standard library only.

The shim reads it before anything else is imported, and hands the worker the same environment.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from runtime.errors import BadConfig

DEFAULT_SOCKET = "/run/glowplug/agent.sock"

AT_LEAST = {
    "slots": 1,
    "queue": 0,
    "kv_memory": 0,
    "decode_rows": 1,
    "handler_concurrency": 0,
    "max_body": 1,
    "threads": 0,
    "start_timeout": 1,
    "answer_limit": 0,
    "drain_linger": 0,
    "drain_grace": 0,
    "worker_timeout": 1,
    "start_price": 0,
}
# Former settings, and the behaviour of all functions now.
_GONE = {
    "GLOWPLUG_CHECKPOINT_TOKENS": "a request is kept again after 16 tokens",
    "GLOWPLUG_CHUNK": "a step takes 256 prompt tokens",
}


@dataclass(frozen=True, kw_only=True)
class FunctionConfig:
    """The settings of one function, each set by `GLOWPLUG_<NAME IN CAPITALS>`, `port` also by `PORT`.

    One README.md of this package has a row for each. Times are in seconds; `start_price` is in GB·s of idle memory per
    second of start. `listen_fd` is an inherited listening socket to serve instead of host and port. An empty `socket`
    means the node's agent if it answers, else a private agent.
    """

    model: str = ""
    name: str = ""
    handler: str = ""
    packages: str = ""
    port: int = 8080
    listen_fd: int = -1
    host: str = "0.0.0.0"  # noqa: S104  a container's port is there to be reached
    socket: str = ""
    token_file: str = ""
    identity_file: str = ""
    pod: str = ""
    slots: int = 16
    queue: int = 32
    kv_memory: int = 0
    deterministic: bool = False
    decode_rows: int = 8
    prefix_cache: bool = True
    handler_concurrency: int = 0
    max_body: int = 16 << 20
    private_weights: bool = False
    lean_imports: bool = True
    layers: str = "model"
    pool: str = "/run/glowplug/pool.sock"
    hold: str = ""
    checkpoints: str = ""
    handoff: str = ""
    function_key_file: str = ""
    threads: int = 0
    start_timeout: float = 600.0
    answer_limit: float = 0.0
    drain_linger: float = 0.0
    drain_grace: float = 25.0
    worker_timeout: float = 120.0
    start_price: float = 60.0
    log_level: str = "info"
    reload: bool = False

    def __post_init__(self) -> None:
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if not least <= value < math.inf:  # NaN is neither
                raise BadConfig(f"GLOWPLUG_{name.upper()} is {value:g}; it must be at least {least}, and finite")
        for name in ("checkpoints", "handoff"):
            if (value := getattr(self, name)) and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,200}", value):
                raise BadConfig(
                    f"GLOWPLUG_{name.upper()} is {value!r}; it is the name that this function's replicas have in "
                    "common: letters, digits, dots, dashes and slashes"
                )
        if not 0 <= self.port < 65536:
            raise BadConfig(f"GLOWPLUG_PORT is {self.port}; ports go from 0 (any free one) to 65535")
        if self.layers not in ("model", "lang", "off"):
            raise BadConfig(f"GLOWPLUG_LAYERS is {self.layers!r}; use model, lang or off")
        _ = self.holds
        if self.log_level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise BadConfig(f"GLOWPLUG_LOG_LEVEL is {self.log_level!r}; use debug, info, warning or error")

    @property
    def model_uri(self) -> str:
        """The model's URI. Raises `BadConfig` when none is set."""
        if not self.model:
            raise BadConfig("GLOWPLUG_MODEL is not set; name the model, like s3://bucket/prefix or file:///directory")
        return self.model if "://" in self.model else "file://" + os.path.abspath(self.model)

    @property
    def holds(self) -> dict[str, float]:
        """Seconds for which idle layers stay, by level; those of other levels stay as long as their price allows."""
        found: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in self.hold.split(","))):
            level, _, seconds = part.partition("=")
            try:
                found[level] = float(seconds)
            except ValueError:
                found[level] = -1.0
            if level not in ("user", "model", "lang") or not found[level] >= 0:
                raise BadConfig(f"GLOWPLUG_HOLD has {part!r}; write seconds by layer, like user=60,model=600,lang=inf")
        return found

    @property
    def handoff_name(self) -> str:
        """The common name of replicas that take over each other's requests; "" for a function without hand-off."""
        name = self.handoff or self.checkpoints
        return "" if name == "off" else name

    @property
    def served_name(self) -> str:
        """The model's name in the OpenAI routes: `name`, or the last part of the model's URI."""
        return self.name or self.model.split("@rev-")[0].rstrip("/").rsplit("/", 1)[-1]

    @property
    def longest_answer(self) -> float:
        """The seconds that one answer may take; infinite without a setting."""
        return self.answer_limit or math.inf

    @property
    def concurrent_handlers(self) -> int:
        """The number of calls of `handle` that may run at once; without a setting, the number of the engine's slots."""
        return self.handler_concurrency if self.handler_concurrency > 0 else self.slots

    def token(self) -> str:
        """Return the secret that the agent asks for, or "". Raise `BadConfig`."""
        if not self.token_file:
            return ""
        path = self.token_file
        if os.path.isdir(path):  # `faas-cli generate` makes a file x/x of OpenFaaS' secret x, for Knative
            path = os.path.join(path, os.path.basename(os.path.normpath(path)))
        try:
            with open(path, encoding="utf-8") as file:
                return file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadConfig(f"GLOWPLUG_TOKEN_FILE={self.token_file} cannot be read: {error}") from error


def from_environment(environment: Mapping[str, str] | None = None) -> FunctionConfig:
    """Read the settings from `environment`, by default the process's. Raise `BadConfig` that names the variable."""
    env = os.environ if environment is None else environment
    values: dict[str, object] = {}
    if env.get("PORT"):
        values["port"] = _parse("PORT", env["PORT"], int)
    for field in fields(FunctionConfig):
        variable = f"GLOWPLUG_{field.name.upper()}"
        if text := env.get(variable, ""):
            values[field.name] = _parse(variable, text, _PARSERS[str(field.type)])
    return FunctionConfig(**values)  # type: ignore[arg-type]


def gone(environment: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable in `environment` that was a setting once and changes nothing now."""
    return [
        f"{name} is no setting any more and changes nothing: {now}; unset it"
        for name, now in _GONE.items()
        if environment.get(name)
    ]


def _parse(variable: str, text: str, parse: Callable[[str], object]) -> object:
    try:
        return parse(text)
    except (ValueError, KeyError):
        raise BadConfig(f"{variable} is {text!r}; {_WANTED[parse]}") from None


def _flag(text: str) -> bool:
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.strip().lower()]


_PARSERS: dict[str, Callable[[str], object]] = {"str": str, "int": int, "float": float, "bool": _flag}
_WANTED: dict[Callable[[str], object], str] = {int: "use a whole number", float: "use a number", _flag: "use 1 or 0"}
