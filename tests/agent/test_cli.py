"""The group `glowplug agent`: its output for people and programs, and its errors."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from cache_agent import config
from cache_agent.config import AgentConfig, from_environment
from cache_agent.errors import BadSetting
from cache_agent.wire.messages import Drain
from runtime.cli import main


@pytest.fixture(scope="module")
def shared_agent(agent_process):
    with agent_process("--node", "node-a") as agent:
        yield agent


@pytest.fixture
def invoke():
    """Give `invoke(*arguments, env=None)`, which runs a command inside this process."""

    def run(*arguments: object, env=None) -> SimpleNamespace:
        unset = dict.fromkeys(name for name in os.environ if name.startswith("GLOWPLUG_"))
        result = CliRunner(env={**unset, "COLUMNS": "250", **(env or {})}).invoke(main, ["agent", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return SimpleNamespace(returncode=result.exit_code, stdout=result.stdout, stderr=result.stderr)

    return run


@pytest.fixture
def command(shared_agent, invoke):
    """Give a function that runs a command on the shared agent, expects success, and returns its parsed output."""

    def run(*arguments: str):
        result = invoke(*arguments, env={"GLOWPLUG_SOCKET": str(shared_agent.socket)})
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout) if "--json" in arguments else result.stdout

    return run


def one_sentence(result) -> tuple[int, str]:
    """Return exit code and sentence of a command that has failed with one sentence on stderr."""
    assert result.returncode != 0, result.stdout
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    sentence = result.stderr.strip().splitlines()[-1]
    assert len(sentence.split()) >= 5, f"no sentence: {sentence!r}"
    return result.returncode, sentence


@pytest.fixture
def fails(invoke):
    """Give `fails(*arguments, env=…)`, which expects a command to fail with one sentence; see `one_sentence`."""
    return lambda *arguments, env=None: one_sentence(invoke(*arguments, env=env))


@pytest.fixture
def serve_fails(glowplug_agent):
    """Give `fails` for `serve`, in a process of its own, because `serve` sets up logging and signals."""
    return lambda *options, env=None: one_sentence(glowplug_agent("serve", *options, env=env))


# --- load, status, manifest, evict, drain -----------------------------------------------------------------------------


def test_load_status_evict_as_people_see_them(command, tmp_path, write_checkpoint):
    model = write_checkpoint(tmp_path / "m", seed=101)
    assert re.fullmatch(r"2 MB loaded in \d+\.\d\d s \(\d+ MB/s\), 4 KiB pages\n", command("load", str(model)))
    assert command("load", str(model)) == "2 MB are resident already\n"
    status = command("status")
    assert re.match(r"node node-a, pid \d+: \d+ of 537 MB in use\n", status)
    (row,) = [line for line in status.splitlines() if f"file://{model}" in line]
    assert re.search(r"(rev-[0-9a-f]{8}|-) +ready +2 +100% +4K +0 +\d+ s$", row), row
    assert command("evict", str(model)) == "2 MB given back\n"
    assert str(model) not in command("status")


def test_load_status_evict_as_programs_see_them(command, shared_agent, tmp_path, write_checkpoint):
    model = write_checkpoint(tmp_path / "m", seed=102)
    loaded = command("load", "--json", f"file://{model}")
    assert loaded.keys() == {"bytes", "tier", "page", "revision", "seconds"}
    assert (loaded["bytes"], loaded["tier"], loaded["page"]) == (2 << 20, "origin", 4096)
    assert command("load", "--json", f"file://{model}")["tier"] == "dram"
    status = command("status", "--json")
    assert (status["node"], status["pid"], status["capacity"]) == ("node-a", shared_agent.pid, 512 << 20)
    (entry,) = [entry for entry in status["models"] if entry["model"] == f"file://{model}"]
    assert (entry["state"], entry["tier"], entry["done"], entry["leases"]) == ("ready", "dram", 2 << 20, 0)
    assert command("evict", "--json", f"file://{model}") == {"bytes": 2 << 20, "stays": ""}


def test_the_command_as_a_process(shared_agent, glowplug_agent, tmp_path, write_checkpoint):
    model = write_checkpoint(tmp_path / "m", seed=107)
    for words, *arguments in (
        ["2 MB loaded", "load", model],
        [str(model), "status"],
        ["given back", "evict", model],
    ):
        result = glowplug_agent(*arguments, "--socket", shared_agent.socket)
        assert (result.returncode, result.stderr, words in result.stdout) == (0, "", True), result
    result = glowplug_agent("evict", model, env={"GLOWPLUG_SOCKET": str(shared_agent.socket)})
    assert one_sentence(result)[1].endswith("[not_found]")
    assert result.stderr.count("\n") == 1


def test_an_empty_agent_says_so(agent, glowplug_agent):
    result = glowplug_agent("status", "--socket", agent.socket)
    assert result.stdout.count("\n") == 1
    assert ": 0 of 537 MB in use" in result.stdout


def test_manifest_loads_nothing(command, tmp_path, write_checkpoint, random_tensors):
    model = write_checkpoint(tmp_path / "m", seed=103, shards=2)
    text = command("manifest", str(model))
    assert re.match(r"\d+ tensors, 2 MB in 1 segments, from 2 files; source src-[0-9a-f]{40}\n", text)
    assert re.search(r"^model\.embed_tokens\.weight +BF16 +101x48 +0 +0 +9696$", text, re.MULTILINE)
    assert re.search(r"^lm_head\.weight +BF16 +101x48 ", text, re.MULTILINE)
    plan = command("manifest", "--json", str(model))
    assert {tensor["name"] for tensor in plan["tensors"]} == set(random_tensors())
    assert str(model) not in command("status")


def test_drain_tells_the_holders(command, shared_agent, tmp_path, write_checkpoint):
    model = write_checkpoint(tmp_path / "m", seed=104)
    assert command("drain", "--model", str(model)) == "0 functions were told\n"
    with shared_agent.client.lease(f"file://{model}") as lease:
        lease.wait_ready(time.monotonic() + 30)
        told = command("drain", "--json", "--model", str(model), "--grace", "2.5", "--reason", "rollout")
        assert told == {"holders": 1}
        while not isinstance(event := lease.next_event(10), Drain):
            assert event is not None
        assert event == Drain("rollout", 2.5)


def test_a_directory_may_be_relative(command, tmp_path, write_checkpoint, monkeypatch):
    write_checkpoint(tmp_path / "m", seed=105)
    monkeypatch.chdir(tmp_path)
    assert "2 MB" in command("load", "m")
    assert f"file://{tmp_path}/m " in command("status")


@pytest.mark.parametrize("name", ["with space", "per%cent", "100%25", "[bold]", "[/red]", "ümlaut", "q?a#b", "m@rev-1"])
def test_directories_with_odd_names(name, command, tmp_path, write_checkpoint):
    model = write_checkpoint(tmp_path / name, {f"{name}.weight": ("U8", (3,), b"abc")})
    assert "2 MB" in command("load", str(model))
    assert name.replace("%", "%25") in command("status")
    assert f"{name}.weight" in command("manifest", str(model))
    assert "given back" in command("evict", str(model))


def test_help_and_version(invoke):
    assert invoke("--version").stdout.startswith("glowplug agent, version ")
    text = invoke("--help").stdout
    for name in ("serve", "load", "status", "evict", "manifest", "drain"):
        assert name in text
        assert invoke(name, "-h").returncode == 0


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["status"], ["load", "m"], ["evict", "m"], ["manifest", "m"], ["drain"]])
@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_no_agent_runs(arguments, json_flag, fails, tmp_path):
    code, sentence = fails(*arguments, *json_flag, "--socket", tmp_path / "none.sock")
    assert code == 1
    assert "glowplug agent serve" in sentence
    assert sentence.endswith("[agent_unreachable]")


@pytest.mark.parametrize("command_name", ["load", "manifest"])
@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("/no/such/directory", "not_found"),
        ("file:///no/such/directory", "not_found"),
        ("file://relative/path", "bad_uri"),
        ("file:///a%00b", "bad_uri"),
        ("gs://bucket/m", "bad_uri"),
        ("s3://bucket", "bad_uri"),
        ("://", "bad_uri"),
        ("/etc/hostname", "not_found"),
        ("s3://" + "x" * 3000, "protocol"),
    ],
)
def test_models_that_are_not_there(command_name, model, code, shared_agent, fails):
    exit_code, sentence = fails(command_name, model, "--socket", shared_agent.socket)
    assert exit_code == 1
    assert sentence.startswith("glowplug: ")
    assert sentence.endswith(f"[{code}]")


def test_evicting_what_is_held_or_not_there(shared_agent, fails, tmp_path, write_checkpoint):
    model = write_checkpoint(tmp_path / "m", seed=106)
    assert fails("evict", model, "--socket", shared_agent.socket)[1].endswith("[not_found]")
    with shared_agent.client.lease(f"file://{model}") as lease:
        lease.wait_ready(time.monotonic() + 30)
        _, sentence = fails("evict", model, "--socket", shared_agent.socket)
    assert "held by a function" in sentence
    assert sentence.endswith("[in_use]")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dram", "lots"], "use a number of bytes"),
        (["--dram", ""], "use a number of bytes"),
        (["--dram", "-1"], "use a number of bytes"),
        (["--dram", "5X"], "use a number of bytes"),
        (["--huge-pages", "some"], "auto"),
        (["--socket-mode", "999"], "octal"),
        (["--socket-mode", "7777"], "octal"),
        (["--socket-mode", "666"], "--file-root"),
        (["--readers", "0"], "at least 1"),
        (["--readers", "many"], "integer"),
        (["--max-connections", "-1"], "at least 1"),
        (["--revalidate", "often"], "float"),
        (["--revalidate", "-1"], "revalidate"),
        (["--revalidate", "nan"], "revalidate"),
        (["--token-file", "/no/such/file"], "cannot be read"),
        (["--token-file", "/dev/null"], "is empty"),
        (["--log-level", "loud"], "debug"),
        (["--socket", "/dev/null/agent.sock"], "another --socket"),
        (["--socket", "/proc/agent.sock"], "another --socket"),
        (["--no-such-option"], "no such option"),
    ],
)
def test_bad_options_of_serve(options, words, serve_fails, tmp_path):
    arguments = options if "--socket" in options else ["--socket", str(tmp_path / "s"), *options]
    code, sentence = serve_fails(*arguments)
    assert words in sentence
    assert code in (2, 64)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DRAM", "lots"),
        ("SOCKET_MODE", "rw"),
        ("HUGE_PAGES", "some"),
        ("READERS", "many"),
        ("READERS", "0"),
        ("REVALIDATE", "often"),
        ("MAX_CONNECTIONS", "1.5"),
        ("S3_ANONYMOUS", "perhaps"),
    ],
)
def test_bad_variables_are_named(variable, value):
    with pytest.raises(BadSetting, match=f"(?i){variable}"):
        from_environment({f"GLOWPLUG_{variable}": value})


@pytest.mark.parametrize("arguments", [["serve"], ["status"], ["load", "m"]])
def test_a_command_with_a_bad_variable_says_so(arguments, fails, serve_fails):
    run = serve_fails if arguments == ["serve"] else lambda **options: fails(*arguments, **options)
    code, sentence = run(env={"GLOWPLUG_DRAM": "lots"})
    assert code == 64
    assert "GLOWPLUG_DRAM='lots'" in sentence
    assert sentence.endswith("[bad_config]")


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1536", 1536),
        ("1k", 1 << 10),
        ("800M", 800 << 20),
        ("1.5G", 3 << 29),
        ("16GiB", 16 << 30),
        ("16gb", 16 << 30),
        (" 2T ", 2 << 40),
        ("10b", 10),
    ],
)
def test_sizes(text, size):
    assert config.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", " ", "G", "-1", "1e3", "1..5", ".", "5X", "inf", "nan", "0x10", "1 2", "²", "1,5"]
)
def test_sizes_that_make_no_sense(text):
    with pytest.raises(ValueError, match="use a number of bytes"):
        config.parse_size(text)


def test_every_field_has_a_variable_and_an_option(invoke):
    fields = set(AgentConfig.__slots__)
    assert fields == set(config._PARSERS)
    text = invoke("serve", "--help").stdout
    for name in fields - {"file_roots", "s3_anonymous"}:
        assert f"--{name.replace('_', '-')}" in text
    assert "--file-root " in text
    assert "--s3-anonymous" in text


def test_the_environment_is_read_and_options_win(start_agent, tmp_path):
    agent = start_agent("--node", "from-option", env={"GLOWPLUG_NODE": "from-env", "GLOWPLUG_DRAM": "7M"})
    status = agent.client.status()
    assert (status.node, status.capacity) == ("from-option", 512 << 20)
    settings = from_environment(
        {
            "GLOWPLUG_FILE_ROOTS": "/a:/b",
            "GLOWPLUG_SOCKET_MODE": "660",
            "GLOWPLUG_S3_ANONYMOUS": "yes",
            "GLOWPLUG_DRAM": "2G",
            "GLOWPLUG_NODE": "",
        }
    )
    assert settings.file_roots == (Path("/a"), Path("/b"))
    assert (settings.socket_mode, settings.s3_anonymous, settings.dram, settings.node) == (0o660, True, 2 << 30, "")


def test_a_budget_nobody_set_is_a_share_of_what_there_is():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < AgentConfig().capacity <= total
    assert AgentConfig(dram=5).capacity == 5
    with pytest.raises(BadSetting):
        AgentConfig(dram=-1)
