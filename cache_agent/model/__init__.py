"""The description of a model: URI, files, layout in memory, revision. No I/O but through an `Origin`."""
