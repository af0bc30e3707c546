"""What the agent shows over HTTP, and the records that it shows."""
