"""Snapshots of running generations: kept while they run, resumed by any replica, moved when a replica drains.

snapshot» (format)   record» (what is kept of one request)   seal (encryption)   live (streams that can change hands)
checkpoint (keeps)   resume (goes on)   client (for those who ask)
"""
