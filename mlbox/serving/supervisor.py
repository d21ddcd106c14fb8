"""The life of the inference server: a process of its own, started when there is something to serve, restarted after a
crash. The daemon holds the listening socket and passes it on, so that a crash of the server refuses no connection.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mlbox.config import ServingConfig, size_bytes
from mlbox.errors import Unavailable
from mlbox.events import MODELS, Events
from mlbox.identity import Scope, digest, new_token
from mlbox.serving.client import InferenceClient, ServedVersion
from mlbox.transport import reachable

log = logging.getLogger(__name__)

_LOOK_S = 1.0
"""How often the model folder is looked at while no server runs."""
_BUSY_POLL_S = 0.5
"""How often the server is asked for its index while something in it changes, and otherwise:"""
_IDLE_POLL_S = 5.0
_BUSY_FOR_S = 10.0
_SILENT_S = 15.0
"""A server that did not answer for so long is said not to; it is left alone, for it may be at a large model."""
_STEADY_S = 60.0
"""A server that lived this long is not blamed for the ends of those before it."""
_LONGEST_DELAY_S = 60.0
_STOP_S = 15.0


class InferenceSupervisor:
    """Starts, watches and stops the inference server. `run` is a task of its own.

    `credentials` answers the live tokens that may infer or deploy; call `write_access` whenever they change.
    """

    def __init__(
        self,
        *,
        config: ServingConfig,
        models: Path,
        state: Path,
        listener: socket.socket,
        events: Events,
        credentials: Callable[[], Sequence[Mapping[str, Any]]],
    ) -> None:
        self._config = config
        self._models = models
        self._store = state / "store"
        self._access = state / "serving" / "access.json"
        self._listener = listener
        self._events = events
        self._credentials = credentials
        self._token = new_token()
        host, port = listener.getsockname()[:2]
        self._client = InferenceClient(reachable(host), port, self._token)
        self._access_due = False
        self._answered_at = 0.0
        self._served: list[ServedVersion] | None = None
        self._why_down: str | None = None

    @property
    def served(self) -> list[ServedVersion] | None:
        """What the server last said of its models; None while it does not run."""
        return self._served

    @property
    def why_down(self) -> str | None:
        """Why the server does not run, where it should."""
        return self._why_down

    def write_access(self) -> None:
        """Tell the server which tokens it may accept. Blocking, short; the file is replaced in one move.

        Where the disk does not let it, the earlier file stays in force and `run` tries again.
        """
        own = {"sha256": digest(self._token), "scopes": [Scope.INFER, Scope.DEPLOY], "expires": None}
        fresh = self._access.with_suffix(".new")
        try:
            self._access.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh.unlink(missing_ok=True)
            fresh.touch(mode=0o600)
            fresh.write_bytes(msgspec.json.encode({"tokens": [own, *self._credentials()]}))
            fresh.replace(self._access)
        except OSError as error:
            log.error("inference server: which tokens are in force cannot be told it, and is tried again: %s", error)
            self._access_due = True
        else:
            self._access_due = False

    async def run(self) -> None:
        """Keep the server running from the first model or request on, until cancelled."""
        self.write_access()
        await self._until_needed()
        delay_s = 1.0
        while True:
            began = time.monotonic()
            try:
                self._why_down = await self._run_server()
            except OSError as error:
                self._why_down = f"it cannot be started: {error}"
            self._served = None
            self._events.publish(MODELS)
            if time.monotonic() - began > _STEADY_S:
                delay_s = 1.0
            log.warning("inference server: %s; it is started again in %g s", self._why_down, delay_s)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    async def _until_needed(self) -> None:
        """Return when the model folder holds a model or somebody connects."""
        with contextlib.suppress(OSError):  # it is made again with the server, which says what is wrong
            self._make_folders()
        loop = asyncio.get_running_loop()
        asked = asyncio.Event()
        loop.add_reader(self._listener, asked.set)
        try:
            while not _holds_models(self._models):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await asked.wait()
                        return
        finally:
            loop.remove_reader(self._listener)

    def _make_folders(self) -> None:
        self._models.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._store.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def _run_server(self) -> str:
        """Start the server and stay with it until it ends; returns how it ended. Raises OSError."""
        self._make_folders()
        if self._access_due:
            self.write_access()
        alive_read, alive_write = os.pipe2(os.O_CLOEXEC)  # its end tells the server that the daemon is gone
        try:
            try:
                server = subprocess.Popen(  # noqa: ASYNC220  # a few ms, once per server
                    [*self._command(), f"--fd={self._listener.fileno()}", f"--parent-fd={alive_read}"],
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr.fileno(),
                    pass_fds=(self._listener.fileno(), alive_read),
                    start_new_session=True,
                )
            finally:
                os.close(alive_read)
            log.info("inference server: started (pid %d)", server.pid)
            self._why_down = None
            try:
                return await self._stay_with(server)
            finally:
                await asyncio.shield(self._end(server))
        finally:
            os.close(alive_write)

    def _command(self) -> list[str]:
        config = self._config
        return [
            sys.executable,
            "-I",
            "-m",
            "mlbox.serving.server",
            f"--models={self._models}",
            f"--store={self._store}",
            f"--access={self._access}",
            f"--name={config.name}",
            f"--gpu={config.gpu}",
            f"--threads={config.threads}",
            f"--settle={config.settle_s}",
            f"--body-max={size_bytes(config.body_max)}",
            f"--run-timeout={config.run_timeout_s}",
        ]

    async def _stay_with(self, server: subprocess.Popen[bytes]) -> str:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        pidfd = os.pidfd_open(server.pid)
        loop.add_reader(pidfd, ended.set)
        try:
            async with asyncio.TaskGroup() as group:
                asking = group.create_task(self._keep_asking(), name="inference index")
                await ended.wait()
                asking.cancel()  # what it asked now waits on the socket for the next server
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        status = server.wait()
        return f"it ended with {'signal' if status < 0 else 'exit code'} {abs(status)}"

    async def _keep_asking(self) -> None:
        """Know what the server serves, soon after it changes."""
        self._answered_at = time.monotonic()
        busy_until = self._answered_at + _BUSY_FOR_S
        with self._events.subscribe(MODELS) as changes:
            while True:
                await self._poll()
                if self._access_due:
                    self.write_access()
                busy = time.monotonic() < busy_until or any(row.state == "LOADING" for row in self._served or ())
                if await changes.take(_BUSY_POLL_S if busy else _IDLE_POLL_S):
                    busy_until = time.monotonic() + _BUSY_FOR_S

    async def _poll(self) -> None:
        """Ask the server what it serves."""
        before = self._served
        try:
            self._served = await asyncio.to_thread(self._client.index)
        except Unavailable as error:  # starting, busy, or about to be seen to have ended
            if time.monotonic() - self._answered_at > _SILENT_S:
                self._served, self._why_down = None, f"it runs, but {error}"
        else:
            self._answered_at, self._why_down = time.monotonic(), None
        if self._served != before:
            self._events.publish(MODELS)

    async def _end(self, server: subprocess.Popen[bytes]) -> None:
        """Let the server finish its requests, then make sure that it is gone."""
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(server.wait, _STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            await asyncio.to_thread(server.wait)


def _holds_models(models: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(entry.is_dir() and not entry.name.startswith(".") for entry in models.iterdir())
    return False
