"""The agent's state, events and metrics over HTTP, and the dashboard; see README.md."""
