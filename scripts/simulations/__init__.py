"""Simulations of the policies on traces."""
