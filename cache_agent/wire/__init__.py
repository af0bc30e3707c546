"""The content of a connection: messages, frames, fds beside them, bytes between them."""
