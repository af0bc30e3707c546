"""The hand-off: a worker that drains gives its running requests to another worker of the function."""
