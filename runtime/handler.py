"""The names for a function's code and its tests to import: `Event`, `Context`, `toy_context`."""

from runtime.function.handler import Context, Event, toy_context

__all__ = ["Context", "Event", "toy_context"]
