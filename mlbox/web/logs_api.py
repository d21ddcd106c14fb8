"""`/api/jobs/12/log`: a log as text or as events, from any byte on, as it is or as it grows."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from mlbox.errors import FieldError, Invalid, NotFound
from mlbox.events import job_topic
from mlbox.identity import Identity
from mlbox.jobs import ACTIVE, Job
from mlbox.scheduler.logs import Chunk, LogFile, notice
from mlbox.web import log_lines
from mlbox.web.answers import Json
from mlbox.web.doors import Doors
from mlbox.web.live import Stream, Streams, event, event_stream, log_events
from mlbox.web.negotiation import accepts_events
from mlbox.web.parameters import Parameters
from mlbox.web.problems import NoSuchRange
from mlbox.web.ranges import byte_range, content_range
from mlbox.web.routes import id_in_path, identity_of

_TAIL_MAX = 100_000
_QUERY_BYTES = 1000
_PAGE_BYTES = 256 << 10
"""The most of a log that a page holds when it comes; 300 lines of a progress bar may be megabytes."""
_LOOK_AGAIN_S = 5.0
"""How long a follower waits for a hint that its job has moved on before it looks for itself."""
_TEXT = "text/plain; charset=utf-8"


class LogsApi:
    """The endpoints of logs."""

    def __init__(self, doors: Doors, streams: Streams) -> None:
        self._jobs = doors.jobs
        self._logs = doors.logs
        self._events = doors.events
        self._streams = streams

    async def log(self, request: Request) -> Response:
        who = identity_of(request)
        job = await self._job(request)
        asked = Parameters(request, "attempt", "offset", "tail", "follow")
        events = accepts_events(request.headers.get("accept", ""))
        follow = events or asked.flag("follow")
        attempt = _attempt(asked, job, coming=follow)
        offset, size = await self._place(request, asked, job, attempt)
        if events:
            return event_stream(self._streams, self._event_body(who, job, max(1, attempt), offset))
        span = None if follow else byte_range(request.headers.get("range"), size)
        headers = {"X-Log-Offset": str(span[0] if span else offset), "Accept-Ranges": "bytes"}
        if span:
            headers["Content-Range"] = content_range(*span, size)
            body = self._kept(job, attempt, *span)
        elif follow:
            body = self._followed(who, job, max(1, attempt), offset, stay="attempt" in asked)
        else:
            body = self._kept(job, attempt, offset, size)
        return Stream(self._streams, body, media_type=_TEXT, status=206 if span else 200, headers=headers)

    async def lines(self, request: Request) -> Response:
        job = await self._job(request)
        asked = Parameters(request, "attempt", "from", "count", "around", "q", "dir")
        log = LogFile(self._jobs.attempt_folder(job.id, _attempt(asked, job, coming=False)))
        count = asked.integer("count", 200, 1, log_lines.COUNT_MAX)
        start = asked.integer("from", 0)
        text, direction = asked.text("q"), asked.text("dir") or "on"
        if direction not in ("on", "back"):
            raise Invalid("dir: wants on or back", (FieldError("dir", "wants on or back"),))
        if text is not None:
            wanted = text.encode()
            if len(wanted) > _QUERY_BYTES:
                raise Invalid(f"q: longer than {_QUERY_BYTES} bytes", (FieldError("q", "is too long"),))
            work = partial(log_lines.find, log, wanted, start, count, back=direction == "back")
        elif "around" in asked:
            work = partial(log_lines.around, log, asked.integer("around", 0), count)
        else:
            work = partial(log_lines.window, log, start, count)
        window = await asyncio.to_thread(work)
        return Json(
            {
                "lines": [
                    {"offset": line.offset, "next": line.next, "text": line.text, "cut": line.cut}
                    for line in window.lines
                ],
                "size": window.size,
                "match": window.match,
                "searched_to": window.searched_to,
            }
        )

    async def tail_text(self, job: Job, lines: int) -> tuple[int, bytes]:
        """The last lines of the newest attempt's log and the offset after them, for a page."""
        log = LogFile(self._jobs.attempt_folder(job.id, job.attempt))

        def read() -> tuple[int, bytes]:
            end = log.size()
            at = max(log.tail_offset(lines), end - _PAGE_BYTES)
            parts: list[bytes] = []
            while at < end and (chunk := log.read(at)).data:
                parts.append(chunk.data)
                at = chunk.end
            return at, b"".join(parts)

        return await asyncio.to_thread(read) if job.attempt else (0, b"")

    async def _job(self, request: Request) -> Job:
        job = await self._jobs.get(identity_of(request), id_in_path(request, "job"))
        if job.files_removed:
            raise NotFound(f"the log of job {job.id} was removed")
        return job

    async def _place(self, request: Request, asked: Parameters, job: Job, attempt: int) -> tuple[int, int]:
        """(the byte to begin with, the bytes there are). Last-Event-ID counts most, then `tail`, then `offset`."""
        log = LogFile(self._jobs.attempt_folder(job.id, attempt))
        size = await asyncio.to_thread(log.size) if attempt else 0
        last = request.headers.get("last-event-id", "")
        if last.isascii() and last.isdigit() and len(last) <= 19:
            offset = int(last)
        elif "tail" in asked:
            lines = asked.integer("tail", 0, 0, _TAIL_MAX)
            offset = await asyncio.to_thread(log.tail_offset, lines) if lines and attempt else size
        else:
            offset = asked.integer("offset", 0)
        if offset > size:
            raise NoSuchRange(f"the log has {size} bytes; byte {offset} is not written yet", size)
        return offset, size

    async def _kept(self, job: Job, attempt: int, start: int, end: int) -> AsyncGenerator[bytes]:
        """What is there of the bytes from `start` to `end`."""
        log = LogFile(self._jobs.attempt_folder(job.id, attempt))
        while start < end:
            chunk = await asyncio.to_thread(log.read, start)
            if chunk.offset > start:
                yield notice(min(chunk.offset, end) - start)
            if chunk.end <= start:
                return
            if chunk.offset < end:
                yield chunk.data[: end - chunk.offset]
            start = chunk.end

    async def _followed(
        self, who: Identity, job: Job, attempt: int, offset: int, *, stay: bool
    ) -> AsyncGenerator[bytes]:
        """The log from `offset` on until the job ends, through its next attempts unless told to `stay` with one."""
        while True:
            async with aclosing(self._chunks(who, job, attempt, offset)) as chunks:
                async for chunk in chunks:
                    if chunk.offset > offset:
                        yield notice(chunk.offset - offset)
                    yield chunk.data
                    offset = chunk.end
            job = await self._jobs.get(who, job.id)
            if stay or (job.ended and job.attempt <= attempt):
                return
            attempt, offset = attempt + 1, 0

    async def _event_body(self, who: Identity, job: Job, attempt: int, offset: int) -> AsyncGenerator[bytes]:
        """One attempt's log as events, and at its end an `end` event with what became of the job."""
        chunks = self._chunks(who, job, attempt, offset)
        async with aclosing(chunks), aclosing(log_events(chunks, offset)) as pieces:
            async for piece in pieces:
                yield piece
        job = await self._jobs.get(who, job.id)
        yield event("end", {"state": job.state, "attempt": job.attempt, "ended": job.ended})

    async def _chunks(self, who: Identity, job: Job, attempt: int, offset: int) -> AsyncGenerator[Chunk]:
        """The log of one attempt, which may not have begun, until it is over."""
        folder = self._jobs.attempt_folder(job.id, attempt)
        ended = partial(self._is_over, job.id, attempt)
        with self._events.subscribe(job_topic(job.id)) as changes:
            while job.attempt < attempt and not job.ended:
                await changes.take(_LOOK_AGAIN_S)
                job = await self._jobs.get(who, job.id)
            while attempt <= job.attempt:
                async with aclosing(self._logs.follow(folder, offset, ended)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                        offset = chunk.end
                # An attempt that was committed a moment ago is not known to be under way yet.
                job = await self._jobs.get(who, job.id)
                if job.attempt != attempt or job.state not in ACTIVE:
                    return
                await changes.take(_LOOK_AGAIN_S)

    def _is_over(self, job_id: int, attempt: int) -> bool:
        return not self._jobs.under_way(job_id, attempt)


def _attempt(asked: Parameters, job: Job, *, coming: bool) -> int:
    """The attempt that is asked for: the newest where none is named, 0 where there is none yet.

    Whoever follows may also name the one that is still to come (`coming`).
    """
    attempt = asked.integer("attempt", job.attempt, 1)
    if attempt > job.attempt + (1 if coming and not job.ended else 0):
        raise NotFound(f"job {job.id} has no attempt {attempt}; it has {job.attempt}")
    return attempt
