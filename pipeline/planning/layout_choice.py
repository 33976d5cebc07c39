"""How many GPUs each clip gets, and which groups of GPUs a job should hold for that.

While clips are many, each gets the layout of fewest GPU-seconds that it fits. Once they are few, the ways to share the
GPUs among them are laid out in time (`timetable`), with what it takes to load a model into another group, and the one
that ends first is taken; of those that end alike, the cheapest. Pure: it is told what waits, what runs and what is held,
and is asked anew whenever that changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.planning.timetable import Busy, Fleet, end_s
from pipeline.records.parallel import ParallelLayout
from pipeline.records.work import Offer, WorkItem

# Clips are few when there are no more than so many for each GPU, and clips times GPUs are no more than that: a decision
# then takes the driver some hundredths of a second.
FEW_PER_GPU = 4
MAX_WEIGHED = 2_048
# Two ends of a job so near to each other count as the same: then GPU-seconds decide.
ALIKE = 1.01


@dataclass(frozen=True)
class Lane:
    """Waiting clips that need at least so many GPUs as each other: the first of them, how many, their GPU-seconds."""

    head: WorkItem
    num_clips: int
    gpu_seconds: float


@dataclass(frozen=True)
class Demand:
    """What a job has to do: what waits, and how many clips of each layout are in flight, with their GPU-seconds.

    Where clips are few, `few` is all that waits in the order of the queue, and `busy` all that is in flight. Times are
    in seconds of estimates; `deadline_s` is how long until the job's deadline.
    """

    lanes: tuple[Lane, ...]
    in_flight: Mapping[ParallelLayout, int] = field(default_factory=dict)
    in_flight_gpu_seconds: float = 0.0
    few: tuple[WorkItem, ...] | None = None
    busy: tuple[Busy, ...] = ()
    deadline_s: float = float("inf")

    @property
    def num_clips(self) -> int:
        return sum(lane.num_clips for lane in self.lanes)


@dataclass(frozen=True)
class HandOut:
    """A waiting item, and the layout it shall have."""

    item: WorkItem
    offer: Offer
    reason: str


@dataclass(frozen=True)
class Choice:
    """Which groups are of use from now on, by layout, and which item each layout should be given next."""

    groups: Mapping[ParallelLayout, int] = field(default_factory=dict)
    next_on: Mapping[ParallelLayout, HandOut] = field(default_factory=dict)


def is_few(num_clips: int, num_gpus: int) -> bool:
    """If so many waiting clips are weighed one by one."""
    return num_clips <= FEW_PER_GPU * num_gpus and num_clips * num_gpus <= MAX_WEIGHED


def needed_gpus(item: WorkItem) -> int:
    """The fewest GPUs that it fits; with offers none of which fits, the most that are offered."""
    if not item.offers:
        return item.layout.num_gpus
    fitting = (o.layout.num_gpus for o in item.offers if not o.misfit and o.layout.num_gpus >= item.min_gpus)
    return next(fitting, item.offers[-1].layout.num_gpus)


def possible(item: WorkItem, gpus_per_node: int) -> tuple[Offer, ...]:
    """The offers that can be made on nodes of so many GPUs, the narrowest first; at least one.

    What is predicted to fit none of them is tried on the widest: a prediction may be wrong, and a worker can keep parts
    of the model on the host.
    """
    if not item.offers:
        return (Offer(item.layout, item.estimate),)
    placeable = tuple(offer for offer in item.offers if offer.layout.num_gpus <= gpus_per_node)
    fitting = tuple(o for o in placeable if not o.misfit and o.layout.num_gpus >= item.min_gpus)
    return fitting or placeable[-1:] or item.offers[:1]


def choose(demand: Demand, fleet: Fleet) -> Choice:
    """What to hold and what to hand out next, for a job that has clips waiting."""
    if demand.few is not None:
        return _choose_for_few(demand, demand.few, fleet)
    return _choose_for_many(demand, fleet)


def _choose_for_many(demand: Demand, fleet: Fleet) -> Choice:
    """A layout for each lane, and to each layout its part of the GPUs by the work that waits for it."""
    # Clips in flight have half of their work behind them, on average.
    total_s = sum(lane.gpu_seconds for lane in demand.lanes) + demand.in_flight_gpu_seconds / 2
    next_on: dict[ParallelLayout, HandOut] = {}
    work_s: Counter[ParallelLayout] = Counter()
    num_clips: Counter[ParallelLayout] = Counter(demand.in_flight)
    for lane in demand.lanes:
        offers = possible(lane.head, fleet.gpus_per_node)
        offer = _by_area(offers, lane, total_s, fleet)
        offer = _in_time(offer, offers, demand.deadline_s)
        reason = _reason(lane.head, offer, offers, demand, fleet)
        next_on.setdefault(offer.layout, HandOut(lane.head, offer, reason))
        work_s[offer.layout] += lane.gpu_seconds
        num_clips[offer.layout] += lane.num_clips
    groups: dict[ParallelLayout, int] = {}
    left, whole_s = fleet.num_gpus, sum(work_s.values())
    for layout in sorted(work_s, key=lambda layout: -layout.num_gpus):
        share = work_s[layout] / whole_s if whole_s else 1.0
        is_last = len(groups) == len(work_s) - 1
        gpus = left if is_last else min(left, max(layout.num_gpus, round(share * fleet.num_gpus)))
        groups[layout] = min(gpus // layout.num_gpus, num_clips[layout])
        left -= groups[layout] * layout.num_gpus
    return Choice(groups, next_on)


def _by_area(offers: Sequence[Offer], lane: Lane, total_s: float, fleet: Fleet) -> Offer:
    """The cheapest offer, unless the first clip would then outlast an even share of all work.

    If all clips of the lane are spread alike, the job takes as long as the first clip, or as all GPU-seconds divided
    by the GPUs, whichever is more.
    """
    cheapest = _cheapest(offers)
    others_s, cheapest_s = total_s - lane.gpu_seconds, max(1e-9, cheapest.estimate.gpu_seconds)

    def job_s(offer: Offer) -> float:
        area_s = others_s + lane.gpu_seconds * offer.estimate.gpu_seconds / cheapest_s
        is_new = bool(fleet.held) and offer.layout not in fleet.held
        return max(offer.estimate.clip_s + fleet.load_s * is_new, area_s / fleet.num_gpus)

    if job_s(cheapest) <= total_s / fleet.num_gpus * ALIKE:
        return cheapest
    best_s = min(map(job_s, offers))
    return _cheapest([offer for offer in offers if job_s(offer) <= best_s * ALIKE])


def _choose_for_few(demand: Demand, items: Sequence[WorkItem], fleet: Fleet) -> Choice:
    """The best of some ways to share the GPUs among all that waits."""
    offered = [possible(item, fleet.gpus_per_node) for item in items]
    ways = [
        [_in_time(offer, offers, demand.deadline_s) for offer, offers in zip(way, offered, strict=True)]
        for way in _ways(offered, demand, fleet)
    ]
    ends = [end_s(way, demand.busy, fleet) for way in ways]
    good = [way for way, ended_s in zip(ways, ends, strict=True) if ended_s <= min(ends) * ALIKE]
    way = min(good, key=lambda way: sum(offer.estimate.gpu_seconds for offer in way))
    next_on: dict[ParallelLayout, HandOut] = {}
    groups: Counter[ParallelLayout] = Counter()
    left = fleet.num_gpus
    for item, offer, offers in zip(items, way, offered, strict=True):
        if offer.layout not in next_on:
            next_on[offer.layout] = HandOut(item, offer, _reason(item, offer, offers, demand, fleet))
        if offer.layout.num_gpus <= left:
            groups[offer.layout] += 1
            left -= offer.layout.num_gpus
    for busy in demand.busy:
        # What runs goes on in its group, and may be followed there where nothing else claims the GPUs.
        if busy.layout.num_gpus <= left:
            groups[busy.layout] += 1
            left -= busy.layout.num_gpus
    return Choice(groups, next_on)


def _ways(offered: Sequence[Sequence[Offer]], demand: Demand, fleet: Fleet) -> list[list[Offer]]:
    """All clips on as many GPUs; full rounds on few GPUs and the rest on more; long clips on more than short ones."""
    widths = sorted({offer.layout.num_gpus for offers in offered for offer in offers})
    in_rounds = len(offered) // fleet.num_gpus * fleet.num_gpus
    alike = {width: [_at_most(offers, width) for offers in offered] for width in widths}
    rounds = [alike[widths[0]][:in_rounds] + alike[width][in_rounds:] for width in widths[1:]]
    return [*alike.values(), *rounds, _balanced(offered, demand.busy, fleet.num_gpus)]


def _balanced(offered: Sequence[Sequence[Offer]], busy: Sequence[Busy], num_gpus: int) -> list[Offer]:
    """Each clip on the fewest GPUs with which it ends by a time, the earliest by which the GPUs can do all that work.

    That is the allotment of Turek, Wolf and Yu (1992) for tasks whose number of processors can be chosen.
    """
    busy_s = sum(each.gpu_seconds_left for each in busy)

    def allotted(by_s: float) -> list[Offer]:
        return [
            next((offer for offer in offers if offer.estimate.clip_s <= by_s), _fastest(offers)) for offers in offered
        ]

    def is_enough(by_s: float) -> bool:
        way = allotted(by_s)
        work_s = busy_s + sum(offer.estimate.gpu_seconds for offer in way)
        return work_s <= num_gpus * by_s and all(offer.estimate.clip_s <= by_s for offer in way)

    times = sorted({offer.estimate.clip_s for offers in offered for offer in offers})
    low, high = 0, len(times)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(times[middle]) else (middle + 1, high)
    return allotted(times[low]) if low < len(times) else [_cheapest(offers) for offers in offered]


def _in_time(offer: Offer, offers: Sequence[Offer], deadline_s: float) -> Offer:
    """`offer`, unless it ends after the deadline and another does not: of those the cheapest."""
    if offer.estimate.clip_s <= deadline_s:
        return offer
    in_time = [other for other in offers if other.estimate.clip_s <= deadline_s]
    return _cheapest(in_time) if in_time else offer


def _cheapest(offers: Sequence[Offer]) -> Offer:
    return min(offers, key=lambda offer: offer.estimate.gpu_seconds)


def _fastest(offers: Sequence[Offer]) -> Offer:
    return min(offers, key=lambda offer: offer.estimate.clip_s)


def _at_most(offers: Sequence[Offer], num_gpus: int) -> Offer:
    """The widest offer of at most so many GPUs; the narrowest, if that needs more."""
    return max((offer for offer in offers if offer.layout.num_gpus <= num_gpus), default=offers[0],
               key=lambda offer: offer.layout.num_gpus)  # fmt: skip


def _reason(item: WorkItem, offer: Offer, offers: Sequence[Offer], demand: Demand, fleet: Fleet) -> str:
    """Why the item gets the layout, in a few words for its row."""
    if not item.offers:
        return item.layout_reason
    num, num_others = offer.layout.num_gpus, demand.num_clips - 1
    gpus, all_gpus = _count(num, "GPU"), _count(fleet.num_gpus, "GPU")
    narrower = [other for other in item.offers if other.layout.num_gpus < num]
    if offer.misfit:
        return f"{gpus}: {offer.misfit}, and a node has no more"
    if offer is offers[0] and narrower and all(o.misfit for o in narrower):
        return f"{gpus}: {narrower[-1].misfit}"
    if offer is offers[0] and item.min_gpus > 1:
        return f"{gpus}: it ran out of memory on fewer"
    if _cheapest(offers).estimate.clip_s > demand.deadline_s >= offer.estimate.clip_s:
        return f"{gpus}: on fewer it would miss the deadline"
    if len(offers) == 1:
        return f"{gpus}: a node has no more"
    if offer is _cheapest(offers):
        if num_others >= fleet.num_gpus // num:
            return f"{gpus}: {_count(demand.num_clips, 'clip')} wait for {all_gpus}"
        return f"{gpus}: more would not end the job sooner"
    if num_others == 0:
        return f"{gpus}: tail, no other clip waits"
    if demand.few is None:
        return f"{gpus}: on fewer it would outlast the other {_count(num_others, 'clip')}"
    return f"{gpus}: tail, {_count(demand.num_clips, 'clip')} for {all_gpus}"


def _count(num: int, what: str) -> str:
    return f"{num} {what}{'' if num == 1 else 's'}"
