"""Owns the decision whether a caller may do what it asks for, by identity and rights, before anything else happens.

A refusal depends on the caller and on the URI's text alone: it is the same, and takes the same time, whether the model
exists, is resident, or is pinned. Every lease, refusal and command that changes something has one line on the logger
`glowplug.audit`.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cache_agent.access.identity import Anybody, Check, Identities, identities
from cache_agent.config import AgentConfig
from cache_agent.errors import AccessDenied, AgentError, BadSetting
from cache_agent.model.uri import ModelURI, parse_uri
from cache_agent.policy.rights import EVERYTHING, Caller, Permission, pieces
from cache_agent.wire.messages import Identity

if TYPE_CHECKING:
    from cache_agent.access.rights import RightsFile

log = logging.getLogger("glowplug.audit")


class Access:
    """The checks of one agent. Any thread."""

    def __init__(self, check: Check | None = None, rights: RightsFile | None = None) -> None:
        """Without a check every client is let in; without rights every client may do everything."""
        self._check: Check = check or Anybody()
        self._rights = rights

    @property
    def open(self) -> bool:
        """Whether clients need no proof of identity."""
        return isinstance(self._check, Anybody) or (isinstance(self._check, Identities) and self._check.anybody)

    def identify(self, identity: Identity, client: str = "") -> Caller:
        """Return the caller; `client` names it in the log. Raises `AccessDenied`, `IdentityUnavailable`."""
        try:
            return self._check.check(identity)
        except AgentError as error:
            log.info("refused", extra={"fields": {"who": "", "client": client, "what": "hello", "outcome": error.code}})
            raise

    def permission(self, caller: Caller) -> Permission:
        return EVERYTHING if self._rights is None else self._rights.current().of(caller)

    def may_have(self, caller: Caller, model: str) -> bool:
        """Whether the caller may know of the model at this URI."""
        permission = self.permission(caller)
        if permission.admin:
            return True
        try:
            return _covers(permission, parse_uri(model))
        except AgentError:
            return False

    def require_model(self, caller: Caller, model: str) -> None:
        """Raise `AccessDenied` unless the caller has a right to the model, `BadModelURI` where `model` is no URI."""
        permission = self.permission(caller)
        uri = parse_uri(model)
        if not permission.admin and not _covers(permission, uri):
            raise AccessDenied(
                f"{caller} has no right to {uri.text}, or there is no such model; the agent's rights file says which "
                "models it may have"
            )

    def require_admin(self, caller: Caller, what: str) -> None:
        """Raise `AccessDenied` unless the caller is an administrator; `what` names the command."""
        if not self.permission(caller).admin:
            raise AccessDenied(f"{caller} has no right to {what}: that takes `admin = true` in the agent's rights file")

    def reload(self) -> None:
        if self._rights is not None:
            self._rights.reload()

    def record(self, caller: Caller, what: str, model: str, outcome: str, **more: object) -> None:
        """Write one line of the audit log: caller, command and outcome."""
        fields = {"who": str(caller), "kind": caller.kind, "what": what, "model": model, "outcome": outcome}
        if caller.pod:
            fields["pod"] = caller.pod
        log.info("%s", outcome, extra={"fields": {**fields, **more}})


def _covers(permission: Permission, uri: ModelURI) -> bool:
    """Whether the grant covers the URI. Only granted places are looked at on disk: a refusal's time tells nothing."""
    if not permission.covers(uri.scheme, uri.place):
        return False
    if uri.scheme != "file":
        return True
    # A link that leads out of the granted places is refused. Links inside are common: model caches consist of them.
    real = pieces("file", os.path.realpath(uri.place))
    return real is not None and any(
        prefix.covers("file", real) or (prefix.scheme == "file" and real[: len(place := _real(prefix.pieces))] == place)
        for prefix in permission.models
    )


def _real(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(Path(os.path.realpath("/" + "/".join(parts))).parts[1:])


def from_config(config: AgentConfig) -> Access:
    """Build the checks of an agent's settings. Raises `BadSetting`."""
    check = identities(config.identity, config.token_file, config.kubernetes)
    if config.rights is None:
        return Access(check)
    if check.anybody:
        raise BadSetting("GLOWPLUG_RIGHTS says who may have what, and nobody is asked who he is: set GLOWPLUG_IDENTITY")
    from cache_agent.access.rights import RightsFile

    return Access(check, RightsFile(config.rights))
