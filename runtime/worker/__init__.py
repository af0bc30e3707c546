"""The life of a worker: lease, imports, weights, drain, reports."""
