"""How much memory an account may hold for itself: leases and pins on models that nobody else holds. Pure.

What two accounts hold counts for neither: sharing is what the memory is for, and neither could free it alone. So an
account can come to hold more than its quota when others let go of what it shared; nothing is taken from it then, and
nothing further that it would have for itself is given. What nobody holds is the node's, and counts for nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from cache_agent.errors import NoCapacity
from cache_agent.policy.copies import Copy, listed, mb


class Account(NamedTuple):
    """On whose account a lease is; `quota` in bytes, None for no limit."""

    name: str
    quota: int | None = None


NO_ACCOUNT = Account("")


class Accounts:
    """On whose account leases and pins are. One caller at a time."""

    def __init__(self, entry_of: Callable[[str], Copy | None]) -> None:
        """`entry_of(uri)` is the copy that a URI names now."""
        self._entry_of = entry_of
        self.pins: dict[str, str] = {}  # URI -> on whose account
        self.leases: dict[int, Account] = {}  # those that wait included

    def of(self, lease: int) -> Account:
        return self.leases.get(lease, NO_ACCOUNT)

    def holders(self, entry: Copy) -> set[str]:
        pins = {name for uri, name in self.pins.items() if self._entry_of(uri) is entry}
        return pins | {self.of(lease).name for lease in entry.leases}

    def refusal(self, leases: Iterable[int], entry: Copy, entries: Iterable[Copy]) -> NoCapacity | None:
        """Why those who come together may not hold a model; under different accounts they share from the beginning."""
        accounts = {self.of(lease) for lease in leases}
        return self.exceeded(accounts.pop(), entry, entries) if len(accounts) == 1 else None

    def exceeded(self, account: Account, entry: Copy, entries: Iterable[Copy]) -> NoCapacity | None:
        """Why the account may not hold the model, too; None when it may."""
        if account.quota is None or self.holders(entry):  # it is shared by whoever comes, or the account's already
            return None
        own = [each for each in entries if self.holders(each) == {account.name}]
        used = sum(each.bytes for each in own)
        if used + entry.bytes <= account.quota:
            return None
        return NoCapacity(
            f"{account.name} may hold {mb(account.quota)} of memory for itself, the model needs {mb(entry.bytes)}, and "
            f"it holds {mb(used)}",
            listed(own, lambda _: "its own"),
            ". Let go of a model, or have the quota raised (dram, in the agent's rights file)",
        )
