"""The interface for a function's author: handler, `context.model`, testing, reload."""
