"""What a function's code and its tests import: `Event`, `Context`, `toy_context`."""

from runtime.function.handler import Context, Event, toy_context

__all__ = ["Context", "Event", "toy_context"]
