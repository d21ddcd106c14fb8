"""`mlbox simulate`: traces of jobs, in mlbox's JSON or in the Standard Workload Format, replayed by `simulation`.

Times are seconds from the beginning of the trace, usage is GPU-hours. SWF is documented at
https://www.cs.huji.ac.il/labs/parallel/workload/swf.html: its processors are taken as GPUs.
"""

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mlbox import config
from mlbox.errors import FieldError, Invalid
from mlbox.jobs import After, Dependency
from mlbox.scheduler import arrays, placement, values
from mlbox.scheduler.placement import Box, GpuView
from mlbox.scheduler.policy import Ledger, Rules, RunningJob, WaitingJob
from mlbox.scheduler.rules import rules_of
from mlbox.scheduler.simulation import Report, SimJob, Simulation, summary

_Id = Annotated[int, Meta(ge=0, le=2**53)] | Annotated[str, Meta(min_length=1, max_length=64)]
_Time = Annotated[float, Meta(ge=-1e12, le=1e12)]
_Seconds = Annotated[float, Meta(ge=0, le=1e12)]
_GPUS_MAX = 1024


class _Gpu(msgspec.Struct, forbid_unknown_fields=True):
    memory_mib: Annotated[int, Meta(gt=0, le=2**31)] | None = None
    name: str | None = None


class _Running(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: _Id
    user: str
    gpus: list[Annotated[int, Meta(ge=0, lt=_GPUS_MAX)]]
    started: _Time = 0.0
    duration: _Seconds
    time_limit: _Seconds | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    preemptible: bool = False
    project: str = "default"


class _Job(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: _Id
    user: str
    submit: _Time = 0.0
    gpus: Annotated[int, Meta(ge=0, le=_GPUS_MAX)] | None = None
    gpu_mem: str | Annotated[int, Meta(gt=0)] | None = None
    cpus: Annotated[int, Meta(gt=0, le=65_536)] | None = None
    duration: _Seconds
    time_limit: _Seconds | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    preemptible: bool = False
    depends_on: list[_Id] | _Id | None = None
    array: str | None = None
    project: str = "default"
    name: str = ""
    fails: bool = False
    not_before: _Time | None = None


class _Trace(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    gpus: list[_Gpu]
    jobs: list[_Job]
    links: list[tuple[int, int, int]] = []
    usage: dict[str, _Seconds] = {}
    shares: dict[str, Annotated[float, Meta(gt=0)]] = {}
    running: list[_Running] = []
    cpu_slots: Annotated[int, Meta(ge=0, le=65_536)] = 0


@dataclass(slots=True)
class _Names:
    """Ids of the trace, which may be text, and the numbers that the policy knows jobs by, in the order of submit."""

    shown: dict[int, str | int] = field(default_factory=dict[int, "str | int"])
    numbers: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """By id as text: the jobs that it names, all elements of an array."""

    def claim(self, name: str | int) -> None:
        """Have `name` stand for a job or an array whose jobs are then added."""
        if str(name) in self.numbers:
            raise Invalid(f"two jobs of the trace have the id {name!r}: each needs its own")
        self.numbers[str(name)] = []

    def add(self, name: str | int, *, index: int | None = None) -> int:
        """The number of a job, or of the element `index` of an array."""
        number = len(self.shown) + 1
        self.shown[number] = name
        self.numbers[str(name)].append(number)
        if index is not None:
            element = self.shown[number] = f"{name}_{index}"
            self.claim(element)
            self.numbers[element].append(number)
        return number


def command(path: Path, config_path: Path | None = None, *, swf: bool | None = None) -> Report:
    """Read a trace and replay it. Blocking. Raises Invalid for a bad trace, BadConfig for a bad configuration.

    `swf` None: by the name of the file (`.swf`).
    """
    settings = config.load(config_path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Invalid(f"the trace {path} cannot be read: {error.strerror}") from error
    is_swf = path.suffix == ".swf" if swf is None else swf
    return replay(_read_swf(data) if is_swf else _read_json(data), rules_of(settings))


def loads(data: bytes) -> _Trace:
    """A trace in mlbox's JSON. Raises Invalid that names the field."""
    return _read_json(data)


def replay(trace: _Trace, rules: Rules) -> Report:
    """Run a trace to its end. Raises Invalid for one that cannot be meant."""
    box = _box(trace)
    ledger = Ledger(rules.half_life_s)
    for user, hours in trace.usage.items():
        ledger.put(user, hours * 3600, 0.0)
    rules = replace(rules, shares={**rules.shares, **trace.shares})
    names = _Names()
    users: dict[int, str] = {}
    held: set[int] = set()
    simulation = Simulation(box, rules, ledger=ledger)
    for one in trace.running:
        names.claim(one.id)
        number = names.add(one.id)
        users[number] = one.user
        job = _running(one, number, box, held)
        held.update(one.gpus)
        simulation.add_running(job, max(0.0, one.started + _length(one)), duration_s=one.duration)
    for at in sorted(range(len(trace.jobs)), key=lambda at: (trace.jobs[at].submit, at)):
        job = trace.jobs[at]
        for sim in _elements(job, at, names, box):
            users[sim.job.id] = job.user
            simulation.submit(sim, job.submit)
    simulation.run()
    events: list[dict[str, Any]] = [
        {"t": one.at, "event": one.event, "job": names.shown[one.job_id], "gpus": list(one.gpus),
         "why": _renamed(one.why, names)}
        for one in simulation.events
    ]  # fmt: skip
    return Report(events=events, summary=summary(simulation, users, len(box.gpus), names.shown))


def _renamed(why: str, names: _Names) -> str:
    """Jobs by their names in the trace."""
    words = why.split(" ")
    for at, word in enumerate(words[:-1]):
        if word == "job" and words[at + 1].isdigit():
            words[at + 1] = str(names.shown.get(int(words[at + 1]), words[at + 1]))
    return " ".join(words)


def _read_json(data: bytes) -> _Trace:
    try:
        return msgspec.json.decode(data, type=_Trace)
    except (msgspec.DecodeError, RecursionError) as error:
        text = str(error)
        message, _, where = text.partition(" - at `$")
        place = where.rstrip("`").lstrip(".") or "the trace"
        raise Invalid(f"the trace cannot be used: {place}: {message}", (FieldError(place, message),)) from error


def _box(trace: _Trace) -> Box:
    if not trace.gpus and not trace.cpu_slots:
        raise Invalid("the trace has no GPUs: give at least one in `gpus`, or `cpu_slots`")
    count = len(trace.gpus)
    if count > _GPUS_MAX:
        raise Invalid(f"the trace has {count} GPUs; at most {_GPUS_MAX} are simulated")
    links: dict[tuple[int, int], int] = {}
    for at, (one, other, number) in enumerate(trace.links):
        if not (0 <= one < count and 0 <= other < count) or one == other or not 0 <= number <= 64:
            raise Invalid(f"links[{at}]: wants two different GPUs of {count} and a number of links, got {one}, {other}")
        links[min(one, other), max(one, other)] = placement.pair_score("SYS", number)
    if links:
        far = placement.pair_score("SYS", 0)
        links = {(a, b): links.get((a, b), far) for a in range(count) for b in range(a + 1, count)}
    return Box(
        gpus=tuple(
            GpuView(uuid=f"GPU-{index}", index=index, busy=None, memory_mib=gpu.memory_mib)
            for index, gpu in enumerate(trace.gpus)
        ),
        slots=trace.cpu_slots or 1,
        slots_free=trace.cpu_slots or 1,
        scores=placement.score_matrix(count, links) if links else (),
    )


def _length(one: _Running) -> float:
    return one.duration if one.time_limit is None else min(one.duration, one.time_limit)


def _running(one: _Running, number: int, box: Box, held: Set[int]) -> RunningJob:
    if not one.gpus or any(gpu >= len(box.gpus) for gpu in one.gpus):
        raise Invalid(f"running job {one.id!r}: gpus {one.gpus} are not all among the {len(box.gpus)} of the trace")
    if len(set(one.gpus)) < len(one.gpus) or not held.isdisjoint(one.gpus):
        raise Invalid(f"running job {one.id!r}: gpus {one.gpus}: each GPU can be held by one running job, once")
    if one.started > 0:
        raise Invalid(f"running job {one.id!r}: started is {one.started:g}, and the trace begins at 0")
    return RunningJob(
        id=number, user=one.user, project=one.project, priority=one.priority, started_at=one.started,
        gpu_uuids=tuple(box.gpus[gpu].uuid for gpu in one.gpus), time_limit_s=one.time_limit or None,
        preemptible=one.preemptible, rate=float(len(one.gpus)),
    )  # fmt: skip


def _elements(job: _Job, at: int, names: _Names, box: Box) -> Sequence[SimJob]:
    """The jobs that one line of a trace stands for: one, or each element of its array."""
    where = f"jobs[{at}] ({job.id!r})"
    try:
        memory_mib = None if job.gpu_mem is None else values.memory_mib(job.gpu_mem)
        array = None if job.array is None else arrays.array(job.array)
    except values.Bad as error:
        raise Invalid(f"{where}: {error}") from None
    gpus = 0 if memory_mib is not None else 1 if job.gpus is None else job.gpus
    if memory_mib is not None and job.gpus:
        raise Invalid(f"{where}: give gpus or gpu_mem, not both")
    slots = 0 if gpus or memory_mib else job.cpus or 1
    problem = placement.impossible(gpus, slots, box)
    if problem is None and memory_mib is not None:
        problem = placement.impossible_share(memory_mib, box)
    if problem is not None:
        raise Invalid(f"{where}: {problem}")
    asked = [] if job.depends_on is None else job.depends_on if isinstance(job.depends_on, list) else [job.depends_on]
    depends_on = tuple(one for text in asked for one in _dependencies(text, where, names))
    indices = [None] if array is None else [element.index for element in array.elements]
    first: int | None = None
    made: list[SimJob] = []
    names.claim(job.id)
    for index in indices:
        number = names.add(job.id, index=index)
        first = first or number
        made.append(
            SimJob(
                job=WaitingJob(
                    id=number, uid=0, user=job.user, project=job.project, priority=job.priority,
                    submitted_at=job.submit, gpus=gpus, gpu_mem_mib=memory_mib, slots=slots,
                    time_limit_s=job.time_limit or None, preemptible=job.preemptible,
                    array_id=None if index is None else first,
                    array_at_once=None if array is None else array.at_once,
                    not_before=job.not_before, kind=job.name,
                ),
                duration_s=job.duration, depends_on=depends_on, fails=job.fails,
            )
        )  # fmt: skip
    return made


def _dependencies(text: str | int, where: str, names: _Names) -> Sequence[Dependency]:
    after, colon, name = str(text).rpartition(":")
    name = name.removesuffix("_*")
    if name not in names.numbers:
        raise Invalid(f"{where}: depends on {name!r}, which is no job that was submitted before it")
    try:
        kind = After(after) if colon else After.OK
    except ValueError:
        raise Invalid(f"{where}: {after!r} is no dependency; known: {', '.join(After)}") from None
    return [Dependency(job_id=number, after=kind) for number in names.numbers[name]]


def _read_swf(data: bytes) -> _Trace:
    """Fields of SWF, from 1: 1 id, 2 submit, 4 run time, 5 processors, 8 requested, 9 requested time, 12 user."""
    header: dict[str, str] = {}
    jobs: list[_Job] = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        if line.startswith(";"):
            name, _, value = line[1:].partition(":")
            header[name.strip()] = value.strip()
            continue
        words = line.split()
        if not words:
            continue
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            numbers = []
        if len(numbers) != 18 or not all(map(math.isfinite, numbers)):
            raise Invalid(f"line {number} of the trace is not SWF: it wants 18 numbers, and has {len(words)} words")
        gpus = int(numbers[7] if numbers[7] > 0 else numbers[4])
        if gpus <= 0 or numbers[3] < 0:
            continue  # a job that was cancelled before it ran
        if gpus > _GPUS_MAX:
            asked = f"line {number} of the trace asks {float(gpus):g} processors"
            raise Invalid(f"{asked}; at most {_GPUS_MAX} are simulated")
        jobs.append(
            _Job(
                id=int(numbers[0]), user=f"user{int(numbers[11])}", submit=numbers[1], gpus=gpus, duration=numbers[3],
                time_limit=numbers[8] if numbers[8] > 0 else None, name=f"program{int(numbers[13])}",
            )
        )  # fmt: skip
    largest = max((job.gpus or 0 for job in jobs), default=1)
    written = header.get("MaxProcs", "")
    size = int(written) if re.fullmatch(r"[0-9]{1,9}", written) else largest
    if size > _GPUS_MAX:
        raise Invalid(f"the trace has {size} processors (MaxProcs); at most {_GPUS_MAX} are simulated")
    return _Trace(gpus=[_Gpu() for _ in range(max(size, largest))], jobs=jobs)


def as_json(report: Report) -> Mapping[str, Any]:
    """The document that `mlbox simulate` prints."""
    return {"events": list(report.events), "summary": report.summary}
