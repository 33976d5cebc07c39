"""Many items on many workers: the driver loop over a Pool, and the pools. Never imports the engine."""
