"""Engines decode generations; `base` is the contract that each of them keeps."""
