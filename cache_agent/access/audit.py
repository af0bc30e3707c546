"""Owns the record of one connection's requests: a line per lease, refusal and command, once its outcome is known."""

from __future__ import annotations

from cache_agent.access.control import Access
from cache_agent.errors import AccessDenied
from cache_agent.policy.rights import Caller
from cache_agent.wire.message import Message
from cache_agent.wire.messages import Adopted, ErrorReply, Granted, LeaseReady, LeaseRequest, Offer, Streaming
from cache_agent.wire.operations import (
    EvictReply,
    EvictRequest,
    PinReply,
    PinRequest,
    PrefetchReply,
    PrefetchRequest,
    PushDrain,
    PushDrainReply,
)

_NAMES: dict[type[Message], str] = {
    LeaseRequest: "lease",
    Offer: "offer",
    EvictRequest: "evict",
    PinRequest: "pin",
    PrefetchRequest: "prefetch",
    PushDrain: "drain",
}


class Trail:
    """The request of one connection whose outcome is to come. The connection's thread alone."""

    def __init__(self, access: Access, client: str) -> None:
        """`client` is the name that the client gives itself: no proof, but a help to people that read the line."""
        self._access = access
        self._client = client
        self._what = ""
        self._model = ""

    def asked(self, message: Message) -> None:
        """Note a request that has arrived."""
        kind = type(message)
        self._what = _NAMES.get(kind, f"?{kind.__struct_config__.tag}")  # with "?": recorded only if it is refused
        if isinstance(message, PinRequest) and not message.pinned:
            self._what = "unpin"
        self._model = str(getattr(message, "model", ""))

    def answered(self, caller: Caller, message: Message) -> None:
        """Record the outcome, if the message that goes out is one."""
        match message:
            case ErrorReply(code) if self._what:
                if not self._what.startswith("?") or code == AccessDenied.code:
                    self._record(caller, code)
                self._what = ""
            case Granted() | Streaming():
                self._record(caller, "granted")  # a load that fails afterwards is a second line
            case LeaseReady():
                self._what = ""
            case Adopted(revision, shared):
                self._record(caller, "adopted" if shared else "orphaned", revision=revision)
                self._what = ""
            case EvictReply(size, ssd):
                self._record(caller, "done", bytes=size, ssd=ssd)
                self._what = ""
            case PinReply(size):
                self._record(caller, "done", bytes=size)
                self._what = ""
            case PrefetchReply():
                self._record(caller, "begun")
                self._what = ""
            case PushDrainReply(holders):
                self._record(caller, "done", holders=holders)
                self._what = ""

    def gone(self, caller: Caller) -> None:
        """Record that the connection ended before the outcome."""
        if self._what and not self._what.startswith("?"):
            self._record(caller, "gone")

    def _record(self, caller: Caller, outcome: str, **more: object) -> None:
        self._access.record(caller, self._what.lstrip("?"), self._model, outcome, client=self._client, **more)
