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
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import uvloop

from mlbox import __version__, transport
from mlbox.config import Config, host_port, size_bytes
from mlbox.database import Database, FolderLock
from mlbox.errors import Conflict, MlboxError, Unavailable
from mlbox.events import GPUS, Events
from mlbox.scheduler import launching
from mlbox.scheduler.executors.local import LocalExecutor
from mlbox.scheduler.folders import Folders
from mlbox.scheduler.gpus import GpuInventory, MonitorOptions
from mlbox.scheduler.launching import Surroundings
from mlbox.scheduler.logs import LogBoard
from mlbox.scheduler.loop import Loop
from mlbox.scheduler.notifier import Notifier
from mlbox.scheduler.rules import rules_of, waiting_quota, watch_rules, weight_of
from mlbox.scheduler.service import JobService
from mlbox.scheduler.state import SchedulerState
from mlbox.serving.deployments import Deployments
from mlbox.serving.supervisor import InferenceSupervisor
from mlbox.web.app import Doors, WebApp, create_app
from mlbox.web.credentials import Credentials
from mlbox.web.problems import protocol_error

log = logging.getLogger(__name__)

EXIT_TROUBLE = 1
EXIT_TAKEN = 75
"""EX_TEMPFAIL in sysexits.h: another daemon has the state folder, or a port is in use."""
_FIRST_SAMPLE_S = 3.0
"""How long a start waits for the GPUs before it answers without knowing them."""
_DRAIN_S = 5.0
_PRUNE_S = 3600.0
_STUBBORN_S = 10.0
"""How long the process waits at its end for threads that the kernel holds (a dead network file system, say)."""


def serve(config: Config) -> int:
    """Run the daemon until SIGTERM or SIGINT; returns its exit status."""
    _configure_logging()
    state = config.state_folder
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if trouble := _not_ours_alone(state):
            log.error("the state folder %s cannot be trusted: %s", state, trouble)
            return EXIT_TROUBLE
        lock = FolderLock(state)
    except Conflict as error:
        log.error("%s", error)
        return EXIT_TAKEN
    except OSError as error:
        log.error("the state folder %s cannot be used: %s", state, error)
        return EXIT_TROUBLE
    daemon = _Daemon(config, state)
    try:
        return uvloop.run(daemon.run())
    except Exception as error:
        causes = list(_causes(error))
        for cause in causes:
            _report(cause, "mlbox stops" if daemon.was_ready else "mlbox cannot start")
        if not daemon.was_ready and all(isinstance(cause, Unavailable) for cause in causes):
            return EXIT_TAKEN
        return EXIT_TROUBLE
    finally:
        daemon.ended()
        lock.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What runs, each as a task of its own."""

    gpus: GpuInventory
    loop: Loop
    jobs: JobService
    notifier: Notifier
    deployments: Deployments
    credentials: Credentials
    logs: LogBoard
    supervisor: InferenceSupervisor | None
    app: WebApp
    server: transport.Server


class _Daemon:
    def __init__(self, config: Config, state: Path) -> None:
        self._config = config
        self._state = state
        self._ready: str | None = "starting: what ran before is being taken up"
        self._endpoints: dict[str, str] = {}
        self._leaving: threading.Timer | None = None
        self.was_ready = False

    async def run(self) -> int:
        """Make the parts and run them until told to stop. What a part dies of comes out as an ExceptionGroup."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            async with contextlib.AsyncExitStack() as cleanup:
                listeners = self._listen(cleanup)
                database = await Database.open(self._state / "mlbox.db")
                cleanup.push_async_callback(database.close)
                cleanup.callback(_forget, self._endpoints_path)
                parts = self._compose(database, listeners)
                await parts.credentials.load()
                await self._run_parts(parts, [listeners["http"], listeners["socket"]], stop)
        finally:
            self._leave()
        if not stop.is_set():
            log.error("mlbox: its web server ended by itself")
            return EXIT_TROUBLE
        log.info("mlbox: stopped; running jobs go on")
        return 0

    def _leave(self) -> None:
        """See to it that the process ends, though a thread of it may hang."""
        self._leaving = threading.Timer(_STUBBORN_S, os._exit, (EXIT_TROUBLE,))
        self._leaving.daemon = True
        self._leaving.start()

    def ended(self) -> None:
        """No thread hangs."""
        if self._leaving is not None:
            self._leaving.cancel()

    @property
    def _endpoints_path(self) -> Path:
        return self._state / "endpoints.json"

    def _listen(self, cleanup: contextlib.AsyncExitStack) -> dict[str, socket.socket]:
        """Every listening socket, and in `endpoints` where they are."""
        config = self._config
        listeners = {"http": transport.listen_tcp(*host_port(config.server.listen))}
        cleanup.callback(listeners["http"].close)
        # Everybody may connect; who is let in is decided by the peer's uid.
        listeners["socket"] = transport.listen_unix(config.socket_path)
        cleanup.callback(_forget, config.socket_path)
        cleanup.callback(listeners["socket"].close)
        if config.serving.enabled:
            listeners["infer_http"] = transport.listen_tcp(*host_port(config.serving.http))
            cleanup.callback(listeners["infer_http"].close)
        self._endpoints = {
            name: str(config.socket_path) if name == "socket" else _address(listener)
            for name, listener in listeners.items()
        }
        return listeners

    def _compose(self, database: Database, listeners: dict[str, socket.socket]) -> _Parts:
        """Make every part and hand each its neighbours."""
        config, state = self._config, self._state
        events = Events()
        folders = Folders(state)
        tools = state / "bin"
        with _tolerated("jobs do without the uv that came with mlbox"):
            launching.offer_uv(tools, sys.executable)
        scheduled = SchedulerState(
            slots=config.scheduler.cpu_slots or os.cpu_count() or 1,
            rules=rules_of(config),
            ignored=frozenset(config.scheduler.ignore_processes),
            weight_of=partial(weight_of, config),
        )

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
            surroundings=Surroundings.of(config.jobs, os.environ, f"http://{self._endpoints['http']}", tools),
            repair_s=config.scheduler.repair_s,
            watch=watch_rules(config),
        )
        jobs = JobService(
            database=database,
            events=events,
            folders=folders,
            gpus=gpus,
            state=scheduled,
            wake=loop.wake,
            waiting_max=config.scheduler.waiting_max,
            waiting_quota=partial(waiting_quota, scheduled.rules),
            take_up=loop.take_up,
        )
        credentials = Credentials(
            database, job_of_token=jobs.job_of_token, session_s=3600 * config.server.session_hours
        )
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
        app = create_app(
            Doors(
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
        )
        limits = transport.Limits(
            header_timeout_s=config.server.header_timeout_s, body_timeout_s=config.server.body_timeout_s
        )
        return _Parts(
            gpus=gpus,
            loop=loop,
            jobs=jobs,
            notifier=Notifier(database, events, config.notify.sendmail),
            deployments=deployments,
            credentials=credentials,
            logs=logs,
            supervisor=supervisor,
            app=app,
            server=transport.Server(transport.Config(app, limits=limits, drain_s=_DRAIN_S, error_body=protocol_error)),
        )

    async def _run_parts(self, parts: _Parts, sockets: list[socket.socket], stop: asyncio.Event) -> None:
        """Run every part until `stop`, or until the web server ends; raises an ExceptionGroup when one of them dies."""

        async def take_up() -> None:
            await parts.gpus.wait_first(_FIRST_SAMPLE_S)
            await parts.loop.recover()

        async with asyncio.TaskGroup() as group:
            tasks = [_spawn(group, "gpus", parts.gpus.run), _spawn(group, "recovery", take_up)]
            await _first(stop, tasks[-1])
            if not stop.is_set():
                tasks.append(_spawn(group, "scheduler", parts.loop.run))
                tasks.append(_spawn(group, "deployments", parts.deployments.run))
                tasks.append(_spawn(group, "credentials", parts.credentials.run))
                tasks.append(_spawn(group, "logs", parts.logs.run))
                tasks.append(_spawn(group, "notices", parts.notifier.run))
                tasks.append(_spawn(group, "retention", partial(_keep_in_bounds, parts.jobs, self._config)))
                if parts.supervisor:
                    tasks.append(_spawn(group, "inference", parts.supervisor.run))
                web = group.create_task(parts.server.serve(sockets=sockets), name="web")
                self._announce(parts.gpus.current().message)
                await _first(stop, web)
                self._ready = "stopping"
                parts.app.stop()
                parts.server.stop()
                await web
            for task in reversed(tasks):
                task.cancel()

    def _announce(self, gpus: str) -> None:
        """Say where everything is: in `endpoints.json` for programs, in the log for people."""
        self._ready, self.was_ready = None, True
        path = self._endpoints_path
        fresh = path.with_suffix(".new")
        with _tolerated(f"{path} does not tell programs where mlbox is"):
            fresh.unlink(missing_ok=True)
            fresh.touch(mode=0o600)
            fresh.write_bytes(msgspec.json.format(msgspec.json.encode(self._endpoints)) + b"\n")
            fresh.replace(path)
        log.info(
            "mlbox %s: ready (%s); %s",
            __version__,
            ", ".join(f"{name} {where}" for name, where in self._endpoints.items()),
            gpus,
        )


async def _keep_in_bounds(jobs: JobService, config: Config) -> None:
    """Remove the oldest files of ended jobs, again and again, where the configuration bounds them."""
    keep = config.jobs
    while keep.keep_days or keep.keep_size:
        keep_bytes = size_bytes(keep.keep_size) if keep.keep_size else None
        with _tolerated("old files of jobs stay for now"), contextlib.suppress(Unavailable):
            await jobs.prune(time.time(), keep_days=keep.keep_days or None, keep_bytes=keep_bytes)
        await asyncio.sleep(_PRUNE_S)


def _spawn(group: asyncio.TaskGroup, name: str, part: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
    return group.create_task(part(), name=name)


async def _first(stop: asyncio.Event, part: asyncio.Task[None]) -> None:
    """Return when somebody wishes the daemon to stop, or `part` has ended by itself."""
    waiting = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({waiting, part}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()


def _causes(error: Exception) -> Iterator[Exception]:
    """`error`, or what is in it where it is a group (of groups)."""
    if isinstance(error, ExceptionGroup):
        for part in cast("ExceptionGroup[Exception]", error).exceptions:
            yield from _causes(part)
    else:
        yield error


def _report(error: Exception, what: str) -> None:
    """One line for what a person can mend, a traceback for what nobody foresaw."""
    if isinstance(error, (MlboxError, OSError)):
        log.error("%s: %s", what, error)
    else:
        log.error("%s: a part of it died", what, exc_info=error)


@contextlib.contextmanager
def _tolerated(consequence: str) -> Generator[None]:
    """A full or read-only disk costs a convenience, not the daemon."""
    try:
        yield
    except OSError as error:
        log.warning("%s: %s", consequence, error)


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _not_ours_alone(state: Path) -> str | None:
    """Why others could change what is in the state folder; None when they cannot."""
    facts = state.stat()
    if facts.st_uid != os.geteuid():
        return f"it belongs to uid {facts.st_uid}, and this is uid {os.geteuid()}: give it to this user (chown)"
    if facts.st_mode & 0o022:
        return f"others may write in it (mode {facts.st_mode & 0o777:o}): chmod go-w {state}"
    return None


def _address(listener: socket.socket) -> str:
    """Where programs on this box reach the listener, also when it listens everywhere."""
    bound, port = listener.getsockname()[:2]
    host = transport.reachable(bound)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _configure_logging() -> None:
    """One event a line on stderr; without a time under systemd, whose journal has its own."""
    under_systemd = "JOURNAL_STREAM" in os.environ
    stamp = "" if under_systemd else "%(asctime)s "
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"{stamp}%(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z"
    )
