"""The side of the agent that answers: the agent itself, its socket, connections of functions and of other nodes."""
