"""HTTP plumbing for the daemon and the inference server: listening sockets, deadlines, peer credentials, a quiet stop.

uvicorn 0.54 has no deadline for a request's head or body and no limit for its head, and knows nothing of who is at
the other end of a Unix socket. One subclass of its protocol adds these. It is also the place where a server may
answer a hot route without an ASGI task: pass a subclass of `Protocol` to `Config`.
"""

import asyncio
import contextlib
import errno
import math
import os
import socket
import stat
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, NamedTuple, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from mlbox.errors import Unavailable

BACKLOG = 2048
_READ_BYTES = 256 << 10
"""The most that one read of the event loop brings: a head that came in whole is measured by its fields instead."""
_PIPELINED_MAX = 64
"""Requests that may wait on one connection behind the one being answered. Each costs a few KiB, and one read of the
event loop can bring thousands."""
_LINGER_S = 5.0
"""How long the rest of a body is read and thrown away after an early answer (413, 401): a client that is still
writing would otherwise meet a reset connection and never see the answer."""


class PeerCredentials(NamedTuple):
    """Who is at the other end of a Unix socket, as the kernel saw it at connect (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How patient a server is with a connection; seconds and bytes."""

    header_timeout_s: float = 10.0
    """From connecting, or from the first byte of a later request, to the end of its head."""
    body_timeout_s: float = 60.0
    """The longest silence within a body."""
    keep_alive_s: int = 75
    """How long an idle connection is kept between requests."""
    header_bytes: int = 16 << 10
    """The largest head: request line and fields."""


def plain_text(status: int, message: str) -> tuple[bytes, bytes]:
    """Content type and body of an answer that the protocol gives itself, before any route is known."""
    return b"text/plain; charset=utf-8", message.encode()


class _Receiving(Enum):
    NOTHING = auto()
    HEAD = auto()
    BODY = auto()


class Protocol(HttpToolsProtocol):
    """One connection: uvicorn's httptools protocol with deadlines, a limit for the head, and the peer's identity.

    `scope["extensions"]["peercred"]` is a PeerCredentials on a Unix socket and missing on TCP.
    """

    def __init__(
        self,
        config: "Config",
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.limits = config.limits
        self._error_body = config.error_body
        self._peer: PeerCredentials | None = None
        self._receiving = _Receiving.NOTHING
        self._refused = False
        self._head_bytes = 0
        self._silent_bytes = 0  # what came in since the last callback that brought something on
        self._body_chunks = 0
        self._body_at = 0.0
        # One lazy timer: `_due` moves with every request, the timer only looks at it when it fires.
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._peer = peer_credentials(transport)
        self._expect(self.limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._due = None
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._receiving is _Receiving.NOTHING and self._due is None:
            self._expect(self.limits.header_timeout_s)  # also blank lines before a request count against it
        chunks = self._body_chunks
        super().data_received(data)
        if self._receiving is _Receiving.NOTHING or self._body_chunks != chunks:
            self._silent_bytes = 0
            return
        # An endless field, chunk extension or trailer grows inside the parser, without any callback.
        self._silent_bytes += len(data)
        if self._silent_bytes > self.limits.header_bytes + _READ_BYTES:
            self.refuse(431, "The head of the request is too large.")

    # What the parser calls

    def on_message_begin(self) -> None:
        if self._refused:
            return
        if len(self.pipeline) >= _PIPELINED_MAX:
            self.refuse(429, "Too many requests are waiting on this connection.")
            return
        super().on_message_begin()
        self._receiving = _Receiving.HEAD
        self._head_bytes = 0
        if self._due is None:
            self._expect(self.limits.header_timeout_s)
        if self._peer is not None:
            cast(dict[str, Any], self.scope)["extensions"] = {"peercred": self._peer}

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._refused:
            return
        self._head_bytes += len(name) + len(value) + 4
        if self._receiving is _Receiving.BODY:  # a trailer: nobody asked for it
            if self._head_bytes > self.limits.header_bytes:
                self.refuse(431, "The trailer of the request is too large.")
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._refused:
            return
        if self._head_bytes + len(self.url) > self.limits.header_bytes:
            self.refuse(431, f"The head of a request may have {self.limits.header_bytes} bytes.")
            return
        super().on_headers_complete()  # raises for an address that is none: then the head is all there was
        self._receiving = _Receiving.BODY
        self._body_at = self.loop.time()
        self._expect(self.limits.body_timeout_s)

    def on_body(self, body: bytes) -> None:
        if self._refused:
            return
        self._body_chunks += 1
        self._body_at = self.loop.time()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._refused:
            return
        self._receiving = _Receiving.NOTHING
        self._due = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._receiving is _Receiving.BODY and not self.transport.is_closing():
            self._expect(_LINGER_S)

    # Deadlines

    def _expect(self, seconds: float) -> None:
        """The present part of the request has to be here within `seconds`."""
        self._due = self.loop.time() + seconds
        if self._timer is None or self._timer.when() > self._due:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_at(self._due, self._look_at_deadline)

    def _look_at_deadline(self) -> None:
        self._timer = None
        if self._due is None or self.transport.is_closing():
            return
        if self._answering and self._receiving is _Receiving.BODY:
            # While reading is paused it is our own app that is slow, not the client.
            since = self.loop.time() if self.flow.read_paused else self._body_at
            self._due = max(self._due, since + self.limits.body_timeout_s)
        if self._due > self.loop.time():
            self._timer = self.loop.call_at(self._due, self._look_at_deadline)
            return
        self.refuse(408, "The request did not arrive in time.")

    # Answers without a route

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)

    def refuse(self, status: int, message: str) -> None:
        """Answer in place of the app where that is still possible, then end the connection."""
        if self._refused:
            return
        self._refused = True
        self._due = None
        in_body = self._receiving is _Receiving.BODY
        if self._answering and not in_body:
            self.cycle.keep_alive = False  # earlier requests of this connection are answered before it ends
            return
        if not self.pipeline and not (self._answering and self.cycle.response_started):
            kind, body = self._error_body(status, message)
            self.transport.write(
                b"%sconnection: close\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s"
                % (STATUS_LINE[status], kind, len(body), body)
            )
        self.transport.close()

    @property
    def _answering(self) -> bool:
        """Whether the newest request of this connection still waits for the end of its answer."""
        cycle = cast(RequestResponseCycle | None, self.cycle)
        return cycle is not None and not cycle.response_complete


def peer_credentials(transport: asyncio.BaseTransport) -> PeerCredentials | None:
    """The peer of a Unix stream socket, None for any other."""
    peer: socket.socket | None = transport.get_extra_info("socket")
    if peer is None or peer.family != socket.AF_UNIX:
        return None
    packed = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return PeerCredentials(*struct.unpack("3i", packed))


class Config(uvicorn.Config):
    """uvicorn's settings as mlbox wants them: httptools, uvloop, no access log, no server header, no proxy headers.

    `drain_s` is how long a stop waits for requests that are being answered. Logging is left alone but for uvicorn's
    own chatter. `error_body(status, message)` makes the body of what the protocol refuses by itself (400, 408, 431).
    """

    def __init__(
        self,
        app: Callable[..., Any],
        *,
        limits: Limits | None = None,
        protocol: type[Protocol] = Protocol,
        lifespan: bool = False,
        drain_s: float = 10.0,
        error_body: Callable[[int, str], tuple[bytes, bytes]] = plain_text,
    ) -> None:
        self.limits = limits or Limits()
        self.error_body = error_body
        super().__init__(
            app,
            interface="asgi3",
            http=protocol,
            ws="none",
            loop="uvloop",
            lifespan="on" if lifespan else "off",
            log_config=None,
            log_level="error",  # a malformed request is the client's news, not the operator's
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=self.limits.keep_alive_s,
            timeout_graceful_shutdown=math.ceil(drain_s),
        )


class Server(uvicorn.Server):
    """uvicorn on sockets that are already listening; it leaves signals to its owner.

    uvicorn's own handlers re-raise the signal after `serve()`, which would skip the owner's cleanup. Call `stop()`
    from any handler of the event loop instead; `serve()` then returns when the open requests are answered.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Accept no more, answer what is open, return from `serve()`. Idempotent."""
        self.should_exit = True
        self._stopping.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def main_loop(self) -> None:
        """Uvicorn's loop, woken by `stop()` rather than ten times a second; the Date header wants one a second."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._stopping.wait()


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 picks a free one. Raises Unavailable that says what is in the way."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise Unavailable(f"cannot listen on {host}:{port}: {host!r} is no address: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise Unavailable(f"cannot listen on {host}:{port}: {_why_not_bound(error)}") from error
    listener.setblocking(False)
    return listener


def reachable(host: str) -> str:
    """An address by which this box itself reaches what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104


def _why_not_bound(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use: stop the program that holds it or choose another port (0 picks a free one)"
    if error.errno == errno.EACCES:
        return "ports below 1024 need privileges: choose a higher one"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this box has no such address: name one of its own, or 0.0.0.0 for all"
    return str(error)


def listen_unix(path: Path, mode: int = 0o666) -> socket.socket:
    """A listening Unix socket at `path`; the file of a server that is gone is replaced. Raises Unavailable.

    Two servers that start at one instant are kept apart by the caller's lock, not here.
    """
    _remove_stale_socket(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(path))
        path.chmod(mode)  # before listen(), so that nobody connects under a laxer mode
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        hint = ": a socket's path has 107 bytes at most (unix(7))" if len(os.fsencode(path)) > 107 else ""
        raise Unavailable(f"cannot listen on {path}: {error}{hint}") from error
    listener.setblocking(False)
    return listener


def _remove_stale_socket(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # not there, or not to be seen: bind says so
    if not stat.S_ISSOCK(mode):
        raise Unavailable(f"cannot listen on {path}: it exists and is no socket: remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise Unavailable(f"cannot listen on {path}: {error}") from error
        else:
            raise Unavailable(f"cannot listen on {path}: another server answers there: stop it first")
