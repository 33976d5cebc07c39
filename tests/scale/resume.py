"""A process of its own: what `jobs.render` does up to where the driver loop would start, and what that took.

`python -m tests.scale.resume <request_s> <arguments of jobs.render>` prints one JSON object. With a `request_s` above 0
the output is a bucket that takes so long to answer: a disk of which each request waits, and each page of 1,000 names is
a request.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobs.entry import RenderJob, compose_job, compose_recipes
from pipeline.assembly import driver_side
from pipeline.cluster.driver import Driver, Ending, StopRequest
from pipeline.storage.filesystem import local_path
from pipeline.storage.local_store import LocalStore
from pipeline.storage.models import fingerprint
from pipeline.storage.object_store import LISTERS
from pipeline.storage.patience import QUICK, Patience
from pipeline.storage.store import Store

PAGE_NAMES = 1_000


class SlowStore(LocalStore):
    """A disk that is asked as a bucket is: each request takes its time, also those that others wait for."""

    def __init__(self, root: Path, request_s: float, *, patience: Patience = QUICK) -> None:
        super().__init__(root, patience=patience)
        self._request_s = request_s

    def with_patience(self, patience: Patience) -> SlowStore:
        return SlowStore(self._root, self._request_s, patience=patience)

    def _wait(self, num_requests: int = 1) -> None:
        time.sleep(num_requests * self._request_s)

    def read(self, name: str) -> bytes | None:
        self._wait()
        return super().read(name)

    def size(self, name: str) -> int | None:
        self._wait()
        return super().size(name)

    def write(self, name: str, content: bytes) -> None:
        self._wait()
        super().write(name, content)

    def create(self, name: str, content: bytes | Path) -> bool:
        self._wait()
        return super().create(name, content)

    def delete(self, name: str) -> None:
        self._wait()
        super().delete(name)

    def append(self, name: str, line: str) -> bool:
        return False

    def sizes(self, folder: str) -> dict[str, int]:
        found = super().sizes(folder)
        self._wait(1 + len(found) // PAGE_NAMES)
        return found

    def folders(self, folder: str) -> list[str]:
        found = super().folders(folder)
        self._wait(1 + len(found) // PAGE_NAMES)
        return found

    def sizes_by_prefix(self, folder: str, prefixes: Sequence[str]) -> Iterator[tuple[str, int]]:
        """Prefixes are asked for at the same time as `ObjectStore` does; the pages of one follow each other."""
        found: dict[str, list[tuple[str, int]]] = defaultdict(list)
        lengths = sorted({len(prefix) for prefix in prefixes})
        wanted = set(prefixes)
        for name, size in super().sizes(folder).items():
            for length in lengths:
                if name[:length] in wanted:
                    found[name[:length]].append((name, size))

        def listed(prefix: str) -> list[tuple[str, int]]:
            self._wait(1 + len(found[prefix]) // PAGE_NAMES)
            return found.pop(prefix)

        with ThreadPoolExecutor(LISTERS) as pool:
            for names in pool.map(listed, prefixes):
                yield from names


class Stopwatch:
    """Seconds of each phase, and the most memory the process has held by its end."""

    def __init__(self) -> None:
        self._since_s = time.perf_counter()
        self.phases: dict[str, tuple[float, int]] = {}

    def lap(self, phase: str) -> None:
        now_s = time.perf_counter()
        # Not `ru_maxrss`, which begins with that of the process that started this one.
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        peak_mb = int(status["VmHWM"].removesuffix("kB")) // 1024
        self.phases[phase] = (round(now_s - self._since_s, 2), peak_mb)
        self._since_s = now_s


def main(request_s: float, argv: list[str]) -> dict[str, Any]:
    """Plan, stand at the driver loop, then close the books as if a limit had stopped the run at once."""
    watch = Stopwatch()
    if request_s:

        def open_slowly(uri: str, **settings: Any) -> Store:
            return SlowStore(local_path(uri), request_s)

        driver_side.open_store = open_slowly
    job = compose_job(RenderJob, "render", argv)
    recipes = compose_recipes("render", argv)
    model_fingerprint = fingerprint(job.model.folder, job.model.name)
    watch.lap("compose")
    manifest, plan = driver_side.make_plan(job, recipes, model_fingerprint)
    watch.lap("plan")
    counts = {"done": len(plan.done), "to_render": len(plan.to_render), "rejected": len(plan.rejected)}

    def stand_still(driver: Driver) -> Ending:
        watch.lap("start")
        driver.ending.limit_reached = "the test has seen enough"
        driver._close(started=False)
        watch.lap("not started")
        return driver.ending

    # Everything is ready here; what follows would render.
    Driver.drive = stand_still
    run = driver_side.Run(job, recipes.usable, model_fingerprint, manifest, plan, StopRequest())
    code = run.execute()
    watch.lap("close")
    return {"phases": watch.phases, "counts": counts, "exit_code": code, "run_id": run.run_id}


if __name__ == "__main__":
    result = main(float(sys.argv[1]), sys.argv[2:])
    sys.stdout.write("\n" + json.dumps(result) + "\n")
