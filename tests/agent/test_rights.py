"""Rights to models: prefixes, the rights file, and refusals that disclose nothing about a model."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cache_agent.access import control as access
from cache_agent.access import rights
from cache_agent.access.control import Access
from cache_agent.access.rights import RightsFile
from cache_agent.client.cache_client import CacheClient
from cache_agent.errors import AgentError, BadSetting
from cache_agent.logs import JsonFormatter, TextFormatter
from cache_agent.model.uri import parse_uri
from cache_agent.policy.rights import NOTHING, Caller, Permission, Prefix, Rights, pieces
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.wire.messages import Identity

CHAT = Caller("llm", "chat", "kubernetes")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def grant(tmp_path: Path, *models: str) -> Permission:
    text = f"[namespace.llm]\nmodels = {json.dumps(models)}\n"
    return rights.read(write(tmp_path / "rights.toml", text)).of(CHAT)


def covers(given: Permission, uri: str) -> bool:
    parsed = parse_uri(uri)
    return given.covers(parsed.scheme, parsed.place)


# --- prefixes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "inside", "outside"),
    [
        (
            "s3://models/llm",
            ["s3://models/llm", "s3://models/llm/", "s3://models/llm/a/b", "s3://models/llm/a@rev-" + "0" * 40],
            [
                "s3://models/llm2",
                "s3://models",
                "s3://models/LLM/a",
                "s3://Models/llm/a",
                "s3://models/llm@x",
                "s3://models/llm/../secret",
                "s3://models/llm/./a",
                "s3://models/llm//a",
                "s3://models//llm/a",
                "s3://models/llm/%2e%2e/secret",
                "s3://models/llm/%2E./secret",
                "s3://models/llm/a%2f..%2fsecret",
                "s3://models/llm/%252e%252e/secret",
                "s3://models/llm/..\\secret",
                "s3://models/llm/a\u202e",
                "file:///models/llm/a",
                "hf://models/llm",
            ],
        ),
        ("s3://models", ["s3://models/a", "s3://models/b/c"], ["s3://models2/a", "s3://model/a"]),
        ("s3://", ["s3://any/a"], ["file:///any/a", "s3a://any/a"]),
        ("*", ["s3://any/a", "hf://a/b", "file:///x/y"], ["file:///x/../y", "s3://any/%2e%2e/a"]),
        ("hf://org", ["hf://org/name", "hf://org/name@main", "hf://org"], ["hf://Org/name", "hf://org2/name"]),
        ("hf://org/name", ["hf://org/name", "hf://org/name@dev", "hf://org/name@refs/pr/1"], ["hf://org/name2"]),
        (
            "hf://org/name@main",
            ["hf://org/name", "hf://org/name@main"],
            ["hf://org/name@dev", "hf://org/name@main/..", "hf://org/name@Main"],
        ),
        (
            "file:///srv/models",
            ["file:///srv/models/a", "file:///srv/models", "file:///srv/mod%65ls/a"],
            [
                "file:///srv/models2",
                "file:///srv/models/../secret",
                "file:///srv/models/%2e%2e/secret",
                "file:///srv/models/a%2f..%2f..%2fsecret",
                "file:///srv/models/%252e%252e/secret",
                "file://host/srv/models/a",
                "file:////srv/models/a",
                "file:///SRV/models/a",
                "file:///",
            ],
        ),
    ],
)
def test_prefixes(prefix: str, inside: list[str], outside: list[str], tmp_path: Path) -> None:
    found = grant(tmp_path, prefix)
    assert [uri for uri in inside if not covers(found, uri)] == []
    assert [uri for uri in outside if covers(found, uri)] == []


DOTS = [
    "..",
    ".",
    "",
    "%2e%2e",
    "%2E.",
    ".%2e",
    "%252e%252e",
    "%2f",
    "a%2f..",
    "%5c..",
    "..\\",
    "%2500",
    "%%32%65",
    "llm%2f..",
]
NAMES = ["a", "b", "llm", "models", "llm ", " llm", "LLM", "...", "a@b", "@", "%", "\u2024\u2024", "．．", "llm\u0301"]
NASTY = st.sampled_from([*DOTS, *NAMES])


def worst(place: str) -> set[tuple[str, ...]]:
    """Everywhere that somebody might think this is: decoded up to four times, backslashes for slashes, collapsed."""
    found = set()
    for _ in range(5):
        for text in (place, place.replace("\\", "/")):
            found.add(tuple(part for part in posixpath.normpath("/" + text).split("/") if part))
        place = unquote(place)
    return found


@given(st.lists(NASTY, max_size=6), st.sampled_from(["s3", "file", "x"]))
@example(["models", "llm", "a", ".."], "s3")
def test_what_is_granted_lies_below_the_prefix_for_every_reader(parts: list[str], scheme: str) -> None:
    """Whatever a store, a proxy or a filesystem makes of a granted URI stays inside."""
    uri = f"{scheme}://{'/' if scheme == 'file' else ''}{'/'.join(['models', 'llm', *parts])}"
    prefix = Prefix(scheme, ("models", "llm"))
    parsed = parse_uri(uri)
    if Permission((prefix,)).covers(parsed.scheme, parsed.place):
        assert {place[:2] for place in worst(parsed.place)} == {("models", "llm")}, uri
        assert parsed.place.strip("/").startswith("models/llm")


@given(st.text(max_size=30), st.sampled_from(["s3", "hf", "file", "x", ""]))
def test_pieces_are_plain_whatever_comes(place: str, scheme: str) -> None:
    found = pieces(scheme, place)
    if found is not None:
        assert not {"", ".", ".."} & set(found)
        assert not any("/" in piece for piece in found if not piece.startswith("@"))


def test_the_closest_grant_alone_counts() -> None:
    grants = {
        ("namespace", "*"): Permission(dram=1),
        ("namespace", "llm"): Permission(dram=2),
        ("account", "llm/batch"): Permission(dram=3),
        ("token", "ops"): Permission(admin=True),
    }
    found = Rights(grants)
    assert found.of(CHAT).dram == 2
    assert found.of(Caller("llm", "batch", "kubernetes")).dram == 3
    assert found.of(Caller("web", "batch", "kubernetes")).dram == 1
    assert found.of(Caller("", "ops", "token")).admin
    # A name proves nothing without the proof that it belongs to.
    for stranger in (Caller("", "ops", "kubernetes"), Caller("", "other", "token"), Caller("", "", "none")):
        assert not found.of(stranger).admin
    assert Rights({}).of(CHAT) is NOTHING


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[", "rights.toml"),
        ("\xff", "rights.toml"),
        ("[namespaces.llm]\nmodels = []", "namespaces"),
        ("[namespace.llm]\nmodel = []", "model"),
        ("[namespace.llm]\nmodels = 's3://a'", "models"),
        ("[namespace.llm]\nadmin = 'yes'", "admin"),
        ("[namespace.llm]\nmodels = ['models/a']", r"\[namespace.llm\] models.*no model URI"),
        ("[namespace.llm]\nmodels = ['s3://models/../a']", "plainly"),
        ("[namespace.llm]\nmodels = ['s3://m/%2e%2e']", "plainly"),
        (f"[namespace.llm]\nmodels = ['s3://m/a@rev-{'0' * 40}']", "rights are to places"),
        ("[namespace.llm]\ndram = 'much'", r"\[namespace.llm\] dram = 'much'"),
        ("[namespace.llm]\ndram = -1", "dram = -1"),
        ("[account.llm]\nadmin = true", "namespace/name"),
        ("a = " + "[" * 5000, "rights.toml"),
        ("#" * (2 << 20), "1 MiB"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_a_mistake_is_named(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "rights.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadSetting, match=match):
        RightsFile(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="cannot be read"):
        RightsFile(tmp_path / "absent")


def test_it_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "rights.toml", "[token.ops]\nadmin = true\n")
    ops = Caller("", "ops", "token")
    file = RightsFile(path)
    assert file.current().of(ops).admin
    for wrong in ("[token.ops]\nadmin = 1\n", "nonsense"):
        write(tmp_path / "new", wrong).replace(path)
        for _ in range(3):
            assert file.current().of(ops).admin, "the former rights stay in force"
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 2, "once for each mistake"
    write(tmp_path / "new", "[token.ops]\nadmin = false\n").replace(path)
    assert not file.current().of(ops).admin
    path.unlink()
    assert not file.current().of(ops).admin


def test_rights_without_identities_are_a_mistake(start_local_agent, tmp_path: Path) -> None:
    write(tmp_path / "rights.toml", "")
    with pytest.raises(BadSetting, match="GLOWPLUG_IDENTITY"):
        start_local_agent({}, rights=tmp_path / "rights.toml")


# --- at the agent -----------------------------------------------------------------------------------------------------

RIGHTS = """
[token.chat]
models = ["fake://llm"]
[token.ops]
admin = true
"""
MINE, THEIRS, ABSENT = "fake://llm/m", "fake://other/m", "fake://other/absent"


@pytest.fixture
def node(start_local_agent, checkpoint_files, tmp_path):
    """An agent with a model of ours and one of others; callers by their token's name."""
    (tmp_path / "tokens").mkdir()
    for name in ("chat", "ops", "stranger"):
        (tmp_path / "tokens" / name).write_text(f"secret of {name}")
    origins = {MINE: FakeOrigin(MINE, checkpoint_files(seed=1)), THEIRS: FakeOrigin(THEIRS, checkpoint_files(seed=2))}
    path = write(tmp_path / "rights.toml", RIGHTS)
    agent = start_local_agent(origins, token_file=tmp_path / "tokens", rights=path)

    def as_(name: str) -> CacheClient:
        return CacheClient(agent.socket, name=name, identity=lambda: Identity("token", f"secret of {name}"), timeout=30)

    agent.as_ = as_
    return agent


def load(client: CacheClient, model: str) -> str:
    with client.lease(model) as lease:
        lease.wait_ready(time.monotonic() + 20)
        while not lease.revision:
            lease.next_event(20)
        return lease.revision


VERBS: dict[str, Callable[[CacheClient, str], Any]] = {
    "lease": lambda client, model: client.lease(model).close(),
    "manifest": lambda client, model: client.manifest(model),
    "estimate": lambda client, model: client.estimate(model),
    "prefetch": lambda client, model: client.prefetch(model),
    "evict": lambda client, model: client.evict(model),
    "evict --ssd": lambda client, model: client.evict(model, ssd=True),
    "pin": lambda client, model: client.pin(model),
    "unpin": lambda client, model: client.pin(model, pinned=False),
    "drain": lambda client, model: client.push_drain("x", 1.0, model),
}


def refusal(verb: str, client: CacheClient, model: str) -> tuple[str, str]:
    with pytest.raises(AgentError) as caught:
        VERBS[verb](client, model)
    return caught.value.code, caught.value.text.replace(model.partition("@")[0], "MODEL")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["chat", "stranger"])
def test_a_refusal_tells_nothing(verb: str, name: str, node) -> None:
    """Absent, there, resident, pinned, asked for by its very revision: one answer, and no origin is asked for it."""
    asked: list[str] = []
    open_origin = node.agent._open_origin
    node.agent._open_origin = lambda uri: asked.append(uri.text) or open_origin(uri)
    client = node.as_(name)
    seen = {refusal(verb, client, ABSENT), refusal(verb, client, THEIRS)}
    assert asked == []
    revision = load(node.as_("ops"), THEIRS)
    node.as_("ops").pin(THEIRS)
    asked.clear()
    seen |= {refusal(verb, client, model) for model in (THEIRS, f"{THEIRS}@{revision}", f"{ABSENT}@{revision}")}
    assert asked == []
    ((code, text),) = seen
    assert code == "denied"
    assert "rights file" in text


def test_a_known_revision_is_not_had_under_a_uri_of_ones_own(node, refused) -> None:
    """A revision that a caller has learned from a log gives no right to its bytes."""
    revision = load(node.as_("ops"), THEIRS)
    with refused("not_found"):
        node.as_("chat").lease(f"fake://llm/absent@{revision}")
    with refused("wrong_revision"), node.as_("chat").lease(f"{MINE}@{revision}") as lease:
        lease.wait_ready(time.monotonic() + 20)


def test_one_sees_what_one_may_have(node) -> None:
    for model in (MINE, THEIRS):
        load(node.as_("ops"), model)
    seen = node.as_("chat").status()
    assert [model.model for model in seen.models] == [MINE]
    assert seen.used == seen.models[0].bytes
    assert node.as_("stranger").status().models == []
    assert {model.model for model in node.as_("ops").status().models} == {MINE, THEIRS}


def test_one_may_have_what_was_granted_and_change_nothing(node, refused) -> None:
    chat = node.as_("chat")
    revision = load(chat, MINE)
    assert chat.estimate(MINE).tier == "dram"
    assert chat.manifest(MINE).nbytes
    chat.prefetch(MINE)
    with chat.lease(f"{MINE}@{revision}") as lease:
        lease.wait_ready(time.monotonic() + 20)
    for verb in ("evict", "pin", "unpin", "drain"):
        assert refusal(verb, chat, MINE)[0] == "denied"
    ops = node.as_("ops")
    assert ops.pin(MINE)
    assert ops.pin(MINE, pinned=False)
    assert ops.push_drain("x", 1.0) == 0
    assert ops.evict(MINE)


def test_rights_change_under_a_live_agent(node, tmp_path: Path, refused) -> None:
    with node.as_("chat").lease(MINE) as lease:
        lease.wait_ready(time.monotonic() + 20)
        write(tmp_path / "new", RIGHTS.replace("fake://llm", "fake://other")).replace(tmp_path / "rights.toml")
        with refused("denied"):
            node.as_("chat").lease(MINE)
        load(node.as_("chat"), THEIRS)
        assert node.agent.status()[2][0].leases == 1, "a lease that was given is not taken back"


def test_sighup_reads_the_rights_and_ends_nothing(start_agent, tmp_path: Path, eventually) -> None:
    secret = write(tmp_path / "token", "s")
    path = write(tmp_path / "rights.toml", "[token.token]\nadmin = true\n")
    agent = start_agent("--token-file", str(secret), "--rights", str(path))
    client = CacheClient(agent.socket, identity=lambda: Identity("token", "s"), timeout=30)
    for number in range(1, 4):
        os.kill(agent.pid, signal.SIGHUP)
        eventually(lambda number=number: agent.output().count("was read again") == number, what="it was read")
    assert client.push_drain("x", 1.0) == 0


# --- directories ------------------------------------------------------------------------------------------------------


def test_a_link_out_of_what_was_granted_is_no_way_around_it(
    start_local_agent, write_checkpoint, tmp_path: Path, refused, monkeypatch
) -> None:
    write_checkpoint(tmp_path / "llm" / "real")
    write_checkpoint(tmp_path / "secret" / "m")
    (tmp_path / "llm" / "inside").symlink_to("real")
    (tmp_path / "llm" / "outside").symlink_to("../secret/m")
    (tmp_path / "granted").symlink_to("llm")
    given = rights.read(
        write(
            tmp_path / "rights.toml",
            f"[namespace.llm]\nmodels = ['file://{tmp_path}/llm', 'file://{tmp_path}/granted']",
        )
    )
    door = Access(None, SimpleRights(given))
    for name in ("llm/real", "llm/inside", "granted/real", "granted/inside"):
        assert door.may_have(CHAT, f"file://{tmp_path}/{name}"), name
    for name in ("llm/outside", "granted/outside", "secret/m", "llm/../secret/m", "llm/absent/../../secret/m"):
        assert not door.may_have(CHAT, f"file://{tmp_path}/{name}"), name
    looked: list[str] = []
    monkeypatch.setattr(access.os.path, "realpath", lambda path: looked.append(path) or path)
    assert not door.may_have(CHAT, f"file://{tmp_path}/secret/m")
    assert looked == [], "nobody can have the agent look at the disk by asking for places that are not his"


class SimpleRights:
    """A rights file that does not change."""

    def __init__(self, given: Rights) -> None:
        self._given = given

    def current(self) -> Rights:
        return self._given


# --- the record -------------------------------------------------------------------------------------------------------


def test_every_lease_refusal_and_command_has_one_line(
    node, caplog: pytest.LogCaptureFixture, refused, eventually
) -> None:
    caplog.set_level(logging.INFO, "glowplug.audit")

    def lines() -> list[dict[str, Any]]:
        return [record.fields for record in caplog.records if record.name == "glowplug.audit"]

    def short() -> list[tuple[str, ...]]:
        return [(line["who"], line["what"], line.get("model", ""), line["outcome"]) for line in lines()]

    load(node.as_("chat"), MINE)
    for verb in ("lease", "manifest", "evict"):
        refusal(verb, node.as_("chat"), THEIRS)
    with refused("not_found"):
        node.as_("ops").lease(ABSENT)
    ops = node.as_("ops")
    ops.status()
    ops.manifest(MINE)
    ops.pin(MINE)
    with refused("in_use"):
        ops.evict(MINE)
    ops.pin(MINE, pinned=False)
    ops.prefetch(MINE)
    ops.push_drain("x", 1.0)
    ops.evict(MINE)
    with refused("denied"):
        CacheClient(node.socket, name="guess", identity=lambda: Identity("token", "guess")).status()
    expected = [
        ("chat", "lease", MINE, "granted"),
        ("chat", "lease", THEIRS, "denied"),
        ("chat", "manifest", THEIRS, "denied"),
        ("chat", "evict", THEIRS, "denied"),
        ("ops", "lease", ABSENT, "not_found"),
        ("ops", "pin", MINE, "done"),
        ("ops", "evict", MINE, "in_use"),
        ("ops", "unpin", MINE, "done"),
        ("ops", "prefetch", MINE, "begun"),
        ("ops", "drain", "", "done"),
        ("ops", "evict", MINE, "done"),
        ("", "hello", "", "denied"),
    ]
    eventually(lambda: len(short()) >= len(expected))
    assert short() == expected
    assert lines()[-1]["client"] == "guess"
    assert not any("secret" in str(line) for line in lines())


def test_lines_for_programs_and_for_people() -> None:
    record = logging.makeLogRecord(
        {
            "name": "glowplug.audit",
            "levelname": "INFO",
            "msg": "%s",
            "args": ("granted",),
            "fields": {"who": "llm/chat", "model": "s3://m/a b\n", "level": "no", "bytes": 7},
        }
    )
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["who"], line["model"], line["bytes"]) == ("granted", "llm/chat", "s3://m/a b\n", 7)
    assert line["level"] == "info", "a field takes no other's place"
    text = TextFormatter().format(record)
    assert text.endswith('granted: who=llm/chat model="s3://m/a b\\n" level=no bytes=7')
    assert "\n" not in text


def test_json_is_what_the_agent_logs_when_it_is_told_to(start_agent, eventually) -> None:
    agent = start_agent("--log-format", "json")
    agent.client.push_drain("x", 1.0)

    def drains() -> list[Any]:
        lines = [json.loads(line) for line in agent.output().splitlines() if line.endswith("}")]
        return [line for line in lines if line["logger"] == "glowplug.audit" and line["what"] == "drain"]

    (line,) = eventually(drains, what="the command has its line")
    assert (line["level"], line["outcome"], line["kind"], line["client"]) == ("info", "done", "none", "test")
