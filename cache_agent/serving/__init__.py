"""The agent's sockets, connections of functions and of other nodes, and the agent behind them; see README.md."""
