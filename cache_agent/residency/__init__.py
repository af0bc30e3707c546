"""What is in this node's memory, for whom, and what happens to it next."""
