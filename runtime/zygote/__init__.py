"""Layers: warm processes that are forked instead of booted."""
