"""What nodes know of each other, and give each other."""
