"""Snapshots of running requests, from which another replica can go on."""
