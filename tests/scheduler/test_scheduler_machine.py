"""The scheduler's real parts against a made-up world: nothing is lost or given away twice.

The loop, the service and the database's SQL are real. Made up are the clock, the shims and what the GPUs show, and
the database answers at once, so that no event loop is needed: every coroutine is run to its end where it is called.
"""

import asyncio
import logging
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlbox import database as database_module
from mlbox.config import JobsConfig
from mlbox.errors import MlboxError
from mlbox.events import Events
from mlbox.jobs import ACTIVE, ENDED, After, ArraySpec, Dependency, Element, JobSpec, JobState, Met, met
from mlbox.scheduler import attempts, gpu_door, gpus, loop, queue, service, state, watch
from mlbox.scheduler.executors.base import Exit, Liveness, Observation, Started, Stopped
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.gpu_state import Gpu, GpuProcess
from mlbox.scheduler.gpus import GpuInventory, Nvml
from mlbox.scheduler.launching import Surroundings
from mlbox.scheduler.loop import Loop
from mlbox.scheduler.placement import Start
from mlbox.scheduler.policy import Quota, Rules, charge
from mlbox.scheduler.queue import Launching, Submitter
from mlbox.scheduler.service import JobService
from mlbox.scheduler.state import Active, Next, SchedulerState, waiting
from mlbox.scheduler.watch import WatchRules
from tests.scheduler.box import ADMIN, ALICE, BOB

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

MEMORY_MIB = 16_000
GPUS = tuple(f"GPU-{letter}" for letter in "abcd")
SLOTS = 2
DAY_S = 86_400.0
MOST_JOBS = 12
NOON = 1_790_000_000.0
RULES = (
    Rules(reservations=2, min_run_s=60.0),
    Rules(
        reservations=1,
        min_run_s=0.0,
        user_quota=Quota(gpus=3),
        project_quotas={"p": Quota(gpus=2)},
        shares={"alice": 3.0},
    ),
    Rules(min_run_s=60.0, user_quotas={"bob": Quota(gpus=2, gpu_hours=30.0)}),
)


class Clock:
    """Stands for the module `time`. The box's own clock never goes back; the wall's may."""

    def __init__(self) -> None:
        self.wall = NOON
        self.up = 1000.0

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        self.up += 1e-6
        return self.up

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.up += seconds


class Died(Exception):
    """The daemon was killed in the middle of what it did."""


class InstantDatabase:
    """The real schema in memory. `dies` is the daemon's death at the next write: before or after its commit."""

    def __init__(self) -> None:
        self.connection = _schema()
        self.dies: str | None = None

    async def write(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        dies, self.dies = self.dies, None
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            if dies == "before":
                raise Died
            result = function(self.connection, *args, **kwargs)
            self.connection.execute("COMMIT")
        except BaseException:
            self.connection.execute("ROLLBACK")
            raise
        if dies == "after":
            raise Died
        return result

    async def read(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(self.connection, *args, **kwargs)


_template: list[bytes] = []


def _schema() -> sqlite3.Connection:
    """An empty database with the schema; migrating it anew for each example would be a third of the run."""
    connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=256)
    connection.row_factory = sqlite3.Row
    if _template:
        connection.deserialize(_template[0])
    else:
        database_module._migrate(connection, path=Path("unused"))
        _template.append(connection.serialize())
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


@dataclass
class Shim:
    """An attempt as it really is."""

    key: str
    gpu_uuids: tuple[str, ...]
    began: float
    liveness: Liveness = Liveness.ALIVE
    same_boot: bool = True
    exit: Exit | None = None


class World:
    """The box outside the daemon: shims, processes on GPUs, broken GPUs. Stands for the executor as well."""

    def __init__(self) -> None:
        self.shims: dict[tuple[int, int], Shim] = {}
        self.processes: dict[str, list[GpuProcess]] = {uuid: [] for uuid in GPUS}
        self.lost: set[str] = set()
        self.pids = 100

    def observe(self, folder: Path) -> Observation:
        shim = self.shims.get((int(folder.parent.name), int(folder.name.split("-")[1])))
        if shim is None:
            return Observation(liveness=Liveness.NOT_STARTED)
        started = Started(shim_pid=1, pid=2, boot_id="b", started_at=shim.began)
        return Observation(liveness=shim.liveness, started=started, exit=shim.exit, same_boot=shim.same_boot)

    def kill_remains(self, _folder: Path, key: str) -> frozenset[int]:
        self.end_processes(key)
        return frozenset()

    def kill(self, pids: list[tuple[int, int]]) -> None:
        dead = {pid for pid, _ in pids}
        for uuid in GPUS:
            self.processes[uuid] = [one for one in self.processes[uuid] if one.pid not in dead]

    def put(self, uuid: str, *, key: str | None, memory_mib: int, killable: bool = False) -> GpuProcess:
        self.pids += 1
        process = GpuProcess(
            pid=self.pids,
            kind="C",
            memory_mib=memory_mib,
            user="eve",
            command="python train.py",
            start_ticks=self.pids if killable else None,
            attempt_key=key,
        )
        self.processes[uuid].append(process)
        return process

    def end_processes(self, key: str) -> None:
        for uuid in GPUS:
            self.processes[uuid] = [one for one in self.processes[uuid] if one.attempt_key != key]

    def gpu(self, index: int, adopted: dict[str, tuple[int, int]]) -> Gpu:
        uuid = GPUS[index]
        base = Gpu(uuid=uuid, index=index, name="H100", bus_id=f"0000:0{index}:00.0")
        if uuid in self.lost:
            return replace(base, error="NVML: GPU is lost")
        keys = {pid: key for key, (pid, _) in adopted.items()}
        seen = tuple(
            replace(one, attempt_key=keys[one.pid]) if one.pid in keys else one for one in self.processes[uuid]
        )
        used = sum(one.memory_mib or 0 for one in seen)
        return replace(base, memory_mib=MEMORY_MIB, used_mib=used, free_mib=max(0, MEMORY_MIB - used), processes=seen)


class Group:
    """Stands for the TaskGroup of a tick: who carries an attempt on, and when, is the machine's choice."""

    def create_task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        del name
        work.close()


async def _at_once(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


async def _wholly(work: Coroutine[Any, Any, Any]) -> Any:
    return await work


EXITS = ("well", "well", "well", "fail", "fail", "signal", "oom", "gpu_oom", "limit", "refused", "lost")
PICK = st.integers(0, 11)
SPECS = st.builds(
    JobSpec,
    command=st.just("python train.py"),
    name=st.just("n"),
    project=st.sampled_from(["default", "p"]),
    gpus=st.sampled_from([0, 1, 1, 2, 2, 3, 4]),
    time_limit_s=st.sampled_from([None, None, 100.0, 1000.0]),
    priority=st.sampled_from([0, 0, 0, -1, 5]),
    preemptible=st.booleans(),
    retries=st.sampled_from([0, 0, 1]),
    requeue=st.booleans(),
)


class Scheduler(RuleBasedStateMachine):
    """Everything that users, admins, jobs and the box itself do, one thing after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        self.clock = Clock()
        self.world = World()
        for module in (attempts, gpu_door, gpus, loop, service, state, watch):
            self.patches.setattr(module, "time", self.clock)
        self.patches.setattr(asyncio, "to_thread", _at_once)
        for module in (service, gpu_door):
            self.patches.setattr(module, "whole", _wholly)
        self.patches.setattr(watch, "_kill", self.world.kill)
        self.database = InstantDatabase()
        self.rules = RULES[0]
        self.ended: dict[int, tuple[Any, ...]] = {}
        self.attempts_seen: dict[int, int] = {}
        self.last_lease = 0
        self.steps = 0
        self.over_soon = False
        self.boot()

    # The daemon

    def boot(self) -> None:
        """A new daemon: all memory is gone, and the database and the attempts' folders are all there is."""
        while True:
            try:
                self.take_up()
            except Died:
                continue
            return

    def take_up(self) -> None:
        events, folders = Events(), Folders(Path("/nowhere"))
        self.state = SchedulerState(slots=SLOTS, rules=self.rules)
        self.gpus = GpuInventory(lambda: None)
        self.gpus._nvml = Nvml.OK
        self.loop = Loop(
            database=self.database,
            events=events,
            folders=folders,
            gpus=self.gpus,
            executor=self.world,
            state=self.state,
            surroundings=Surroundings(config=JobsConfig(), inherited={}, url="", tools=Path("/nowhere")),
            repair_s=3600.0,
            watch=WatchRules(over_share_s=0.0, over_share_stops=True, idle_notice_s=0.0),
        )
        self.loop._forecaster.look = lambda *_: None
        self.attempts = self.loop._attempts
        self.attempts._prepare_and_start = self.launch
        self.service = JobService(
            database=self.database,
            events=events,
            folders=folders,
            gpus=self.gpus,
            state=self.state,
            wake=self.loop.wake,
            waiting_max=50,
            take_up=self.loop.take_up,
        )
        _result(self.loop._remember())
        found = _result(self.loop._catch_up())
        self.sample()
        for active in found:
            _result(self.attempts.settle(active))
            self.mark_running(active)

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What `work` returns; None when it was refused, or the daemon died of it and a new one is there."""
        try:
            return _result(work)
        except Died:
            self.boot()
        except MlboxError:
            pass
        return None

    def launch(self, active: Active, token: str) -> None:
        """Stands for the start of a shim."""
        assert token
        place = (active.job.id, active.attempt)
        if place in self.world.shims:  # a second shim refuses
            return
        self.world.shims[place] = Shim(key=active.key, gpu_uuids=active.gpu_uuids, began=self.clock.wall + 0.25)
        if active.adopts is None:
            for uuid in active.gpu_uuids:
                asked = active.job.spec.gpu_mem_mib
                over = 2000 if active.job.id % 3 == 0 else 0
                self.world.put(uuid, key=active.key, memory_mib=asked + over if asked else 9000)

    def mark_running(self, active: Active) -> None:
        if active.next is Next.WATCH and active.job.state is JobState.STARTING:
            _result(self.attempts._mark_running(active))

    def carry_on(self, active: Active) -> None:
        async def work() -> None:
            await self.attempts.settle(active)
            assert active.trouble is None, active.trouble
            if active.next is Next.WATCH and active.job.state is JobState.STARTING:
                await self.attempts._mark_running(active)

        self.do(work())

    def sample(self) -> None:
        self.gpus._known = {uuid: self.world.gpu(index, self.gpus._adopted) for index, uuid in enumerate(GPUS)}
        self.gpus._taken = self.clock.monotonic()

    def rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        return self.database.connection.execute(sql, values).fetchall()

    def one(self, pick: int) -> int:
        """A job, the newest ones first."""
        return self.last_id() - pick % self.last_id()

    def last_id(self) -> int:
        return int(self.rows("SELECT coalesce(max(id), 0) FROM jobs")[0][0])

    # What users do

    @initialize(rules=st.sampled_from(RULES), specs=st.lists(SPECS, min_size=1, max_size=4))
    def begin(self, rules: Rules, specs: list[JobSpec]) -> None:
        self.rules = rules
        self.boot()
        for place, spec in enumerate(specs):
            self.do(self.service.submit((ALICE, BOB, ADMIN)[place % 3], spec))
        self.tick(True)

    @rule(who=st.sampled_from([ALICE, BOB, ADMIN]), spec=SPECS)
    @precondition(lambda self: self.last_id() < MOST_JOBS)
    def submit(self, who: Any, spec: JobSpec) -> None:
        self.do(self.service.submit(who, spec))

    @rule(who=st.sampled_from([ALICE, BOB]), spec=SPECS, memory_mib=st.sampled_from([4000, 4000, 9000, 16_000, 17_000]))
    @precondition(lambda self: self.last_id() < MOST_JOBS)
    def submit_share(self, who: Any, spec: JobSpec, memory_mib: int) -> None:
        self.do(self.service.submit(who, replace(spec, gpus=0, priority=min(0, spec.priority), gpu_mem_mib=memory_mib)))

    @rule(
        who=st.sampled_from([ADMIN, ALICE]),
        spec=SPECS,
        parents=st.dictionaries(PICK, st.sampled_from(After), min_size=1, max_size=2),
        whole=st.booleans(),
        size=st.sampled_from([1, 1, 2]),
    )
    @precondition(lambda self: 0 < self.last_id() < MOST_JOBS)
    def submit_dependent(self, who: Any, spec: JobSpec, parents: dict[int, After], whole: bool, size: int) -> None:
        on = tuple(Dependency(job_id=self.one(pick), after=how, whole_array=whole) for pick, how in parents.items())
        self.do(self.service.submit(who, replace(spec, depends_on=on), array=_array(size, None) if size > 1 else None))

    @rule(who=st.sampled_from([ALICE, BOB]), spec=SPECS, size=st.integers(2, 4), cap=st.sampled_from([None, 1, 1, 2]))
    @precondition(lambda self: self.last_id() < MOST_JOBS - 2)
    def submit_array(self, who: Any, spec: JobSpec, size: int, cap: int | None) -> None:
        small = replace(spec, gpus=min(spec.gpus, 2), priority=0)
        self.do(self.service.submit(who, small, array=_array(size, cap)))

    @rule(spec=SPECS, hold=st.booleans(), later_s=st.sampled_from([None, -5.0, 50.0, DAY_S]))
    @precondition(lambda self: self.last_id() < MOST_JOBS)
    def submit_for_later(self, spec: JobSpec, hold: bool, later_s: float | None) -> None:
        at = None if later_s is None else self.clock.wall + later_s
        self.do(self.service.submit(ADMIN, replace(spec, hold=hold, not_before=at)))

    @rule(what=st.sampled_from(["cancel", "cancel", "array", "hold", "release", "priority", "limit"]), pick=PICK)
    @precondition(lambda self: self.last_id())
    def ask(self, what: str, pick: int) -> None:
        """Somebody changes their mind about a job."""
        job_id = self.one(pick)
        waiting_ids = sorted(self.state.backlog.jobs) or [job_id]
        waits = waiting_ids[pick % len(waiting_ids)]
        arrays = self.rows("SELECT DISTINCT array_id FROM jobs WHERE array_id IS NOT NULL")
        match what:
            case "cancel":
                self.do(self.service.cancel(ADMIN, job_id))
            case "array":
                self.do(self.service.cancel_array(ADMIN, arrays[pick % len(arrays)][0] if arrays else job_id))
            case "hold":
                self.do(self.service.hold(ADMIN, waits))
            case "release":
                self.do(self.service.release(ADMIN, waits))
            case "priority":
                self.do(self.service.change(ADMIN, waits, {"priority": 7 - pick}))
            case _:
                self.do(self.service.change(ADMIN, waits, {"time_limit_s": 50.0 * pick or None}))

    # What the daemon does

    @rule(go_on=st.sampled_from([True, True, True, False]))
    def tick(self, go_on: bool) -> None:
        """One tick; `go_on`: what it started, or found, is carried on before anything else happens."""
        self.sample()
        unclean = self.unclean()
        self.do(self.loop._tick(Group()))
        assert self.state.leases.keys() >= unclean
        self.what_started_may_run()
        if not self.over_soon:
            self.everybody_knows_why()
        if go_on:
            for active in self.under_way(Next.LAUNCH, Next.LOOK):
                if self.state.active.get(active.job.id) is active:
                    self.carry_on(active)

    @rule(seconds=st.sampled_from([1.0, 100.0]))
    @precondition(lambda self: len(self.state.backlog))
    def tick_later(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.tick(True)

    @rule(pick=PICK)
    @precondition(lambda self: self.under_way(Next.LAUNCH, Next.LOOK))
    def carry_on_one(self, pick: int) -> None:
        found = self.under_way(Next.LAUNCH, Next.LOOK)
        self.carry_on(found[pick % len(found)])

    @rule()
    def repair(self) -> None:
        """The slow timer's look at the database finds nothing that memory did not know, or is about to take up."""
        coming = {active.job.id for active in self.loop._taken_up}
        found = self.do(self.loop._catch_up()) or []
        assert {active.job.id for active in found} <= coming

    def under_way(self, *wanted: Next) -> list[Active]:
        found = [active for active in self.state.active.values() if active.next in wanted]
        return sorted(found, key=lambda active: active.job.id)

    # What jobs do

    @rule(pick=PICK, how=st.sampled_from(EXITS), seen=st.sampled_from([True, True, True, False]), left=st.booleans())
    @precondition(lambda self: self.alive())
    def end(self, pick: int, how: str, seen: bool, left: bool) -> None:
        """A shim ends; `left`: something of it stays on its GPUs. Unless it is `seen`, a later look finds it."""
        alive = self.alive()
        active = alive[pick % len(alive)]
        self.end_shim(active, how, left=left)
        if seen:
            active.next = Next.LOOK
            self.carry_on(active)

    @rule(pick=PICK, how=st.sampled_from(EXITS), left=st.sampled_from([False, False, True]))
    @precondition(lambda self: self.alive())
    def end_and_tick(self, pick: int, how: str, left: bool) -> None:
        """What mostly happens."""
        self.end(pick, how, True, left)
        self.clock.advance(5.0)
        self.tick(True)

    @rule(pick=PICK)
    @precondition(lambda self: self.over())
    def look(self, pick: int) -> None:
        over = self.over()
        active = over[pick % len(over)]
        active.next = Next.LOOK
        self.carry_on(active)

    def alive(self) -> list[Active]:
        return [one for one in self.under_way(Next.WATCH) if self.shim(one).liveness is Liveness.ALIVE]

    def over(self) -> list[Active]:
        return [one for one in self.under_way(Next.WATCH) if self.shim(one).liveness is not Liveness.ALIVE]

    def shim(self, active: Active) -> Shim:
        return self.world.shims[active.job.id, active.attempt]

    def end_shim(self, active: Active, how: str, *, left: bool) -> None:
        shim = self.shim(active)
        stopped = Stopped.CANCEL if active.stop_wanted else None
        facts: dict[str, Any] = {
            "well": {"exit_code": 0, "stopped": stopped},
            "fail": {"exit_code": 3, "stopped": stopped},
            "signal": {"signal": 15, "stopped": stopped},
            "oom": {"exit_code": 137, "out_of_memory": True},
            "gpu_oom": {"exit_code": 1, "gpu_out_of_memory": True},
            "limit": {"signal": 15, "stopped": Stopped.TIME_LIMIT},
            "refused": {"error": "no such program", "started_at": None},
        }.get(how, {})
        if how == "lost":
            shim.liveness = Liveness.VANISHED
        else:
            times = {"started_at": shim.began, "ended_at": self.clock.wall}
            shim.exit = Exit(
                **(times | facts), cpu_seconds=1.0, max_rss_mib=1.0, log_bytes=1, adopted=active.adopts is not None
            )
            shim.liveness = Liveness.ENDED
        self.world.end_processes(shim.key)
        if active.adopts is not None:
            self.world.kill([active.adopts])
        elif left:
            for uuid in shim.gpu_uuids:
                self.world.put(uuid, key=shim.key, memory_mib=500, killable=active.job.id % 2 == 0)

    @rule()
    @precondition(lambda self: any(lease.ended for lease in self.state.leases.values()))
    def leftovers_go(self) -> None:
        for lease in self.state.leases.values():
            if lease.ended:
                self.world.end_processes(lease.key)

    # What the box does

    @rule(when=st.sampled_from(["now", "before", "after"]))
    def crash(self, when: str) -> None:
        """The daemon dies: now, or at the next write."""
        if when != "now":
            self.database.dies = when
            return
        self.usage_is_what_was_recorded()
        self.boot()
        self.usage_is_what_was_recorded()

    @rule()
    @precondition(lambda self: self.steps % 3 == 0)
    def reboot(self) -> None:
        for shim in self.world.shims.values():
            if shim.liveness is Liveness.ALIVE:
                shim.liveness = Liveness.VANISHED
            shim.same_boot = False
        for uuid in GPUS:
            self.world.processes[uuid].clear()
        self.world.lost.clear()
        self.clock.advance(100.0)
        self.boot()

    @rule(uuid=st.sampled_from(GPUS), what=st.sampled_from(["lost", "foreign", "hog", "drain", "drain", "resume"]))
    def trouble(self, uuid: str, what: str) -> None:
        """A GPU is lost or back; somebody computes on it past the queue, or stops; an admin drains or resumes it."""
        match what:
            case "lost":
                self.world.lost ^= {uuid}
            case "drain":
                self.do(self.service.drain(ADMIN, uuid, None))
            case "resume":
                self.do(self.service.resume(ADMIN, uuid))
            case _:
                here = self.world.processes[uuid]
                kept = [one for one in here if one.attempt_key is not None or self.is_adopted(one)]
                if len(kept) < len(here):
                    self.world.processes[uuid] = kept
                else:
                    self.world.put(uuid, key=None, memory_mib=600 if what == "foreign" else 12_000)

    def is_adopted(self, process: GpuProcess) -> bool:
        return any(pid == process.pid for pid, _ in self.gpus._adopted.values())

    @rule(uuid=st.sampled_from(GPUS), limit_s=st.sampled_from([None, 500.0]))
    @precondition(lambda self: any(one.attempt_key is None for here in self.world.processes.values() for one in here))
    def adopt(self, uuid: str, limit_s: float | None) -> None:
        """Its owner makes a foreign process a job."""
        strangers = [one for one in self.world.processes[uuid] if one.attempt_key is None and not self.is_adopted(one)]
        if not strangers:
            return
        self.world.pids += 1
        launching = Launching(
            start=Start(job_id=0, gpu_uuids=(uuid,)),
            key=f"adopted-{self.world.pids}",
            token_sha256=f"adopted-{self.world.pids}",
            charge_rate=1.0,
            adopts=(strangers[0].pid, strangers[0].pid),
        )
        spec = JobSpec(command="python train.py", name="adopted", gpus=1, time_limit_s=limit_s)
        self.do(self.service._adopt(spec, Submitter(user="bob", uid=BOB.uid), launching))

    @rule(seconds=st.sampled_from([1.0, 40.0, 61.0, 400.0, 3600.0]), jump_days=st.sampled_from([0, 0, 0, -1, 1]))
    def time_passes(self, seconds: float, jump_days: int) -> None:
        """On the box; the wall's clock may be set meanwhile."""
        self.clock.advance(seconds)
        self.clock.wall += jump_days * DAY_S

    # What admins do

    @rule(
        uuids=st.sets(st.sampled_from(GPUS), min_size=1, max_size=2),
        begins_s=st.sampled_from([0.0, 80.0, 900.0]),
        lasts_s=st.sampled_from([50.0, 5000.0]),
        whose=st.sampled_from([{}, {"for_user": "alice"}, {"for_project": "p"}]),
    )
    @precondition(lambda self: len(self.state.reservations) < 2)
    def reserve(self, uuids: set[str], begins_s: float, lasts_s: float, whose: dict[str, str]) -> None:
        begins = self.clock.wall + begins_s
        uuids_in_order = sorted(uuids)
        self.do(
            self.service.reserve(
                ADMIN, name="w", gpu_uuids=uuids_in_order, starts_at=begins, ends_at=begins + lasts_s, **whose
            )
        )

    @rule()
    @precondition(lambda self: self.state.reservations)
    def cancel_reservation(self) -> None:
        self.do(self.service.cancel_reservation(ADMIN, self.state.reservations[0].id))

    # What must hold

    @invariant()
    def the_books_are_right(self) -> None:
        """Jobs, counters, attempts and dependencies in the database, and memory beside them."""
        self.steps += 1
        found = self.rows("SELECT id, state, attempt, reason, cause, ended_at, failures, eligible_at, array_id, "
                          "array_at_once, hold FROM jobs ORDER BY id")  # fmt: skip
        states = {row["id"]: JobState(row["state"]) for row in found}
        for row in found:
            job_id, attempt = row["id"], row["attempt"]
            assert attempt >= self.attempts_seen.get(job_id, 0)
            self.attempts_seen[job_id] = attempt
            if states[job_id] in ENDED:
                assert self.ended.setdefault(job_id, tuple(row)) == tuple(row)
            else:
                assert job_id not in self.ended
        counted = {JobState(row["state"]): row["count"] for row in self.rows("SELECT state, count FROM job_counts")}
        assert {one: count for one, count in counted.items() if count} == Counter(states.values())
        active = {job_id for job_id, one in states.items() if one in ACTIVE}
        assert set(self.state.backlog.jobs) == {job_id for job_id, one in states.items() if one is JobState.QUEUED}
        assert set(self.state.active) | {one.job.id for one in self.loop._taken_up} == active
        open_attempts = self.rows("SELECT job_id, attempt FROM attempts WHERE ended_at IS NULL")
        attempt_of = {row["id"]: row["attempt"] for row in found}
        assert {(row[0], row[1]) for row in open_attempts} == {(job_id, attempt_of[job_id]) for job_id in active}
        for one in self.state.active.values():
            assert (one.attempt, one.job.state) == (attempt_of[one.job.id], states[one.job.id])
        for row in found:
            if row["array_at_once"] is not None and row["id"] == row["array_id"]:
                elements = [each["id"] for each in found if each["array_id"] == row["id"]]
                assert len(active & set(elements)) <= row["array_at_once"]
        self.dependencies_are_right(found, states)

    def dependencies_are_right(self, found: list[sqlite3.Row], states: dict[int, JobState]) -> None:
        unmet: dict[int, int] = {}
        for row in self.rows("SELECT job_id, parent_id, after, met_at FROM dependencies"):
            stands = met(After(row["after"]), states[row["parent_id"]])
            if states[row["job_id"]] in ENDED:
                continue
            assert (row["met_at"] is not None) == (stands is Met.YES)
            assert stands is not Met.NEVER, f"job {row['job_id']} is stranded"
            unmet[row["job_id"]] = unmet.get(row["job_id"], 0) + (stands is Met.NOT_YET)
        for row in found:
            if states[row["id"]] not in ENDED:
                assert (row["eligible_at"] is None) == bool(unmet.get(row["id"]))
                assert row["eligible_at"] is not None or states[row["id"]] is JobState.QUEUED

    @invariant()
    def each_gpu_is_given_away_once(self) -> None:
        leases = self.rows(
            "SELECT l.gpu_uuid, l.share, l.memory_mib, l.job_id, l.attempt, a.ended_at IS NOT NULL AS ended "
            "FROM leases AS l JOIN attempts AS a USING (job_id, attempt) WHERE l.released_at IS NULL"
        )
        for uuid in GPUS:
            here = [row for row in leases if row["gpu_uuid"] == uuid]
            assert sum(row["share"] == 0 for row in here) in (0, 1)
            assert len(here) < 2 or all(row["share"] for row in here)
            assert sum(row["memory_mib"] or 0 for row in here) <= MEMORY_MIB
        truth = {(row["gpu_uuid"], row["share"]): (row["job_id"], row["attempt"], bool(row["ended"])) for row in leases}
        known = {place: (lease.job_id, lease.attempt, lease.ended) for place, lease in self.state.leases.items()}
        assert known == truth
        held = {(row["gpu_uuid"], row["job_id"]) for row in leases if not row["ended"]}
        assert held == {
            (uuid, one.job.id) for one in (*self.state.active.values(), *self.loop._taken_up) for uuid in one.gpu_uuids
        }

    def unclean(self) -> set[tuple[str, int]]:
        """What nobody may take back now: something of the attempt is on the GPU, or nobody can tell."""
        return {
            place
            for place, lease in self.state.leases.items()
            if lease.gpu_uuid in self.world.lost
            or any(one.attempt_key == lease.key for one in self.world.processes[lease.gpu_uuid])
        }

    def what_started_may_run(self) -> None:
        """What the tick gave away was there to be given, and to those who got it."""
        now = self.clock.wall
        new = self.rows(
            "SELECT l.*, j.user, j.project, j.adopted, j.array_id FROM leases AS l JOIN jobs AS j ON j.id = l.job_id "
            "WHERE l.id > ? AND j.adopted = 0",
            self.last_lease,
        )
        self.last_lease = int(self.rows("SELECT coalesce(max(id), 0) FROM leases")[0][0])
        drained = queue.drained(self.database.connection)
        for row in new:
            uuid = row["gpu_uuid"]
            assert uuid not in self.world.lost
            assert uuid not in drained
            live = {lease.key for lease in self.state.leases.values() if lease.gpu_uuid == uuid and not lease.ended}
            if len(live) == 1:  # a further share may come beside a stranger, on what memory is left
                assert live >= {one.attempt_key for one in self.world.processes[uuid]}
            for window in self.state.reservations:
                if uuid in window.gpu_uuids and window.starts_at <= now < window.ends_at:
                    assert window.admits(row["user"], row["project"])
        held: dict[str, int] = {}
        for one in self.state.active.values():
            for key in (one.job.user, "@" + one.job.spec.project):
                held[key] = held.get(key, 0) + len(one.gpu_uuids)
        for row in new:
            of_project = self.rules.quota_of_project(row["project"])
            assert held[row["user"]] <= (self.rules.quota_of_user(row["user"]).gpus or math.inf)
            assert of_project is None or held["@" + row["project"]] <= (of_project.gpus or math.inf)
        for one in self.state.active.values():
            if one.created_at == now and one.next is Next.LAUNCH:
                assert not one.job.spec.hold
                assert one.job.spec.not_before is None or one.job.spec.not_before <= now

    def everybody_knows_why(self) -> None:
        for job in queue.in_states(self.database.connection, (JobState.QUEUED,)):
            assert self.state.backlog.get(job.id) == waiting(job)
            pending = self.service.pending(job)
            assert pending is not None
            assert pending.why.strip()
            assert "\n" not in pending.why

    def usage_is_what_was_recorded(self) -> None:
        """The ledger in memory is the sum over the attempts that the database says have ended."""
        now = self.clock.wall
        sums: dict[str, float] = {}
        for row in self.rows(
            "SELECT j.user, a.charge_rate, a.started_at, a.ended_at FROM attempts AS a "
            "JOIN jobs AS j ON j.id = a.job_id "
            "WHERE a.ended_at IS NOT NULL AND a.started_at IS NOT NULL"
        ):
            part = charge(row["charge_rate"], row["started_at"], row["ended_at"], now, self.rules.half_life_s)
            sums[row["user"]] = sums.get(row["user"], 0.0) + part
        for user in ("alice", "bob", "ann"):
            assert self.state.ledger.used(user, now) == pytest.approx(sums.get(user, 0.0), rel=1e-6, abs=1e-6)

    # The end

    def teardown(self) -> None:
        try:
            self.everything_ends()
        finally:
            self.patches.undo()
            self.database.connection.close()

    def everything_ends(self) -> None:
        """When all obstacles are gone, every job that this box can run ends, in about as many ticks as there are."""
        self.database.dies, self.over_soon = None, True
        self.world.lost.clear()
        for uuid in GPUS:
            self.world.processes[uuid] = [one for one in self.world.processes[uuid] if self.is_adopted(one)]
        for window in self.state.reservations:
            self.do(self.service.cancel_reservation(ADMIN, window.id))
        for job in list(self.state.backlog.jobs.values()):
            if job.hold:
                self.do(self.service.release(ADMIN, job.id))
        for _ in range(3 * MOST_JOBS + 10):
            for uuid in list(self.state.drained):
                self.do(self.service.resume(ADMIN, uuid))
            self.clock.advance(2 * DAY_S)
            self.tick(True)
            for active in list(self.state.active.values()):
                if active.next is not Next.WATCH:
                    self.carry_on(active)
            for active in self.alive():
                self.end_shim(active, "well", left=False)
            for active in self.over():
                active.next = Next.LOOK
                self.carry_on(active)
            able = [job for job in self.state.backlog.jobs.values() if self.could_run(job.user, job.project, job.gpus)]
            if not self.state.active and all(job.depends for job in able):  # on one that can never run
                break
        else:
            pytest.fail(f"{[job.id for job in able]} never start")
        self.the_books_are_right()
        self.each_gpu_is_given_away_once()
        self.usage_is_what_was_recorded()

    def could_run(self, user: str, project: str, gpus: int) -> bool:
        of_project = self.rules.quota_of_project(project)
        most = min(
            self.rules.quota_of_user(user).gpus or math.inf, (of_project.gpus if of_project else None) or math.inf
        )
        return gpus <= most


def _result(work: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that never waits."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    work.close()
    raise AssertionError("it waited for something")


def _array(size: int, at_once: int | None) -> ArraySpec:
    return ArraySpec(elements=tuple(Element(index=index) for index in range(size)), at_once=at_once)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Any:
    """What the scheduler logs of two thousand histories is nobody's to read."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


Scheduler.TestCase.settings = settings(
    max_examples=2000,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class TestScheduler(Scheduler.TestCase):
    """Runs the machine."""


# Histories that once went wrong


@pytest.fixture
def history() -> Iterator[Scheduler]:
    made = Scheduler()
    yield made
    made.teardown()


def test_an_adopted_process_holds_its_gpu_at_once(history: Scheduler) -> None:
    history.trouble("GPU-a", "foreign")
    history.sample()
    history.adopt("GPU-a", None)
    history.each_gpu_is_given_away_once()


def test_an_attempt_whose_end_is_noticed_late_is_charged_by_its_record(history: Scheduler) -> None:
    history.submit(ALICE, JobSpec(command="true", name="n", gpus=1))
    history.tick(True)
    history.time_passes(100.0, 0)
    history.end(0, "well", False, False)
    history.time_passes(500.0, 0)
    history.look(0)
    history.usage_is_what_was_recorded()
