"""The ledger as cost per row: direct, and loaded with the row's share of cold start and idle time.

Method: an attempt's time is charged to its row, whether it gave a clip or not, so a poison row pays for itself.
Time that belongs to no row (cold start, idle, unknown) is spread over the rendered rows by their direct cost. With
no rendered row it stays unallocated, and totals say so. Nothing is rounded before the sums.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from pipeline.records.outcome import NS_PER_S, LedgerEntry

ZERO = Decimal(0)
# Why an attempt gave no clip, where nothing else says it.
GIVEN_UP = "given_up"


@dataclass
class Charges:
    """A ledger summed as its entries come, so that a long run need not keep them: by attempt, by state, in all."""

    by_attempt: dict[tuple[str, int | None], tuple[Decimal, int]] = field(default_factory=dict)
    by_state: dict[str, Decimal] = field(default_factory=dict)
    total: Decimal = ZERO
    # What belongs to no row.
    shared: Decimal = ZERO
    gpu_ns: int = 0

    def add(self, entries: Iterable[LedgerEntry]) -> None:
        for entry in entries:
            duration_ns = entry.t1_ns - entry.t0_ns
            self.total += entry.cost_usd
            self.gpu_ns += duration_ns
            self.by_state[entry.state] = self.by_state.get(entry.state, ZERO) + entry.cost_usd
            if entry.id is None:
                self.shared += entry.cost_usd
            else:
                cost, spent_ns = self.by_attempt.get((entry.id, entry.attempt), (ZERO, 0))
                self.by_attempt[entry.id, entry.attempt] = (cost + entry.cost_usd, spent_ns + duration_ns)


@dataclass
class RowCost:
    """What one row cost: `direct` of the attempt that gave its clip, `waste` of its other attempts."""

    direct: Decimal = ZERO
    waste: Decimal = ZERO
    loaded: Decimal = ZERO
    gpu_ns: int = 0

    @property
    def gpu_seconds(self) -> float:
        return self.gpu_ns / NS_PER_S


@dataclass
class Allocation:
    """Costs of a run: per row, per state, wasted by cause, in all. `unallocated` is what no rendered row can carry."""

    rows: dict[str, RowCost] = field(default_factory=dict)
    by_state: dict[str, Decimal] = field(default_factory=dict)
    wasted: dict[str, Decimal] = field(default_factory=dict)
    total: Decimal = ZERO
    shared: Decimal = ZERO
    unallocated: Decimal = ZERO
    gpu_ns: int = 0


def allocate(
    charges: Charges, rendered: Mapping[str, int], wasted: Mapping[tuple[str, int], str] | None = None
) -> Allocation:
    """Allocate a summed ledger; `rendered` maps the id of each rendered row to the attempt that gave its clip, `wasted`
    other attempts (id, number) to why they gave none."""
    causes = wasted or {}
    rows: dict[str, RowCost] = defaultdict(RowCost)
    by_cause: dict[str, Decimal] = defaultdict(lambda: ZERO)
    for (id, attempt), (cost, spent_ns) in charges.by_attempt.items():
        row = rows[id]
        row.gpu_ns += spent_ns
        if rendered.get(id) == attempt:
            row.direct += cost
        else:
            row.waste += cost
            by_cause[causes.get((id, attempt or 0), GIVEN_UP)] += cost
    total_direct = sum((rows[id].direct for id in rendered if id in rows), ZERO)
    for id, row in rows.items():
        share = charges.shared * row.direct / total_direct if total_direct and id in rendered else ZERO
        row.loaded = row.direct + row.waste + share
    return Allocation(
        rows=dict(rows),
        by_state=dict(charges.by_state),
        wasted=dict(by_cause),
        total=charges.total,
        shared=charges.shared,
        unallocated=ZERO if total_direct else charges.shared,
        gpu_ns=charges.gpu_ns,
    )
