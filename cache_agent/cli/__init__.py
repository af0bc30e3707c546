"""The commands of `glowplug agent`: to serve a node or a cluster, and to ask a serving agent."""
