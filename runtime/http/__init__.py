"""The HTTP side of a worker: server, application, routes, answers."""
