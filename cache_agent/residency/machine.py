"""Owns a node's entries, their leases and what happens next: handle(event, now) -> [Action]. Pure: no I/O, no clock.

    absent ──LeaseAsked──► (resolving) ──Resolved──► loading ──Loaded──► ready ──no room──► evicting ──► absent
                                │                       │                  ▲
                          ResolveFailed             LoadFailed          Admitted (revision known; the state stays)

A URI is an *alias*: it is resolved to a source (files, sizes, ETags) and, after admission, to a revision. An entry is
one copy of a source's bytes and has a number of its own, so that late news of an evicted copy never hits its successor;
two sources with equal bytes share the first one's entry from the moment both revisions are known. Leased bytes are
never evicted, nor is what a pinned URI names now; of the rest, what is cheapest to bring back goes first
(policy/eviction.py). An alias whose model is resident is granted at once and revalidated in the background. The driver
carries actions out in order and feeds what came of them back as events.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count

from cache_agent.errors import AgentError, EvictRefused, ModelNotFound, NoCapacity
from cache_agent.model.manifest import Manifest
from cache_agent.policy.copies import mb, short
from cache_agent.policy.eviction import Candidate, cheapest, priority
from cache_agent.policy.quota import Account, Accounts
from cache_agent.residency.catalogue import Catalogue
from cache_agent.residency.entry import Alias, Entry, no_capacity, wrong_revision
from cache_agent.residency.events import (
    Action,
    Admit,
    Admitted,
    Adopt,
    Announce,
    Complete,
    Event,
    Evict,
    EvictAsked,
    EvictDone,
    Evicted,
    Grant,
    LeaseAsked,
    LeaseClosed,
    Load,
    Loaded,
    LoadFailed,
    OfferAsked,
    Offered,
    OfferFailed,
    Orphan,
    PinAsked,
    PinDone,
    Refuse,
    Reserved,
    Resolve,
    Resolved,
    ResolveFailed,
)


class Residency:
    """The state machine of one node's DRAM tier. One caller at a time: its owner holds a lock around `handle`."""

    def __init__(self, capacity: int, revalidate_after: float = 10.0) -> None:
        """`capacity` in bytes; an alias older than `revalidate_after` seconds is checked when it is next leased."""
        self.capacity = capacity
        self.revalidate_after = revalidate_after
        self.entries: dict[int, Entry] = {}
        self._numbers = count(1)
        self._aliases: dict[str, Alias] = {}
        self._catalogue = Catalogue(self.entries)
        self._holds: dict[int, int] = {}  # lease -> entry
        self._offering: set[int] = set()  # leases whose bytes are being examined
        self._accounts = Accounts(self.entry_of)
        self._clock = 0.0  # of the eviction policy

    @property
    def used(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    def entry_of(self, uri: str) -> Entry | None:
        """Return the entry that a lease on `uri` would get now, whole or still loading, or None."""
        alias = self._aliases.get(uri)
        return self._catalogue.find(alias.source) if alias else None

    def entry_with(self, source: str) -> Entry | None:
        """Return the copy of a source's bytes, whole or still loading, or None."""
        return self._catalogue.find(source)

    @property
    def pinned(self) -> set[str]:
        """The sources that pinned URIs name now."""
        return {self._aliases[uri].source for uri in self._accounts.pins if uri in self._aliases}

    @property
    def pins(self) -> Collection[str]:
        """The URIs that are pinned."""
        return self._accounts.pins

    def is_pinned(self, entry: Entry) -> bool:
        return any(self._catalogue.names(source, entry) for source in self.pinned)

    def holders(self, uri: str = "") -> list[int]:
        """Return the leases on the model at `uri`, on its former bytes, too; without a URI all leases."""
        if not uri:
            return list(self._holds)
        current = self.entry_of(uri)
        return [lease for e in self.entries.values() if e is current or e.uri == uri for lease in e.leases]

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in an event and decide; `now` in seconds on any clock that does not go back."""
        match event:
            case LeaseAsked(lease, uri, revision, account):
                self._accounts.leases[lease] = account
                return self._lease_asked(lease, uri, revision, now)
            case LeaseClosed(lease):
                self._accounts.leases.pop(lease, None)
                return self._lease_closed(lease, now)
            case Resolved(uri, manifest, revision):
                return self._resolved(uri, manifest, revision, now)
            case ResolveFailed(uri, error):
                return self._resolve_failed(uri, error)
            case Reserved(number):
                entry = self.entries[number]
                entry.reserved = True
                return [Grant(lease, number) for lease in entry.leases]
            case Loaded(number, seconds):
                return self._loaded(self.entries[number], seconds, now)
            case LoadFailed(number, error):
                return self._load_failed(self.entries[number], error)
            case Admitted(number, revision):
                return self._admitted(number, revision)
            case EvictAsked(asker, uri):
                return self._evict_asked(asker, uri)
            case PinAsked(asker, uri, pinned, account):
                return self._pin_asked(asker, uri, pinned, account)
            case OfferAsked(lease, uri, account):
                self._accounts.leases[lease] = account
                self._aliases.setdefault(uri, Alias()).offers += 1
                self._offering.add(lease)
                return []
            case Offered(lease, uri, manifest, revision, same):
                return self._offered(lease, uri, manifest, revision, same, now)
            case OfferFailed(lease, uri, why):
                return self._offer_over(lease, uri, [Orphan(lease, uri, why)], now)
            case Evicted(number):
                del self.entries[number]
                return []

    # --- leases -------------------------------------------------------------------------------------------------------

    def _lease_asked(self, lease: int, uri: str, pinned: str, now: float) -> list[Action]:
        alias = self._aliases.get(uri, Alias())
        entry = self._known_at(uri, pinned) if pinned else self._catalogue.find(alias.source)
        if entry is not None:
            actions = self._attach_all(entry, {lease: pinned}, uri, now)
            if not pinned and not alias.resolving and now - alias.checked > self.revalidate_after:
                alias.resolving = True
                actions.append(Resolve(uri))
            return actions
        self._aliases[uri] = alias
        alias.waiting[lease] = pinned
        if alias.resolving or alias.offers:
            return []
        alias.resolving = True
        return [Resolve(uri)]

    def _known_at(self, uri: str, revision: str) -> Entry | None:
        """Return the copy with this revision that was read from the URI, or that the URI was last seen to name.

        A copy that came from another URI is not given out by its revision alone: the URI is resolved first. Older
        bytes of the URI itself are: its origin does not have them any more.
        """
        current = self.entry_of(uri)
        if current is not None and current.revision == revision:
            return current
        copies = (e for e in self.entries.values() if e.uri == uri and e.revision == revision)
        return next((entry for entry in copies if entry.state != "evicting" and not entry.doomed), None)

    def _attach_all(self, entry: Entry, waiting: dict[int, str], uri: str, now: float) -> list[Action]:
        over = self._accounts.refusal(waiting, entry, self.entries.values())
        actions: list[Action] = []
        for lease, pinned in waiting.items():
            if pinned and entry.revision and entry.revision != pinned:
                actions.append(Refuse(lease, wrong_revision(uri, entry.revision, pinned)))
            elif over is not None:
                actions.append(Refuse(lease, over))
            else:
                actions += self._attach(entry, lease, pinned, now)
        return actions

    def _attach(self, entry: Entry, lease: int, pinned: str, now: float) -> list[Action]:
        self._hold(entry, lease, pinned, now)
        actions: list[Action] = [Grant(lease, entry.number)] if entry.reserved else []
        # A lease that insists on a revision is complete only once the digest proves that these bytes are that one.
        if entry.state == "ready" and (entry.revision or not pinned):
            actions.append(Complete(lease, entry.number, True, entry.revision))
        return actions

    def _hold(self, entry: Entry, lease: int, pinned: str, now: float) -> None:
        entry.leases[lease], entry.last_used = pinned, now
        entry.uses += 1
        self._price(entry)
        self._holds[lease] = entry.number

    def _lease_closed(self, lease: int, now: float) -> list[Action]:
        number = self._holds.pop(lease, None)
        if number is None:
            self._offering.discard(lease)
            for alias in self._aliases.values():
                alias.waiting.pop(lease, None)
            return []
        entry = self.entries[number]
        del entry.leases[lease]
        entry.last_used = now
        return self._evict_if_unwanted(entry)

    # --- resolving and loading ----------------------------------------------------------------------------------------

    def _resolved(self, uri: str, manifest: Manifest, revision: str, now: float) -> list[Action]:
        alias = self._aliases.setdefault(uri, Alias())
        alias.source, alias.resolving, alias.checked = manifest.source, False, now
        waiting, alias.waiting = alias.waiting, {}
        self._catalogue.same(manifest.source, revision)
        if not waiting:
            return []
        actions: list[Action] = []
        entry = self._catalogue.find(manifest.source)
        if entry is None and alias.offers:
            alias.waiting = waiting
            return []
        if entry is None:
            entry = Entry(next(self._numbers), uri, manifest, revision=revision, last_used=now)
            try:
                if (over := self._accounts.refusal(waiting, entry, self.entries.values())) is not None:
                    raise over
                actions += self._make_room(manifest.nbytes, uri)
            except NoCapacity as error:
                return [Refuse(lease, error) for lease in waiting]
            self.entries[entry.number] = entry
            self._catalogue.add(entry)
            actions.append(Load(entry.number, manifest, uri))
        return actions + self._attach_all(entry, waiting, uri, now)

    def _resolve_failed(self, uri: str, error: AgentError) -> list[Action]:
        alias = self._aliases[uri]
        waiting = alias.waiting
        alias.waiting, alias.resolving = {}, False
        # Bytes that are resident stay in use when the origin is merely out of reach; they are checked again next time.
        if alias.source not in self._catalogue and not alias.offers:
            del self._aliases[uri]
        return [Refuse(lease, error) for lease in waiting]

    # --- adopting what an earlier agent left --------------------------------------------------------------------------

    def _offered(self, lease: int, uri: str, manifest: Manifest, revision: str, same: int, now: float) -> list[Action]:
        alias = self._aliases[uri]
        alias.source, alias.checked = manifest.source, now
        entry = self.entries.get(same)
        fresh = entry is None
        if lease not in self._offering or (entry is not None and entry.state != "ready"):
            return self._offer_over(lease, uri, [Orphan(lease, uri, "it came too late")], now)
        if entry is None:
            if manifest.source in self._catalogue or self._catalogue.has(revision):
                return self._offer_over(lease, uri, [Orphan(lease, uri, "the agent has a copy of its own")], now)
            # Over the budget, too: the memory is taken, and refusing the bytes would not free it.
            entry = Entry(next(self._numbers), uri, manifest, "ready", reserved=True, revision=revision)
            self.entries[entry.number] = entry
            self._catalogue.add(entry)
        self._hold(entry, lease, "", now)
        return self._offer_over(lease, uri, [Adopt(lease, entry.number, fresh)], now)

    def _offer_over(self, lease: int, uri: str, actions: list[Action], now: float) -> list[Action]:
        """Answer the offer if its lease is still open, and continue the leases that waited for the offer."""
        alias = self._aliases[uri]
        alias.offers -= 1
        actions = actions if lease in self._offering else []
        self._offering.discard(lease)
        entry = self._catalogue.find(alias.source)
        if alias.offers or alias.resolving:
            return actions
        if not alias.waiting:
            if entry is None:
                del self._aliases[uri]
            return actions
        if entry is None:
            alias.resolving = True
            return [*actions, Resolve(uri)]
        waiting, alias.waiting = alias.waiting, {}
        return actions + self._attach_all(entry, waiting, uri, now)

    def _make_room(self, needed: int, uri: str) -> list[Action]:
        present = [entry for entry in self.entries.values() if entry.state != "evicting"]
        free = self.capacity - sum(entry.bytes for entry in present)
        if needed <= free:
            return []
        idle = [e for e in present if e.state == "ready" and not e.leases and not self.is_pinned(e)]
        candidates = [Candidate(e.number, e.bytes, e.priority, e.last_used) for e in idle]
        choice = cheapest(candidates, needed - free, self._clock)
        if choice is None:
            stays = [entry for entry in present if entry not in idle]
            raise no_capacity(needed, self.capacity, stays, sum(entry.bytes for entry in idle), self._why_stays)
        self._clock = choice.clock
        why = f"smallest price, to make room for {short(uri)} ({mb(needed)})"
        return [self._evict(self.entries[int(number)], why) for number in choice.keys]

    def _why_stays(self, entry: Entry) -> str:
        if entry.leases:
            return f"held by {len(entry.leases)} functions" if len(entry.leases) > 1 else "held by a function"
        return "pinned" if self.is_pinned(entry) and entry.state == "ready" else f"{entry.state}"

    def _price(self, entry: Entry) -> None:
        entry.priority = priority(self._clock, entry.uses, entry.seconds, entry.bytes)

    def _loaded(self, entry: Entry, seconds: float, now: float) -> list[Action]:
        entry.state, entry.last_used, entry.seconds = "ready", now, seconds
        self._price(entry)
        complete = [lease for lease, pinned in entry.leases.items() if entry.revision or not pinned]
        actions: list[Action] = [Complete(lease, entry.number, False, entry.revision) for lease in complete]
        return actions if entry.revision else [*actions, Admit(entry.number)]

    def _load_failed(self, entry: Entry, error: AgentError) -> list[Action]:
        self._unlink(entry)
        del self.entries[entry.number]
        for lease in entry.leases:
            del self._holds[lease]
        return [Refuse(lease, error) for lease in entry.leases]

    def _admitted(self, number: int, revision: str) -> list[Action]:
        entry = self.entries.get(number)
        if entry is None or entry.state == "evicting":
            return []
        entry.revision = revision
        self._catalogue.admitted(entry)
        actions: list[Action] = []
        for lease, pinned in list(entry.leases.items()):
            if not pinned:
                actions.append(Announce(lease, revision))
            elif pinned == revision:
                actions.append(Complete(lease, number, False, revision))
            else:
                del entry.leases[lease], self._holds[lease]
                actions.append(Refuse(lease, wrong_revision(entry.uri, revision, pinned)))
        return actions + self._evict_if_unwanted(entry)

    # --- leaving ------------------------------------------------------------------------------------------------------

    def _evict_if_unwanted(self, entry: Entry) -> list[Action]:
        if entry.leases or entry.state != "ready":
            return []
        if entry.doomed:
            return [self._evict(entry, "asked for while it was held")]
        first = self._catalogue.first(entry)
        return [] if first is entry else [self._evict(entry, f"its bytes are resident as {first.uri}, too")]

    def _evict_asked(self, asker: int, uri: str) -> list[Action]:
        """Evict all copies of the URI's bytes; a copy from before the URI changed goes when its last lease ends."""
        current = self.entry_of(uri)
        copies = [e for e in self.entries.values() if e.state != "evicting" and (e is current or e.uri == uri)]
        if not copies:
            return [Refuse(asker, ModelNotFound(f"{uri} is not resident on this node; see `glowplug agent status`"))]
        held = [e for e in copies if e.state != "ready" or e.leases or self.is_pinned(e)]
        free = [e for e in copies if e not in held]
        for entry in held:
            if entry is not current and entry.state == "ready" and not self.is_pinned(entry):
                entry.doomed = True
                self._unlink(entry)
        stays = "; ".join(self._who_stays(entry, entry is current) for entry in held)
        if not free and current in held:
            return [Refuse(asker, EvictRefused(f"{uri} stays: {stays}"))]
        return [*(self._evict(e, "asked for") for e in free), EvictDone(asker, sum(e.bytes for e in free), stays)]

    def _who_stays(self, entry: Entry, is_current: bool) -> str:
        name = f"{entry.revision or entry.manifest.source}, {mb(entry.bytes)}, is {self._why_stays(entry)}"
        return name if is_current or not entry.doomed else f"{name}, and goes when it is free"

    def _pin_asked(self, asker: int, uri: str, pinned: bool, account: Account) -> list[Action]:
        entry = self.entry_of(uri)
        if entry is None and (pinned or uri not in self._accounts.pins):
            text = f"{uri} is not resident on this node; `glowplug agent prefetch` brings it"
            return [Refuse(asker, ModelNotFound(text))]
        if pinned and entry is not None:
            if (error := self._accounts.exceeded(account, entry, self.entries.values())) is not None:
                return [Refuse(asker, error)]
            self._accounts.pins[uri] = account.name
        else:
            self._accounts.pins.pop(uri, None)
        return [PinDone(asker, entry.bytes if entry else 0)]

    def _evict(self, entry: Entry, why: str) -> Evict:
        entry.state = "evicting"
        self._unlink(entry)
        return Evict(entry.number, why)

    def _unlink(self, entry: Entry) -> None:
        """Hide the entry from later leases, and forget aliases that name nothing any more."""
        self._catalogue.drop(entry)
        for uri, alias in list(self._aliases.items()):
            if alias.source not in self._catalogue and not alias.resolving and not alias.offers:
                del self._aliases[uri]
