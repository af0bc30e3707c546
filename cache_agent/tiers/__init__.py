"""The places of a model's bytes: this node's memory, its SSD, and the origins that models come from."""
