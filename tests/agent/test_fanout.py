"""The choice of chunks and peers: the rules one by one, and whole clusters simulated in steps, with nodes that die."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_agent.policy.fanout import ORIGIN, Fanout, Step, place


def test_places_are_far_apart_however_many_there_are():
    assert [place(slot) for slot in range(8)] == [0, 0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]


def test_who_is_alone_reads_in_order():
    fanout = Fanout(4)
    steps = []
    while (step := fanout.next(0.0, 1)) is not None:
        steps.append(step)
        fanout.finished(step)
    assert steps == [Step(chunk, ORIGIN) for chunk in range(4)]
    assert fanout.complete


def test_at_most_so_many_reads_at_once():
    fanout = Fanout(10)
    assert [fanout.next(0.0, 2) for _ in range(3)] == [Step(0, ORIGIN), Step(1, ORIGIN), None]
    assert fanout.next(0.0, 3) == Step(2, ORIGIN)


def test_what_a_peer_has_or_reads_is_not_read_again():
    fanout = Fanout(4)
    fanout.has("a", 0)
    fanout.reads("a", [1], 0.0)
    assert fanout.next(0.0, 1) == Step(3, ORIGIN), "the far end of what is left: the near one is a's next"
    assert fanout.next(0.0, 1) == Step(0, "a")


def test_what_a_peer_reads_for_too_long_is_read_here():
    fanout = Fanout(1, patience=10)
    fanout.reads("a", [0], 0.0)
    fanout.reads("a", [0], 5.0)
    assert fanout.next(9.9, 1) is None
    assert fanout.next(10.0, 1) == Step(0, ORIGIN)


def test_who_is_gone_leaves_its_chunks_to_the_origin():
    fanout = Fanout(1)
    fanout.has("a", 0)
    fanout.gone("a")
    assert fanout.next(0.0, 1) == Step(0, ORIGIN)


def test_a_shunned_peer_is_not_asked_until_its_time_is_over():
    fanout = Fanout(2)
    fanout.shun("a", 10.0)
    fanout.has("a", 0)
    assert fanout.next(0.0, 0) is None
    assert fanout.is_shunned("a", 9.0)
    assert not fanout.is_shunned("a", 10.0)
    fanout.has("a", 0)
    assert fanout.next(10.0, 0) == Step(0, "a")


def test_the_rarest_chunk_comes_first_and_from_the_peer_with_less_to_do():
    fanout = Fanout(3)
    for chunk, peers in enumerate(("ab", "a", "abc")):
        for peer in peers:
            fanout.has(peer, chunk)
    assert [fanout.next(0.0, 1) for _ in range(3)] == [Step(1, "a"), Step(0, "b"), Step(2, "c")]


def test_a_failed_chunk_is_missing_again():
    fanout = Fanout(1)
    step = fanout.next(0.0, 1)
    fanout.failed(step)
    assert not fanout.complete
    assert fanout.next(0.0, 1) == step


def test_a_chunk_that_is_not_believed_any_more_is_fetched_again():
    fanout = Fanout(1)
    fanout.finished(fanout.next(0.0, 1))
    fanout.reopen(0)
    assert fanout.next(0.0, 1) == Step(0, ORIGIN)


# --- whole clusters ---------------------------------------------------------------------------------------------------


@dataclass
class Node:
    fanout: Fanout
    began: int
    done: set[int] = field(default_factory=set)
    under_way: dict[Step, int] = field(default_factory=dict)  # until when
    reads: int = 0
    alive: bool = True


class Cluster:
    """Nodes that load the same model; `delay` steps pass until one hears of another."""

    def __init__(self, chunks: int, begins: list[int], delay: int, slow: int) -> None:
        self.chunks, self.delay = chunks, delay
        self.nodes = [Node(Fanout(chunks, start=place(slot), patience=20), began) for slot, began in enumerate(begins)]
        self.slow = slow  # steps that a transfer takes
        self.history: list[list[tuple[set[int], set[int]]]] = []

    def step(self, now: int) -> None:
        self.history.append([(set(n.done), {s.chunk for s in n.under_way if s.peer == ORIGIN}) for n in self.nodes])
        told = self.history[max(0, now - self.delay)]
        for number, node in enumerate(self.nodes):
            if not node.alive or now < node.began:
                continue
            for other, (has, reading) in enumerate(told):
                if other != number and self.nodes[other].alive and now >= self.nodes[other].began:
                    for chunk in has:
                        node.fanout.has(str(other), chunk)
                    node.fanout.reads(str(other), reading, now)
            for step, until in list(node.under_way.items()):
                dead = step.peer != ORIGIN and not self.nodes[int(step.peer)].alive
                if dead:
                    node.fanout.failed(step)
                elif now >= until:
                    assert step.peer == ORIGIN or step.chunk in self.nodes[int(step.peer)].done
                    node.done.add(step.chunk)
                    node.fanout.finished(step)
                if dead or now >= until:
                    del node.under_way[step]
            while (step := node.fanout.next(now, 2)) is not None:
                assert step.chunk not in node.done
                assert all(step.chunk != other.chunk for other in node.under_way)
                node.under_way[step] = now + self.slow
                node.reads += step.peer == ORIGIN
            assert sum(s.peer == ORIGIN for s in node.under_way) <= 2

    def kill(self, number: int) -> None:
        self.nodes[number].alive = False
        for node in self.nodes:
            node.fanout.gone(str(number))

    @property
    def complete(self) -> bool:
        return all(node.fanout.complete and len(node.done) == self.chunks for node in self.nodes if node.alive)


@given(
    chunks=st.integers(1, 40),
    begins=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    delay=st.integers(0, 3),
    slow=st.integers(1, 5),
    deaths=st.dictionaries(st.integers(1, 7), st.integers(1, 40), max_size=3),
)
def test_everybody_who_lives_gets_all_of_it(chunks, begins, delay, slow, deaths):
    cluster = Cluster(chunks, begins, delay, slow)
    for now in range(400 + 20 * chunks):
        for number, when in deaths.items():
            if now == when and number < len(begins):
                cluster.kill(number)
        cluster.step(now)
        if cluster.complete and now > max(begins):
            break
    assert cluster.complete


@pytest.mark.parametrize(
    "begins", [[0] * 8, list(range(8)), [0, 0, 0, 0, 30, 30, 60, 60]], ids=["at once", "one by one", "late"]
)
@pytest.mark.parametrize("slow", [2, 4])
def test_the_origin_is_read_about_once(begins, slow):
    chunks = 128
    cluster = Cluster(chunks, begins, 1, slow)
    for now in range(4000):
        cluster.step(now)
        if cluster.complete and now > max(begins):
            break
    assert cluster.complete
    assert sum(node.reads for node in cluster.nodes) <= 1.15 * chunks
