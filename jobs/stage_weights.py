"""Place a model's files and their fingerprint on this node or in a bucket: fetch what is missing, check it by hash.

Builds the `nano` model, whose files are our own. `list=true` shows what the sources of a model hold.
"""

from __future__ import annotations

import jobs.interrupts  # noqa: F401 - first, so that a signal during slow imports is exit 5

# isort: split

import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jobs.entry import StageWeightsJob, compose_job, run_job
from pipeline.config.model import ModelConfig
from pipeline.storage.filesystem import is_local, local_path
from pipeline.storage.hub import fetch, list_source, repository_of
from pipeline.storage.models import Files, copy_to, stage, staged_files

TERMINAL_EVERY_S = 0.25
LOG_EVERY_S = 5.0


def stage_model(model: ModelConfig, extras: Mapping[str, str]) -> str:
    """Make sure that the files of `model` are there, building or fetching them; returns the fingerprint.

    `extras` are the adapters (name -> file) to place as well; those that are there stay in the books.
    """
    if is_local(model.folder):
        return _stage_in(local_path(model.folder), model, extras, {})
    # Through a folder of this node that is kept until all is there, so that a killed staging goes on.
    folder = Path(model.cache).expanduser() / "staging" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    kept = staged_files(model.folder, model.name, {*model.parts().values(), *model.extras().values()})
    fingerprint = _stage_in(folder, model, extras, kept)
    copy_to(model.folder, folder)
    shutil.rmtree(folder)
    return fingerprint


def _stage_in(folder: Path, model: ModelConfig, extras: Mapping[str, str], kept: Mapping[str, Files]) -> str:
    """Place and hash in `folder` what is not in `kept`, which lies where the model is going to."""

    def absent(names: Mapping[str, str]) -> dict[str, str]:
        return {name: file for name, file in names.items() if file not in kept and not (folder / file).exists()}

    parts = model.parts()
    known: dict[str, str] = {}
    wanted = _wanted(model, {name: file for name, file in {**parts, **extras}.items() if file not in kept})
    if model.built_here and absent({**parts, **model.extras()}):
        # Torch loads only where it is needed: staging published files is hashing.
        from pipeline.engine.nano import build_nano

        sys.stderr.write(f"building the {model.name} model in {folder}\n")
        build_nano(folder)
    elif not all((folder / path).exists() for path in wanted):
        sys.stderr.write(f"fetching {model.name} into {folder}; licence: {model.license}\n")
        progress = Progress()
        known = fetch(folder, wanted, on_start=progress.start, on_bytes=progress.add)
    present = {name: file for name, file in model.extras().items() if not absent({name: file})}
    return stage(folder, model.name, parts, {**present, **extras}, known, kept)


def list_files(model: ModelConfig) -> str:
    """Every file of the repositories that `model` names, with its size and what the model uses it as."""
    used = {uri.rstrip("/"): name for name, uri in model.sources.items()}
    lines = []
    for source in dict.fromkeys(repository_of(uri) for uri in used):
        for file in list_source(source):
            part = next((name for uri, name in used.items() if f"{file.uri}/".startswith(f"{uri}/")), "")
            lines.append(f"{_size(file.size_bytes):>9}  {file.uri}  {part}".rstrip())
    return "\n".join(lines)


def _wanted(model: ModelConfig, names: Mapping[str, str]) -> dict[str, str]:
    """Where to fetch what from: path relative to the folder -> URI, for those of `names` that have a source."""
    wanted = {}
    for key, uri in model.sources.items():
        part, slash, within = key.partition("/")
        if part in names:
            wanted[names[part] + slash + within] = uri
    return wanted


@dataclass
class Progress:
    """Bytes so far, their rate and the time left: a line that rewrites itself, or every 5 s where nobody looks."""

    total: int = 0
    there: int = 0
    came: int = 0
    started_s: float = 0.0
    shown_s: float = 0.0
    terminal: bool = field(default_factory=sys.stderr.isatty)

    def start(self, total: int, there: int) -> None:
        self.total, self.there = total, there
        self.started_s = self.shown_s = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self.came += num_bytes
        now_s = time.monotonic()
        done = self.there + self.came == self.total
        if not done and now_s - self.shown_s < (TERMINAL_EVERY_S if self.terminal else LOG_EVERY_S):
            return
        self.shown_s = now_s
        line = self.line(now_s - self.started_s)
        sys.stderr.write(f"\r{line}\x1b[K" + ("\n" if done else "") if self.terminal else f"{line}\n")
        sys.stderr.flush()

    def line(self, elapsed_s: float) -> str:
        """`12.1 of 67.6 GB  310.2 MB/s  179 s left`; the rate is of what came since this process started."""
        rate = self.came / max(elapsed_s, 1e-9)
        so_far = self.there + self.came
        left_s = (self.total - so_far) / max(rate, 1e-9)
        return f"{_size(so_far)} of {_size(self.total)}  {rate / 1e6:.1f} MB/s  {left_s:.0f} s left"


def _size(num_bytes: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"


def main(argv: list[str]) -> int:
    job = compose_job(StageWeightsJob, "stage_weights", argv)
    if job.list:
        sys.stdout.write(list_files(job.model) + "\n")
        return 0
    fingerprint = stage_model(job.model, job.chosen_extras)
    sys.stdout.write(f"{job.model.name} staged in {job.model.folder}, fingerprint {fingerprint}\n")
    return 0


if __name__ == "__main__":
    run_job(main)
