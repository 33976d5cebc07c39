"""Immutable values that cross floors and become table rows. No I/O, no configuration, no tensors."""
