"""What goes out: values as JSON with the interface's field names, and as the text that a person at a shell wants."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import cast

import msgspec
from starlette.responses import Response

from mlbox.jobs import Dependency, Job
from mlbox.scheduler.queue import Attempt
from mlbox.scheduler.service import FewerGpus, Pending
from mlbox.serving.deployments import ModelInfo, VersionInfo
from mlbox.web.queries import Token

_ENCODER = msgspec.json.Encoder()


class Json(Response):
    """A JSON answer."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return _ENCODER.encode(content)


class Text(Response):
    """A plain text answer."""

    media_type = "text/plain"


def moment(seconds: float | None) -> str | None:
    """RFC 3339 in UTC with milliseconds."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def job_json(job: Job, pending: Pending | None = None, fewer: FewerGpus | None = None) -> dict[str, object]:
    """A job as users see it; what this version does not have yet is there and empty."""
    spec = job.spec
    return {
        "id": job.id,
        "name": spec.name,
        "project": spec.project,
        "user": job.user,
        "state": job.state,
        "reason": job.reason,
        "cause": job.cause,
        "command": spec.command,
        "script": spec.script,
        "code": spec.code,
        "workdir": spec.workdir,
        "env": spec.env,
        "gpus": spec.gpus,
        "gpu_mem_mib": spec.gpu_mem_mib,
        "cpus": spec.cpus,
        "mem_mib": spec.mem_mib,
        "time_limit_s": spec.time_limit_s,
        "grace_s": spec.grace_s,
        "priority": spec.priority,
        "preemptible": spec.preemptible,
        "depends_on": [depends_on(dependency) for dependency in spec.depends_on],
        "array": array_json(job),
        "retries": spec.retries,
        "requeue": spec.requeue,
        "launch": spec.launch,
        "model": spec.model,
        "hold": spec.hold,
        "not_before": moment(spec.not_before),
        "warn_signal": warn_signal_json(job),
        "output": spec.output,
        "error": spec.error,
        "notify": spec.notify,
        "notify_on": spec.notify_on,
        "retry_of": job.retry_of,
        "adopted": job.adopted,
        "submitted_at": moment(job.submitted_at),
        "eligible_at": moment(job.eligible_at),
        "started_at": moment(job.started_at),
        "ended_at": moment(job.ended_at),
        "cancel_requested_at": moment(job.cancel_requested_at),
        "exit_code": job.exit_code,
        "signal": job.signal,
        "attempt": job.attempt,
        "gpu_uuids": job.gpu_uuids,
        "log_bytes": job.log_bytes,
        "files_removed": job.files_removed,
        "usage": {
            "gpu_seconds": job.usage.gpu_seconds,
            "cpu_seconds": job.usage.cpu_seconds,
            "max_rss_mib": job.usage.max_rss_mib,
            "max_gpu_mib": job.usage.max_gpu_mib,
        },
        "progress": None,
        "verdict": None,
        "pending": None if pending is None else pending_json(pending, fewer),
    }


def depends_on(dependency: Dependency) -> str:
    """As Slurm writes it: `afterok:12`, for a whole array `afterok:12_*`."""
    return f"{dependency.after}:{dependency.job_id}{'_*' if dependency.whole_array else ''}"


def array_json(job: Job) -> dict[str, object] | None:
    place = job.array
    if place is None:
        return None
    return {"id": place.id, "index": place.index, "size": place.size, "at_once": place.at_once}


def warn_signal_json(job: Job) -> dict[str, object] | None:
    """The signal that comes before the time limit; `signal` is the one that ended the job."""
    warning = job.spec.warn_signal
    if warning is None:
        return None
    return {"number": warning.number, "before_s": warning.before_s, "main_only": warning.main_only}


def pending_json(pending: Pending, fewer: FewerGpus | None = None) -> dict[str, object]:
    """Why a job waits. `fewer_gpus` is looked for where one job is asked about: it takes a forecast of its own."""
    return {
        "why": pending.why,
        "position": pending.position,
        "estimated_start": moment(pending.estimated_start),
        "estimated_start_p90": moment(pending.estimated_start_p90),
        "fewer_gpus": fewer and {"gpus": fewer.gpus, "estimated_start": moment(fewer.estimated_start)},
    }


def attempt_json(attempt: Attempt) -> dict[str, object]:
    return {
        "attempt": attempt.attempt,
        "gpu_uuids": attempt.gpu_uuids,
        "started_at": moment(attempt.started_at),
        "ended_at": moment(attempt.ended_at),
        "exit_code": attempt.exit_code,
        "signal": attempt.signal,
        "reason": attempt.reason,
        "cause": attempt.cause,
        "cpu_seconds": attempt.cpu_seconds,
        "max_rss_mib": attempt.max_rss_mib,
        "log_bytes": attempt.log_bytes,
    }


def version_json(version: VersionInfo) -> dict[str, object]:
    return {
        "version": version.version,
        "state": version.state,
        "ready": version.ready,
        "reason": version.reason,
        "job": version.job_id,
        "sha256": version.sha256,
        "by_user": version.by_user,
        "deployed_at": moment(version.deployed_at),
    }


def model_json(model: ModelInfo) -> dict[str, object]:
    return {
        "name": model.name,
        "ready": model.ready,
        "reason": model.reason,
        "versions": [version_json(version) for version in model.versions],
    }


def token_json(token: Token) -> dict[str, object]:
    return {
        "id": token.id,
        "name": token.name,
        "last4": token.last4,
        "user": token.user,
        "scopes": sorted(token.scopes),
        "created_at": moment(token.created_at),
        "expires_at": moment(token.expires_at),
        "last_used_at": moment(token.last_used_at),
        "revoked_at": moment(token.revoked_at),
    }


# Text


def table(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as aligned columns; None is `-`. What could move a terminal's cursor is shown as an escape."""
    lines = [[column.upper() for column in columns]]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


def facts(values: Mapping[str, object]) -> str:
    """One value as `name: value` lines, without what is empty."""
    flat = dict(_flattened(values, ""))
    width = max((len(name) for name in flat), default=0)
    return "".join(f"{name + ':':<{width + 1}} {_cell(value)}\n" for name, value in flat.items())


def _flattened(values: Mapping[str, object], prefix: str) -> Iterable[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(cast("Mapping[str, object]", value), f"{prefix}{name}.")
        elif value is not None and value != () and value != []:
            yield prefix + name, value


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        value = ",".join(str(item) for item in cast("Sequence[object]", value)) or "-"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(value))
