"""What finished generations leave behind: the longest common beginning, bounded, the least useful evicted first."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.prefixes import Prefixes, common, encoded

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
ids = st.lists(st.integers(0, 2), max_size=40)


@dataclass(frozen=True)
class Kept:
    name: str
    nbytes: int = 10


@given(ids, ids)
def test_common(a: list[int], b: list[int]) -> None:
    want = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common(encoded(a), encoded(b)) == want


def test_large_ids_do_not_agree_by_their_bytes() -> None:
    assert common(encoded([1, 0x01020304]), encoded([1, 0x01020305])) == 1


def test_the_longest_is_found() -> None:
    store: Prefixes[Kept] = Prefixes()
    for name in ("abcd", "abxy", "q"):
        store.add(encoded(map(ord, name)), Kept(name))
    assert store.find(encoded(map(ord, "abxz"))) == (Kept("abxy"), 3)
    assert store.find(encoded(map(ord, "abxz")), [(encoded(map(ord, "abxzz")), Kept("live"))]) == (Kept("live"), 4)
    assert store.find(encoded([1])) is None


def test_a_continuation_takes_the_place_of_what_it_continues() -> None:
    store: Prefixes[Kept] = Prefixes()
    store.add(encoded([1, 2]), Kept("first turn"))
    store.add(encoded([1, 2, 3]), Kept("second turn", 30))
    store.add(encoded([1]), Kept("older"))
    assert (len(store), store.nbytes) == (1, 30)


def test_the_least_useful_goes_first() -> None:
    store: Prefixes[Kept] = Prefixes(most=2)
    store.add(encoded([1]), Kept("a"))
    store.add(encoded([2]), Kept("b"))
    store.find(encoded([1, 5]))
    store.add(encoded([3]), Kept("c"))
    assert store.find(encoded([2])) is None
    assert store.find(encoded([1])) == (Kept("a"), 1)
    assert (store.evict(), store.evict(), store.evict(), store.nbytes) == (True, True, False, 0)
