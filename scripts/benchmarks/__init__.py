"""Benchmarks that a stranger can repeat: one small module each, over the harness."""

NAMES = ["cold-start", "load", "origin", "density"]
