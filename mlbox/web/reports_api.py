"""What the scheduler reports: the plan over time, who used how much, and what people were told."""

import time
from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response

from mlbox.scheduler.accounting import UsageLine, UsageReport
from mlbox.scheduler.notices import Notice
from mlbox.scheduler.timeline import Timeline
from mlbox.web import gantt
from mlbox.web.answers import Json, Text, moment, table
from mlbox.web.doors import Doors
from mlbox.web.negotiation import wants_text
from mlbox.web.parameters import LIST_MAX, Parameters
from mlbox.web.routes import identity_of

_WEEK_S = 7 * 86_400.0
_USAGE_COLUMNS = ("gpu_hours", "gpu_hours_idle", "cpu_hours", "jobs", "wait_mean_s", "wait_p95_s")
_NOTICE_COLUMNS = ("at", "kind", "job", "text", "sent_at", "failure")
_COLUMNS = 100
"""Width of the plan as text where the asker does not say how wide their screen is."""


class ReportsApi:
    """The endpoints of reports. Their permissions are in the route table."""

    def __init__(self, doors: Doors, clock: Callable[[], float] = time.time) -> None:
        self._jobs = doors.jobs
        self._clock = clock

    async def plan(self, request: Request) -> Response:
        columns = Parameters(request, "columns").integer("columns", _COLUMNS, 40, 400)
        plan = await self._jobs.plan(identity_of(request))
        return Text(gantt.text(plan, columns)) if wants_text(request) else Json(plan_json(plan))

    async def usage(self, request: Request) -> Response:
        now = self._clock()
        since = Parameters(request, "since").since("since", _WEEK_S, now)
        report = await self._jobs.usage(identity_of(request), min(since, now), now)
        return Text(usage_text(report)) if wants_text(request) else Json(usage_json(report))

    async def notices(self, request: Request) -> Response:
        limit = Parameters(request, "limit").integer("limit", 100, 1, LIST_MAX)
        rows = [notice_json(notice) for notice in await self._jobs.notices(identity_of(request), limit=limit)]
        return Text(table(_NOTICE_COLUMNS, rows)) if wants_text(request) else Json({"notices": rows})


def plan_json(plan: Timeline) -> dict[str, object]:
    """GPUs x time."""
    return {
        "now": moment(plan.now),
        "starts_at": moment(plan.starts_at),
        "ends_at": moment(plan.ends_at),
        "gpus": [
            {
                "uuid": lane.gpu_uuid,
                "index": lane.index,
                "label": lane.label,
                "bars": [
                    {
                        "kind": bar.kind,
                        "job": bar.job_id,
                        "name": bar.name,
                        "user": bar.user,
                        "starts_at": moment(bar.starts_at),
                        "ends_at": moment(bar.ends_at),
                    }
                    for bar in lane.bars
                ],
            }
            for lane in plan.lanes
        ],
    }


def usage_json(report: UsageReport) -> dict[str, object]:
    return {
        "since": moment(report.since),
        "until": moment(report.until),
        "total": _usage_row(report.total),
        "users": [_usage_row(row) for row in report.users],
        "projects": [_usage_row(row) for row in report.projects],
    }


def usage_text(report: UsageReport) -> str:
    """Two tables, by user and by project, after the time that they are about."""
    parts = [f"from {moment(report.since)} to {moment(report.until)}\n"]
    for what, rows in (("user", report.users), ("project", report.projects)):
        everybody = (report.total,) if what == "user" and len(rows) > 1 else ()
        parts.append(table((what, *_USAGE_COLUMNS), _rounded(what, (*rows, *everybody))))
    return "\n".join(parts)


def notice_json(notice: Notice) -> dict[str, object]:
    return {
        "id": notice.id,
        "at": moment(notice.at),
        "user": notice.user,
        "job": notice.job_id,
        "kind": notice.kind,
        "text": notice.text,
        "sent_at": moment(notice.sent_at),
        "failure": notice.failure,
    }


def _usage_row(row: UsageLine) -> dict[str, object]:
    return {
        "name": row.name,
        "gpu_hours": row.gpu_hours,
        "gpu_hours_idle": row.gpu_hours_idle,
        "cpu_hours": row.cpu_hours,
        "jobs": row.jobs,
        "wait_mean_s": row.wait_mean_s,
        "wait_p95_s": row.wait_p95_s,
    }


def _rounded(what: str, rows: Sequence[UsageLine]) -> Sequence[dict[str, object]]:
    """Hours to a hundredth and seconds to a whole, which is what a person reads."""
    found: list[dict[str, object]] = []
    for row in rows:
        values = _usage_row(row)
        shown: dict[str, object] = {what: values["name"] or "all"}
        for name in _USAGE_COLUMNS:
            value = values[name]
            shown[name] = f"{value:.{0 if name.endswith('_s') else 2}f}" if isinstance(value, float) else value
        found.append(shown)
    return found
