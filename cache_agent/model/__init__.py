"""What a model is: its URI, its files, their layout in memory, its revision. No I/O but through an `Origin`."""
