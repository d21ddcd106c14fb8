"""The box itself: its GPUs, who waits for them, what happens now, and how mlbox is."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

from starlette.requests import Request
from starlette.responses import Response

from mlbox import __version__
from mlbox.errors import Conflict, FieldError, Invalid, NotFound
from mlbox.events import GPUS, JOBS, MODELS, Events, job_topic
from mlbox.jobs import Job
from mlbox.scheduler import fields, values
from mlbox.scheduler.gpus import GpuProcess
from mlbox.scheduler.service import Pending
from mlbox.scheduler.state import GpuReport
from mlbox.web import bodies, words
from mlbox.web.answers import Json, Text, array_json, job_json, moment, pending_json, table
from mlbox.web.doors import Doors
from mlbox.web.live import Streams, event, event_stream
from mlbox.web.metrics import HttpMeter, exposition
from mlbox.web.negotiation import wants_text
from mlbox.web.openapi import document
from mlbox.web.parameters import LIST_MAX, Parameters
from mlbox.web.routes import identity_of

_GPU_COLUMNS = ("index", "name", "state", "jobs", "memory_mib", "free_mib", "utilization", "temperature_c", "why")
_QUEUE_COLUMNS = ("position", "id", "user", "name", "asks", "submitted_at", "starts", "by", "why")
_TIME_LIMIT_MAX_S = 10 * 366 * 86_400.0
_ADOPT = {
    "pid": values.integer(1, 2**31 - 1),
    "name": fields.name,
    "project": fields.name,
    "time_limit": fields.duration(1, _TIME_LIMIT_MAX_S),
}
_TOPICS = {"gpus": GPUS, "queue": JOBS, "jobs": JOBS, "models": MODELS}
_TOPICS_MAX = 100
_GATHER_S = 0.25
"""Hints that come within so long of one that was just told wait and are told as one: a page redraws for each."""


class BoxApi:
    """The endpoints of the box."""

    def __init__(self, doors: Doors, streams: Streams, meter: HttpMeter) -> None:
        self._doors = doors
        self._jobs = doors.jobs
        self._streams = streams
        self._meter = meter

    async def gpus(self, request: Request) -> Response:
        rows = [gpu_json(report) for report in sorted(self._jobs.gpus(), key=lambda report: report.gpu.place)]
        if wants_text(request):
            return Text(self._gpu_text(rows))
        seen = self._doors.gpus.current()
        slots, free = self._jobs.slots
        return Json(
            {
                "gpus": rows,
                "nvml": seen.nvml,
                "driver": seen.driver,
                "message": seen.message,
                "cpu_slots": {"total": slots, "free": free},
            }
        )

    async def drain(self, request: Request) -> Response:
        sent = await bodies.fields_of(request)
        bodies.known_only(sent, ("reason",))
        reason = sent.get("reason")
        if reason is not None and (not isinstance(reason, str) or len(reason) > 200 or not reason.isprintable()):
            raise Invalid(
                "reason: wants a line of 200 characters or fewer", (FieldError("reason", "wants a line of text"),)
            )
        uuid: str = request.path_params["uuid"]
        await self._jobs.drain(identity_of(request), uuid, reason or None)
        return self._one_gpu(uuid)

    async def resume(self, request: Request) -> Response:
        bodies.known_only(await bodies.fields_of(request), ())
        uuid: str = request.path_params["uuid"]
        await self._jobs.resume(identity_of(request), uuid)
        return self._one_gpu(uuid)

    async def adopt(self, request: Request) -> Response:
        """A process that was started past mlbox becomes a running job of its owner."""
        asked = bodies.checked(await bodies.fields_of(request), _ADOPT)
        uuid: str = request.path_params["uuid"]
        job = await self._jobs.adopt(
            identity_of(request),
            uuid,
            pid=asked["pid"] if "pid" in asked else self._only_process(uuid),
            name=asked.get("name", "adopted"),
            project=asked.get("project", "default"),
            time_limit_s=asked.get("time_limit"),
        )
        headers = {"Location": f"/api/jobs/{job.id}"}
        return Text(f"{job.id}\n", 201, headers) if wants_text(request) else Json(job_json(job), 201, headers)

    async def queue(self, request: Request) -> Response:
        limit = Parameters(request, "limit").integer("limit", 100, 1, LIST_MAX)
        jobs = await self._jobs.queue(identity_of(request), limit)
        rows = [waiting_json(job, self._jobs.pending(job)) for job in jobs]
        if wants_text(request):
            return Text(
                table(_QUEUE_COLUMNS, [{**row, **self._place(job)} for row, job in zip(rows, jobs, strict=True)])
            )
        return Json({"jobs": rows})

    async def events(self, request: Request) -> Response:
        asked = Parameters(request, "topics").text("topics") or "gpus,queue,models"
        names = [word.strip() for word in asked.split(",") if word.strip()]
        if len(names) > _TOPICS_MAX:
            raise Invalid(f"topics: at most {_TOPICS_MAX}", (FieldError("topics", "too many"),))
        topics: dict[str, str] = {}
        for word in names:
            topics[await self._topic(request, word)] = word
        return event_stream(self._streams, _hints(self._doors.events, topics))

    async def healthz(self, request: Request) -> Response:
        del request
        return Json({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        del request
        why_not = self._doors.ready()
        if why_not is None:
            return Json({"status": "ready", "version": __version__})
        return Json({"status": "not ready", "detail": why_not}, 503, {"Retry-After": "1"})

    async def metrics(self, request: Request) -> Response:
        del request
        text = exposition(
            counts=await self._jobs.counts(),
            gpus=self._jobs.gpus(),
            slots=self._jobs.slots,
            streams=len(self._streams),
            meter=self._meter,
        )
        return Text(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        del request
        return Json(document())

    def _one_gpu(self, uuid: str) -> Response:
        return Json(next(gpu_json(report) for report in self._jobs.gpus() if report.gpu.uuid == uuid))

    def _only_process(self, uuid: str) -> int:
        """The pid of the one process from outside on a GPU. Raises NotFound, and Conflict where there are several."""
        report = next((report for report in self._jobs.gpus() if report.gpu.uuid == uuid), None)
        if report is None:
            raise NotFound(f"there is no GPU {uuid[:80]} here")
        outside = [one for one in report.gpu.processes or () if one.computes and one.attempt_key is None]
        if not outside:
            raise NotFound(f"no process from outside computes on GPU {report.gpu.index}: there is nothing to adopt")
        if len(outside) > 1:
            pids = ", ".join(f"{one.pid} ({one.user})" for one in outside)
            raise Conflict(f"several processes compute on GPU {report.gpu.index}: {pids}; say which by its pid")
        return outside[0].pid

    def _gpu_text(self, rows: Sequence[Mapping[str, object]]) -> str:
        slots, free = self._jobs.slots
        note = f"{self._doors.gpus.current().message}\n{free} of {slots} CPU slots free\n"
        lines = [{**row, "index": row["label"]} for row in rows]
        return (table(_GPU_COLUMNS, lines) if rows else "") + note

    def _place(self, job: Job) -> dict[str, object]:
        """What the table of the queue says beside the job itself."""
        pending = self._jobs.pending(job)
        if pending is None:
            return {"asks": words.needs(job)}
        return {
            "asks": words.needs(job),
            "position": pending.position,
            "starts": words.hour(pending.estimated_start),
            "by": words.hour(pending.estimated_start_p90),
            "why": pending.why,
        }

    async def _topic(self, request: Request, word: str) -> str:
        """The board's name of a topic. Raises Invalid, NotFound for a job that the asker may not see."""
        kind, colon, number = word.partition(":")
        if kind == "job" and colon and number.isascii() and number.isdigit() and len(number) <= 19:
            job = await self._jobs.get(identity_of(request), int(number))
            return job_topic(job.id)
        if word not in _TOPICS:
            message = f"{word[:40]!r} is no topic; known: {', '.join(_TOPICS)}, job:<id>"
            raise Invalid(f"topics: {message}", (FieldError("topics", message),))
        return _TOPICS[word]


async def _hints(events: Events, topics: Mapping[str, str]) -> AsyncGenerator[bytes]:
    """A `hello` at once, then a `change` whenever one of `topics` (by the board's names) changed: look it up anew."""
    with events.subscribe(*topics) as changes:
        yield b"retry: 2000\n" + event("hello", {"topics": sorted(topics.values())})
        while True:
            changed = await changes.take()
            yield event("change", {"topics": sorted(topics[topic] for topic in changed)})
            await asyncio.sleep(_GATHER_S)


def waiting_json(job: Job, pending: Pending | None) -> dict[str, object]:
    """A waiting job as anybody may see it."""
    return {
        "id": job.id,
        "name": job.spec.name,
        "project": job.spec.project,
        "user": job.user,
        "gpus": job.spec.gpus,
        "gpu_mem_mib": job.spec.gpu_mem_mib,
        "cpus": job.spec.cpus,
        "priority": job.spec.priority,
        "array": array_json(job),
        "time_limit_s": job.spec.time_limit_s,
        "submitted_at": moment(job.submitted_at),
        "pending": None if pending is None else pending_json(pending),
    }


def gpu_json(report: GpuReport) -> dict[str, object]:
    """A GPU as users see it; what NVML does not tell is null."""
    gpu = report.gpu
    return {
        "uuid": gpu.uuid,
        "index": gpu.index,
        "label": gpu.label,
        "parent": gpu.parent,
        "name": gpu.name,
        "memory_mib": gpu.memory_mib,
        "used_mib": gpu.used_mib,
        "free_mib": gpu.free_mib,
        "utilization": gpu.utilization,
        "power_w": gpu.power_w,
        "temperature_c": gpu.temperature_c,
        "shared_free_mib": report.shared_free_mib,
        "cpus": gpu.cpus,
        "numa_node": gpu.numa_node,
        "unused_since": moment(gpu.unused_since),
        "state": report.state,
        "why": report.why or None,
        "jobs": report.job_ids,
        "models": (),
        "processes": [_process_json(process, report.job_ids) for process in gpu.processes or ()],
        "links": [{"uuid": link.uuid, "level": link.level, "nvlinks": link.nvlinks} for link in gpu.links],
    }


def _process_json(process: GpuProcess, job_ids: Sequence[int]) -> dict[str, object]:
    return {
        "pid": process.pid,
        "user": process.user,
        "command": process.command,
        "memory_mib": process.memory_mib,
        "kind": process.kind,
        "started_at": moment(process.started_at),
        "container": process.container,
        "job": job_ids[0] if process.attempt_key is not None and len(job_ids) == 1 else None,
    }
