"""The README's performance table, made of the committed rows: of each measurement the newest. No torch here.

Reads rows of the scripts that `jobs.bench` replaced too. What was measured with a toy model or on a CPU is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.bench.rows import Row, read

Key = tuple[str, ...]
_TOY_MODEL = "nano"
# What the older scripts called contestants that there are still; their other rows are history.
_OLDER_STEPS = {
    "exact plain": "plain", "exact beside": "exact", "fp8 beside": "fp8", "diffusers eager": "diffusers",
    "diffusers compiled": "diffusers_compiled",
}  # fmt: skip
# All files of LTX-2.0 19B have one denoiser and one decoder; older rows do not say of which.
_OLDER_MODEL = "ltx2_19b_distilled"
_CLIPS = ("clip", "recipe", "precision", "load", "text", "denoise", "decode", "encode (beside)", "whole clip",
          "from an empty process", "peak GPU memory", "GPU capped at", "measured")  # fmt: skip
_STEPS = ("one denoiser step", "contestant", "seconds, median (least to most)", "TFLOP/s", "% of bf16 product",
          "% of fp8 product", "off by", "peak GPU memory", "measured")  # fmt: skip
_DECODES = (
    "decoding",
    "way",
    "seconds, median (least to most)",
    "TFLOP/s",
    "% of bf16 product",
    "peak GPU memory",
    "measured",
)


_BATCHES = ("batch", "clips", "recipe", "precision", "GPUs", "layouts", "wall", "clips a minute", "video s per s",
            "GPU s a clip, loaded", "$ a clip, loaded", "idle", "measured")  # fmt: skip
_LATENCIES = ("warm clip", "recipe", "precision", "pictures", "seconds to the commit, median (least to most)",
              "to the closed MP4", "text", "denoise", "upsample", "decode", "from the last frame to the close",
              "encode (beside)", "video s per s",
              "peak GPU memory", "GPU capped at", "measured")  # fmt: skip
_GANGS = ("one step on several GPUs", "layout", "contestant", "seconds, median (least to most)",
          "times one GPU's speed", "cosine against one GPU", "weights a GPU", "measured")  # fmt: skip
_ENCODES = ("encoding", "x264", "clip", "seconds, median (least to most)", "size", "measured")


_ON_DEVICE = ("text_encode", "denoise", "upsample", "decode")
_STAGES = (*_ON_DEVICE, "encode")
# What a clip of random weights is encoded from.
_PICTURES = ("natural", "as_decoded")


class _Line(NamedTuple):
    """A line of a table; a newer one of the same key takes its place."""

    key: Key
    cells: Sequence[str]


def performance_table(results: Path) -> str:
    """Markdown of all tables, each line with its date, hardware and version of torch."""
    steps = (*_older_peers(read(results, "peers")), *_older_steps(read(results, "kernels")),
             *_steps(read(results, "step")))  # fmt: skip
    decodes = (*_older_decodes(read(results, "decode")), *_decodes(read(results, "decode")))
    tables = [(_CLIPS, [*_clips(read(results, "clip"))]), (_STEPS, [*steps]), (_DECODES, [*decodes])]
    later = [
        (_LATENCIES, [*_latencies(read(results, "latency"))]),
        (_GANGS, [*_gangs(read(results, "gang"))]),
        (_BATCHES, [*_batches(read(results, "batch"))]),
        (_ENCODES, [*_encodes(read(results, "encode"))]),
    ]
    tables += [table for table in later if table[1]]
    return "\n".join(_markdown(head, _newest(lines)) for head, lines in tables)


def _newest(lines: Iterable[_Line]) -> list[Sequence[str]]:
    """Lines come oldest first. Shapes of a model stand together, small ones first; contestants as they first came."""
    newest = {line.key: line.cells for line in lines}
    return [newest[key] for key in sorted(newest, key=_size)]


def _size(key: Key) -> tuple[str, int]:
    model, shape, *_ = key
    return model, math.prod(map(int, shape.split("x")))


def _clips(rows: Iterable[Row]) -> Iterator[_Line]:
    for row in rows:
        if row["status"] != "rendered" or not _counts(row):
            continue
        shape, cap = f"{row['width']}x{row['height']}x{row['num_frames']}", row["gpu_memory_limit_gb"]
        key = (row["model"], shape, row["recipe"], row["precision"], str(cap))
        load = f"{row['load_s']:.1f} s, {row['load_gb_per_s']:.1f} GB/s"
        stages = (row[f"{stage}_s"] for stage in ("text_encode", "denoise", "decode", "encode", "wall"))
        # The first rows have no such time.
        empty = f"{row['first_clip_s']:.1f} s" if row.get("first_clip_s") else ""
        yield _Line(key, (
            f"{row['model']} {shape}", row["recipe"], row["precision"], load, *(f"{s:.1f} s" for s in stages),
            empty, _gigabytes(row["peak_gpu_memory_bytes"]), "" if cap is None else f"{cap:.0f} GB", _measured(row),
        ))  # fmt: skip


def _steps(rows: Iterable[Row]) -> Iterator[_Line]:
    for row in rows:
        for name, facts in row["contestants"].items() if _counts(row) else ():
            # A tier without one group of kernels says where time goes, not what a user gets.
            if "_without_" not in name:
                yield _step(row["model"], row["shape"], name, facts, _measured(row))


def _older_steps(rows: Iterable[Row]) -> Iterator[_Line]:
    for row in rows:
        for label, facts in row.get("steps", {}).items():
            shape, _, older = label.partition(" ")
            name = _OLDER_STEPS.get(older)
            found = facts | {"min_s": min(facts["all_s"]), "max_s": max(facts["all_s"])}
            streams = {stream: facts[key] for stream in ("video", "audio")
                       if (key := f"{stream} against exact plain") in facts}  # fmt: skip
            if name is not None:
                yield _step(_OLDER_MODEL, shape, name, found | {"difference": streams}, _measured(row))


def _older_peers(rows: Iterable[Row]) -> Iterator[_Line]:
    for row in rows:
        for older, by_shape in row["all"].items():
            name = _OLDER_STEPS.get(older)
            for shape, all_s in by_shape.items() if name is not None else ():
                if "x" in shape:
                    facts = {"median_s": row["median_s"][older][shape], "min_s": min(all_s), "max_s": max(all_s)}
                    yield _step(_OLDER_MODEL, shape, str(name), facts, _measured(row))


def _step(model: str, shape: str, name: str, facts: Row, measured: str) -> _Line:
    off = max((of["relative"] for of in facts.get("difference", {}).values()), default=None)
    cells = (
        f"{model} {shape}", f"`{name}`", *_speed(facts), "" if off is None else f"{off:.3f}",
        _gigabytes(facts.get("peak_gpu_memory_bytes")), measured,
    )  # fmt: skip
    return _Line((model, shape, name), cells)


def _decodes(rows: Iterable[Row]) -> Iterator[_Line]:
    for row in rows:
        for name, facts in row["contestants"].items() if "contestants" in row and _counts(row) else ():
            yield _decode(row["model"], row["shape"], name, facts, _measured(row))


def _older_decodes(rows: Iterable[Row]) -> Iterator[_Line]:
    for row in rows:
        for shape, ways in row["decode"].items() if "decode" in row else ():
            for name, facts in ways.items():
                found = {"least_of_3_s": facts["s"], "peak_gpu_memory_bytes": facts["peak_gb"] * 1e9}
                yield _decode(_OLDER_MODEL, shape, name, found, _measured(row))


def _decode(model: str, shape: str, name: str, facts: Row, measured: str) -> _Line:
    *speed, _ = _speed(facts)
    peak = _gigabytes(facts.get("peak_gpu_memory_bytes"))
    return _Line((model, shape, name), (f"{model} {shape}", f"`{name}`", *speed, peak, measured))


def _latencies(rows: Iterable[Row]) -> Iterator[_Line]:
    for row in rows:
        cap = row["gpu_memory_limit_gb"]
        shown_cap = "" if cap is None else f"{cap:.0f} GB"
        for name, facts in row["contestants"].items() if _counts(row) else ():
            for pictures in _PICTURES:
                key = (row["model"], row["shape"], row["recipe"], name, pictures, str(cap))
                cells = (f"{row['model']} {row['shape']}", row["recipe"], name, pictures.replace("_", " "),
                         *_latency(facts, pictures), shown_cap, _measured(row))  # fmt: skip
                yield _Line(key, cells)


def _latency(facts: Row, pictures: str) -> tuple[str, ...]:
    """Seconds from the call to the commit, to the closed file, and of each stage; seconds of video a second; memory."""
    found = facts.get("pictures", {}).get(pictures, {})
    seconds, *_ = _speed(facts | found)
    if not found or "error" in facts:
        return (seconds, *[""] * (len(_STAGES) + 4))
    # The first rows have no such time.
    closed = rest = ""
    if "closed_s" in found:
        closed_s = found["closed_s"]
        closed, rest = (f"{s:.2f} s" for s in (closed_s, closed_s - sum(found[f"{stage}_s"] for stage in _ON_DEVICE)))
    *stages, encode = (f"{found[f'{stage}_s']:.2f} s" for stage in _STAGES)
    memory = _gigabytes(found["peak_gpu_memory_bytes"])
    return seconds, closed, *stages, rest, encode, f"{found['real_time_factor']:.2f}", memory


def _gangs(rows: Iterable[Row]) -> Iterator[_Line]:
    for row in rows:
        for name, facts in row["contestants"].items() if _counts(row) else ():
            model, shape, layout = row["model"], row["shape"], row["layout"]
            seconds, *_ = _speed(facts)
            # Of a time that means nothing there is no speed-up either.
            counts = "median_s" in facts and "error" not in facts
            faster = facts.get("speed_up") if counts else None
            cosine = min((of["cosine"] for of in facts.get("against_alone", {}).values()), default=None)
            cells = (
                f"{model} {shape}", layout, f"`{name}`", seconds, "" if faster is None else f"{faster:.2f}",
                "" if cosine is None else f"{cosine:.5f}", _gigabytes(facts.get("weights_bytes")), _measured(row),
            )  # fmt: skip
            yield _Line((model, shape, layout, name), cells)


def _batches(rows: Iterable[Row]) -> Iterator[_Line]:
    for row in rows:
        if row["num_rendered"] < row["num_clips"] or not _counts(row):
            continue
        shape = f"{row['width']}x{row['height']}x{row['num_frames']}"
        layouts = ", ".join(f"{count} {layout}" for layout, count in sorted(row["layouts"].items()))
        gpus, cap = str(row["num_gpus"]), str(row["gpu_memory_limit_gb"])
        cells = (
            f"{row['model']} {shape}", str(row["num_clips"]), row["recipe"], row["precision"], gpus, layouts,
            f"{row['wall_s']:.1f} s", f"{row['clips_a_minute']:.2f}", f"{row['video_s_per_s']:.2f}",
            f"{row['gpu_seconds_a_clip_loaded']:.1f}", f"{row['cost_usd_a_clip_loaded']:.4f}",
            f"{100 * row['idle_share']:.0f} %", _measured(row),
        )  # fmt: skip
        # The same batch under other settings is another line.
        key = (row["model"], shape, row["recipe"], row["precision"], gpus, cap, *row["arguments"])
        yield _Line(key, cells)


def _encodes(rows: Iterable[Row]) -> Iterator[_Line]:
    for row in rows:
        settings = row["settings"]
        x264 = f"{settings['preset']}, CRF {settings['crf']}, {settings['x264_threads']} threads"
        # On the host of a GPU: another machine's cores say nothing of it.
        for name, facts in row["contestants"].items() if row["hardware"]["gpus"] else ():
            size = f"{facts['size_bytes'] / 1e6:.1f} MB"
            cells = (row["shape"], x264, name, _seconds(facts), size, _measured(row))
            yield _Line((x264, row["shape"], name), cells)


def _counts(row: Row) -> bool:
    return bool(row["hardware"]["gpus"]) and row["model"] != _TOY_MODEL


def _speed(facts: Row) -> tuple[str, ...]:
    """Seconds, TFLOP/s and percent of products in bfloat16 and float8; of a time that means nothing, why."""
    for why in ("failure", "not_comparable", "error"):
        if why in facts:
            return why.replace("_", " "), "", "", ""
    if "least_of_3_s" in facts:
        return f"{facts['least_of_3_s']:.3f} (least of 3)", "", "", ""
    percentages = (facts.get(name) for name in ("percent_of_bf16_gemm", "percent_of_fp8_gemm"))
    return _seconds(facts), _rate(facts), *map(_number, percentages)


def _seconds(facts: Row) -> str:
    return f"{facts['median_s']:.3f} ({facts['min_s']:.3f} to {facts['max_s']:.3f})"


def _rate(facts: Row) -> str:
    """TFLOP/s by a dense step's operations, and by those that were executed where these are others."""
    effective, executed = facts.get("tflops"), facts.get("executed_tflops")
    if effective == executed or executed is None:
        return _number(effective)
    return f"{_number(effective)} effective, {_number(executed)} executed"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _gigabytes(num_bytes: float | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e9:.1f} GB"


def _measured(row: Row) -> str:
    """When, on what, with which torch. Older rows name the device and the version alone."""
    hardware = row["hardware"]
    device = hardware if isinstance(hardware, str) else hardware["gpus"][0].split(",")[0]
    torch = row["torch"] if "torch" in row else row["versions"]["torch"]
    return f"{row['at'][:16].replace('T', ' ')}, {re.sub('^NVIDIA ', '', device)}, torch {torch}"


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
