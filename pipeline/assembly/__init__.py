"""Configuration to objects: one file for each kind of process. `driver_side.Run` opens and closes a run's books."""
