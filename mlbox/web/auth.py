"""The gate: the outermost layer, through which every request comes. Nothing behind it meets an unknown asker.

In this order: is the Host one of ours, who asks, did a browser's request come from our own pages; then the route, whose
own permission is checked there. It also turns what went wrong into an answer and puts the security headers on
every one.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlbox.errors import Denied, Invalid, Unauthenticated
from mlbox.identity import Identity
from mlbox.web import hosts, problems
from mlbox.web.credentials import Credentials
from mlbox.web.negotiation import accepts_events
from mlbox.web.problems import Problem, problem_of
from mlbox.web.throttle import Throttle

COOKIE = "mlbox_session"
SECURE_COOKIE = "__Host-mlbox_session"
"""Over TLS: the prefix keeps other hosts of the same domain from setting it (RFC 6265bis)."""
_ONCE = frozenset({b"authorization", b"cookie", b"origin", b"sec-fetch-site", b"sec-fetch-mode"})
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
    (b"cache-control", b"no-store"),
)
"""On every answer that does not set them itself."""


class Meter(Protocol):
    """Counts answers."""

    def answered(self, method: str, status: int) -> None: ...


class Gate:
    """An ASGI app around the routes. `open_paths` are the (method, path) pairs that need no credential."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        credentials: Credentials,
        owner: Identity,
        host_names: frozenset[str],
        open_paths: frozenset[tuple[str, str]],
        error_page: Callable[[Scope, Problem], Response],
        meter: Meter,
        throttle: Throttle,
    ) -> None:
        self._app = app
        self._credentials = credentials
        self._owner = owner
        self._host_names = host_names
        self._open_paths = open_paths
        self._error_page = error_page
        self._meter = meter
        self._throttle = throttle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # lifespan: a server's own message, nobody asks
            await self._app(scope, receive, send)
            return
        started = False

        async def dressed(message: Message) -> None:
            nonlocal started
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                started = True
                _dress(message)
                self._meter.answered(scope.get("method", "WEBSOCKET"), message["status"])
            await send(message)

        try:
            await self._admit(scope)
            await self._app(scope, receive, dressed)
        except ClientDisconnect:
            pass
        except Exception as error:
            if started:  # too late for an answer: the server logs it and cuts the connection, so that it is seen
                raise
            await self._tell(problem_of(error), scope, receive, dressed)

    async def _admit(self, scope: Scope) -> None:
        """Set `scope["identity"]`, or raise what the asker is to be told."""
        headers, hosts_named = _read(scope)
        peer: tuple[int, int, int] | None = scope.get("extensions", {}).get("peercred")
        host = hosts.host_of(hosts_named)
        if peer is None:  # a web page cannot open a Unix socket, so any name does there
            server: tuple[str, int] | None = scope.get("server")
            hosts.check_host(host, self._host_names, server[0] if server else None)
        elif peer[1] != self._owner.uid:
            raise Denied(
                f"this mlbox is {self._owner.user}'s own (uid {self._owner.uid}) and runs jobs for nobody else; "
                f"you are uid {peer[1]}"
            )
        method: str = scope.get("method", "WEBSOCKET")
        if (method, scope["path"]) in self._open_paths:
            scope["identity"] = None
            return
        scope["identity"] = await self._identify(scope, method, headers, peer is not None)

    async def _identify(self, scope: Scope, method: str, headers: Mapping[bytes, bytes], on_socket: bool) -> Identity:
        authorization = headers.get(b"authorization")
        if authorization is not None:  # said explicitly, so it counts, even where the socket would grant more
            return await self._bearer(scope, authorization)
        if on_socket:
            return self._owner
        secret = cookie_of(headers.get(b"cookie", b""), scope)
        if secret is None:
            raise Unauthenticated(
                "no credential: send Authorization: Bearer mlbx_..., use the Unix socket, or sign in at /login"
            )
        known = self._credentials.of_session(secret)
        if known is None:
            self._throttle.count_failure(scope)
            raise Unauthenticated("this browser session has ended: sign in again at /login")
        streams = accepts_events(headers.get(b"accept", b"").decode("latin-1")) or method == "WEBSOCKET"
        hosts.check_origin(method, headers, streams=streams)
        scope["expires_at"] = known.expires_at
        return known.identity

    async def _bearer(self, scope: Scope, authorization: bytes) -> Identity:
        kind, _, secret = authorization.decode("latin-1").strip().partition(" ")
        known = await self._credentials.of_token(secret.strip()) if kind.lower() == "bearer" else None
        if known is None:
            self._throttle.count_failure(scope)
            raise Unauthenticated("this token is not known here, has expired or was revoked")
        scope["expires_at"] = known.expires_at
        return known.identity

    async def _tell(self, problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()  # the handshake
            await send({"type": "websocket.close", "code": 1008})
            return
        accept = next((value for name, value in scope["headers"] if name == b"accept"), b"*/*").decode("latin-1")
        page = None if scope["path"].startswith("/api/") else partial(self._error_page, scope)
        await problems.answer(problem, accept, page)(scope, receive, send)


def cookie_of(header: bytes, scope: Scope) -> str | None:
    """The session's secret in a Cookie header. Raises Unauthenticated where there are two: one is not ours."""
    name = cookie_name(scope)
    pairs = (pair.strip().partition("=") for pair in header.decode("latin-1").split(";"))
    found = [value for key, _, value in pairs if key == name]
    if len(found) > 1:
        raise Unauthenticated(f"this browser sent two cookies called {name}: remove the cookies of this host")
    return found[0] if found else None


def cookie_name(scope: Scope) -> str:
    return SECURE_COOKIE if scope.get("scheme") == "https" else COOKIE


def _read(scope: Scope) -> tuple[dict[bytes, bytes], list[bytes]]:
    """The headers by name, and every Host. Raises Invalid where one that decides who asks is there twice."""
    headers: dict[bytes, bytes] = {}
    named: list[bytes] = []
    for name, value in scope["headers"]:
        if name == b"host":
            named.append(value)
        elif name in _ONCE and name in headers:
            raise Invalid(f"the header {name.decode('latin-1')} is there twice")
        headers[name] = value
    return headers, named


def _dress(message: Message) -> None:
    headers: list[tuple[bytes, bytes]] = list(message.get("headers", ()))
    given = {name.lower() for name, _ in headers}
    headers += [pair for pair in _HEADERS if pair[0] not in given]
    message["headers"] = headers
