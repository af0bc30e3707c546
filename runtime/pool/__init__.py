"""Node mode's daemon: warm processes for all containers of a node."""
