"""The web room as its users meet it, in this process: the real app amid a real database, scheduler and sockets."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx

from mlbox import transport
from mlbox.config import Config, JobsConfig
from mlbox.database import Database
from mlbox.events import GPUS, Events
from mlbox.identity import ROLE_SCOPES, Identity, Role
from mlbox.scheduler.executors.local import LocalExecutor
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.gpus import GpuInventory, MonitorOptions
from mlbox.scheduler.launching import Surroundings
from mlbox.scheduler.logs import LogBoard
from mlbox.scheduler.loop import Loop
from mlbox.scheduler.service import JobService
from mlbox.scheduler.state import SchedulerState
from mlbox.serving.client import ServedVersion
from mlbox.serving.deployments import Deployments
from mlbox.web.app import Doors, WebApp, create_app
from mlbox.web.credentials import Credentials
from mlbox.web.problems import protocol_error

T = TypeVar("T")
PATIENCE_S = 30.0


async def eventually(what: str, probe: Callable[[], Awaitable[T]], patience_s: float = PATIENCE_S) -> T:
    """The first truthy answer of `probe`; fails with `what` when none comes."""
    async with asyncio.timeout(patience_s):
        while True:
            if answer := await probe():
                return answer
            await asyncio.sleep(0.02)
    raise AssertionError(what)


class Box:
    """A running mlbox without a process of its own. `http` asks over the Unix socket, `tcp` over TCP."""

    def __init__(self, folder: Path, config: Config, *, owner_uid: int | None = None) -> None:
        self.state = folder
        self.config = config
        self.owner_uid = os.getuid() if owner_uid is None else owner_uid
        self.events = Events()
        self.folders = Folders(folder)
        self.scheduled = SchedulerState(slots=config.scheduler.cpu_slots or 2)
        self.served: list[ServedVersion] | None = None
        self.not_ready: str | None = None
        self.database: Database
        self.gpus: GpuInventory
        self.jobs: JobService
        self.credentials: Credentials
        self.app: WebApp
        self.http: httpx.AsyncClient
        self.tcp: httpx.AsyncClient
        self.server: transport.Server
        self.address = ""

    @property
    def owner(self) -> Identity:
        return Identity(user="me", uid=os.getuid(), role=Role.ADMIN, scopes=ROLE_SCOPES[Role.ADMIN], how="socket")

    async def submit(self, command: str = "true", **fields: Any) -> dict[str, Any]:
        answer = await self.http.post("/api/jobs", json={"command": command, **fields})
        assert answer.status_code == 201, answer.text
        return answer.json()

    async def wait(self, job_id: int) -> dict[str, Any]:
        answer = await self.http.get(f"/api/jobs/{job_id}/wait", params={"timeout": PATIENCE_S})
        job = answer.json()
        assert job["ended_at"], job
        return job

    async def running(self, job_id: int) -> dict[str, Any]:
        async def probe() -> dict[str, Any] | None:
            job = (await self.http.get(f"/api/jobs/{job_id}")).json()
            return job if job["state"] == "running" else None

        return await eventually(f"job {job_id} runs", probe)

    async def token(self, **fields: Any) -> str:
        answer = await self.http.post("/api/tokens", json=fields)
        assert answer.status_code == 201, answer.text
        return answer.json()["token"]

    async def cookie(self) -> str:
        """The Cookie header of a browser that has just signed in."""
        code = (await self.http.post("/api/login-codes")).json()["code"]
        answer = await self.tcp.post("/login", data={"secret": code})
        assert answer.status_code == 303, answer.text
        name, _, rest = answer.headers["set-cookie"].partition("=")
        self.tcp.cookies.clear()
        return f"{name}={rest.partition(';')[0]}"


@contextlib.asynccontextmanager
async def running_box(
    folder: Path,
    config: Config | None = None,
    *,
    environment: dict[str, str] | None = None,
    owner_uid: int | None = None,
) -> AsyncGenerator[Box]:
    """A box in `folder`; everything of it, jobs included, is gone at the end."""
    config = config or Config()
    config = replace(config, state=str(folder), jobs=JobsConfig(grace_s=0.5))
    box = Box(folder, config, owner_uid=owner_uid)
    async with contextlib.AsyncExitStack() as cleanup:
        box.database = await Database.open(folder / "mlbox.db")
        cleanup.push_async_callback(box.database.close)
        box.gpus = GpuInventory(
            lambda: (box.events.publish(GPUS), loop.wake()), MonitorOptions(period_s=0.2, environment=environment)
        )
        listeners = [transport.listen_tcp("127.0.0.1", 0), transport.listen_unix(folder / "mlbox.sock")]
        for listener in listeners:
            cleanup.callback(listener.close)
        host, port = listeners[0].getsockname()
        box.address = f"{host}:{port}"
        loop = Loop(
            database=box.database,
            events=box.events,
            folders=box.folders,
            gpus=box.gpus,
            executor=LocalExecutor(cgroups=False),
            state=box.scheduled,
            surroundings=Surroundings.of(config.jobs, os.environ, f"http://{box.address}", folder / "bin"),
            repair_s=1.0,
        )
        box.jobs = JobService(
            database=box.database,
            events=box.events,
            folders=box.folders,
            gpus=box.gpus,
            state=box.scheduled,
            wake=loop.wake,
            waiting_max=1000,
        )
        box.credentials = Credentials(box.database, job_of_token=box.jobs.job_of_token)
        await box.credentials.load()
        deployments = Deployments(
            database=box.database,
            events=box.events,
            models=folder / "models",
            out_folder=box.folders.out,
            served=lambda: box.served,
        )
        logs = LogBoard()
        box.app = create_app(
            Doors(
                config=config,
                database=box.database,
                events=box.events,
                jobs=box.jobs,
                gpus=box.gpus,
                logs=logs,
                deployments=deployments,
                credentials=box.credentials,
                endpoints=lambda: {"http": box.address, "socket": str(folder / "mlbox.sock")},
                ready=lambda: box.not_ready,
                owner_uid=box.owner_uid,
            )
        )
        box.server = transport.Server(transport.Config(box.app, drain_s=1.0, error_body=protocol_error))
        async with asyncio.TaskGroup() as tasks:
            parts = [tasks.create_task(box.gpus.run(), name="gpus")]
            assert await box.gpus.wait_first(20)
            await loop.recover()
            parts += [
                tasks.create_task(part(), name=name)
                for name, part in (
                    ("scheduler", loop.run),
                    ("logs", logs.run),
                    ("deployments", deployments.run),
                    ("credentials", box.credentials.run),
                )
            ]
            web = tasks.create_task(box.server.serve(sockets=listeners), name="web")
            uds = httpx.AsyncHTTPTransport(uds=str(folder / "mlbox.sock"))
            async with (
                httpx.AsyncClient(transport=uds, base_url="http://mlbox", timeout=60) as box.http,
                httpx.AsyncClient(base_url=f"http://{box.address}", timeout=60) as box.tcp,
            ):
                try:
                    yield box
                finally:
                    await _end_jobs(box)
            box.app.stop()
            box.server.stop()
            await web
            for part in parts:
                part.cancel()


async def _end_jobs(box: Box) -> None:
    for active in list(box.scheduled.active.values()):
        with contextlib.suppress(Exception):
            await box.jobs.cancel(box.owner, active.job.id)

    async def none_left() -> bool:
        return not box.scheduled.active

    await eventually("every job has ended", none_left)
