"""How a model's bytes come: which files, which ranges, by how many readers, checked and written down."""
