"""The composition root: makes every part, hands each its neighbours, runs them until told to stop.

Every task is named and in one TaskGroup: one that dies ends the daemon with a non-zero code, and systemd starts it
again. Jobs are not its children in any sense that matters: they go on.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from mlbox import __version__, transport
from mlbox.config import Config, host_port
from mlbox.database import Database, FolderLock
from mlbox.errors import Conflict, MlboxError
from mlbox.events import GPUS, Events
from mlbox.scheduler import launching
from mlbox.scheduler.executors.local import LocalExecutor
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.gpus import GpuInventory, MonitorOptions
from mlbox.scheduler.launching import Surroundings
from mlbox.scheduler.logs import LogBoard
from mlbox.scheduler.loop import Loop
from mlbox.scheduler.service import JobService
from mlbox.scheduler.state import SchedulerState
from mlbox.serving.deployments import Deployments
from mlbox.serving.supervisor import InferenceSupervisor
from mlbox.web.app import Doors, create_app
from mlbox.web.credentials import Credentials
from mlbox.web.problems import protocol_error

log = logging.getLogger(__name__)

EXIT_TROUBLE = 1
EXIT_TAKEN = 75
"""EX_TEMPFAIL in sysexits.h: another daemon has the state folder, or a port is in use."""
_FIRST_SAMPLE_S = 3.0
"""How long a start waits for the GPUs before it answers without knowing them."""
_DRAIN_S = 5.0


def serve(config: Config) -> int:
    """Run the daemon until SIGTERM or SIGINT; returns its exit status."""
    _configure_logging()
    state = config.state_folder
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FolderLock(state)
    except Conflict as error:
        log.error("%s", error)
        return EXIT_TAKEN
    except OSError as error:
        log.error("the state folder %s cannot be used: %s", state, error)
        return EXIT_TROUBLE
    try:
        return uvloop.run(_Daemon(config, state).run())
    except MlboxError as error:
        log.error("mlbox cannot start: %s", error)
        return EXIT_TAKEN
    finally:
        lock.release()


class _Daemon:
    def __init__(self, config: Config, state: Path) -> None:
        self._config = config
        self._state = state
        self._ready: str | None = "starting: what ran before is being taken up"
        self._endpoints: dict[str, str] = {}

    async def run(self) -> int:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with contextlib.AsyncExitStack() as cleanup:
            listeners = self._listen(cleanup)
            database = await Database.open(self._state / "mlbox.db")
            cleanup.push_async_callback(database.close)
            try:
                await self._run_parts(database, listeners, stop)
            except ExceptionGroup as trouble:
                for error in trouble.exceptions:
                    log.error("mlbox: a part of it died", exc_info=error)
                return EXIT_TROUBLE
        log.info("mlbox: stopped; running jobs go on")
        return 0

    def _listen(self, cleanup: contextlib.AsyncExitStack) -> dict[str, socket.socket]:
        """Every listening socket, and in `endpoints` where they are."""
        config = self._config
        listeners = {"http": transport.listen_tcp(*host_port(config.server.listen))}
        cleanup.callback(listeners["http"].close)
        # Everybody may connect; who is let in is decided by the peer's uid.
        listeners["socket"] = transport.listen_unix(config.socket_path)
        cleanup.callback(config.socket_path.unlink, missing_ok=True)
        cleanup.callback(listeners["socket"].close)
        if config.serving.enabled:
            listeners["infer_http"] = transport.listen_tcp(*host_port(config.serving.http))
            cleanup.callback(listeners["infer_http"].close)
        self._endpoints = {
            name: str(config.socket_path) if name == "socket" else _address(listener)
            for name, listener in listeners.items()
        }
        return listeners

    async def _run_parts(self, database: Database, listeners: dict[str, socket.socket], stop: asyncio.Event) -> None:
        config, state = self._config, self._state
        events = Events()
        folders = Folders(state)
        url = f"http://{self._endpoints['http']}"
        tools = state / "bin"
        launching.offer_uv(tools, sys.executable)
        scheduled = SchedulerState(slots=config.scheduler.cpu_slots or os.cpu_count() or 1)

        def gpus_changed() -> None:
            events.publish(GPUS)
            loop.wake()

        gpus = GpuInventory(
            gpus_changed,
            MonitorOptions(period_s=config.scheduler.gpu_sample_s, silence_s=config.scheduler.gpu_silence_s),
        )
        loop = Loop(
            database=database,
            events=events,
            folders=folders,
            gpus=gpus,
            executor=LocalExecutor(),
            state=scheduled,
            surroundings=Surroundings.of(config.jobs, os.environ, url, tools),
            repair_s=config.scheduler.repair_s,
        )
        jobs = JobService(
            database=database,
            events=events,
            folders=folders,
            gpus=gpus,
            state=scheduled,
            wake=loop.wake,
            waiting_max=config.scheduler.waiting_max,
        )
        credentials = Credentials(
            database, job_of_token=jobs.job_of_token, session_s=3600 * config.server.session_hours
        )
        await credentials.load()
        supervisor = None
        if "infer_http" in listeners:
            supervisor = InferenceSupervisor(
                config=config.serving,
                models=config.models_folder,
                state=state,
                listener=listeners["infer_http"],
                events=events,
                credentials=credentials.infer_access,
            )
            credentials.on_change = supervisor.write_access
        deployments = Deployments(
            database=database,
            events=events,
            models=config.models_folder,
            out_folder=folders.out,
            served=lambda: supervisor.served if supervisor else None,
        )
        logs = LogBoard()
        doors = Doors(
            config=config,
            database=database,
            events=events,
            jobs=jobs,
            gpus=gpus,
            logs=logs,
            deployments=deployments,
            credentials=credentials,
            endpoints=lambda: self._endpoints,
            ready=lambda: self._ready,
            owner_uid=os.getuid(),
        )
        app = create_app(doors)
        server = transport.Server(
            transport.Config(
                app,
                limits=transport.Limits(
                    header_timeout_s=config.server.header_timeout_s, body_timeout_s=config.server.body_timeout_s
                ),
                drain_s=_DRAIN_S,
                error_body=protocol_error,
            )
        )
        async with asyncio.TaskGroup() as group:
            tasks = [_spawn(group, "gpus", gpus.run)]
            await gpus.wait_first(_FIRST_SAMPLE_S)
            await loop.recover()
            tasks.append(_spawn(group, "scheduler", loop.run))
            tasks.append(_spawn(group, "logs", logs.run))
            tasks.append(_spawn(group, "deployments", deployments.run))
            tasks.append(_spawn(group, "credentials", credentials.run))
            if supervisor:
                tasks.append(_spawn(group, "inference", supervisor.run))
            web = group.create_task(server.serve(sockets=[listeners["http"], listeners["socket"]]), name="web")
            self._announce(gpus.current().message)
            await _first(stop.wait(), web)
            self._ready = "stopping"
            app.stop()
            server.stop()
            await web
            for task in reversed(tasks):
                task.cancel()

    def _announce(self, gpus: str) -> None:
        """Say where everything is: in `endpoints.json` for programs, in the log for people."""
        self._ready = None
        path = self._state / "endpoints.json"
        fresh = path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(self._endpoints)) + b"\n")
        fresh.replace(path)
        log.info(
            "mlbox %s: ready (%s); %s",
            __version__,
            ", ".join(f"{name} {where}" for name, where in self._endpoints.items()),
            gpus,
        )


def _spawn(group: asyncio.TaskGroup, name: str, part: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    return group.create_task(part(), name=name)


async def _first(wish: Coroutine[Any, Any, Any], web: asyncio.Task[None]) -> None:
    """Return when somebody wishes the daemon to stop, or its web server ended by itself."""
    waiting = asyncio.ensure_future(wish)
    try:
        await asyncio.wait({waiting, web}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _configure_logging() -> None:
    """One event a line on stderr; without a time under systemd, whose journal has its own."""
    under_systemd = "JOURNAL_STREAM" in os.environ
    stamp = "" if under_systemd else "%(asctime)s "
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"{stamp}%(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"
    )
