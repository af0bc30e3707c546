"""The agent's memory of its node: events, starts, layers."""
