"""What every request meets first: the token, the name of the host, counting, and an answer of one form for every failure."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from bpt_dist.commands.serve.access import Token, is_local_name
from bpt_dist.commands.serve.limits import Refused
from bpt_dist.commands.serve.metrics import Metrics

log = logging.getLogger(__name__)
OPEN = ("/health",)  # asked by probes, which have no token
GONE = 499  # counted where the client left; nobody reads it


def answer_of(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response that holds a JSON value."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return Response(text.encode() + b"\n", status, dict(headers or {}), media_type="application/json")


def refusal_of(refused: Refused) -> Response:
    """Return the response to a request that is not answered."""
    return answer_of({"error": {"kind": refused.kind, "message": refused.message}}, refused.status, refused.headers)


def failure(error: Exception) -> Refused:
    """Return what a client is told of an error of ours."""
    message = f"the request could not be answered ({type(error).__name__}); report it with the log of the server"
    return Refused(500, "internal", message, {"connection": "close"})


class Front:
    """Around the application: nothing behind it runs for somebody who may not ask, and no failure of it leaves a traceback."""

    def __init__(self, app: ASGIApp, metrics: Metrics, token: Token | None, *, local_only: bool) -> None:
        self.app, self.metrics, self.token, self.local_only = app, metrics, token, local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._admit(scope)
            await self.app(scope, receive, counted)
        except Refused as refused:
            await refusal_of(refused)(scope, receive, counted)
        except Exception as error:  # the application has answered by `failure`
            log.error("%s %s failed", scope["method"], ascii(scope["path"][:60]), exc_info=error)
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status or GONE)).inc()
        self.metrics.seconds.labels(route).observe(time.perf_counter() - began)

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self.token is None:
            if self.local_only and not is_local_name(headers.get(b"host", b"localhost")):
                raise Refused(403, "host", "this server answers its own machine; call it localhost, or start it with --token-file")
        elif scope["path"] not in OPEN and not self.token.is_given_by(headers.get(b"authorization", b"")):
            how = "send the token of the server as `Authorization: Bearer TOKEN`"
            raise Refused(401, "token", how, {"www-authenticate": "Bearer", "connection": "close"})


class PatientProtocol(H11Protocol):
    """HTTP/1.1, except that a connection is closed which does not finish the head of its next request in time."""

    head_seconds = 10.0

    def connection_made(self, transport: Any) -> None:
        """Look at the connection from time to time."""
        super().connection_made(transport)
        self._answered: object = None
        self._look = self.loop.call_later(self.head_seconds, self._close_if_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more."""
        self._look.cancel()
        super().connection_lost(exc)

    def _close_if_slow(self) -> None:
        """Close the connection where since the last look nothing was asked, though bytes of a head have come."""
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and self.cycle is self._answered and self.timeout_keep_alive_task is None:
            self.transport.abort()
            return
        self._answered = self.cycle if waiting else object()
        self._look = self.loop.call_later(self.head_seconds, self._close_if_slow)
