"""Finds the owner of a ServiceAccount token by the API server's TokenReview, for the audience `glowplug`.

A successful review is believed for a minute, so a token may outlive its pod for as long; a failed one for two seconds.
While the API server is away no new caller is let in; callers that are in stay.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from http.client import HTTPException
from typing import NamedTuple

import msgspec

from cache_agent.access.keyfile import digest
from cache_agent.access.kubernetes import Api
from cache_agent.errors import AccessDenied, IdentityUnavailable
from cache_agent.policy.rights import AUDIENCE, Caller
from cache_agent.wire.messages import Identity

BELIEVED_SECONDS = 60.0
REFUSED_SECONDS = 2.0
_REVIEW_SECONDS = 5.0  # to wait for one answer of the API server
_TURN_SECONDS = 10.0  # to wait for a turn behind other reviews
_REVIEWS_AT_ONCE = 8
_REMEMBERED = 4096
_LONGEST_ANSWER = 1 << 20
_ACCOUNT = re.compile(r"system:serviceaccount:([^:]+):([^:]+)")
_POD = "authentication.kubernetes.io/pod-uid"


class _User(msgspec.Struct):
    username: str = ""
    extra: dict[str, list[str]] | None = None


class _Status(msgspec.Struct):
    authenticated: bool = False
    user: _User = msgspec.field(default_factory=_User)
    audiences: list[str] | None = None
    error: str = ""


class _Review(msgspec.Struct):
    status: _Status = msgspec.field(default_factory=_Status)


class _Known(NamedTuple):
    """The result of a review; `caller` is None for a token that was refused."""

    caller: Caller | None
    until: float


_decoder = msgspec.json.Decoder(_Review)


class TokenReview:
    """A check of ServiceAccount tokens, with the results of former reviews. Any thread."""

    def __init__(self, api: Api, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._clock = clock
        self._turns = threading.BoundedSemaphore(_REVIEWS_AT_ONCE)
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()  # by the token's digest

    def check(self, identity: Identity) -> Caller:
        if not identity.token:
            raise AccessDenied("this agent asks for a ServiceAccount token; set GLOWPLUG_IDENTITY_FILE to its file")
        key = digest(identity.token)
        known = self._remembered(key)
        if known is None:
            if not self._turns.acquire(timeout=_TURN_SECONDS):
                raise IdentityUnavailable("too many tokens wait for the Kubernetes API to review them; try again")
            try:
                known = self._remembered(key) or self._review(key, identity.token)
            finally:
                self._turns.release()
        if known.caller is None:
            raise AccessDenied(
                f"Kubernetes does not take this token for one of a ServiceAccount, for the audience {AUDIENCE!r}; "
                "mount a projected token, as `glowplug render` and the admission policy do"
            )
        return known.caller

    def _remembered(self, key: str) -> _Known | None:
        with self._lock:
            known = self._known.get(key)
            return known if known is not None and self._clock() < known.until else None

    def _review(self, key: str, token: str) -> _Known:
        status = self._ask(token)
        account = _ACCOUNT.fullmatch(status.user.username)
        caller = None
        if status.authenticated and account and AUDIENCE in (status.audiences or ()):
            pods = (status.user.extra or {}).get(_POD) or [""]
            caller = Caller(account[1], account[2], "kubernetes", pods[0])
        known = _Known(caller, self._clock() + (REFUSED_SECONDS if caller is None else BELIEVED_SECONDS))
        with self._lock:
            self._known[key] = known
            self._known.move_to_end(key)
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return known

    def _ask(self, token: str) -> _Status:
        review = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [AUDIENCE]},
        }
        connection = self._api.connection(_REVIEW_SECONDS)
        try:
            headers = self._api.headers(**{"Content-Type": "application/json", "Accept": "application/json"})
            place = self._api.path("/apis/authentication.k8s.io/v1/tokenreviews")
            connection.request("POST", place, body=msgspec.json.encode(review), headers=headers)
            response = connection.getresponse()
            body = response.read(_LONGEST_ANSWER)
            if response.status not in (200, 201):
                hint = {
                    401: "; is the agent's own token mounted?",
                    403: "; bind a ClusterRole that may create tokenreviews, as knative/components/rights does",
                }.get(response.status, "")
                raise IdentityUnavailable(f"the Kubernetes API answers {response.status} to a token review{hint}")
            return _decoder.decode(body).status
        except (OSError, HTTPException, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise IdentityUnavailable(
                f"the Kubernetes API cannot review tokens now ({error or type(error).__name__}); try again. "
                "Functions that have their weights keep them"
            ) from error
        finally:
            connection.close()
