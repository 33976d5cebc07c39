"""The fsspec client of a URI, with every wait for the network bounded.

By itself s3fs tries 5 times what botocore tries 5 times, 15 s each; and nothing bounds the sending of a body to a
server that takes none of it.
"""

from __future__ import annotations

import socket
from functools import partial
from typing import Any

from fsspec.core import url_to_fs

# A request is given up when its connection stands still for so long: no answer begins, no byte comes, none is taken.
# A slow transfer goes on for as long as it moves.
ANSWER_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
# What the S3 client tries by itself: a part of a large upload that fails once must not cost all the others.
CLIENT_TRIES = 2
# Of one S3 client. Requests that queue for a connection would wait for others' timeouts beside their own.
MAX_CONNECTIONS = 64


def client_of(uri: str, *, tries: int, answer_timeout_s: float = ANSWER_TIMEOUT_S, **options: Any) -> tuple[Any, str]:
    """The file system of `uri` and the path in it; on S3 a request is tried `tries` x CLIENT_TRIES times in all.

    ImportError or ValueError if fsspec does not know the URI. Time limits of other clients than s3fs are their own.
    """
    if not uri.startswith(("s3://", "s3a://")):
        fs, path = url_to_fs(uri, **options)
        return fs, str(path)
    # Imported where it is called: the S3 client loads only where there is a bucket.
    from pipeline.storage.s3_session import UnannouncedSession

    config = {
        "connect_timeout": min(CONNECT_TIMEOUT_S, answer_timeout_s),
        "read_timeout": answer_timeout_s,
        "retries": {"mode": "standard", "total_max_attempts": CLIENT_TRIES},
        "max_pool_connections": MAX_CONNECTIONS,
        "http_session_cls": UnannouncedSession,
        "connector_args": {"socket_factory": partial(_socket, round(1000 * answer_timeout_s))},
    }
    fs, path = url_to_fs(uri, config_kwargs=config, **options)
    fs.retries = tries
    return fs, str(path)


def _socket(stalled_after_ms: int, address: tuple[Any, ...]) -> socket.socket:
    """A socket for `address` (a row of getaddrinfo) that breaks when its peer takes nothing for so long.

    The read timeout of the client only begins when the whole body is sent.
    """
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, stalled_after_ms)
    return made
