"""The contract of what is kept of requests, on every store; and Redis when it is gone, full or tampered with."""

from __future__ import annotations

import random
import threading
import time

import pytest

from cache_agent.errors import SnapshotTooLarge, StoreUnavailable
from cache_agent.snapshots.store import Change, Claimed, InProcessSnapshots, Keep, KeepResult, Key
from cache_agent.snapshots.store_redis import RedisSnapshots

KEY = Key("chat", "chatcmpl-0123456789abcdef")
LIMITS = (20.0, 1000, 3000)


@pytest.fixture(params=["in process", "redis"])
def open_store(request):
    """`open_store(ttl, most, space)`"""
    stores = []

    def make(*limits):
        limits = limits or LIMITS
        if request.param == "in process":
            stores.append(InProcessSnapshots(*limits))
        else:
            stores.append(RedisSnapshots(request.getfixturevalue("redis_url"), *limits))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store):
    return open_store()


def keep(at=0, *pieces, owner="a", epoch=1, lease=10.0, done=False, key=KEY):
    return Keep(key, owner, epoch, at, pieces, lease, done)


def test_what_was_kept_is_there_for_whoever_claims_it_after_its_owner_let_go(store):
    assert store.claim(KEY, "b", 5) == Claimed("absent")
    assert store.keep(keep(0, b"one", b"two")) == KeepResult("kept")
    assert store.keep(keep(2, b"three")) == KeepResult("kept")
    assert store.keep(keep(3, lease=0)) == KeepResult("kept")
    assert store.claim(KEY, "b", 5) == Claimed("taken", 2, (b"one", b"two", b"three"))
    assert store.history(KEY) == [Change(1, "a"), Change(2, "b")]


def test_a_lease_keeps_others_away_and_tells_its_owner_that_they_wait(store):
    store.keep(keep(0, b"one"))
    found = store.claim(KEY, "b", 5)
    assert (found.outcome, found.epoch, found.pieces) == ("held", 1, ())
    assert 9 < found.wait <= 10
    assert store.keep(keep(1, b"two")) == KeepResult("kept", True)
    assert store.keep(keep(2, b"three", lease=0)) == KeepResult("kept", True)
    assert store.claim(KEY, "b", 5).outcome == "taken"


def test_a_lease_that_is_over_keeps_nobody_away(store, eventually):
    store.keep(keep(0, b"one", lease=0.1))
    eventually(lambda: store.claim(KEY, "b", 5) == Claimed("taken", 2, (b"one",)))


def test_whoever_was_overtaken_is_fenced_for_ever(store):
    store.keep(keep(0, b"one", lease=0))
    store.claim(KEY, "b", 5)
    assert store.keep(keep(1, b"two")) == KeepResult("fenced")
    assert store.keep(keep(0, b"all anew")) == KeepResult("fenced")
    assert store.keep(keep(1, b"two", epoch=2)) == KeepResult("fenced"), "the epoch alone is not enough"
    assert store.keep(keep(1, b"two", owner="b", epoch=1)) == KeepResult("fenced"), "nor is the name"
    assert store.keep(keep(1, b"two", owner="b", epoch=2, lease=0)) == KeepResult("kept")
    assert store.claim(KEY, "a", 5) == Claimed("taken", 3, (b"one", b"two"))


def test_an_owner_that_claims_again_fences_its_own_past(store):
    store.keep(keep(0, b"one"))
    assert store.claim(KEY, "a", 5) == Claimed("taken", 2, (b"one",))
    assert store.keep(keep(1, b"two")) == KeepResult("fenced")


def test_a_note_is_for_the_owner_of_that_time_alone(store):
    store.keep(keep(0, b"one"))
    assert store.claim(KEY, "b", 5).outcome == "held"
    store.keep(keep(1, lease=0))
    store.claim(KEY, "c", 5)
    assert store.keep(keep(1, b"two", owner="c", epoch=2)) == KeepResult("kept", False)


def test_saying_it_twice_is_saying_it_once(store):
    store.keep(keep(0, b"one"))
    store.keep(keep(1, b"two"))
    assert store.keep(keep(1, b"two")) == KeepResult("kept")
    assert store.keep(keep(1, b"2", b"3", lease=0)) == KeepResult("kept")
    assert store.claim(KEY, "b", 5).pieces == (b"one", b"2", b"3")


def test_a_hole_is_not_made(store):
    assert store.keep(keep(1, b"two")) == KeepResult("gap")
    store.keep(keep(0, b"one"))
    assert store.keep(keep(2, b"three")) == KeepResult("gap")
    assert store.keep(keep(0, b"anew", lease=0)) == KeepResult("kept")
    assert store.claim(KEY, "b", 5).pieces == (b"anew",)


def test_what_is_done_can_be_read_by_everybody_and_is_nobodys(store):
    store.keep(keep(0, b"one"))
    assert store.keep(keep(1, b"end", done=True)) == KeepResult("kept")
    assert store.claim(KEY, "b", 5) == Claimed("done", 1, (b"one", b"end"))
    assert store.claim(KEY, "c", 5) == Claimed("done", 1, (b"one", b"end"))
    assert store.history(KEY) == [Change(1, "a")]


def test_a_store_that_forgot_the_last_owner_learns_it_from_that_one(store):
    """Redis came back with less than it had been told: the higher epoch is the later truth."""
    store.keep(keep(0, b"one"))
    assert store.keep(keep(1, b"two", owner="b", epoch=3)) == KeepResult("gap")
    assert store.keep(keep(0, b"one", b"two", owner="b", epoch=3)) == KeepResult("kept")
    assert store.keep(keep(1, b"x")) == KeepResult("fenced")
    assert store.history(KEY) == [Change(1, "a"), Change(3, "b")]


def test_transfer_is_compare_and_set(store):
    store.keep(keep(0, b"one"))
    assert not store.transfer(KEY, "a", 2, "b", 5), "another epoch"
    assert not store.transfer(KEY, "x", 1, "b", 5), "another owner"
    assert store.transfer(KEY, "a", 1, "b", 5)
    assert store.transfer(KEY, "a", 1, "b", 5), "told again"
    assert not store.transfer(KEY, "a", 1, "c", 5)
    assert store.keep(keep(1, b"two")) == KeepResult("fenced")
    assert store.claim(KEY, "c", 5).outcome == "held", "the heir has a lease"
    assert store.keep(keep(1, b"two", owner="b", epoch=2)) == KeepResult("kept", True)
    assert store.history(KEY) == [Change(1, "a"), Change(2, "b")]


def test_what_is_made_over_is_not_complete_any_more(store):
    """Its last tokens were told to nobody: the heir makes them again, and nobody else may."""
    store.keep(keep(0, b"one", b"end", done=True))
    assert store.transfer(KEY, "a", 1, "b", 5)
    assert store.claim(KEY, "c", 5).outcome == "held"
    assert store.keep(keep(0, b"anew", owner="b", epoch=2, done=True)).outcome == "kept"
    assert store.claim(KEY, "c", 5) == Claimed("done", 2, (b"anew",))


def test_transfer_needs_nothing_kept(store):
    assert store.transfer(KEY, "a", 1, "b", 5)
    assert not store.transfer(KEY, "a", 1, "c", 5)
    assert store.history(KEY) == [Change(1, "a"), Change(2, "b")]


def test_only_one_heir(store, rounds):
    for number in range(rounds(10, 300)):
        key = Key("chat", f"chatcmpl-{number:016}")
        store.keep(keep(0, b"one", key=key, lease=0))
        barrier, won = threading.Barrier(9), []

        def try_it(name, key=key, barrier=barrier, won=won):
            barrier.wait(30)
            if name == "claim":
                won.append(store.claim(key, "claimer", 30).outcome == "taken")
            else:
                won.append(store.transfer(key, "a", 1, name, 30))

        threads = [threading.Thread(target=try_it, args=(f"b{n}",)) for n in range(8)]
        threads.append(threading.Thread(target=try_it, args=("claim",)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert won.count(True) in (1, 2)  # the claimer may overtake an heir only when it was first, never after
        epochs = [change.epoch for change in store.history(key)]
        assert epochs == sorted(set(epochs))
        assert won.count(True) == len(epochs) - 1


def test_spaces_do_not_see_each_other(store):
    other = Key("other", KEY.id)
    store.keep(keep(0, b"one", lease=0))
    assert store.claim(other, "b", 5) == Claimed("absent")
    store.keep(keep(0, b"theirs", key=other, owner="z", lease=0))
    assert store.claim(KEY, "b", 5).pieces == (b"one",)
    assert store.claim(other, "b", 5).pieces == (b"theirs",)


def test_dropping_is_the_owners(store):
    store.keep(keep(0, b"one", lease=0))
    store.drop(KEY, "b", 1)
    store.drop(KEY, "a", 2)
    assert store.claim(KEY, "a", 5).outcome == "taken"
    store.drop(KEY, "a", 2)
    assert store.claim(KEY, "b", 5) == Claimed("absent")
    assert store.history(KEY) == []


def test_limits_of_one_request_and_of_a_function(open_store):
    store = open_store(20.0, 100, 250)
    assert store.keep(keep(0, b"x" * 100)).outcome == "kept"
    with pytest.raises(SnapshotTooLarge, match="takes 101 bytes, and 100"):
        store.keep(keep(1, b"y"))
    with pytest.raises(SnapshotTooLarge):
        store.keep(keep(0, b"x" * 101, key=Key("chat", "chatcmpl-1111111111111111")))
    second, third = Key("chat", "chatcmpl-2222222222222222"), Key("chat", "chatcmpl-3333333333333333")
    store.keep(keep(0, b"x" * 100, key=second))
    with pytest.raises(SnapshotTooLarge, match="keeps 251 bytes with this, and may keep 250"):
        store.keep(keep(0, b"x" * 51, key=third))
    store.keep(keep(0, b"x" * 51, key=Key("other", third.id)))
    assert store.keep(keep(0, b"x" * 40)).outcome == "kept", "what is replaced makes room"
    assert store.keep(keep(0, b"x" * 51, key=third)).outcome == "kept"
    store.drop(second, "a", 1)
    assert store.keep(keep(0, b"x" * 60, key=second)).outcome == "kept"


def test_records_expire_and_give_their_room_back(open_store, eventually):
    store = open_store(0.2, 100, 100)
    store.keep(keep(0, b"x" * 100))
    second = Key("chat", "chatcmpl-2222222222222222")

    def fits():
        try:
            return store.keep(keep(0, b"x" * 100, key=second)).outcome == "kept"
        except SnapshotTooLarge:
            return False

    eventually(fits)
    assert store.claim(KEY, "b", 5) == Claimed("absent")


def test_random_steps_agree_with_a_simple_model(open_store, rounds):
    """Owners as anybody would write them down; both stores must say the same, whatever is tried in whatever order."""
    for seed in range(rounds(3, 100)):
        source, store = random.Random(seed), open_store()
        key = Key("chat", f"chatcmpl-model-{seed:010}")
        pieces, owner, epoch, free, done, changes = [], "", 0, True, False, []
        for _ in range(60):
            name, under, at = source.choice("abc"), source.choice([epoch, epoch, epoch, 1]), source.randint(0, 4)
            match source.choice(["keep", "keep", "let go", "claim", "transfer", "done"]):
                case "claim":
                    found = store.claim(key, name, 60)
                    if not owner:
                        assert found.outcome == "absent"
                    elif done:
                        assert found == Claimed("done", epoch, tuple(pieces))
                    elif free or owner == name:
                        owner, epoch, free = name, epoch + 1, False
                        changes.append(Change(epoch, name))
                        assert found == Claimed("taken", epoch, tuple(pieces))
                    else:
                        assert (found.outcome, found.epoch) == ("held", epoch)
                case "transfer" if owner:
                    successor = source.choice("abc")
                    told_again = owner == successor and under + 1 == epoch
                    lawful = (owner, epoch) == (name, under)
                    assert store.transfer(key, name, under, successor, 60) == (lawful or told_again)
                    if lawful and not told_again:
                        owner, epoch, free, done = successor, epoch + 1, False, False
                        changes.append(Change(epoch, successor))
                case "transfer":
                    pass
                case what:
                    fresh, under = [source.randbytes(4)], max(1, under)
                    step = Keep(key, name, under, at, tuple(fresh), 0 if what == "let go" else 60, what == "done")
                    outcome = store.keep(step).outcome
                    if owner and (name, under) != (owner, epoch):
                        assert outcome == "fenced"
                    elif at > len(pieces):
                        assert outcome == "gap"
                    else:
                        assert outcome == "kept"
                        if not owner:
                            owner, epoch = name, under
                            changes.append(Change(under, name))
                        pieces[at:] = fresh
                        free, done = what == "let go", done or what == "done"
            assert store.history(key) == changes[-64:]


# --- Redis ------------------------------------------------------------------------------------------------------------


def test_redis_that_is_not_there_is_an_error_and_no_wait(tmp_path):
    store = RedisSnapshots(f"unix://{tmp_path}/nobody.sock", *LIMITS)
    begun = time.monotonic()
    for ask in (lambda: store.claim(KEY, "a", 5), lambda: store.keep(keep(0, b"x")), lambda: store.history(KEY)):
        with pytest.raises(StoreUnavailable, match="cannot be reached"):
            ask()
    assert time.monotonic() - begun < 5
    store.close()


def test_nothing_of_ours_stays_in_redis(redis_url, eventually):
    import redis

    store = RedisSnapshots(redis_url, 0.2, 1000, 1000)
    store.keep(keep(0, b"x"))
    store.transfer(Key("other", KEY.id), "a", 1, "b", 5)
    with redis.Redis.from_url(redis_url) as client:
        assert len(list(client.scan_iter("glowplug:snapshot:*"))) > 4
        eventually(lambda: not list(client.scan_iter("glowplug:snapshot:*")))
    store.close()


def test_every_key_is_below_the_prefix_that_agents_may_write(redis_url):
    import redis

    store = RedisSnapshots(redis_url, *LIMITS)
    store.keep(keep(0, b"x"))
    with redis.Redis.from_url(redis_url) as client:
        assert all(key.startswith(b"glowplug:snapshot:") for key in client.scan_iter("*"))
    store.close()
