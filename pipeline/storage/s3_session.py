"""The HTTP session of the S3 client, without the one wait that none of its timeouts bounds. Loads the S3 client."""

from __future__ import annotations

from typing import Any

from aiobotocore.httpsession import AIOHTTPSession


class UnannouncedSession(AIOHTTPSession):
    """Sends bodies at once. botocore announces them (`Expect: 100-continue`), and aiohttp waits for the go for ever."""

    async def send(self, request: Any) -> Any:
        # Not among the signed headers.
        request.headers.pop("Expect", None)
        return await super().send(request)
