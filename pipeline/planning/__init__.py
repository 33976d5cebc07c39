"""Rows to ordered work. Pure: no torch, no I/O, no clock of its own; the caller supplies the time."""
