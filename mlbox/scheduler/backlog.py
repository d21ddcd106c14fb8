"""The waiting jobs in memory, in order: an index over the database's `queued` rows, kept in step by the service.

A pass over 10,000 rows of SQLite for every job that ends would cost more than starting the next one. Ranks change
with time, but within a group (user, project, priority) the order never does: it is that of waiting. So a group is a
sorted list, and a pass merges the fronts of few groups instead of sorting all jobs.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

from mlbox.scheduler.policy import Standing, WaitingJob, Weights, barred, score

Place = tuple[float, int]
"""Since when a job waits, and its id: the order within a group."""
GroupKey = tuple[str, str, int]
"""User, project, priority."""
Shape = tuple[int, int, float, bool]
"""Units, MiB of GPU memory (0: whole units), time limit (infinity: none), preemptible: what placing depends on."""


def shape_of(job: WaitingJob) -> Shape:
    limit = math.inf if job.time_limit_s is None else job.time_limit_s
    return (job.size, job.gpu_mem_mib or 0, limit, job.preemptible)


@dataclass(slots=True)
class Group:
    """Jobs of one user, project and priority: all in the order of waiting, and the same by shape."""

    user: str
    project: str
    priority: int
    order: list[Place] = field(default_factory=list[Place])
    by_shape: dict[Shape, list[Place]] = field(default_factory=dict[Shape, list[Place]])

    def score(self, place: Place, standing: Standing, weights: Weights, now: float) -> float:
        return score(self.priority, standing.factor(self.user), now - place[0], weights)


class Line:
    """The jobs that may start and want one kind of resource."""

    def __init__(self) -> None:
        self.groups: dict[GroupKey, Group] = {}
        self.size = 0

    def put(self, job: WaitingJob) -> None:
        key = (job.user, job.project, job.priority)
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = Group(*key)
        place = (job.since, job.id)
        insort(group.order, place)
        insort(group.by_shape.setdefault(shape_of(job), []), place)
        self.size += 1

    def drop(self, job: WaitingJob) -> None:
        key = (job.user, job.project, job.priority)
        group = self.groups[key]
        place = (job.since, job.id)
        del group.order[bisect_left(group.order, place)]
        shape = shape_of(job)
        alike = group.by_shape[shape]
        del alike[bisect_left(alike, place)]
        if not alike:
            del group.by_shape[shape]
        if not group.order:
            del self.groups[key]
        self.size -= 1

    def merged(
        self, standing: Standing, weights: Weights, now: float, skipped: Container[int] = ()
    ) -> Iterator[tuple[int, Group]]:
        """Ids with their groups, first to be tried first. No more comes of a group whose `id()` is put in `skipped`."""
        heap = [
            (-group.score(group.order[0], standing, weights, now), *group.order[0], number, 0, group)
            for number, group in enumerate(self.groups.values())
        ]
        heapify(heap)
        while heap:
            _, _, job_id, number, at, group = heap[0]
            yield job_id, group
            if at + 1 < len(group.order) and id(group) not in skipped:
                place = group.order[at + 1]
                heapreplace(heap, (-group.score(place, standing, weights, now), *place, number, at + 1, group))
            else:
                heappop(heap)

    def ahead(self, job: WaitingJob, standing: Standing, weights: Weights, now: float) -> int:
        """How many jobs come before `job`."""
        own = score(job.priority, standing.factor(job.user), now - job.since, weights)
        count = 0
        for group in self.groups.values():
            low, high = 0, len(group.order)
            while low < high:  # scores fall along a group, so the jobs before `job` are a prefix of it
                middle = (low + high) // 2
                place = group.order[middle]
                theirs = group.score(place, standing, weights, now)
                if theirs > own or (theirs == own and place < (job.since, job.id)):
                    low = middle + 1
                else:
                    high = middle
            count += low
        return count


class Backlog:
    """Waiting jobs in two lines, one for GPUs and one for CPU slots, and aside those that may not start yet.

    Adding and removing take logarithmic time and a short move.
    """

    def __init__(self) -> None:
        self._jobs: dict[int, WaitingJob] = {}
        self.gpu_line = Line()
        self.slot_line = Line()
        self._aside: set[int] = set()
        self._capped: dict[int, list[Place]] = {}
        """By array with a cap: its elements that are kept aside because enough of them run or are in line."""
        self._in_line: dict[int, int] = {}
        self._at_once: dict[int, int] = {}
        self._next_due = math.inf
        self._latest = -math.inf
        """The latest moment that it was told: a clock may be set back."""
        self._users: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: int) -> bool:
        return job_id in self._jobs

    def get(self, job_id: int) -> WaitingJob | None:
        return self._jobs.get(job_id)

    @property
    def jobs(self) -> Mapping[int, WaitingJob]:
        return self._jobs

    @property
    def users(self) -> Iterable[str]:
        """Everybody who has a job waiting."""
        return self._users.keys()

    def put(self, job: WaitingJob, now: float) -> None:
        """Add `job`, or replace what was known of it."""
        self.drop(job.id)
        self._jobs[job.id] = job
        self._users[job.user] = self._users.get(job.user, 0) + 1
        self._sort_in(job, now)

    def _sort_in(self, job: WaitingJob, now: float) -> None:
        self._latest = max(self._latest, now)
        if barred(job, now):
            self._aside.add(job.id)
            if job.not_before is not None and not job.hold and not job.depends:
                self._next_due = min(self._next_due, job.not_before)
        elif job.array_at_once is not None and job.array_id is not None:
            self._at_once[job.array_id] = job.array_at_once
            insort(self._capped.setdefault(job.array_id, []), (job.since, job.id))
        else:
            self._line(job).put(job)

    def drop(self, job_id: int) -> None:
        """Forget a job that waits no longer; nothing happens when it is not there."""
        job = self._jobs.pop(job_id, None)
        if job is None:
            return
        self._users[job.user] -= 1
        if not self._users[job.user]:
            del self._users[job.user]
        if job_id in self._aside:
            self._aside.discard(job_id)
            return
        if job.array_at_once is not None and job.array_id is not None:
            aside = self._capped.get(job.array_id, [])
            at = bisect_left(aside, (job.since, job.id))
            if at < len(aside) and aside[at][1] == job_id:
                del aside[at]
                self._forget_array(job.array_id)
                return
            self._in_line[job.array_id] -= 1
        self._line(job).drop(job)
        if job.array_id in self._in_line:
            self._forget_array(job.array_id)

    def replace_all(self, jobs: Iterable[WaitingJob], now: float) -> None:
        """Start anew from the database's truth."""
        for known in (self._jobs, self._aside, self._capped, self._in_line, self._at_once, self._users):
            known.clear()
        self.gpu_line, self.slot_line = Line(), Line()
        self._next_due = math.inf
        for job in jobs:
            self.put(job, now)

    def admit(self, now: float, running_of_array: Mapping[int, int] | None = None) -> None:
        """Let the jobs whose time has come into their line, and of each capped array as many as may run."""
        if now < self._latest:  # the clock was set back: what was due may not be any more
            for job in [job for job in self._jobs.values() if job.not_before is not None and job.not_before > now]:
                self.put(job, now)
        self._latest = now
        if now >= self._next_due:
            aside = [self._jobs[job_id] for job_id in self._aside]
            self._next_due = math.inf
            self._aside.clear()
            for job in aside:
                self._sort_in(job, now)
        running = running_of_array or {}
        for array_id in list(self._capped):
            aside = self._capped[array_id]
            room = self._at_once[array_id] - running.get(array_id, 0) - self._in_line.get(array_id, 0)
            if room <= 0 or not aside:
                continue
            for _, job_id in aside[:room]:
                job = self._jobs[job_id]
                self._line(job).put(job)
            self._in_line[array_id] = self._in_line.get(array_id, 0) + min(room, len(aside))
            del aside[:room]

    @property
    def next_due(self) -> float:
        """When the next job's `not_before` comes, in Unix seconds; infinity when none waits for a time."""
        return self._next_due

    def ordered(self, limit: int, standing: Standing, weights: Weights, now: float) -> list[WaitingJob]:
        """The first `limit` waiting jobs in one order; those that may not start yet come last."""
        found: list[tuple[float, float, int]] = []
        for line in (self.gpu_line, self.slot_line):
            for count, (job_id, group) in enumerate(line.merged(standing, weights, now)):
                if count == limit:
                    break
                job = self._jobs[job_id]
                found.append((-group.score((job.since, job_id), standing, weights, now), job.since, job_id))
        found.sort()
        ids = [job_id for _, _, job_id in found[:limit]]
        for array_id in self._capped:
            if len(ids) < limit:
                ids += [job_id for _, job_id in self._capped[array_id][: limit - len(ids)]]
        ids += sorted(self._aside)[: max(0, limit - len(ids))]
        return [self._jobs[job_id] for job_id in ids]

    def position(self, job: WaitingJob, standing: Standing, weights: Weights, now: float) -> int | None:
        """1 for the job that is tried first of all; None for one that may not start yet."""
        if job.id in self._aside or self.is_capped(job):
            return None
        lines = (self.gpu_line, self.slot_line)
        return 1 + sum(line.ahead(job, standing, weights, now) for line in lines)

    def is_capped(self, job: WaitingJob) -> bool:
        """Whether it waits only because enough of its array run or come before it."""
        if job.array_at_once is None or job.array_id is None or job.id in self._aside:
            return False
        aside = self._capped.get(job.array_id, [])
        at = bisect_left(aside, (job.since, job.id))
        return at < len(aside) and aside[at][1] == job.id

    def _forget_array(self, array_id: int | None) -> None:
        """Forget an array of which nothing is left, in line or aside."""
        if array_id is not None and not self._capped.get(array_id) and not self._in_line.get(array_id):
            self._capped.pop(array_id, None)
            self._in_line.pop(array_id, None)
            self._at_once.pop(array_id, None)

    def _line(self, job: WaitingJob) -> Line:
        return self.gpu_line if job.wants_gpu else self.slot_line
