"""Warm layers: keys, the rule that keeps or drops one, spawning, leases, reports."""
