"""Identity and rights of callers, and the record of their requests."""
