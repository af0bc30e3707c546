"""The node-local cache agent: one sealed copy of a model's weights for all functions of a node."""

__version__ = "0.1.0"
