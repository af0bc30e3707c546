"""Every command in the documentation: run as it stands there, on stand-ins for its names, or listed with a reason."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from documented import DOCUMENTS, ROOT, commands

BIN = Path(sys.prefix) / "bin"
MODEL = ROOT / "templates" / "llm-python" / "model"
SECONDS = 300.0
TEMPLATE = "templates/llm-python/README.md"

# What is not run here, by its beginning.
ELSEWHERE = {
    "scripts/demo": "test_demo.py runs it",
    "scripts/test": "it runs these tests",
    "scripts/lint": "CI runs it beside these tests",
    "scripts/bench": "an hour; test_bench.py runs its parts",
    "scripts/simulate": "test_simulate.py runs it",
    ". .venv/bin/activate": "the tests run in an environment of their own",
    "python3 -m venv": "test_template.py installs what the template brings",
    "pip install": "test_template.py installs what the template brings",
    "faas-cli template pull": "test_faas_cli.py runs it where FAAS_CLI names the binary",
    "faas-cli new": "test_faas_cli.py runs it where FAAS_CLI names the binary",
    "faas-cli up": "it needs a registry and a gateway",
    "hf download": "test_hf.py runs it on a stand-in of a hub",
    "curl": "it asks a function behind a gateway; test_watchdog.py does where OF_WATCHDOG names the binary",
    "docker build": "it needs a container engine; test_images.py replays the steps",
    "kubectl apply": "it needs a cluster; test_kubernetes.py runs it where ETCD and KUBE_APISERVER name the binaries",
    "kubectl label": "it needs a cluster; test_kubernetes.py runs it where ETCD and KUBE_APISERVER name the binaries",
    "kubectl -n glowplug-system get": "it needs a cluster; test_kubernetes.py runs it in one",
    "kubectl -n glowplug-system port-forward": "it needs a node that runs the agent's pod",
    "glowplug place": "it asks agents that share a Redis; test_place.py starts some and runs it",
}


ALL = [(document, command) for document in DOCUMENTS for command in commands(document)]
OURS = [row for row in ALL if not row[1].startswith(tuple(ELSEWHERE))]


class Place:
    """A directory in which the documentation's names mean something."""

    def __init__(self, directory: Path, s3: Any) -> None:
        self.directory = directory
        bucket = s3.new_bucket()
        shutil.copytree(MODEL, directory / "llama-1b")
        files = {path.name: path.read_bytes() for path in MODEL.iterdir()}
        uri = s3.upload(bucket, "m", files)
        for name in ("templates", "template", "knative"):
            (directory / name).symlink_to(ROOT / name)
        for name in ("agent-password", "placer-password", "tls.crt", "tls.key", "ca.crt", "s3.env"):
            (directory / name).write_text("NAME=value\n")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.names = {
            "sync s3://models/llama-1b": f"sync s3://{bucket}/aws",
            "llama-1b s3://models/llama-1b": f"llama-1b s3://{bucket}/aws",
            "json s3://models/llama-1b": f"json s3://{bucket}/aws",
            "s3://models/llama-1b": uri,
            "store:models/": f"store:{bucket}/",
            "/models": str(directory),
            "--dram 16G": "--dram 64M",
            "glowplug ask": f"glowplug ask --url 127.0.0.1:{self.port}",
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("GLOWPLUG_", "AWS_")) and k != "PORT"}
        self.env = {
            **kept,
            **s3.env,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "GLOWPLUG_SOCKET": str(directory / "a.sock"),
            "GLOWPLUG_S3_ENDPOINT": s3.endpoint,
            "AWS_ENDPOINT_URL": s3.endpoint,
            "RCLONE_CONFIG": os.devnull,
            "RCLONE_CONFIG_STORE_TYPE": "s3",
            "RCLONE_CONFIG_STORE_PROVIDER": "Other",
            "RCLONE_CONFIG_STORE_ENV_AUTH": "true",
            "RCLONE_CONFIG_STORE_ENDPOINT": s3.endpoint,
            "GLOWPLUG_HOST": "127.0.0.1",
            "GLOWPLUG_PORT": str(self.port),
            "GLOWPLUG_THREADS": "1",
            "GLOWPLUG_HUGE_PAGES": "never",
            "HF_HUB_OFFLINE": "1",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def meant(self, command: str) -> str:
        for name, stand_in in self.names.items():
            if name in command:
                command = command.replace(name, stand_in)
        return command.partition(" | kubectl")[0]

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", self.meant(command)],
            cwd=self.directory,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def compare_the_copy(self) -> None:
        """Asserts that a model that a command brought back is the one that was sent, and removes it."""
        copy = self.directory / "copy-of-llama-1b"
        if copy.exists():
            found, sent = ({p.name: p.read_bytes() for p in place.iterdir()} for place in (copy, MODEL))
            assert found == sent
            shutil.rmtree(copy)

    def start(self, command: str, says: str) -> None:
        """A command that serves; it stays until the end, or until the next that needs its port."""
        log = self.directory / f"log-{len(self.processes)}"
        # A function here has an agent of its own: the node's, in the documents, may read the directory of models alone.
        private = command.startswith("glowplug serve")
        env = {name: value for name, value in self.env.items() if not (private and name == "GLOWPLUG_SOCKET")}
        with log.open("wb") as output:
            process = self.processes[command] = subprocess.Popen(
                shlex.split(self.meant(command)),
                cwd=self.directory, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        deadline = time.monotonic() + SECONDS
        while says not in log.read_text():
            assert process.poll() is None, (command, log.read_text())
            assert time.monotonic() < deadline, (command, log.read_text())
            time.sleep(0.02)

    def stop(self, beginning: str) -> None:
        """Those servers whose command begins like that."""
        for command, process in list(self.processes.items()):
            if command.startswith(beginning):
                process.send_signal(signal.SIGTERM)
                assert process.wait(SECONDS) == 0, command
                del self.processes[command]


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, s3: Any) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("d"), s3)
    yield place
    for process in place.processes.values():
        process.kill()
        process.wait()


def test_the_documents_have_commands() -> None:
    assert {document for document, _ in ALL} >= {"README.md", "CONTRIBUTING.md", TEMPLATE, "knative/README.md"}
    assert len(OURS) > 10


@pytest.mark.parametrize("beginning", ELSEWHERE)
def test_what_is_run_elsewhere_is_still_in_a_document(beginning: str) -> None:
    assert any(command.startswith(beginning) for _, command in ALL)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if any(row[0] == name for row in OURS)])
@pytest.mark.skipif(Path("/run/glowplug/agent.sock").exists(), reason="this machine has an agent of its own")
def test_the_commands_of_ours_do_what_they_say(document: str, place: Place) -> None:
    """In their order; what serves is left running for those that ask it."""
    if document.startswith(("CONTRIBUTING", "knative", "templates")):  # the README makes it itself
        place.run("glowplug init chat")
    for command in (command for name, command in OURS if name == document):
        if command.startswith("glowplug serve"):
            place.stop("glowplug serve")
            place.start(command, "ready after")
        elif command.startswith("glowplug agent serve"):
            place.start(command, "serves")
        elif command.startswith("kubectl"):
            if binary := os.environ.get("KUBECTL"):
                place.run(f"{binary}{command.removeprefix('kubectl')} --dry-run=client -o name")
        elif command.startswith(("aws", "rclone")):
            if shutil.which(command.split()[0], path=place.env["PATH"]):
                place.run(command)
                place.compare_the_copy()
        else:
            assert place.run(command).strip(), command
    place.stop("")
