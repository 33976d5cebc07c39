"""Shared fixtures. Tests read nothing outside the repository; what they compare with lies in `tests/fixtures`."""
