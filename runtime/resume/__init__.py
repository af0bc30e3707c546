"""Requests that any replica can continue: they are kept while they run."""
