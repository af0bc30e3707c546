"""Zygotes: processes that are forked instead of booting another, and the way of a fork into a container."""
