"""transport: one request to an endpoint, bounded as a whole, from the connection to the last byte.

The HTTP client bounds the gaps between bytes, follows redirects, and unpacks what comes. Here the time of all
of it is bounded, nothing is followed, the body is cut, and what is packed without being asked for is refused.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import openai

MAX_BODY_BYTES = 4 * 2**20  # a chat completion of 100,000 tokens with its reasoning is less than 2 MiB
CUT = "grpo_cut"  # in a response's extensions: why its body is not all there
_OF_THE_BODY = (b"content-encoding", b"content-length", b"transfer-encoding")
# The HTTP library below `openai`: httpx or httpx2, by its release. Only its own errors are repeated there.
_HTTP: Any = sys.modules[openai.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]]


# What the HTTP library raises for an address, and for proxies and certificates that the environment names.
CannotConnect = (_HTTP.InvalidURL, ImportError, OSError, ValueError)
# The package adds an organisation, a project and headers that the environment holds for another endpoint.
_SENT = ("host", "accept", "connection", "content-length", "content-type", "user-agent")


class BoundedClient(openai.DefaultAsyncHttpxClient):
    """The HTTP client of the `openai` package, which waits for its turn before a request.

    authorization: what the header of that name holds. Raises one of CannotConnect.
    """

    def __init__(
        self, timeout_s: float, take_turn: Callable[[], Awaitable[None]], authorization: str
    ) -> None:
        for proxy in getproxies().values():
            _ = urlsplit(proxy).port  # a ValueError now, and not the library's when it connects
        # What is asked goes to the endpoint that is named, and nowhere else.
        super().__init__(follow_redirects=False, timeout=timeout_s)
        self._timeout_s, self._take_turn, self._authorization = timeout_s, take_turn, authorization

    async def send(self, request: Any, **options: Any) -> Any:
        """The response, with at most MAX_BODY_BYTES of its body. Raises the library's ReadTimeout."""
        asked = self._asked(request)
        await self._take_turn()
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await super().send(asked, **{**options, "stream": True})
                try:
                    body, cut = await _read(response)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise _HTTP.ReadTimeout("the request took too long", request=request) from error
        headers = [pair for pair in response.headers.raw if pair[0].lower() not in _OF_THE_BODY]
        more = {"headers": headers, "content": body, "request": request, "extensions": {CUT: cut}}
        return type(response)(response.status_code, **more)

    def _asked(self, request: Any) -> Any:
        """The request as it is sent: the package looks at what it put into its own."""
        headers = {name: value for name, value in request.headers.items() if name in _SENT}
        headers["authorization"] = self._authorization
        headers["accept-encoding"] = "identity"  # unpacked, a megabyte may be a gigabyte
        more = {"headers": headers, "content": request.content, "extensions": request.extensions}
        return type(request)(request.method, request.url, **more)


async def _read(response: Any) -> tuple[bytes, str | None]:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        return b"", f"a body in content-encoding {encoding}, which was not asked for"
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return bytes(body[:MAX_BODY_BYTES]), f"a body of more than {MAX_BODY_BYTES // 2**20} MiB"
    return bytes(body), None
