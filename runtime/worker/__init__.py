"""A worker's life: leasing, imports, weights, drain, reports."""
