"""A function's side of the agent: leases, snapshots, hand-offs, credentials."""
