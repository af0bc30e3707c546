"""Snapshots of running generations: kept while they run, resumed by any replica, moved when a replica drains.

snapshot» (format)   record» (what is kept of one request)   seal (encryption)   hold (one request, and who may tell it)
answer (the tokens of one generation, wherever they come from)
checkpoint (keeps)   resume (goes on)   client (for those who ask)

moving (a worker's part)   live (where its generations run)   move» (how a request changes hands)
departure, mover, relay, orphans, reporter (the worker that drains)   host, guest (the one that goes on)
talk» (what they say)   pipe (its way)
"""
