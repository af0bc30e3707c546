"""A worker's HTTP side: server, application, routes, answers."""
