"""A proxy in front of an S3 server that breaks what passes: refuses, forgets, delays, hangs up, by a seeded plan.

What reaches the server behind is real, so what a fault leaves there is too. Which faults there are: `FAULTS`.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

SLOW_S = 0.3
# A client that never gives up is let go, so that no test hangs with it.
HANG_S = 60.0
_OWN_HEADERS = ("connection", "keep-alive", "transfer-encoding")


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_conditional_put(self) -> bool:
        return self.method in ("PUT", "POST") and "if-none-match" in self.headers

    def without(self, name: str) -> Request:
        return Request(self.method, self.target, {k: v for k, v in self.headers.items() if k != name}, self.body)


@dataclass(frozen=True)
class Response:
    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Exchange:
    """One request of a client, and what a fault can do with it."""

    request: Request
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    upstream: tuple[str, int]

    async def forward(self, request: Request | None = None) -> Response:
        request = request or self.request
        reader, writer = await asyncio.open_connection(*self.upstream)
        try:
            headers = {**request.headers, "connection": "close", "content-length": str(len(request.body))}
            writer.write(_head(f"{request.method} {request.target} HTTP/1.1", headers) + request.body)
            status, headers = await _read_head(reader)
            _, code, *reason = status.split(" ", 2)
            rest = await reader.read()
        finally:
            writer.close()
        chunked = headers.get("transfer-encoding") == "chunked"
        return Response(int(code), "".join(reason), headers, _joined(rest) if chunked else rest)

    async def reply(self, response: Response, *, num_bytes: int | None = None) -> None:
        """Answer the client; with `num_bytes` only so many of the body's."""
        headers = {name: value for name, value in response.headers.items() if name not in _OWN_HEADERS}
        if self.request.method != "HEAD":
            headers["content-length"] = str(len(response.body))
        head = _head(f"HTTP/1.1 {response.status} {response.reason}", headers)
        body = b"" if self.request.method == "HEAD" else response.body[:num_bytes]
        self.writer.write(head + body)
        await self.writer.drain()

    async def refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>a fault of the test</Message></Error>".encode()
        await self.reply(Response(status, code, {"content-type": "application/xml"}, body))

    def hang_up(self) -> None:
        self.writer.transport.abort()


Fault = Callable[[Exchange], Awaitable[None]]


def refusing(status: int, code: str) -> Fault:
    return lambda exchange: exchange.refuse(status, code)


async def pass_on(exchange: Exchange) -> None:
    await exchange.reply(await exchange.forward())


async def forget_the_condition(exchange: Exchange) -> None:
    """As a store does that has no conditional puts: it overwrites."""
    await exchange.reply(await exchange.forward(exchange.request.without("if-none-match")))


async def _lose_and_repeat(exchange: Exchange) -> None:
    """The put is done, its answer is lost on the way, something between sends it again: it meets itself."""
    response = await exchange.forward()
    if response.status == 200:
        await exchange.refuse(412, "PreconditionFailed")
    else:
        await exchange.reply(response)


async def _hang_up_before(exchange: Exchange) -> None:
    exchange.hang_up()


async def _hang_up_after(exchange: Exchange) -> None:
    await exchange.forward()
    exchange.hang_up()


async def _be_slow(exchange: Exchange) -> None:
    await asyncio.sleep(SLOW_S)
    await pass_on(exchange)


async def _be_silent(exchange: Exchange) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(exchange.reader.read(1), HANG_S)
    exchange.hang_up()


async def _truncate(exchange: Exchange) -> None:
    response = await exchange.forward()
    await exchange.reply(response, num_bytes=len(response.body) // 2)
    exchange.writer.close()


FAULTS: dict[str, Fault] = {
    "500": refusing(500, "InternalError"),
    "503": refusing(503, "SlowDown"),
    "409": refusing(409, "ConditionalRequestConflict"),
    "412 of a put that was done": _lose_and_repeat,
    "closed before": _hang_up_before,
    "closed after": _hang_up_after,
    "slow": _be_slow,
    "silent": _be_silent,
    "truncated": _truncate,
}
_OF_CONDITIONAL_PUTS = ("409", "412 of a put that was done")


class Plan(Protocol):
    def choose(self, request: Request) -> Fault | None:
        """What happens to a request instead of being passed on; None passes it on."""
        ...


@dataclass
class SeededPlan:
    """A share of the requests meets a fault, each kind that suits the request as likely as another.

    Which request is which depends on the order in which they come; one by one, the same seed gives the same faults.
    """

    seed: int
    share: float
    # No more than so many faults in all, after which everything passes.
    max_faults: int | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def choose(self, request: Request) -> Fault | None:
        is_due = self._random.random() < self.share
        suiting = [kind for kind in FAULTS if _suits(kind, request)]
        kind = self._random.choice(suiting)
        if not is_due or (self.max_faults is not None and self.counts.total() >= self.max_faults):
            return None
        self.counts[kind] += 1
        return FAULTS[kind]


def _suits(kind: str, request: Request) -> bool:
    if kind in _OF_CONDITIONAL_PUTS:
        return request.is_conditional_put
    return kind != "truncated" or request.method == "GET"


class S3FaultProxy:
    """Serves at `url`, on a thread of its own, what the S3 server at `upstream_url` does, but for what `plan` says."""

    def __init__(self, upstream_url: str, plan: Plan) -> None:
        parts = urlsplit(upstream_url)
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        self._plan = plan
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.num_requests = 0
        self._thread = threading.Thread(target=self._loop.run_forever, name="s3-faults", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A client that hangs up, and the end of the test, end a connection at any moment.
        with suppress(asyncio.CancelledError, asyncio.IncompleteReadError, OSError):
            while not writer.is_closing():
                request = await _read_request(reader, writer)
                self.num_requests += 1
                fault = self._plan.choose(request)
                await (fault or pass_on)(Exchange(request, reader, writer, self._upstream))
        writer.close()


@contextmanager
def faults_before(upstream_url: str, plan: Plan) -> Iterator[S3FaultProxy]:
    proxy = S3FaultProxy(upstream_url, plan)
    try:
        yield proxy
    finally:
        proxy.stop()


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    line, headers = await _read_head(reader)
    method, target, _ = line.split(" ")
    if headers.pop("expect", "") == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get("transfer-encoding") == "chunked":
        raise AssertionError("S3 clients say how long a body is")
    return Request(method, target, headers, await reader.readexactly(int(headers.get("content-length", 0))))


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
    """The first line, and the headers by their names in small letters."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    pairs = (line.split(":", 1) for line in lines)
    return first, {name.strip().lower(): value.strip() for name, value in pairs}


def _head(first: str, headers: Mapping[str, str]) -> bytes:
    return "\r\n".join([first, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode("latin-1")


def _joined(chunks: bytes) -> bytes:
    """The body that was sent in chunks."""
    body = b""
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        num_bytes = int(size.partition(b";")[0], 16)
        body, chunks = body + chunks[:num_bytes], chunks[num_bytes + 2 :]
        if num_bytes == 0:
            break
    return body
