"""The SSD tier: images that survive the agent, and every way in which one can be damaged; no wrong byte is served."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest
from leased import FAKE, contents, large_tensors, soon, tensors_of, whole

from cache_agent.errors import AgentError, BadSetting
from cache_agent.model.manifest import CHUNK, LAYOUT, PAGE, Manifest
from cache_agent.tiers import image
from cache_agent.tiers.fake import FakeOrigin
from cache_agent.tiers.ssd import Ssd


@pytest.fixture
def ssd(tmp_path) -> Path:
    return tmp_path / "ssd"


@pytest.fixture
def model(tmp_path, write_checkpoint):
    """Return (uri, tensors) of a model of four chunks."""
    tensors = large_tensors(3)
    return f"file://{write_checkpoint(tmp_path / 'model', tensors)}", tensors


def images(ssd: Path) -> list[Path]:
    place = ssd / "images"
    return sorted(place.iterdir()) if place.exists() else []


def load(agent, uri: str, tensors, tier: str = "") -> str:
    """Leases, compares every byte, and gives the tier they came from."""
    with agent.client.lease(uri, deadline=soon()) as lease:
        lease.wait_ready(soon())
        assert tensors_of(lease) == contents(tensors)
        if tier:
            assert lease.tier == tier
        return lease.tier


def kept(agent, eventually, count: int = 1) -> None:
    """Waits until so many images are whole and their revisions known."""

    def done() -> bool:
        found = agent.client.status().ssd.images
        return len(found) == count and all(stored.revision for stored in found)

    eventually(done, 30, "the images are whole and admitted")


# --- life -------------------------------------------------------------------------------------------------------------


def test_after_a_restart_the_model_comes_from_ssd_with_its_revision(start_agent, ssd, model, eventually):
    uri, tensors = model
    agent = start_agent("--ssd", str(ssd), "--ssd-size", "1G")
    load(agent, uri, tensors, "origin")
    kept(agent, eventually)
    (before,) = agent.client.status().ssd.images
    for how in (agent.stop, agent.kill):
        how()
        agent.start()
        with agent.client.lease(f"{uri}@{before.revision}", deadline=soon()) as lease:
            lease.wait_ready(soon())
            assert (lease.tier, lease.revision) == ("ssd", before.revision), "no digest is needed for a pin"
            assert tensors_of(lease) == contents(tensors)
        load(agent, uri, tensors, "dram")
    status = agent.client.status().ssd
    assert (status.used, status.capacity, status.quarantined) == (before.bytes, 1 << 30, [])
    assert (ssd.stat().st_mode | (ssd / "images").stat().st_mode) & 0o077 == 0


def test_without_the_option_nothing_is_written(agent, model):
    load(agent, *model, "origin")
    assert agent.client.status().ssd is None


def test_the_image_is_what_is_in_memory(start_agent, ssd, model, eventually):
    uri, _ = model
    agent = start_agent("--ssd", str(ssd))
    with agent.client.lease(uri) as lease:
        lease.wait_ready(soon())
        kept(agent, eventually)
        (place,) = images(ssd)
        assert [(place / f"{n}.seg").read_bytes() for n in range(len(lease.segments))] == whole(lease)
        assert image.read_index(place).segments == lease.manifest.segments


def test_the_last_seal_follows_the_tee(start_agent, ssd, model, eventually):
    agent = start_agent("--ssd", str(ssd))
    with agent.client.lease(model[0]) as lease:
        lease.wait_ready(soon())
        eventually(lambda: all(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE for fd in lease.segments))
        kept(agent, eventually)


def test_a_changed_source_is_another_image(start_agent, ssd, tmp_path, write_checkpoint, random_tensors, eventually):
    uri = f"file://{write_checkpoint(tmp_path / 'm', seed=1)}"
    agent = start_agent("--ssd", str(ssd))
    load(agent, uri, random_tensors(1), "origin")
    kept(agent, eventually)
    write_checkpoint(tmp_path / "m", seed=2)
    agent.restart()
    load(agent, uri, random_tensors(2), "origin")
    kept(agent, eventually, 2)


def test_a_load_from_ssd_reads_no_weights_from_the_origin(start_local_agent, ssd, checkpoint_files, eventually):
    tensors = large_tensors(3)
    origin = FakeOrigin(FAKE, checkpoint_files(tensors))
    first = start_local_agent({FAKE: origin}, ssd=ssd)
    load(first, FAKE, tensors, "origin")
    kept(first, eventually)
    first.evict(FAKE)
    read = origin.bytes_read
    load(first, FAKE, tensors, "ssd")
    assert origin.bytes_read - read < 1 << 20


def test_two_agents_do_not_share_a_directory(ssd, monkeypatch):
    monkeypatch.setattr("cache_agent.tiers.ssd._LOCK_SECONDS", 0.2)
    first = Ssd(ssd)
    with pytest.raises(BadSetting, match="another agent"):
        Ssd(ssd)
    first.close()
    Ssd(ssd).close()


@pytest.mark.parametrize("place", ["a file", "/proc/self/nowhere"])
def test_a_directory_that_cannot_be_used_is_said(place, tmp_path):
    if place == "a file":
        (tmp_path / "a file").touch()
    with pytest.raises(BadSetting, match="GLOWPLUG_SSD"):
        Ssd(tmp_path / place)


def test_without_o_direct_it_works_all_the_same(ssd, start_local_agent, checkpoint_files, monkeypatch, eventually):
    real, refused = os.open, []

    def no_direct(path, flags, *args, **options):
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "refused")
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", no_direct)
    tensors = large_tensors(1)
    agent = start_local_agent({FAKE: FakeOrigin(FAKE, checkpoint_files(tensors))}, ssd=ssd)
    load(agent, FAKE, tensors, "origin")
    kept(agent, eventually)
    agent.evict(FAKE)
    load(agent, FAKE, tensors, "ssd")
    assert len(refused) == 2


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 0x40]))


@pytest.fixture
def stopped(start_agent, ssd, model, eventually):
    """An agent that is stopped and has one whole image; the image's directory."""
    agent = start_agent("--ssd", str(ssd), "--ssd-size", "1G")
    load(agent, *model, "origin")
    kept(agent, eventually)
    agent.stop()
    (place,) = images(ssd)
    return agent, place


@pytest.fixture
def left(start_local_agent, ssd, checkpoint_files, eventually):
    """`start()` makes an agent in this process; one before it has left an image: its directory, and its tensors."""
    tensors = large_tensors(1)
    origins = {FAKE: FakeOrigin(FAKE, checkpoint_files(tensors))}

    def start():
        return start_local_agent(origins, ssd=ssd)

    agent = start()
    load(agent, FAKE, tensors, "origin")
    kept(agent, eventually)
    agent.close()
    (place,) = images(ssd)
    return start, place, tensors


def test_flipped_bits_are_found_refetched_and_repaired(stopped, model, rounds, eventually):
    agent, place = stopped
    segment = place / "0.seg"
    good = segment.read_bytes()
    source = random.Random(3)
    for _ in range(rounds(6, 300)):
        places = [source.randrange(len(good)) for _ in range(source.randrange(1, 4))]
        for position in set(places):
            flip(segment, position)
        damaged = segment.read_bytes() != good
        agent.start()
        with agent.client.lease(model[0], deadline=soon()) as lease:
            lease.wait_ready(soon())
            assert lease.tier == "ssd"
            assert whole(lease) == [good], "padding included"
        if damaged:
            eventually(lambda: segment.read_bytes() == good, 20, "the image is repaired")
        agent.stop()


def test_a_chunk_whose_origin_changed_too_is_an_error_and_then_new_bytes(ssd, start_local_agent, checkpoint_files):
    tensors = large_tensors(2)
    origin = FakeOrigin(FAKE, checkpoint_files(tensors))
    agent = start_local_agent({FAKE: origin}, ssd=ssd)
    load(agent, FAKE, tensors, "origin")
    deadline = soon()
    while not agent.client.status().ssd.images:
        assert time.monotonic() < deadline
    agent.evict(FAKE)
    flip(images(ssd)[0] / "0.seg", CHUNK + 5)
    lied = bytearray(origin.contents["model.safetensors"])
    lied[CHUNK : 2 * CHUNK] = bytes(CHUNK)
    etag = FakeOrigin._etag(origin.contents["model.safetensors"])
    origin._etag = lambda data: etag if data is origin.contents["model.safetensors"] else FakeOrigin._etag(data)
    origin.contents["model.safetensors"] = bytes(lied)
    with pytest.raises(AgentError, match="overwritten") as caught, agent.client.lease(FAKE) as lease:
        lease.wait_ready(soon())
    assert caught.value.code == "origin_changed"
    assert not agent.client.status().ssd.images


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda place: os.truncate(place / "0.seg", PAGE), "truncated"),
        (lambda place: os.truncate(place / "0.seg", 0), "truncated"),
        (lambda place: (place / "0.seg").unlink(), "torn"),
        (lambda place: (place / "manifest.json").unlink(), "torn"),
        (lambda place: flip(place / "manifest.json", 50), "flipped"),
        (lambda place: flip(place / "image.json", 30), "flipped"),
        (lambda place: flip(place / "image.json", 3), "flipped"),
        (lambda place: (place / "image.json").write_bytes(b""), "flipped"),
        (lambda place: (place / "image.json").unlink(), "half-written"),
        (lambda place: (place / "image.json").write_bytes(image.seal(b"[]")), "foreign"),
        (lambda place: (place / "image.json").write_bytes(image.seal(b"\xff{")), "foreign"),
        (lambda place: rewrite(place, source="src-" + "0" * 40), "foreign"),
        (lambda place: rewrite(place, segments=[]), "foreign"),
        (lambda place: rewrite(place, segments=[PAGE + 1]), "foreign"),
        (lambda place: rewrite(place, checksums=[1]), "foreign"),
        (lambda place: rewrite(place, version=99), "version"),
        (lambda place: rewrite(place, layout=99), "version"),
        (lambda place: place.rename(place.parent / f"{place.name.split('.')[0]}.{LAYOUT + 1}"), "version"),
        (lambda place: place.rename(place.parent / f"src-{'a' * 40}.{LAYOUT}"), "foreign"),
    ],
)
def test_damage_that_the_start_finds_is_quarantined_with_its_reason(damage, reason, left, ssd, caplog, eventually):
    start, place, tensors = left
    damage(place)
    agent = start()
    (bad,) = agent.client.status().ssd.quarantined
    assert reason in bad.reason
    assert bad.reason in caplog.text
    assert not images(ssd)
    (aside,) = (ssd / "quarantine").iterdir()
    assert bad.reason == (aside / "reason").read_text().strip()
    assert not list(aside.glob("*.seg")), "the space is free"
    load(agent, FAKE, tensors, "origin")
    kept(agent, eventually)
    agent.close()
    load(start(), FAKE, tensors, "ssd")


def rewrite(place: Path, **fields) -> None:
    content = json.loads(image.unseal((place / "image.json").read_bytes()))
    (place / "image.json").write_bytes(image.seal(json.dumps({**content, **fields}).encode()))


@pytest.mark.parametrize("damage", ["flip", "cut", "garbage", "absent"])
def test_a_damaged_revision_is_computed_again(damage, left, eventually):
    start, place, tensors = left
    path = place / "revision"
    right = path.read_bytes()
    match damage:
        case "flip":
            flip(path, 25)
        case "cut":
            os.truncate(path, 20)
        case "garbage":
            path.write_bytes(image.seal(b"rev-nonsense"))
        case "absent":
            path.unlink()
    load(start(), FAKE, tensors, "ssd")
    eventually(lambda: path.exists() and path.read_bytes() == right)


def test_a_segment_cut_behind_the_agents_back_is_refetched(start_agent, ssd, model, eventually):
    agent = start_agent("--ssd", str(ssd))
    load(agent, *model)
    kept(agent, eventually)
    eventually(lambda: agent.client.status().models[0].leases == 0)
    agent.client.evict(model[0])
    (place,) = images(ssd)
    good = (place / "0.seg").read_bytes()
    os.truncate(place / "0.seg", CHUNK + 4096)
    load(agent, *model, "ssd")
    eventually(lambda: (place / "0.seg").read_bytes() == good)


@pytest.mark.parametrize("what", ["segment", "image"])
def test_an_image_removed_behind_the_agents_back_costs_the_image_only(what, start_agent, ssd, model, eventually):
    agent = start_agent("--ssd", str(ssd))
    load(agent, *model)
    kept(agent, eventually)
    eventually(lambda: agent.client.status().models[0].leases == 0)
    agent.client.evict(model[0])
    (place,) = images(ssd)
    if what == "segment":
        (place / "0.seg").unlink()
    else:
        place.rename(ssd / "elsewhere")
    load(agent, *model, "origin")
    kept(agent, eventually)


def test_unknown_files_are_left_alone(stopped, ssd, model):
    agent, _ = stopped
    (ssd / "notes.txt").write_text("mine")
    (ssd / "images" / "lost+found").mkdir()
    (ssd / "images" / "README").write_text("mine, too")
    (ssd / "images" / f"src-{'b' * 40}.{LAYOUT}").symlink_to(ssd)
    agent.start()
    assert not agent.client.status().ssd.quarantined
    load(agent, *model, "ssd")
    assert (ssd / "notes.txt").read_text() == "mine"
    assert (ssd / "images" / "lost+found").is_dir()
    assert (ssd / "images" / "README").read_text() == "mine, too"


# --- room -------------------------------------------------------------------------------------------------------------


def test_images_make_room_for_one_another(start_agent, ssd, tmp_path, write_checkpoint, random_tensors, eventually):
    agent = start_agent("--ssd", str(ssd), "--ssd-size", "5M")
    uris = [f"file://{write_checkpoint(tmp_path / str(seed), seed=seed)}" for seed in range(4)]
    for seed, uri in enumerate(uris):
        load(agent, uri, random_tensors(seed), "origin")
        eventually(lambda uri=uri: uri in {stored.model for stored in agent.client.status().ssd.images})
    status = agent.client.status().ssd
    assert len(status.images) == 2
    assert status.used <= status.capacity == 5 << 20
    assert "evicted" in agent.output()
    assert len(images(ssd)) == 2


def test_a_model_larger_than_the_ssd_is_served_and_not_kept(start_agent, ssd, model, eventually):
    agent = start_agent("--ssd", str(ssd), "--ssd-size", "4M")
    load(agent, *model, "origin")
    eventually(lambda: "not kept on SSD: no room" in agent.output())
    assert not images(ssd)


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(megabytes)` mounts a filesystem of that size."""
    mounted = []

    def mount(megabytes: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}M", "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small filesystem needs root")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_filesystem_that_is_too_small_is_never_filled(start_agent, small_disk, model, eventually):
    disk = small_disk(20)
    agent = start_agent("--ssd", str(disk / "ssd"), "--ssd-size", "1G")
    load(agent, *model, "origin")
    eventually(lambda: "not kept on SSD: no room" in agent.output())
    load(agent, *model, "dram")


def test_a_disk_that_runs_full_while_the_image_is_written(start_local_agent, small_disk, checkpoint_files, eventually):
    """Somebody else takes the space after it was counted."""
    disk = small_disk(40)
    tensors = large_tensors(3)
    gate = threading.Event()

    def before_read(name: str, start: int, size: int) -> None:
        if size > 1 << 20:
            assert gate.wait(30)

    origin = FakeOrigin(FAKE, checkpoint_files(tensors), before_read=before_read)
    agent = start_local_agent({FAKE: origin}, ssd=disk / "ssd")
    with agent.client.lease(FAKE) as lease:
        eventually(lambda: list((disk / "ssd" / "partial").iterdir()))
        (disk / "hog").write_bytes(bytes(30 << 20))
        gate.set()
        lease.wait_ready(soon())
        assert tensors_of(lease) == contents(tensors)
        eventually(lambda: fcntl.fcntl(lease.segments[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE)
    eventually(lambda: not list((disk / "ssd" / "partial").iterdir()))
    assert not images(disk / "ssd")
    assert agent.client.status().ssd.used == 0
    (disk / "hog").unlink()
    eventually(lambda: agent.client.status().models[0].leases == 0)
    agent.evict(FAKE)
    load(agent, FAKE, tensors, "origin")
    eventually(lambda: images(disk / "ssd"))


def test_a_write_error_is_logged_once_and_harms_nothing_else(
    start_local_agent, ssd, checkpoint_files, monkeypatch, caplog, eventually
):
    real, writes = os.pwritev, []

    def failing(fd, buffers, offset):
        writes.append(offset)
        if len(writes) > 1:
            raise OSError(errno.EIO, "the disk is dying")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", failing)
    tensors = large_tensors(3)
    agent = start_local_agent({FAKE: FakeOrigin(FAKE, checkpoint_files(tensors))}, ssd=ssd)
    load(agent, FAKE, tensors, "origin")
    eventually(lambda: "not kept on SSD: the disk is dying" in caplog.text)
    eventually(lambda: not list((ssd / "partial").iterdir()))
    assert caplog.text.count("not kept on SSD") == 1
    load(agent, FAKE, tensors, "dram")
    assert not images(ssd)


def test_evicting_a_model_that_is_still_being_written_frees_its_memory(
    start_local_agent, ssd, checkpoint_files, monkeypatch, eventually
):
    writing, go_on = threading.Event(), threading.Event()
    real = os.pwritev

    def slow(fd, buffers, offset):
        writing.set()
        assert go_on.wait(30)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", slow)
    tensors = large_tensors(2)
    agent = start_local_agent({FAKE: FakeOrigin(FAKE, checkpoint_files(tensors))}, ssd=ssd)
    load(agent, FAKE, tensors, "origin")
    assert writing.wait(10), "ready did not wait for the disk"
    eventually(lambda: agent.agent.status()[2][0].leases == 0)
    threading.Timer(0.2, go_on.set).start()
    agent.client.evict(FAKE)
    eventually(lambda: agent.agent.status()[1] == 0)
    maps = Path("/proc/self/maps").read_text()
    assert "memfd:glowplug:" not in maps
    assert not images(ssd)
    load(agent, FAKE, tensors, "origin")
    kept(agent, eventually)


def test_evicting_from_ssd_too(start_agent, ssd, model, eventually, glowplug_agent, refused):
    agent = start_agent("--ssd", str(ssd))
    load(agent, *model)
    kept(agent, eventually)
    eventually(lambda: agent.client.status().models[0].leases == 0)
    size = agent.client.status().models[0].bytes
    assert agent.client.evict(model[0], ssd=True) == 2 * size
    assert not images(ssd)
    assert agent.client.status().ssd.used == 0
    load(agent, *model, "origin")
    kept(agent, eventually)
    eventually(lambda: agent.client.status().models[0].leases == 0)
    agent.client.evict(model[0])
    assert agent.client.evict(model[0], ssd=True) == size, "it is on SSD only"
    with refused("not_found"):
        agent.client.evict(model[0], ssd=True)


def test_a_pinned_model_keeps_its_image(start_agent, ssd, tmp_path, write_checkpoint, random_tensors, eventually):
    agent = start_agent("--ssd", str(ssd), "--ssd-size", "5M")
    uris = [f"file://{write_checkpoint(tmp_path / str(seed), seed=seed)}" for seed in range(4)]
    for seed, uri in enumerate(uris):
        load(agent, uri, random_tensors(seed), "origin")
        eventually(lambda uri=uri: uri in {stored.model for stored in agent.client.status().ssd.images})
        if seed == 0:
            agent.client.pin(uri)
    assert uris[0] in {stored.model for stored in agent.client.status().ssd.images}


# --- kills ------------------------------------------------------------------------------------------------------------


def test_agents_killed_at_random_moments_never_serve_a_wrong_byte_and_use_the_image_again(
    start_agent, ssd, tmp_path, write_checkpoint, rounds, eventually
):
    """Load, tee, sync, rename, eviction, repair: wherever the kill falls, the next agent copes."""
    models = {
        f"file://{write_checkpoint(tmp_path / str(seed), large_tensors(2, seed))}": large_tensors(2, seed)
        for seed in range(3)
    }
    agent = start_agent("--ssd", str(ssd), "--ssd-size", "50M", "--dram", "30M")
    source = random.Random(11)
    tiers = []
    for _ in range(rounds(8, 600)):
        moment = source.uniform(0, 0.12)
        order = source.sample(sorted(models), 3)
        killer = threading.Timer(moment, agent.running.kill)
        killer.start()
        with contextlib.suppress(AgentError):
            for uri in order:
                tiers.append(load(agent, uri, models[uri]))
                eventually(lambda: all(model.leases == 0 for model in agent.client.status().models))
        killer.join()
        agent.kill()
        for place in images(ssd):
            if source.random() < 0.2:
                flip(place / "0.seg", source.randrange(CHUNK))
        agent.start()
        assert not [bad for bad in agent.client.status().ssd.quarantined if "half-written" not in bad.reason]
        uri = source.choice(sorted(models))
        tiers.append(load(agent, uri, models[uri]))
    kept_now = eventually(lambda: agent.client.status().ssd.images, 20)
    agent.restart()
    load(agent, kept_now[0].model, models[kept_now[0].model], "ssd")
    assert "Traceback" not in agent.output()
    assert {"origin", "ssd"} <= set(tiers)


def test_a_plan_of_other_shape_is_not_served_from_the_image(ssd, tmp_path):
    """Should the layout change without its number."""
    store = Ssd(ssd)
    plan = Manifest(source="src-" + "1" * 40, tensors=(), segments=(PAGE,), weight_files=(), files={})
    writing = store.begin(plan, "file:///m")
    with mmap.mmap(-1, PAGE) as memory, memoryview(memory) as view:
        writing.write(0, 0, view)
    writing.commit([0], 1.0)
    other = Manifest(source=plan.source, tensors=(), segments=(PAGE,), weight_files=(), files={"config.json": b"{}"})
    assert store.open(other) is None
    assert "laid out differently" in store.quarantine.found()[0].reason
    store.close()
