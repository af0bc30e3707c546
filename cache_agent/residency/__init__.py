"""The models in this node's memory: which, for which leases, and what happens to them next."""
