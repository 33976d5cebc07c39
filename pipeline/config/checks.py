"""The form of a refusal: what is set wrongly, the rule, the value, the way out."""

from __future__ import annotations

from pipeline.errors import UsageError


def require(ok: bool, name: str, rule: str, value: object, way_out: str) -> None:
    """UsageError unless `ok`."""
    if not ok:
        raise UsageError(f"{name} must be {rule}, got {value!r}; {way_out}")
