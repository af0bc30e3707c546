"""The memory that an account may hold alone: leases and pins on models that no other account holds. Pure.

A model that two accounts hold counts for neither: sharing is what the memory is for, and neither could free it alone.
So an account can come to hold more than its quota, when others release a model that it shared. The account keeps that
model then, and gets no further one for itself. A model that no account holds counts for none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from cache_agent.errors import NoCapacity
from cache_agent.policy.copies import Copy, listed, mb


class Account(NamedTuple):
    """The account of a lease; `quota` in bytes, None for no limit."""

    name: str
    quota: int | None = None


NO_ACCOUNT = Account("")


class Accounts:
    """The accounts of all leases and pins. One caller at a time."""

    def __init__(self, entry_of: Callable[[str], Copy | None]) -> None:
        """Start without leases and pins; `entry_of(uri)` is the copy that a URI names now."""
        self._entry_of = entry_of
        self.pins: dict[str, str] = {}  # URI -> name of the account
        self.leases: dict[int, Account] = {}  # leases that still wait included

    def of(self, lease: int) -> Account:
        return self.leases.get(lease, NO_ACCOUNT)

    def holders(self, entry: Copy) -> set[str]:
        """Return the names of the accounts that hold a copy, by a lease or a pin."""
        pins = {name for uri, name in self.pins.items() if self._entry_of(uri) is entry}
        return pins | {self.of(lease).name for lease in entry.leases}

    def refusal(self, leases: Iterable[int], entry: Copy, entries: Iterable[Copy]) -> NoCapacity | None:
        """Return why leases that were asked for together may not hold a model; of different accounts they share it."""
        accounts = {self.of(lease) for lease in leases}
        return self.exceeded(accounts.pop(), entry, entries) if len(accounts) == 1 else None

    def exceeded(self, account: Account, entry: Copy, entries: Iterable[Copy]) -> NoCapacity | None:
        """Return why the account may not hold the model as well; None when it may."""
        if account.quota is None or self.holders(entry):  # held by another account, so shared, or by this one already
            return None
        alone = [each for each in entries if self.holders(each) == {account.name}]
        used = sum(each.bytes for each in alone)
        if used + entry.bytes <= account.quota:
            return None
        return NoCapacity(
            f"{account.name} may hold {mb(account.quota)} of memory for itself, the model needs {mb(entry.bytes)}, and "
            f"it holds {mb(used)}",
            listed(alone, lambda _: "its own"),
            ". Let go of a model, or have the quota raised (dram, in the agent's rights file)",
        )
