"""Decisions as pure functions of history and sizes."""
