"""Answers that go on: a seat for each, capped, and ended at once when the client goes or its credential does.

Server-sent events as in the HTML standard, section 9.2.
"""

import asyncio
import codecs
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Coroutine, Generator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import lru_cache
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlbox.errors import TooMany, Unauthenticated
from mlbox.identity import Identity
from mlbox.scheduler.logs import Chunk, notice
from mlbox.web.negotiation import EVENTS
from mlbox.web.routes import identity_of

T = TypeVar("T")

HEARTBEAT_S = 15.0
"""A comment goes out after so long a silence: proxies and browsers give up on streams that are silent for longer."""
_FULL_RETRY_S = 10.0


class Streams:
    """The streams that are open now: how many there may be, and a way to end them."""

    def __init__(self, *, total: int, per_user: int, has_ended: Callable[[str], bool]) -> None:
        self._has_ended = has_ended
        self._total = total
        self._per_user = per_user
        self._open: dict[asyncio.Timeout, Identity] = {}
        self._of_user: Counter[int] = Counter()
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def seat(self, who: Identity, cut: asyncio.Timeout) -> Generator[None]:
        """A place for one stream, which `cut` ends. Raises TooMany, Unauthenticated."""
        if self._has_ended(who.how):  # between finding it good and here
            raise Unauthenticated("this credential was revoked")
        if self._closed or len(self._open) >= self._total:
            raise TooMany(f"{len(self._open)} streams are open, no more are served", _FULL_RETRY_S)
        if self._of_user[who.uid] >= self._per_user:
            raise TooMany(f"you have {self._per_user} streams open: close some of them", _FULL_RETRY_S)
        self._open[cut] = who
        self._of_user[who.uid] += 1
        try:
            yield
        finally:
            del self._open[cut]
            self._of_user[who.uid] -= 1

    def end(self, how: str) -> None:
        """End the streams of one credential (its `Identity.how`)."""
        for cut, who in self._open.items():
            if who.how == how:
                _end(cut)

    def close(self) -> None:
        """End every stream and admit no more: mlbox is stopping. Idempotent."""
        self._closed = True
        for cut in self._open:
            _end(cut)


def _end(cut: asyncio.Timeout) -> None:
    if not cut.expired():
        cut.reschedule(asyncio.get_running_loop().time())


class Stream(Response):
    """An answer whose body comes piece by piece until it ends, the client goes, or its credential does.

    `heartbeat` is sent whenever nothing else was for a while; empty where every byte counts. `close` is called at the
    end, whether anything was sent or not.
    """

    def __init__(
        self,
        streams: Streams,
        body: AsyncGenerator[bytes],
        *,
        media_type: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        heartbeat: bytes = b"",
        close: Callable[[], None] | None = None,
    ) -> None:
        self.status_code = status
        self.media_type = media_type
        self.background = None
        self.init_headers(headers)
        self._streams = streams
        self._chunks = body
        self._heartbeat = heartbeat
        self._close = close
        self._sent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope, receive, send)
        finally:
            if self._close is not None:
                self._close()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        if scope["method"] == "HEAD":
            await send(start)
            await send({"type": "http.response.body", "body": b""})
            return
        expires_at: float | None = scope.get("expires_at")
        cut = asyncio.timeout(None if expires_at is None else max(0.0, expires_at - time.time()))
        try:
            async with cut:
                with self._streams.seat(identity_of(Request(scope)), cut):
                    await send(start)
                    await self._pump(cut, receive, send)
        except TimeoutError:
            if not cut.expired():
                raise
            if "content-length" in self.headers:  # cut short: an end that looks proper would be a lie
                return
        await send({"type": "http.response.body", "body": b""})

    async def _pump(self, cut: asyncio.Timeout, receive: Receive, send: Send) -> None:
        async def beat() -> None:
            if self._heartbeat and not self._sent:
                await send({"type": "http.response.body", "body": self._heartbeat, "more_body": True})
            self._sent = False

        async with _watched(cut, receive, beat), aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                self._sent = True
                await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def while_listening(streams: Streams, request: Request, answer: Coroutine[None, None, T]) -> T | None:
    """The result of `answer`, which may take long; None when the client went, or mlbox stops, before it was there."""
    cut = asyncio.timeout(None)
    try:
        async with cut:
            with streams.seat(identity_of(request), cut):
                async with _watched(cut, request.receive, None):
                    return await answer
    except TimeoutError:
        if not cut.expired():
            raise
    finally:
        answer.close()
    return None


@asynccontextmanager
async def _watched(
    cut: asyncio.Timeout, receive: Receive, beat: Callable[[], Awaitable[None]] | None
) -> AsyncGenerator[None]:
    """Within: `cut` ends things when the client goes."""
    watch = asyncio.create_task(_watch(cut, receive, beat), name="stream: watch for its client to go")
    try:
        yield
    finally:
        watch.cancel()
        await asyncio.wait((watch,))
    if not watch.cancelled():
        watch.result()


async def _watch(cut: asyncio.Timeout, receive: Receive, beat: Callable[[], Awaitable[None]] | None) -> None:
    """End what `cut` bounds when the client goes; call `beat` now and then until it does."""
    while True:
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                while (await receive())["type"] != "http.disconnect":
                    pass
        except TimeoutError:
            if beat is not None:
                await beat()
        else:
            _end(cut)
            return


def event_stream(streams: Streams, events: AsyncGenerator[bytes]) -> Stream:
    """An answer of server-sent events."""
    headers = {"X-Accel-Buffering": "no"}  # nginx and its kin would hold events back until a buffer is full
    return Stream(streams, events, media_type=EVENTS, headers=headers, heartbeat=b":\n\n")


def event(kind: str, data: object, position: int | None = None) -> bytes:
    """One server-sent event with JSON as its data, which holds no line end whatever the value is."""
    marker = b"" if position is None else b"id: %d\n" % position
    return b"%sevent: %s\ndata: %s\n\n" % (marker, kind.encode(), msgspec.json.encode(data))


async def log_events(chunks: AsyncIterable[Chunk], offset: int) -> AsyncGenerator[bytes]:
    """Pieces of a log from `offset` on as `log` events: JSON strings, the id the offset of the byte after them.

    A character that comes in two pieces is held back until it is whole, and the id with it, so that a reader who
    resumes at any id sees every character once. What is not UTF-8 becomes U+FFFD; a gap is told in a line.
    """
    held, end = b"", offset
    async for chunk in chunks:
        piece, held = _log_event(chunk, held, end)
        end = chunk.end
        if piece:
            yield piece
    if held:
        yield event("log", held.decode(errors="replace"), end)


@lru_cache(maxsize=16)
def _log_event(chunk: Chunk, held: bytes, end: int) -> tuple[bytes, bytes]:
    """The event for `chunk` after `held` bytes of a character begun before `end`, and what is held back of it.

    Cached: the followers of one log are given the very same chunks, and most of the work is the same for all.
    """
    text = ""
    if chunk.offset != end:
        text, held = held.decode(errors="replace") + notice(chunk.offset - end).decode(), b""
    data = held + chunk.data
    whole, used = codecs.utf_8_decode(data, "replace", False)
    held = data[used:]
    text += whole
    return (event("log", text, chunk.end - len(held)) if text else b""), held
