"""The pages: the overview, the list of jobs, one job. Complete without JavaScript; with it their parts are refetched.

The address of a page with `.json` after it answers its data.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from mlbox.errors import NotFound
from mlbox.identity import Identity
from mlbox.jobs import ACTIVE, ENDED, Dependency, Job, JobState
from mlbox.scheduler.queue import Attempt
from mlbox.scheduler.service import Pending
from mlbox.scheduler.state import GpuReport
from mlbox.serving.deployments import ModelInfo
from mlbox.web import artifacts, bodies, gantt, words
from mlbox.web.answers import Json, attempt_json, job_json, model_json
from mlbox.web.artifacts import Artifact
from mlbox.web.artifacts_api import artifact_json
from mlbox.web.box_api import gpu_json, waiting_json
from mlbox.web.doors import Doors
from mlbox.web.gantt import Picture
from mlbox.web.logs_api import LogsApi
from mlbox.web.parameters import JobFilters, job_filters
from mlbox.web.rendering import Renderer
from mlbox.web.routes import id_in_path, identity_of

_QUEUE_SHOWN = 50
_RECENT_SHOWN = 12
_RUNNING_SHOWN = 100
_LISTED = 50
_TAIL_LINES = 300
_DEPENDS_SHOWN = 20
_ARTIFACTS_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What the overview shows. `waiting` holds the first of `waiting_total` jobs with the reason why they wait."""

    gpus: Sequence[GpuReport]
    gpu_message: str
    slots: int
    slots_free: int
    running: Sequence[Job]
    waiting: Sequence[tuple[Job, Pending | None]]
    waiting_total: int
    recent: Sequence[Job]
    models: Sequence[ModelInfo]
    socket: str
    plan: Picture | None
    """GPUs x time; None where there is none to show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """What a job's page shows beside its log."""

    job: Job
    story: str
    pending: Pending | None
    waits_for: Sequence[tuple[Dependency, Job | None]]
    """The jobs that it depends on; None for one that the asker may not see."""
    attempts: Sequence[Attempt]
    gpu_names: Sequence[str]
    artifacts: Sequence[Artifact]
    artifacts_left_out: int


class Pages:
    """The endpoints that answer HTML."""

    def __init__(self, doors: Doors, logs: LogsApi, renderer: Renderer) -> None:
        self._doors = doors
        self._jobs = doors.jobs
        self._logs = logs
        self._renderer = renderer
        self._acts = {
            "cancel": doors.jobs.cancel,
            "hold": doors.jobs.hold,
            "release": doors.jobs.release,
            "retry": doors.jobs.retry,
        }

    # The overview

    async def overview(self, request: Request) -> Response:
        view = await self._overview(identity_of(request))
        return self._renderer.page(request, "overview.html", {"view": view, "gpu_names": self._gpu_names()})

    async def overview_parts(self, request: Request) -> Response:
        """The overview without what surrounds it, to be put in place of the one that is shown."""
        view = await self._overview(identity_of(request))
        return self._renderer.page(request, "overview_parts.html", {"view": view, "gpu_names": self._gpu_names()})

    async def overview_json(self, request: Request) -> Response:
        view = await self._overview(identity_of(request))
        return Json(
            {
                "gpus": [gpu_json(report) for report in view.gpus],
                "message": view.gpu_message,
                "cpu_slots": {"total": view.slots, "free": view.slots_free},
                "running": [job_json(job) for job in view.running],
                "queue": [waiting_json(job, pending) for job, pending in view.waiting],
                "waiting": view.waiting_total,
                "recent": [job_json(job) for job in view.recent],
                "models": [model_json(model) for model in view.models],
            }
        )

    async def _overview(self, who: Identity) -> Overview:
        running = await self._jobs.list(who, states=ACTIVE, limit=_RUNNING_SHOWN)
        waiting = await self._jobs.queue(who, _QUEUE_SHOWN)
        slots, slots_free = self._jobs.slots
        counts = await self._jobs.counts()
        return Overview(
            gpus=sorted(self._jobs.gpus(), key=lambda report: report.gpu.place),
            gpu_message=self._doors.gpus.current().message,
            slots=slots,
            slots_free=slots_free,
            running=running,
            waiting=[(job, self._jobs.pending(job)) for job in waiting],
            waiting_total=counts.get(JobState.QUEUED, 0),
            recent=await self._jobs.list(who, states=ENDED, limit=_RECENT_SHOWN),
            models=await self._doors.deployments.models(),
            socket=self._doors.endpoints().get("socket", "mlbox.sock"),
            plan=await self._picture(who),
        )

    async def _picture(self, who: Identity) -> Picture | None:
        plan = await self._jobs.plan(who)
        return gantt.picture(plan) if plan.lanes else None

    # The list of jobs

    async def jobs(self, request: Request) -> Response:
        wanted, jobs = await self._listed(request)
        array, older = wanted["array"], None
        if len(jobs) == wanted["limit"]:
            of_array = [] if array is None else [("array", str(array))]
            older = "/jobs?" + urlencode([*_as_query(wanted), *of_array, ("before", str(jobs[-1].id))])
        values = {
            "jobs": [(job, self._jobs.pending(job)) for job in jobs],
            "wanted": wanted,
            "array": array,
            "older": older,
            "states": list(JobState),
            "counts": await self._jobs.counts(),
        }
        return self._renderer.page(request, "jobs.html", values)

    async def jobs_json(self, request: Request) -> Response:
        _, jobs = await self._listed(request)
        return Json({"jobs": [job_json(job, self._jobs.pending(job)) for job in jobs]})

    async def _listed(self, request: Request) -> tuple[JobFilters, Sequence[Job]]:
        wanted = job_filters(request, default_limit=_LISTED)
        return wanted, await self._jobs.list(identity_of(request), **wanted)

    # One job

    async def job(self, request: Request) -> Response:
        who, job_id = identity_of(request), request.path_params["id"]
        if job_id.endswith(".json"):
            return await self._job_json(request, job_id.removesuffix(".json"))
        view = await self._job_view(who, id_in_path(request, "job"))
        log_end, log = (0, b"") if view.job.files_removed else await self._logs.tail_text(view.job, _TAIL_LINES)
        values = {"view": view, "log": words.plain_log(log.decode(errors="replace")), "log_end": log_end}
        return self._renderer.page(request, "job.html", values)

    async def job_parts(self, request: Request) -> Response:
        """A job's page without its log and what surrounds it."""
        view = await self._job_view(identity_of(request), id_in_path(request, "job"))
        return self._renderer.page(request, "job_parts.html", {"view": view})

    async def act(self, request: Request) -> Response:
        """What a button of a job's page does; then the page of the job, which for `retry` is the new one."""
        bodies.known_only(await bodies.fields_of(request), ())
        act = self._acts.get(request.path_params["act"])
        if act is None:
            raise NotFound(f"a job cannot be told to {request.path_params['act'][:40]!r}")
        job = await act(identity_of(request), id_in_path(request, "job"))
        return RedirectResponse(f"/jobs/{job.id}", 303)

    async def _job_json(self, request: Request, number: str) -> Response:
        request.path_params["id"] = number
        view = await self._job_view(identity_of(request), id_in_path(request, "job"))
        return Json(
            {
                **job_json(view.job, view.pending),
                "attempts": [attempt_json(attempt) for attempt in view.attempts],
                "artifacts": [artifact_json(artifact) for artifact in view.artifacts],
            }
        )

    async def _job_view(self, who: Identity, job_id: int) -> JobView:
        job = await self._jobs.get(who, job_id)
        found = await asyncio.to_thread(artifacts.listing, self._jobs.out_folder(job.id))
        names = self._gpu_names()
        gpu_names = [names.get(uuid, uuid) for uuid in job.gpu_uuids]
        pending, fewer = self._jobs.pending(job), await self._jobs.fewer_gpus(job)
        return JobView(
            job=job,
            story=words.story(job, pending, gpu_names, time.time(), fewer),
            pending=pending,
            waits_for=[(found, await self._seen(who, found.job_id)) for found in job.spec.depends_on[:_DEPENDS_SHOWN]],
            attempts=await self._jobs.attempts(who, job_id),
            gpu_names=gpu_names,
            artifacts=found[:_ARTIFACTS_SHOWN],
            artifacts_left_out=max(0, len(found) - _ARTIFACTS_SHOWN),
        )

    async def _seen(self, who: Identity, job_id: int) -> Job | None:
        try:
            return await self._jobs.get(who, job_id)
        except NotFound:
            return None

    def _gpu_names(self) -> dict[str, str]:
        return {report.gpu.uuid: f"GPU {report.gpu.label}" for report in self._jobs.gpus()}


def _as_query(wanted: JobFilters) -> list[tuple[str, str]]:
    named = [("user", wanted["user"]), ("name", wanted["name"]), ("project", wanted["project"])]
    states = [("state", str(state)) for state in sorted(wanted["states"])]
    return states + [(key, value) for key, value in named if value]
