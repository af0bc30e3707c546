"""Where bytes can be: this node's memory, and the origins they come from."""
