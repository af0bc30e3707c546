"""The agent's helpers for Kubernetes: the scheduler's extender, the admission webhook, the witness of pods."""
