"""The demo, on real processes: a cold request, a warm request, a second replica; times and memory of all of it.

Every process that it starts ends with it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from memory import Footprint, descendants, footprint, weight_copies
from report import ROOT, Report
from rich.console import Console
from rich.table import Table

from cache_agent.client.cache_client import CacheClient
from cache_agent.errors import AgentError
from runtime.sse import EventParser

TEMPLATE = ROOT / "templates" / "llm-python"
BIN = Path(sys.executable).parent
START_SECONDS = 120.0

console = Console(highlight=False)


@dataclass
class Function:
    """One replica of the function: its shim, its port, and its measurements."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    first_text_ms: list[float] = field(default_factory=list)
    ledger: list[dict[str, Any]] = field(default_factory=list)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default=str(TEMPLATE / "model"), help="Directory or URI of another model.")
@click.option("--question", default="What is Glowplug?", help="What to ask.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file.")
def main(model: str, question: str, json_file: Path | None) -> None:
    """Start a cache agent and a function, ask it a question while nothing is loaded, and show what happened."""
    uri = model if "://" in model else f"file://{Path(model).absolute()}"
    with tempfile.TemporaryDirectory(prefix="glowplug-demo-") as place, contextlib.ExitStack() as stack:
        directory = Path(place)
        agent_socket = directory / "agent.sock"
        agent = stack.enter_context(_agent(agent_socket, directory / "agent.log"))
        console.print(f"[bold]1.[/] A cache agent serves this node (pid {agent.pid}); nothing is loaded.")

        first = stack.enter_context(_function("first", uri, agent_socket, directory))
        console.print(f"[bold]2.[/] A cold function on port {first.port}, asked at once: [italic]{question}[/]")
        _ask(first, question)
        console.print("[bold]3.[/] The same question again, now that it is warm:")
        _ask(first, question)

        second = stack.enter_context(_function("second", uri, agent_socket, directory))
        console.print("[bold]4.[/] A second replica; its weights are there already:")
        _ask(second, question)

        console.print()
        for function in (first, second):
            function.ledger = _get(function.port, "/_/ledger")["spans"]
        _show_starts([first, second])
        copies = _show_memory(agent.pid, [first, second], CacheClient(agent_socket))
        if json_file is not None:
            _report([first, second], copies).write(json_file)
            console.print(f"The figures are in {json_file}.")
    if copies != 1:
        sys.exit(f"demo: {copies} copies of the weights exist on this machine; there should be one")


# --- processes ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _agent(path: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(BIN / "glowplug"), "agent", "serve", "--socket", str(path)]
    with _process(command, log, dict(os.environ)) as process:
        _until(lambda: _answers(path), process, command, log)
        yield process


@contextlib.contextmanager
def _function(name: str, uri: str, agent_socket: Path, directory: Path) -> Iterator[Function]:
    port, log = _free_port(), directory / f"{name}.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GLOWPLUG_")}
    environment |= {
        "PORT": str(port),
        "GLOWPLUG_HOST": "127.0.0.1",
        "GLOWPLUG_MODEL": uri,
        "GLOWPLUG_HANDLER": str(TEMPLATE / "function"),
        "GLOWPLUG_SOCKET": str(agent_socket),
        "PYTHONSAFEPATH": "1",
    }
    # What a container's entrypoint runs; `glowplug serve` ends in the same command.
    with _process([sys.executable, "-m", "runtime.shim"], log, environment) as process:
        yield Function(name, process, port, log)


@contextlib.contextmanager
def _process(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=log.parent, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(path: Path) -> bool:
    try:
        CacheClient(path, timeout=1.0).status()
    except AgentError:
        return False
    return True


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes], command: list[str], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"demo: {' '.join(command)} did not start:\n{log.read_text()}")
        time.sleep(0.01)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# --- asking -------------------------------------------------------------------------------------------------------


def _ask(function: Function, question: str) -> None:
    """Stream the answer to the terminal, and note the milliseconds from the request to the first text."""
    start = time.monotonic()
    response = _post(function, question)
    console.print("   [green]", end="")
    parser, answered = EventParser(), False
    while data := response.read1(4096):
        for event in parser.feed(data):
            if event.data == "[DONE]":
                continue
            if event.event == "error":
                sys.exit(f"\ndemo: the function failed: {event.data}\n{function.log.read_text()}")
            if not answered:
                function.first_text_ms.append((time.monotonic() - start) * 1e3)
                answered = True
            console.print(event.data, end="", style="green", soft_wrap=True)
    response.close()
    if not answered:
        sys.exit(f"\ndemo: the function answered nothing:\n{function.log.read_text()}")
    total = (time.monotonic() - start) * 1e3
    console.print(f"\n   [dim]first text after {function.first_text_ms[-1]:.0f} ms, all of it after {total:.0f} ms[/]")


def _post(function: Function, question: str) -> http.client.HTTPResponse:
    """Send a request as soon as the port is open, which is long before the model is loaded."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", function.port, timeout=START_SECONDS)
        try:
            connection.connect()
        except ConnectionRefusedError:
            if function.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"demo: the function did not start:\n{function.log.read_text()}")
            time.sleep(0.001)
            continue
        connection.request("POST", "/", question.encode(), {"Accept": "text/event-stream"})
        response = connection.getresponse()
        if response.status != 200:
            sys.exit(f"demo: status {response.status}: {response.read().decode()}\n{function.log.read_text()}")
        return response


def _get(port: int, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    return json.load(connection.getresponse())


# --- showing ------------------------------------------------------------------------------------------------------


def _show_starts(functions: list[Function]) -> None:
    table = Table(title="Starts, in ms", title_justify="left", box=None, pad_edge=False)
    table.add_column("phase")
    for function in functions:
        table.add_column(function.name, justify="right")
        table.add_column("at", justify="right", style="dim")
    spans = [
        {f"{span['owner']}: {span['name']}": (span["start_ns"], span["end_ns"]) for span in function.ledger}
        for function in functions
    ]
    names = list(dict.fromkeys(name for found in spans for name in found))
    names.sort(key=lambda name: min(found[name][0] - _began(found) for found in spans if name in found))
    for name in names:
        row = [name]
        for found in spans:
            start, end = found.get(name, (0, 0))
            row += [f"{(end - start) / 1e6:.1f}", f"{(start - _began(found)) / 1e6:.0f}"] if end else ["-", ""]
        table.add_row(*row)
    table.add_section()
    row = ["[bold]request → first text[/]"]
    for function in functions:
        row += [f"[bold]{function.first_text_ms[0]:.0f}[/]", ""]
    table.add_row(*row)
    warm = [f"{function.first_text_ms[1]:.0f}" if len(function.first_text_ms) > 1 else "-" for function in functions]
    table.add_row("the same, warm", *(cell for text in warm for cell in (text, "")))
    console.print(table)
    console.print("[dim]Phases of agent and worker overlap: weights travel while Python imports.[/]\n")


def _began(spans: dict[str, tuple[int, int]]) -> int:
    return min(start for start, _ in spans.values())


def _show_memory(agent: int, functions: list[Function], client: CacheClient) -> int:
    table = Table(title="Memory, in MB", title_justify="left", box=None, pad_edge=False)
    for heading in ("process", "private", "with its share", "weights mapped"):
        table.add_column(heading, justify="left" if heading == "process" else "right")
    pids = {"cache agent": agent}
    for function in functions:
        pids[f"{function.name}: shim"] = function.process.pid
        pids |= {f"{function.name}: {_title(pid)}": pid for pid in _children(function.process.pid)}
    for name, pid in pids.items():
        found: Footprint = footprint(pid)
        table.add_row(name, *(f"{size / 1e6:.0f}" for size in (found.private, found.proportional, found.weights)))
    console.print(table)
    # Counted over everything that this demo started, so that a copy in any process would show.
    copies = weight_copies(descendants(os.getpid()))
    size = sum(copies.values())
    expected = client.status().used
    count = round(size / expected) if expected else 0
    console.print(f"[bold]Copies of the weights on this machine: {count}[/] ({size / 1e6:.1f} MB)")
    return count


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _title(pid: int) -> str:
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    match = re.search(r"-m \S+?\.(\w+)", command)
    return match.group(1) if match else command[:20]


def _report(functions: list[Function], copies: int) -> Report:
    headline = {
        "copies_of_weights": float(copies),
        "cold_first_text_ms": round(functions[0].first_text_ms[0], 1),
        "warm_first_text_ms": round(functions[0].first_text_ms[1], 1),
        "attached_first_text_ms": round(functions[1].first_text_ms[0], 1),
    }
    rows: list[dict[str, str | float | None]] = [
        {
            "start": function.name,
            "owner": span["owner"],
            "span": span["name"],
            "ms": round((span["end_ns"] - span["start_ns"]) / 1e6, 3),
        }
        for function in functions
        for span in function.ledger
    ]
    return Report("demo", headline, rows)


if __name__ == "__main__":
    main()
