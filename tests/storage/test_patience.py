"""Time: how long a store that is away is waited for, and that a silent one never takes an operation for itself."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import StorageUnavailable, UsageError
from pipeline.storage import local_store
from pipeline.storage.filesystem import size_of
from pipeline.storage.local_store import LocalStore
from pipeline.storage.object_store import ObjectStore
from pipeline.storage.patience import QUICK, MayPass, Patience, keep_trying
from tests.chaos.s3_faults import Exchange, Fault, Request, faults_before
from tests.conftest import s3_at

ANSWER_TIMEOUT_S = 0.5
# Of an operation with that timeout: the client's two tries, each in two halves (taking the body, answering), the ending
# of an upload in parts, and slack for a busy machine.
BOUND_S = 10.0


def test_waits_grow_to_half_a_minute_and_end_before_the_limit() -> None:
    patience, elapsed_s, waits_s = Patience(600.0), 0.0, []
    while (wait_s := patience.wait_s(len(waits_s) + 1, elapsed_s, 1.0)) is not None:
        waits_s.append(wait_s)
        elapsed_s += wait_s
    assert waits_s == pytest.approx([0.2, 0.8, 3.2, 12.8, *[30.0] * 19])
    assert elapsed_s < 600 and patience.wait_s(10**6, 0.0, 1.5) == 45.0
    assert [QUICK.wait_s(failures, 0.0, 1.0) is None for failures in (1, 2, 3, 4)] == [False, False, False, True]


def away(times: int) -> Callable[[], str]:
    failures = iter(range(times))

    def call() -> str:
        if next(failures, None) is not None:
            raise MayPass("503 SlowDown")
        return "done"

    return call


def test_a_store_that_comes_back_after_minutes_costs_nothing_but_the_wait(caplog: pytest.LogCaptureFixture) -> None:
    waits_s: list[float] = []
    patience = Patience(600.0, pause=lambda wait_s: not waits_s.append(wait_s))
    with caplog.at_level(logging.WARNING, "pipeline.storage.patience"):
        assert keep_trying(away(8), patience, "writing s3://bucket/videos/a.mp4") == "done"
    assert len(waits_s) == 8 and 60 < sum(waits_s) < 220
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 8 and all(text.startswith("writing s3://bucket/videos/a.mp4 failed, trying") for text in said)


def test_who_does_not_want_to_wait_any_longer_is_let_go_at_once() -> None:
    with pytest.raises(StorageUnavailable, match="storage failed once while writing x: 503 SlowDown; run the same"):
        keep_trying(away(1), Patience(600.0, pause=lambda wait_s: False), "writing x")


def test_a_store_keeps_what_it_found_out_when_its_patience_changes(store: Any) -> None:
    store.is_exclusive = False
    other = store.with_patience(Patience(600.0))
    assert other.is_exclusive is False and other.root_uri == store.root_uri


def test_a_disk_behind_a_network_is_waited_for_and_another_error_of_it_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_link, errors, waits_s = local_store.os.link, [errno.ESTALE, errno.EIO], []

    def link(source: Path, path: Path) -> None:
        if errors:
            raise OSError(errors.pop(0), "away")
        real_link(source, path)

    monkeypatch.setattr(local_store.os, "link", link)
    store = LocalStore(tmp_path, patience=Patience(600.0, pause=lambda wait_s: not waits_s.append(wait_s)))
    assert store.create("a", b"x") is True and len(waits_s) == 2
    errors.append(errno.EROFS)
    with pytest.raises(StorageUnavailable, match="away"):
        store.create("b", b"x")
    assert len(waits_s) == 2


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes every connection and says nothing, nor reads what it is sent."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        with s3_at(f"http://127.0.0.1:{server.getsockname()[1]}"):
            yield "s3://bucket/out"
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


@contextmanager
def within(bound_s: float) -> Iterator[None]:
    begin_s = time.monotonic()
    yield
    assert time.monotonic() - begin_s < bound_s


@pytest.mark.parametrize(
    "operation", ["read", "size", "write", "create", "create file", "list", "delete folder", "parts"]
)
def test_an_endpoint_that_never_answers_ends_every_operation(silent: str, operation: str, tmp_path: Path) -> None:
    store = ObjectStore(silent, patience=Patience(0.1), answer_timeout_s=ANSWER_TIMEOUT_S)
    source = tmp_path / "source"
    with source.open("wb") as stream:
        stream.truncate((120 if operation == "parts" else 20) * 2**20)
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: store.read("a"),
        "size": lambda: store.size("a"),
        "write": lambda: store.write("a", b"x"),
        "create": lambda: store.create("a", b"x"),
        "create file": lambda: store.create("a", source),
        "parts": lambda: store.create("a", source),
        "list": lambda: store.sizes("a"),
        "delete folder": lambda: store.delete_folder("a"),
    }
    with within(BOUND_S), pytest.raises(StorageUnavailable, match="storage failed once while"):
        calls[operation]()


def test_an_endpoint_that_never_answers_is_said_before_a_run_starts(silent: str) -> None:
    store = ObjectStore(silent, patience=Patience(1.0), answer_timeout_s=ANSWER_TIMEOUT_S)
    with within(2 * BOUND_S), pytest.raises(StorageUnavailable):
        store.prepare()


def test_an_input_at_an_endpoint_that_never_answers_is_said_too(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.filesystem.INPUT_ANSWER_TIMEOUT_S", ANSWER_TIMEOUT_S)
    with within(2 * BOUND_S), pytest.raises(UsageError, match="must be readable, got"):
        size_of(f"{silent}/prompts.parquet")


class Dripping:
    """Passes bodies on a piece at a time, with pauses shorter than the timeout but much longer than it in all."""

    def choose(self, request: Request) -> Fault | None:
        return self._drip if request.method == "GET" else None

    async def _drip(self, exchange: Exchange) -> None:
        response = await exchange.forward()
        await exchange.reply(response, num_bytes=0)
        for start in range(0, len(response.body), 2**18):
            await asyncio.sleep(ANSWER_TIMEOUT_S / 2)
            exchange.writer.write(response.body[start : start + 2**18])
            await exchange.writer.drain()


def test_a_slow_transfer_that_moves_is_not_ended(bucket: str, s3_endpoint: str, tmp_path: Path) -> None:
    content = bytes(2 * 2**20)
    ObjectStore(bucket).write("a", content)
    with faults_before(s3_endpoint, Dripping()) as proxy, s3_at(proxy.url):
        store = ObjectStore(bucket, patience=Patience(0.0), answer_timeout_s=ANSWER_TIMEOUT_S)
        begin_s = time.monotonic()
        store.fetch("a", tmp_path / "copy")
        assert time.monotonic() - begin_s > 3 * ANSWER_TIMEOUT_S
    assert (tmp_path / "copy").read_bytes() == content
