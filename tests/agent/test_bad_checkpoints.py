"""Checkpoints that cannot be served: a stable code, a sentence that says what to do, and an agent that goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import tempfile
from pathlib import Path

import pytest
from leased import soon

from cache_agent.client.cache_client import CacheClient
from cache_agent.config import AgentConfig
from cache_agent.daemon import Daemon
from cache_agent.errors import AgentError


@pytest.fixture(scope="module")
def shared_agent(agent_process):
    """One agent gets all of it; at the end its log has no traceback, and nothing is resident but the good model."""
    with agent_process("--dram", "64M") as agent:
        yield agent


def write_header(path: Path, header: object, data: bytes = b"") -> None:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + data)


def only_pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def config_of(content: bytes):
    return lambda directory: (directory / "config.json").write_bytes(content)


def header(value: object, data: bytes = b""):
    return lambda directory: write_header(directory / "model.safetensors", value, data)


def index(content: object):
    """Shards as before, with another index; the single file is gone."""

    def change(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "one.safetensors")
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        (directory / "model.safetensors.index.json").write_bytes(body)

    return change


def weight_map(**places: object):
    return index({"weight_map": places})


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def longer(directory: Path) -> None:
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"x")


def same_tensor_twice(directory: Path) -> None:
    index({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})(directory)
    shutil.copy(directory / "one.safetensors", directory / "two.safetensors")


def empty(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()


def is_a_file(directory: Path) -> None:
    empty(directory)
    directory.rmdir()
    directory.touch()


def entry(shape: object, offsets: object, dtype: object = "U8") -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def huge_small_file(directory: Path) -> None:
    with (directory / "vocab.txt").open("wb") as file:
        file.truncate(65 << 20)


def huge_index(directory: Path) -> None:
    index(b"")(directory)
    with (directory / "model.safetensors.index.json").open("wb") as file:
        file.truncate(65 << 20)


BAD = {
    "pickled only": (only_pickled, "unsafe_checkpoint", "save_pretrained"),
    "no weights": (no_weights, "bad_checkpoint", "neither model.safetensors nor"),
    "no config": (no_config, "bad_checkpoint", "no config.json"),
    "config that is no JSON": (config_of(b"{"), "bad_checkpoint", "config.json is no JSON object"),
    "config that is empty": (config_of(b""), "bad_checkpoint", "config.json is no JSON object"),
    "config that is a list": (config_of(b"[]"), "bad_checkpoint", "config.json is no JSON object"),
    "config that is not UTF-8": (config_of(b'{"a": "\xff"}'), "bad_checkpoint", "config.json is no JSON object"),
    "config nested deeply": (config_of(b"[" * 100_000), "bad_checkpoint", "config.json is no JSON object"),
    "index that is no JSON": (index(b"{"), "bad_checkpoint", "no usable weight_map"),
    "index that is a list": (index([]), "bad_checkpoint", "no usable weight_map"),
    "index without a map": (index({"metadata": {}}), "bad_checkpoint", "no usable weight_map"),
    "index whose map is a list": (index({"weight_map": []}), "bad_checkpoint", "no usable weight_map"),
    "index whose map has numbers": (weight_map(a=1), "bad_checkpoint", "no usable weight_map"),
    "index nested deeply": (index(b"[" * 100_000), "bad_checkpoint", "no usable weight_map"),
    "index of nothing": (weight_map(), "bad_checkpoint", "names no file"),
    "index that is huge": (huge_index, "bad_checkpoint", "is it an index?"),
    "shard that is missing": (
        weight_map(a="one.safetensors", b="two.safetensors"),
        "bad_checkpoint",
        "upload the shard",
    ),
    "shard outside": (weight_map(a="../other/model.safetensors"), "bad_checkpoint", "upload the shard"),
    "shard with an absolute path": (weight_map(a="/etc/passwd"), "bad_checkpoint", "upload the shard"),
    "shard that is no safetensors": (weight_map(a="config.json"), "bad_checkpoint", "upload the shard"),
    "shard with a NUL": (weight_map(a="one.safetensors\0"), "bad_checkpoint", "upload the shard"),
    "shard with an endless name": (weight_map(a="x" * 100_000), "bad_checkpoint", "upload the shard"),
    "tensor in two shards": (same_tensor_twice, "bad_checkpoint", "in two of the weight files"),
    "weights cut short": (cut, "bad_checkpoint", "cut short"),
    "weights with more at the end": (longer, "bad_checkpoint", "after its header"),
    "weights of zero bytes": (lambda d: (d / "model.safetensors").write_bytes(b""), "bad_checkpoint", "too few"),
    "weights that are text": (
        lambda d: (d / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "bad_checkpoint",
        "no safetensors file",
    ),
    "header of 2^64-1 bytes": (
        lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 100),
        "bad_checkpoint",
        "no safetensors file",
    ),
    "header that is no JSON": (header(b"not JSON"), "bad_checkpoint", "no valid JSON"),
    "header that is not UTF-8": (header(b'{"\xff":1}'), "bad_checkpoint", "not UTF-8"),
    "header without a tensor": (header({}), "bad_checkpoint", "holds no tensor"),
    "name twice": (header(b'{"a":1,"a":2}'), "bad_checkpoint", "occurs twice"),
    "name that no UTF-8 can carry": (header(b'{"\\ud800":1}'), "bad_checkpoint", "no valid Unicode"),
    "unknown dtype": (header(entry([1], [0, 1], "F13"), b"1"), "bad_checkpoint", "unknown dtype 'F13'"),
    "overlap": (
        header({**entry([2], [0, 2]), "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"123"),
        "bad_checkpoint",
        "overlaps",
    ),
    "offsets out of range": (header(entry([9], [0, 9]), b"1"), "bad_checkpoint", "cut short"),
    "absurd size": (header(entry([1 << 61], [0, 1 << 61])), "bad_checkpoint", "cut short"),
    "small file that is huge": (huge_small_file, "bad_checkpoint", "exceed 256 MiB"),
    "empty directory": (empty, "not_found", "holds no files"),
    "a file": (is_a_file, "not_found", "name the directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoint(name, shared_agent, tmp_path, write_checkpoint):
    change, code, words = BAD[name]
    directory = write_checkpoint(tmp_path / "m")
    change(directory)
    with pytest.raises(AgentError) as caught:
        shared_agent.client.lease(f"file://{directory}", deadline=soon())
    assert (caught.value.code, words in caught.value.text) == (code, True), caught.value.text
    assert len(caught.value.text) < 1500
    with pytest.raises(AgentError) as again:
        shared_agent.client.manifest(f"file://{directory}")
    assert (again.value.code, again.value.text) == (code, caught.value.text)
    assert shared_agent.client.status().used in (0, 2 << 20)
    with shared_agent.client.lease(good(tmp_path, write_checkpoint), deadline=soon()) as lease:
        lease.wait_ready(soon())


def good(tmp_path: Path, write_checkpoint) -> str:
    """A model that the agent must still serve; the same one for all tests of a run."""
    place = tmp_path.parent / "good"
    if not place.exists():
        write_checkpoint(place)
    return f"file://{place}"


def test_the_command_says_it_in_one_line(shared_agent, tmp_path, write_checkpoint, glowplug_agent):
    directory = write_checkpoint(tmp_path / "m")
    only_pickled(directory)
    result = glowplug_agent("load", directory, "--socket", shared_agent.socket)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith("[unsafe_checkpoint]\n")


def test_files_that_are_none_of_a_models_do_not_disturb(shared_agent, tmp_path, write_checkpoint):
    """A pickled copy beside, an index beside a single file, folders, dangling links, names that are no UTF-8."""
    directory = write_checkpoint(tmp_path / "m", seed=7)
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    (directory / "model.safetensors.index.json").write_bytes(b"nonsense")
    (directory / "onnx.json").mkdir()
    (directory / "gone.json").symlink_to("nowhere")
    os.mkfifo(directory / "pipe.json")
    (directory / os.fsdecode(b"caf\xe9.json")).write_bytes(b"{}")
    with shared_agent.client.lease(f"file://{directory}", deadline=soon()) as lease:
        lease.wait_ready(soon())
        assert "config.json" in lease.manifest.files


# --- no permission ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nobodys_agent(eventually):
    """Start an agent under another user id, and make a directory that it may enter.

    The agent is forked and not executed, because that user may not be able to read the interpreter.
    """
    if os.getuid() != 0:
        pytest.skip("running the agent as another user needs root")
    with tempfile.TemporaryDirectory(prefix="gp-") as name:
        place = Path(name)
        place.chmod(0o777)
        pid = os.fork()
        if pid == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            Daemon(AgentConfig(socket=place / "s", dram=64 << 20, huge_pages="never")).run()
            os._exit(0)
        try:
            eventually((place / "s").is_socket)
            yield CacheClient(place / "s"), place
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("what", ["m", "m/model.safetensors", "m/config.json", "."])
def test_no_permission(what, nobodys_agent, write_checkpoint, refused):
    client, place = nobodys_agent
    secret = write_checkpoint(place / "models" / "m")
    good = write_checkpoint(place / "good")
    (place / "models" / what).chmod(0)
    with refused("denied") as error:
        client.lease(f"file://{secret}", deadline=soon())
    assert "the agent's user may not" in error.text
    with client.lease(f"file://{good}", deadline=soon()) as lease:
        lease.wait_ready(soon())
