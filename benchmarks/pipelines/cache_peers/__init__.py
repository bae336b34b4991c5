"""Parts of cache_quality.py: how a trial is run and counted, and what is tried."""
