"""`/api/jobs`: submit, list, show, wait, and what may be done with a job."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from mlbox.config import size_bytes
from mlbox.identity import Identity
from mlbox.jobs import ACTIVE, Job
from mlbox.scheduler import submission
from mlbox.scheduler.logs import LogFile
from mlbox.scheduler.policy import RankParts
from mlbox.scheduler.submission import Defaults
from mlbox.web import bodies
from mlbox.web.answers import Json, Text, attempt_json, facts, job_json, table
from mlbox.web.doors import Doors
from mlbox.web.live import Streams, while_listening
from mlbox.web.negotiation import wants_text
from mlbox.web.parameters import Parameters, job_filters
from mlbox.web.routes import id_in_path, idempotency_key, identity_of
from mlbox.web.submits import receiving_submit

_WAIT_MAX_S = 3600.0
_COMMAND_SHOWN = 1000
_COLUMNS = ("id", "state", "name", "user", "gpus", "submitted_at", "cause")


class JobsApi:
    """The endpoints of jobs. Their permissions are in the route table."""

    def __init__(self, doors: Doors, streams: Streams) -> None:
        self._doors = doors
        self._jobs = doors.jobs
        self._streams = streams
        self._defaults = Defaults(grace_s=doors.config.jobs.grace_s)
        self._body_max = size_bytes(doors.config.server.body_max)

    async def submit(self, request: Request) -> Response:
        key = idempotency_key(request)
        async with receiving_submit(request, self._jobs.incoming_folder, self._body_max) as sent:
            asked = submission.parse(sent.fields, self._defaults, now=time.time(), code=sent.code_format)
            job, made = await self._jobs.submit(
                identity_of(request), asked.spec, array=asked.array, code=sent.code, idempotency_key=key
            )
        return self._made(request, job, made)

    async def list(self, request: Request) -> Response:
        who = identity_of(request)
        wanted = job_filters(request)
        jobs = await self._jobs.list(who, **wanted)
        rows = [self._short(job) for job in jobs]
        if wants_text(request):
            return Text(table(_COLUMNS, rows))
        more = len(jobs) == wanted["limit"]
        return Json({"jobs": rows, "next": str(jobs[-1].id) if more else None})

    async def show(self, request: Request) -> Response:
        who, job_id = identity_of(request), id_in_path(request, "job")
        job = await self._jobs.get(who, job_id)
        return await self._shown(request, job)

    async def wait(self, request: Request) -> Response:
        who, job_id = identity_of(request), id_in_path(request, "job")
        timeout_s = Parameters(request, "timeout").seconds("timeout", 60.0, _WAIT_MAX_S)
        await self._jobs.get(who, job_id)
        job = await while_listening(self._streams, request, self._jobs.wait(who, job_id, timeout_s))
        return await self._shown(request, job or await self._jobs.get(who, job_id))

    async def cancel(self, request: Request) -> Response:
        return await self._act(request, self._jobs.cancel)

    async def hold(self, request: Request) -> Response:
        return await self._act(request, self._jobs.hold)

    async def release(self, request: Request) -> Response:
        return await self._act(request, self._jobs.release)

    async def remove(self, request: Request) -> Response:
        return await self._act(request, self._jobs.remove_files)

    async def retry(self, request: Request) -> Response:
        bodies.known_only(await bodies.fields_of(request), ())
        job_id = id_in_path(request, "job")
        job = await self._jobs.retry(identity_of(request), job_id, idempotency_key=idempotency_key(request))
        return self._made(request, job, made=True)

    async def clone(self, request: Request) -> Response:
        bodies.known_only(await bodies.fields_of(request), ())
        who, job_id = identity_of(request), id_in_path(request, "job")
        job = await self._jobs.clone(who, job_id, idempotency_key=idempotency_key(request))
        return self._made(request, job, made=True)

    async def rank(self, request: Request) -> Response:
        parts = rank_json(await self._jobs.rank(identity_of(request), id_in_path(request, "job")))
        return Text(facts(parts)) if wants_text(request) else Json(parts)

    async def cancel_array(self, request: Request) -> Response:
        bodies.known_only(await bodies.fields_of(request), ())
        jobs = await self._jobs.cancel_array(identity_of(request), id_in_path(request, "array"))
        if wants_text(request):
            return Text("".join(f"job {job.id} is {job.state}\n" for job in jobs))
        return Json({"jobs": [self._short(job) for job in jobs]})

    async def change(self, request: Request) -> Response:
        values = submission.changes(await bodies.fields_of(request))
        job = await self._jobs.change(identity_of(request), id_in_path(request, "job"), values)
        return self._done(request, job)

    async def _act(self, request: Request, act: Callable[[Identity, int], Awaitable[Job]]) -> Response:
        bodies.known_only(await bodies.fields_of(request), ())
        return self._done(request, await act(identity_of(request), id_in_path(request, "job")))

    def _made(self, request: Request, job: Job, made: bool) -> Response:
        headers = {"Location": f"/api/jobs/{job.id}"}
        if not made:
            headers["Idempotency-Replayed"] = "true"
        if wants_text(request):
            return Text(f"{job.id}\n", 201, headers)
        return Json(job_json(job, self._jobs.pending(job)), 201, headers)

    def _done(self, request: Request, job: Job) -> Response:
        if wants_text(request):
            return Text(f"job {job.id} is {job.state}\n")
        return Json(job_json(job, self._jobs.pending(job)))

    async def _shown(self, request: Request, job: Job) -> Response:
        attempts = await self._jobs.attempts(identity_of(request), job.id)
        shown = job_json(job, self._jobs.pending(job), await self._jobs.fewer_gpus(job))
        shown["attempts"] = [attempt_json(attempt) for attempt in attempts]
        if job.state in ACTIVE:
            log = LogFile(self._jobs.attempt_folder(job.id, job.attempt))
            shown["log_bytes"] = await asyncio.to_thread(log.size)
        if wants_text(request):
            del shown["attempts"]
            return Text(facts(shown))
        return Json(shown)

    def _short(self, job: Job) -> dict[str, object]:
        """A job as one of many, without what may be long: a thousand scripts could be a gigabyte."""
        row = job_json(job, self._jobs.pending(job))
        del row["script"], row["env"]
        if job.spec.command is not None and len(job.spec.command) > _COMMAND_SHOWN:
            row["command"] = job.spec.command[:_COMMAND_SHOWN] + "…"
        return row


def rank_json(parts: RankParts) -> dict[str, object]:
    """Why a job stands where it does, part by part."""
    return {
        "position": parts.position,
        "score": parts.score,
        "priority": parts.priority,
        "fair_share": parts.fair_share,
        "usage_gpu_hours": parts.usage_gpu_hours,
        "usage_share": parts.usage_share,
        "share": parts.share,
        "age": parts.age,
        "age_s": parts.age_s,
    }
