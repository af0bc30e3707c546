"""`glowplug push` and `pull`: whole models to a real S3 server and back, interrupted, damaged, refused."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from cache_agent import manifest
from cache_agent.errors import (
    AccessDenied,
    BadCheckpoint,
    BadModelURI,
    NoCapacity,
    OriginChanged,
    OriginUnavailable,
    UnsafeCheckpoint,
    WrongRevision,
)
from cache_agent.loading import copying, pushing
from cache_agent.model.uri import parse_uri
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.tiers.origin import FileOrigin
from cache_agent.tiers.s3 import S3, S3Origin

MB = 1 << 20


def silent(stage: str, count: int, total: int) -> None:
    pass


def large(size: int = 50 * MB) -> dict:
    return {"model.layers.0.w": ("U8", (size,), hashlib.sha256(b"x").digest() * (size // 32))}


def revision_by_hand(directory: Path) -> str:
    """As the README says: from `sha256sum` of what is served."""
    names = [p for p in directory.iterdir() if p.suffix in (".json", ".safetensors") and "index" not in p.name]
    return manifest.revision({p.name: (p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()) for p in names})


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if not p.name.startswith(".")}


@pytest.fixture
def store(s3, monkeypatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    store = S3(endpoint=s3.endpoint)
    yield store
    store.client().close()


@pytest.fixture
def glowplug(s3):
    """`glowplug(*arguments)` runs the command to its end."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(Path(sys.prefix) / "bin" / "glowplug"), *map(str, arguments)]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("GLOWPLUG_", "AWS_"))}
        env |= {**s3.env, "GLOWPLUG_S3_ENDPOINT": s3.endpoint}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    return run


# --- the commands -----------------------------------------------------------------------------------------------------


def test_there_and_back(s3, glowplug, tmp_path, write_checkpoint):
    source = write_checkpoint(tmp_path / "m", large(), shards=1)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / ".cache").write_bytes(b"hidden")
    (source / "README.md").write_bytes(b"# m")
    uri = f"s3://{s3.new_bucket()}/some/m"
    sent = glowplug("push", source, uri)
    assert sent.returncode == 0, sent.stderr
    assert sent.stderr == "", "a bar is for terminals"
    right = revision_by_hand(source)
    assert sent.stdout.splitlines()[-1] == f"revision {right}"
    again = json.loads(glowplug("push", source, uri, "--json").stdout)
    assert (again["revision"], again["moved"], again["skipped"]) == (right, 0, again["files"])

    back = glowplug("pull", f"{uri}@{right}", tmp_path / "back", "--json")
    assert back.returncode == 0, back.stderr
    told = json.loads(back.stdout)
    assert (told["revision"], told["moved"], told["skipped"]) == (right, told["size"], 0)
    assert contents(tmp_path / "back") == {
        name: content for name, content in contents(source).items() if name != "pytorch_model.bin"
    }
    told = json.loads(glowplug("pull", uri, tmp_path / "back", "--json").stdout)
    assert (told["moved"], told["skipped"]) == (0, told["files"])
    assert revision_by_hand(tmp_path / "back") == right


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["push", "{bin}", "s3://{bucket}/m"], "unsafe_checkpoint", "save_pretrained"),
        (["push", "{empty}", "s3://{bucket}/m"], "not_found", "no files"),
        (["push", "{good}", "file:///tmp/x"], "bad_uri", "s3://bucket/prefix"),
        (["push", "{good}", "s3://no-such-bucket-of-ours/m"], "not_found", "bucket"),
        (["pull", "s3://{bucket}/nothing", "{new}"], "not_found", "prefix"),
        (["pull", "file://{bin}", "{new}"], "unsafe_checkpoint", "save_pretrained"),
        (["pull", "file://{good}@rev-" + "0" * 40, "{new}"], "wrong_revision", "rev-"),
        (["pull", "nonsense", "{new}"], "bad_uri", "s3://"),
        (["pull", "file://{good}", "/proc/nowhere"], "not_found", "/proc"),
    ],
)
def test_refusals_help(arguments, code, words, s3, glowplug, tmp_path, write_checkpoint):
    good = write_checkpoint(tmp_path / "good")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text("{}")
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    names = {"bin": tmp_path / "bin", "empty": tmp_path / "empty", "good": good, "new": tmp_path / "new"}
    done = glowplug(*(a.format(bucket=s3.new_bucket(), **names) for a in arguments))
    assert done.returncode == 1, done.stdout
    assert f"[{code}]" in done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bar_on_a_terminal(tmp_path, write_checkpoint):
    source = write_checkpoint(tmp_path / "m", large())
    ours, theirs = pty.openpty()
    command = [sys.executable, str(Path(sys.prefix) / "bin" / "glowplug"), "pull", f"file://{source}", tmp_path / "n"]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(command, stderr=theirs, stdout=subprocess.PIPE, env=env, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode(errors="replace")
    os.close(ours)
    assert done.returncode == 0, shown
    assert "pulling" in shown


# --- push -------------------------------------------------------------------------------------------------------------


def test_a_push_that_was_interrupted_sends_the_missing_parts(s3, store, tmp_path, write_checkpoint, monkeypatch):
    source = write_checkpoint(tmp_path / "m", large(80 * MB))
    uri = parse_uri(f"s3://{s3.new_bucket()}/m")
    sent: list[int] = []
    real = S3Origin.call

    def call(origin, operation, what, **arguments):
        if operation == "upload_part":
            sent.append(arguments["PartNumber"])
            if broken and arguments["PartNumber"] == 4:
                raise OriginUnavailable("the link broke")
        return real(origin, operation, what, **arguments)

    monkeypatch.setattr(S3Origin, "call", call)
    monkeypatch.setattr(pushing, "PARALLEL", 1)
    broken = True
    with pytest.raises(OriginUnavailable):
        pushing.push(source, uri, store, silent)
    assert [file.name for file in _listed(uri, store)] == []
    broken = False
    first, sent[:] = list(sent), []
    copied = pushing.push(source, uri, store, silent)
    assert first[:3] == [1, 2, 3]
    assert copied.revision == revision_by_hand(source)
    held = s3.client.get_object(Bucket=uri.place.split("/")[0], Key="m/model.safetensors")["Body"].read()
    assert held == (source / "model.safetensors").read_bytes()
    assert 4 in sent
    assert not set(sent) & set(first) - {4}, "what was there was not sent again"


def _listed(uri, store):
    try:
        return S3Origin(uri, store).files()
    except Exception:
        return []


def test_what_is_there_and_another_is_replaced(s3, store, tmp_path, write_checkpoint):
    old, new = write_checkpoint(tmp_path / "old", seed=1), write_checkpoint(tmp_path / "new", seed=2)
    uri = parse_uri(f"s3://{s3.new_bucket()}/m")
    pushing.push(old, uri, store, silent)
    copied = pushing.push(new, uri, store, silent)
    assert copied.skipped == copied.files - 1, "only the weights differ, and they have the same size"
    assert copying.pull(S3Origin(uri, store), tmp_path / "back", silent).revision == revision_by_hand(new)


def test_objects_of_others_are_compared_by_reading_them(s3, store, tmp_path, write_checkpoint, checkpoint_files):
    uri = parse_uri(s3.upload(s3.new_bucket(), "m", checkpoint_files(seed=1)))
    source = write_checkpoint(tmp_path / "m", seed=1)
    copied = pushing.push(source, uri, store, silent)
    assert (copied.moved, copied.skipped) == (0, copied.files)


def test_what_arrives_damaged_is_noticed(s3, store, tmp_path, write_checkpoint, monkeypatch):
    source = write_checkpoint(tmp_path / "m")
    real = S3Origin.call

    def call(origin, operation, what, **arguments):
        if operation == "put_object" and arguments["Key"].endswith("safetensors"):
            arguments["Body"] = arguments["Body"][:-1] + b"\xff"
        return real(origin, operation, what, **arguments)

    monkeypatch.setattr(S3Origin, "call", call)
    with pytest.raises(OriginChanged, match="Push again"):
        pushing.push(source, parse_uri(f"s3://{s3.new_bucket()}/m"), store, silent)


@pytest.mark.parametrize("uri", ["s3://b/m@rev-" + "0" * 40, "hf://a/b", "file:///x"])
def test_places_that_nothing_is_pushed_to(uri, tmp_path, write_checkpoint):
    with pytest.raises(BadModelURI):
        pushing.push(write_checkpoint(tmp_path / "m"), parse_uri(uri), S3(), silent)


def test_a_model_is_visible_only_when_it_is_complete(tmp_path, write_checkpoint, checkpoint_files):
    origin = FileOrigin(parse_uri(f"file://{write_checkpoint(tmp_path / 'm', shards=2)}"), [tmp_path])
    from cache_agent.loading.checkpoint import describe

    names = [file.name for file in copying.wanted(origin.files(), describe(origin))]
    assert names[-1] == "config.json"
    assert set(names) == set(checkpoint_files(shards=2))


# --- pull -------------------------------------------------------------------------------------------------------------


def test_a_pull_that_was_interrupted_goes_on(tmp_path, checkpoint_files):
    files = checkpoint_files(large(100 * MB))
    broken = True

    def before_read(name: str, start: int, size: int) -> None:
        if broken and start >= 64 * MB:
            raise AccessDenied("not any more")

    origin = FakeOrigin("fake://m", files, before_read=before_read)
    with pytest.raises(AccessDenied):
        copying.pull(origin, tmp_path / "m", silent)
    assert "config.json" not in contents(tmp_path / "m")
    broken, origin.bytes_read = False, 0
    copied = copying.pull(origin, tmp_path / "m", silent)
    assert contents(tmp_path / "m") == files
    assert copied.moved < 56 * MB
    assert copied.revision == revision_by_hand(tmp_path / "m")
    assert not list((tmp_path / "m").glob(".*.part"))


def test_a_file_that_was_touched_is_fetched_again(tmp_path, checkpoint_files):
    files = checkpoint_files()
    origin = FakeOrigin("fake://m", files)
    copying.pull(origin, tmp_path / "m", silent)
    path = tmp_path / "m" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    copied = copying.pull(origin, tmp_path / "m", silent)
    assert contents(tmp_path / "m") == files
    assert (copied.skipped, copied.moved) == (copied.files - 1, len(content))


def test_a_source_that_changed_is_pulled_anew(tmp_path, checkpoint_files):
    copying.pull(FakeOrigin("fake://m", checkpoint_files(seed=1)), tmp_path / "m", silent)
    copied = copying.pull(FakeOrigin("fake://m", checkpoint_files(seed=2)), tmp_path / "m", silent)
    assert contents(tmp_path / "m") == checkpoint_files(seed=2)
    assert copied.skipped == copied.files - 1


def test_a_source_that_changes_meanwhile_is_not_pulled_as_a_mixture(tmp_path, checkpoint_files):
    def before_read(name: str, start: int, size: int) -> None:
        if name == "tokenizer_config.json":
            origin.contents = checkpoint_files(seed=2)

    origin = FakeOrigin("fake://m", checkpoint_files(seed=1), before_read=before_read)
    with pytest.raises(OriginChanged):
        copying.pull(origin, tmp_path / "m", silent)


@pytest.mark.parametrize("record", ["{", "[]", '{"model.safetensors": 3}', "\0"])
def test_a_broken_record_costs_time_only(record, tmp_path, checkpoint_files):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / copying.RECORD).write_text(record)
    copying.pull(FakeOrigin("fake://m", checkpoint_files()), tmp_path / "m", silent)
    assert contents(tmp_path / "m") == checkpoint_files()


def test_a_pulled_directory_has_the_revision_of_its_origin(tmp_path, checkpoint_files):
    first = copying.pull(FakeOrigin("fake://m", checkpoint_files()), tmp_path / "a", silent)
    origin = FileOrigin(parse_uri(f"file://{tmp_path / 'a'}"), [tmp_path])
    assert copying.pull(origin, tmp_path / "b", silent, first.revision).revision == first.revision
    with pytest.raises(WrongRevision):
        copying.pull(origin, tmp_path / "b", silent, "rev-" + "0" * 40)


@pytest.mark.parametrize(
    ("files", "error"),
    [({"config.json": b"{}", "m.bin": b"x"}, UnsafeCheckpoint), ({"config.json": b"{}"}, BadCheckpoint)],
)
def test_what_is_no_checkpoint_is_not_pulled(files, error, tmp_path):
    with pytest.raises(error):
        copying.pull(FakeOrigin("fake://m", files), tmp_path / "m", silent)
    assert not (tmp_path / "m").exists()


def test_a_full_disk_is_named(tmp_path, checkpoint_files, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoCapacity, match="make room"):
        copying.pull(FakeOrigin("fake://m", checkpoint_files()), tmp_path / "m", silent)


def test_progress_adds_up(tmp_path, checkpoint_files):
    told: dict[str, int] = {}

    def report(stage: str, count: int, total: int) -> None:
        told[stage] = told.get(stage, 0) + count

    copied = copying.pull(FakeOrigin("fake://m", checkpoint_files()), tmp_path / "m", report)
    assert told == {"pulling": copied.size}
