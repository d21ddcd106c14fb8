"""A box with the scheduler's real parts: database, loop, service, shims and, where a test asks for it, GPUs."""

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mlbox.config import JobsConfig
from mlbox.database import Database
from mlbox.events import Events
from mlbox.identity import ROLE_SCOPES, Identity, Role
from mlbox.jobs import Job, JobSpec, JobState
from mlbox.scheduler.executors.base import Liveness
from mlbox.scheduler.executors.local import LocalExecutor
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.gpus import GpuInventory, MonitorOptions
from mlbox.scheduler.launching import Surroundings
from mlbox.scheduler.loop import Loop
from mlbox.scheduler.policy import Rules
from mlbox.scheduler.queue import WaitingQuota
from mlbox.scheduler.service import JobService
from mlbox.scheduler.state import SchedulerState
from tests.nvml.standin import StandIn

PATIENCE_S = 20.0


def person(name: str, uid: int, role: Role = Role.USER, job_id: int | None = None) -> Identity:
    return Identity(user=name, uid=uid, role=role, scopes=ROLE_SCOPES[role], how="test", job_id=job_id)


ALICE = person("alice", 1001)
BOB = person("bob", 1002)
ADMIN = person("ann", 1003, Role.ADMIN)


async def eventually(what: str, probe: Callable[[], Any]) -> Any:
    """The first truthy answer of `probe`, which may be a coroutine function; fails with `what` when none comes."""
    until = time.monotonic() + PATIENCE_S
    while True:
        answer = probe()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < until, f"did not happen within {PATIENCE_S:g} s: {what}"
        await asyncio.sleep(0.01)


class Box:
    """One daemon's scheduler on `state`; `stop` and `start` are a restart. Jobs end with `close` at the latest."""

    def __init__(
        self,
        state: Path,
        *,
        hardware: StandIn | None = None,
        slots: int = 2,
        waiting_max: int = 1000,
        repair_s: float = 60,
        waiting_quota: WaitingQuota | None = None,
        rules: Rules | None = None,
    ) -> None:
        self.state_folder = state
        self.folders = Folders(state)
        self.executor = LocalExecutor()
        self.hardware = hardware
        self._slots = slots
        self._waiting_max = waiting_max
        self._repair_s = repair_s
        self._rules = rules or Rules()
        self._waiting_quota = waiting_quota or WaitingQuota()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> "Box":
        await self.open()
        await self.loop.recover()
        self.run()
        return self

    async def open(self) -> None:
        """Make the parts; nothing moves yet."""
        self.database = await Database.open(self.state_folder / "mlbox.db")
        self.events = Events()
        self.scheduled = SchedulerState(slots=self._slots, rules=self._rules)
        no_driver = {**os.environ, "LD_LIBRARY_PATH": ""}
        environment = self.hardware.environment() if self.hardware else no_driver
        self.gpus = GpuInventory(
            lambda: self.loop.wake(),  # noqa: PLW0108  # the loop is made below
            MonitorOptions(period_s=0.1, retry_s=0.1, environment=environment),
        )
        inherited = {"PATH": os.environ["PATH"]}
        self.loop = Loop(
            database=self.database,
            events=self.events,
            folders=self.folders,
            gpus=self.gpus,
            executor=self.executor,
            state=self.scheduled,
            surroundings=Surroundings(
                config=JobsConfig(), inherited=inherited, url="http://box", tools=Path("/nowhere")
            ),
            repair_s=self._repair_s,
        )
        self.service = JobService(
            database=self.database,
            events=self.events,
            folders=self.folders,
            gpus=self.gpus,
            state=self.scheduled,
            wake=self.loop.wake,
            waiting_max=self._waiting_max,
            waiting_quota=lambda _user, _project: self._waiting_quota,
        )
        if self.hardware:
            self._tasks.append(asyncio.create_task(self.gpus.run(), name="gpus"))
            assert await self.gpus.wait_first(PATIENCE_S)

    def run(self) -> None:
        self._tasks.append(asyncio.create_task(self.loop.run(), name="loop"))

    async def stop(self) -> None:
        """End this daemon; jobs go on. Raises what a part of it died of."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self.database.close()

    async def restart(self, *, slots: int | None = None) -> None:
        await self.stop()
        self._slots = slots or self._slots
        self.executor = LocalExecutor()
        await self.start()

    async def close(self) -> None:
        if self._tasks:
            await self.stop()
        for folder, key in self._under_way():
            self.executor.stop(folder, kill=True)
            await eventually("nothing of it is left", lambda folder=folder, key=key: self._gone(folder, key))

    def _under_way(self) -> list[tuple[Path, str]]:
        """Folder and key of each attempt that has no end in the database."""
        with contextlib.closing(sqlite3.connect(self.state_folder / "mlbox.db")) as database:
            rows = database.execute("SELECT job_id, attempt, attempt_key FROM attempts WHERE ended_at IS NULL")
            return [(self.folders.attempt(job_id, attempt), key) for job_id, attempt, key in rows]

    def _gone(self, folder: Path, key: str) -> bool:
        alive = self.executor.observe(folder).liveness is Liveness.ALIVE
        return not alive and not self.executor.kill_remains(folder, key)

    # What tests do and look at

    async def submit(self, command: str = "true", who: Identity = ALICE, **fields: Any) -> Job:
        spec = JobSpec(command=command, name="test", **fields)
        job, made = await self.service.submit(who, spec)
        assert made
        return job

    async def job(self, job_id: int) -> Job:
        return await self.service.get(ADMIN, job_id)

    async def until(self, job_id: int, state: JobState) -> Job:
        async def arrived() -> Job | None:
            job = await self.job(job_id)
            assert job.state is state or not job.ended, job
            return job if job.state is state else None

        return await eventually(f"job {job_id} is {state}", arrived)

    async def ended(self, job_id: int) -> Job:
        job = await self.service.wait(ADMIN, job_id, PATIENCE_S)
        assert job.ended, job
        return job

    def attempt(self, job_id: int, attempt: int = 1) -> Path:
        return self.folders.attempt(job_id, attempt)

    def log(self, job_id: int, attempt: int = 1) -> str:
        return (self.attempt(job_id, attempt) / "log").read_text()
