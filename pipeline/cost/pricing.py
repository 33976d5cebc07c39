"""Prices with where and when they were seen, and time into money without rounding before the sum."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import ROUND_HALF_EVEN, Context, Decimal

from pipeline.config.cluster import Price

# The scale of `cost_usd` in the ledger: decimal128(38, 14).
SCALE = Decimal(1).scaleb(-14)
_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)
NS_PER_HOUR = 3_600_000_000_000
STALE_AFTER_DAYS = 180


@dataclass(frozen=True)
class UnitPrice:
    """What one worker (one GPU, or one CPU worker) costs an hour, and which price that is."""

    price_id: str
    usd_per_hour: Decimal

    def cost(self, duration_ns: int) -> Decimal:
        """Dollars of `duration_ns` nanoseconds, to 14 decimal places."""
        exact = _EXACT.divide(_EXACT.multiply(self.usd_per_hour, Decimal(duration_ns)), Decimal(NS_PER_HOUR))
        return exact.quantize(SCALE, context=_EXACT)


def unit_price(price: Price) -> UnitPrice:
    """The price of one unit of `price`: a node's hourly rate over the units it holds."""
    per_unit = _EXACT.divide(Decimal(str(price.node_usd_per_hour)), Decimal(price.units_per_node))
    return UnitPrice(price.price_id, per_unit)


def stale_price_warning(price: Price, today: date) -> str | None:
    """A sentence for the operator if the price was seen long ago, else None."""
    age_days = (today - date.fromisoformat(price.observed_at)).days
    if age_days <= STALE_AFTER_DAYS:
        return None
    return f"price {price.price_id} was last seen {age_days} days ago ({price.source}); check it in conf/pricing/"
