"""The nodes of a cluster: a directory of them, and transfers between them."""
