"""A container's first process: port, probes, worker, private agent, pod mode, node mode."""
