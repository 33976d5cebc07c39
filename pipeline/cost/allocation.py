"""The ledger as cost per row: direct, and loaded with the row's share of cold start and idle time.

Method: an attempt's time is charged to its row, whether it gave a clip or not, so a poison row pays for itself.
Time that belongs to no row (cold start, idle, unknown) is spread over the rendered rows by their direct cost. With
no rendered row it stays unallocated, and totals say so. Nothing is rounded before the sums.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal

from pipeline.records.outcome import NS_PER_S, LedgerEntry

ZERO = Decimal(0)


@dataclass
class RowCost:
    """What one row cost: `direct` of its last attempt if that gave a clip, `waste` of its other attempts."""

    direct: Decimal = ZERO
    waste: Decimal = ZERO
    loaded: Decimal = ZERO
    gpu_ns: int = 0

    @property
    def gpu_seconds(self) -> float:
        return self.gpu_ns / NS_PER_S


@dataclass
class Allocation:
    """Costs of a run: per row, per state, in all. `unallocated` is what no rendered row could carry."""

    rows: dict[str, RowCost] = field(default_factory=dict)
    by_state: dict[str, Decimal] = field(default_factory=dict)
    total: Decimal = ZERO
    shared: Decimal = ZERO
    unallocated: Decimal = ZERO
    gpu_ns: int = 0


def allocate(entries: Iterable[LedgerEntry], rendered: dict[str, int]) -> Allocation:
    """Allocate the ledger; `rendered` maps the id of each rendered row to the attempt that gave its clip."""
    result = Allocation()
    rows: dict[str, RowCost] = defaultdict(RowCost)
    by_state: dict[str, Decimal] = defaultdict(lambda: ZERO)
    for entry in entries:
        duration_ns = entry.t1_ns - entry.t0_ns
        result.total += entry.cost_usd
        result.gpu_ns += duration_ns
        by_state[entry.state] += entry.cost_usd
        if entry.id is None:
            result.shared += entry.cost_usd
            continue
        row = rows[entry.id]
        row.gpu_ns += duration_ns
        if rendered.get(entry.id) == entry.attempt:
            row.direct += entry.cost_usd
        else:
            row.waste += entry.cost_usd
    total_direct = sum((rows[id].direct for id in rendered if id in rows), ZERO)
    for id, row in rows.items():
        share = result.shared * row.direct / total_direct if total_direct and id in rendered else ZERO
        row.loaded = row.direct + row.waste + share
    result.rows, result.by_state = dict(rows), dict(by_state)
    result.unallocated = ZERO if total_direct else result.shared
    return result
