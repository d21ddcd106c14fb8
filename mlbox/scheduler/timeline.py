"""GPUs x time: what ran, runs and probably will run on each GPU, and what keeps it from that. Pure.

It is a picture for people, made of what others decided: past attempts, the forecast, reservations, and what the GPUs'
states say.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mlbox.scheduler.forecast import Forecast
from mlbox.scheduler.gpus import GpuState
from mlbox.scheduler.history import History
from mlbox.scheduler.placement import Reservation
from mlbox.scheduler.policy import RunningJob
from mlbox.scheduler.rows import Held
from mlbox.scheduler.state import GpuReport

Kind = Literal["past", "running", "planned", "reserved", "foreign", "drained"]

_AHEAD_MIN_S = 2 * 3600.0
_AHEAD_MAX_S = 48 * 3600.0
"""Further ahead an estimate is a guess, and the next hour too narrow to be seen."""
_PAST_PART = 0.5
"""How much is shown of the past, in parts of what is shown of the time to come."""
PAST_MAX_S = _AHEAD_MAX_S * _PAST_PART


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Something on one GPU from one time to another (Unix seconds); `ends_at` None: nobody knows until when.

    A running bar ends when such jobs probably end.
    """

    kind: Kind
    name: str
    starts_at: float
    ends_at: float | None
    job_id: int | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One GPU; bars of a GPU that is shared overlap."""

    gpu_uuid: str
    index: int
    label: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The lanes, MIG devices behind their GPU, and the time to show: further back for longer plans."""

    now: float
    starts_at: float
    ends_at: float
    lanes: tuple[Lane, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a timeline is made of. `names` are those of the jobs that run or wait, by id."""

    gpus: Sequence[GpuReport]
    past: Sequence[Held]
    running: Sequence[RunningJob]
    forecast: Forecast
    history: History
    reservations: Sequence[Reservation]
    names: Mapping[int, str]
    now: float


def timeline(scene: Scene) -> Timeline:
    """The scene as bars on lanes."""
    gpus = sorted(scene.gpus, key=lambda report: report.gpu.index)
    bars: dict[str, list[Bar]] = {report.gpu.uuid: [] for report in gpus}
    for uuid, bar in (*_past(scene), *_running(scene), *_planned(scene, gpus), *_barred(scene)):
        if uuid in bars:  # a GPU that is gone has no lane
            bars[uuid].append(bar)
    ends = [bar.ends_at for lane in bars.values() for bar in lane if bar.kind in ("running", "planned") and bar.ends_at]
    ahead_s = min(_AHEAD_MAX_S, max(_AHEAD_MIN_S, 1.05 * (max(ends, default=scene.now) - scene.now)))
    return Timeline(
        now=scene.now,
        starts_at=scene.now - _PAST_PART * ahead_s,
        ends_at=scene.now + ahead_s,
        lanes=tuple(
            Lane(
                gpu_uuid=report.gpu.uuid,
                index=report.gpu.index,
                label=report.gpu.label,
                bars=tuple(bars[report.gpu.uuid]),
            )
            for report in sorted(gpus, key=lambda report: report.gpu.place)
        ),
    )


def _past(scene: Scene) -> Iterable[tuple[str, Bar]]:
    for held in scene.past:
        for uuid in held.gpu_uuids:
            yield (
                uuid,
                Bar(
                    kind="past",
                    name=held.name,
                    job_id=held.job_id,
                    user=held.user,
                    starts_at=held.started_at,
                    ends_at=held.ended_at,
                ),
            )


def _running(scene: Scene) -> Iterable[tuple[str, Bar]]:
    for job in scene.running:
        ran_s = max(0.0, scene.now - job.started_at)
        total_s = scene.history.quantile(job.user, job.project, job.kind, 0.5, limit_s=job.time_limit_s, ran_s=ran_s)
        for uuid in job.gpu_uuids:
            yield (
                uuid,
                Bar(
                    kind="running",
                    name=scene.names.get(job.id, ""),
                    job_id=job.id,
                    user=job.user,
                    starts_at=job.started_at,
                    ends_at=None if total_s is None else job.started_at + max(total_s, ran_s),
                ),
            )


def _planned(scene: Scene, gpus: Sequence[GpuReport]) -> Iterable[tuple[str, Bar]]:
    """The forecast without what runs already; it may be some seconds old."""
    under_way = {job.id for job in scene.running}
    for planned in scene.forecast.bars:
        if planned.job_id in under_way or planned.job_id not in scene.names:
            continue
        start = max(planned.start, scene.now)
        if planned.end is not None and planned.end <= start:
            continue
        for place in planned.gpus:
            if place < len(gpus):
                bar = Bar(
                    kind="planned",
                    name=scene.names[planned.job_id],
                    job_id=planned.job_id,
                    user=planned.user,
                    starts_at=start,
                    ends_at=planned.end,
                )
                yield gpus[place].gpu.uuid, bar


def _barred(scene: Scene) -> Iterable[tuple[str, Bar]]:
    """What keeps jobs off a GPU: reservations, processes from outside, draining."""
    for kept in scene.reservations:
        whom = kept.for_user or kept.for_project
        name = f"{kept.name} ({whom})" if whom and whom != kept.name else kept.name
        for uuid in kept.gpu_uuids:
            yield uuid, Bar(kind="reserved", name=name, starts_at=kept.starts_at, ends_at=kept.ends_at)
    for report in scene.gpus:
        uuid = report.gpu.uuid
        if report.state is GpuState.FOREIGN:
            for process in report.gpu.processes or ():
                if process.computes and process.attempt_key is None:
                    began = min(process.started_at or scene.now, scene.now)
                    name = process.command or f"process {process.pid}"
                    yield uuid, Bar(kind="foreign", name=name, user=process.user, starts_at=began, ends_at=None)
        elif report.state in (GpuState.DRAINED, GpuState.DRAINING):
            yield uuid, Bar(kind="drained", name=report.why, starts_at=scene.now, ends_at=None)
