"""Owns the zygotes of a node's pool: the lang zygote, from which all is forked, and those of models on top of it."""

from __future__ import annotations

import os
from collections.abc import Callable

from runtime.zygote.building import Event
from runtime.zygote.models import Models, PooledModel
from runtime.zygote.rule import Backoff
from runtime.zygote.spawn import Lost, Ready, Spec, Zygote, boot

PROGRAM = ("-m", "runtime.zygote.placed")
_REBUILD, _REBUILD_MOST = 1.0, 60.0  # seconds before a lang zygote that was lost is built again


class Zygotes:
    """The lang zygote, which is there always, and those of `models` on top of it."""

    def __init__(self, spec: Spec, models: Models, seccomp: str, say: Callable[[str], None]) -> None:
        self.models = models
        self.ready: Ready | None = None  # what the lang zygote said of itself, while it can be forked
        self._lang: Zygote | None = None
        self._spec, self._seccomp, self._say = spec, seccomp, say
        self._retry = Backoff(_REBUILD, _REBUILD_MOST)

    def fds(self) -> list[int]:
        return [*([] if self._lang is None else [self._lang.wire.fileno()]), *self.models.fds()]

    def step(self, now: float) -> list[Event]:
        """Has a lang layer, lets those of models come and go; what all zygotes say of processes in containers."""
        events: list[Event] = []
        if self._lang is None and self._retry.due(now):
            variables = {**os.environ, "GLOWPLUG_POOL_SECCOMP": self._seccomp}
            self._lang = boot(self._spec, environment=variables, program=PROGRAM)
        for event in [] if self._lang is None else self._lang.read():
            match event:
                case Ready(level, _, seconds, size):
                    self.ready = event
                    self._retry.worked()
                    self._say(f"the {level} layer is ready: {seconds:.2f} s, {size / 1e6:.0f} MB")
                case Lost(why):
                    self._lost(why, now)
                case _ if not self.models.takes(event, now):
                    events.append(event)
        # After what it has said: if it is the pool that was stopped, the beats are there.
        if self._lang is not None and (why := self._lang.overdue(now)):
            self._lost(f"{why} and was killed", now)
        return events + self.models.step(now, None if self.ready is None else self._lang)

    def deepest(self, uri: str) -> tuple[Zygote | None, PooledModel | None, str]:
        """The zygote from which a worker with this model is forked, None if there is none; its layer, None if that is
        lang; and why it is no deeper one."""
        layer, why = self.models.deepest(uri)
        if self.ready is None:
            return None, layer, "no zygote of the pool is ready"
        return self._lang if layer is None else layer.zygote, layer, why

    def _lost(self, why: str, now: float) -> None:
        self._say(f"a zygote was lost: {why}; another is built in {self._retry.failed(now):.0f} s")
        if self._lang is not None:
            self._lang.kill()
            self._lang.close()
        self._lang = self.ready = None

    def close(self) -> None:
        self.models.close()
        if self._lang is not None:
            self._lang.kill()
