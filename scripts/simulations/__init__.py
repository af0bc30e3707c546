"""Policies on traces."""
