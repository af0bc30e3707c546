"""The commands of `glowplug agent`: serving a node or a cluster, and asking an agent that serves."""
