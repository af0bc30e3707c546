"""What the agent and its helpers have to do with Kubernetes."""
