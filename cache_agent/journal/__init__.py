"""What the agent remembers of its node: events, starts, layers."""
