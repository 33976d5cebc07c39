"""Money: exact, and with its source."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest

from pipeline.config.cluster import Price
from pipeline.cost.pricing import UnitPrice, stale_price_warning, unit_price
from pipeline.errors import UsageError

P5 = Price("aws-p5", 55.04, 8, "us-east", "on_demand", "2026-03-01", "a list")


def test_a_unit_is_its_share_of_the_node() -> None:
    assert unit_price(P5).usd_per_hour == Decimal("6.88")


def test_an_hour_costs_the_hourly_price_and_parts_add_up() -> None:
    price = UnitPrice("p", Decimal("6.88"))
    assert price.cost(3_600_000_000_000) == Decimal("6.88")
    parts = sum((price.cost(1_000_000) for _ in range(1000)), Decimal(0))
    assert abs(parts - price.cost(1_000_000_000)) < Decimal("1e-10")
    assert price.cost(1).as_tuple().exponent == -14


def test_an_old_price_is_said_to_be_old() -> None:
    assert stale_price_warning(P5, date(2026, 3, 2)) is None
    assert "264 days ago" in (stale_price_warning(P5, date(2026, 11, 20)) or "")


def test_a_price_without_source_or_date_is_refused() -> None:
    with pytest.raises(UsageError, match="named with a source"):
        Price("p", 1.0, 1, observed_at="2026-01-01")
    with pytest.raises(UsageError, match="observed_at must be a date, got 'May'"):
        Price("p", 1.0, 1, observed_at="May", source="s")
