"""Configuration to objects, nothing more: one file for each kind of process."""
