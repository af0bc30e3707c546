"""Workers that drain and workers that go on in their place: who meets whom. What they say is `runtime.handoff`'s.

hosts (who waits)   desk (what connections ask)   client (a worker's side)
"""
