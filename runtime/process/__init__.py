"""Processes and what passes between them: children, control line, descriptors, wake-ups, kernel questions."""
