"""The loading of a model's bytes: which ranges, by how many readers, checked, and written to SSD."""
