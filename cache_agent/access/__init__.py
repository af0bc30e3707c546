"""Who asks, what they may, and the record of it."""
