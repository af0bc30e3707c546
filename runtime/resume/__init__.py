"""Requests that can go on elsewhere: kept while they run, taken up by any replica."""
