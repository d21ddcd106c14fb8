"""The supervisor over the real inference server: when it is started, what a crash of it costs, who may ask it."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mlbox.config import ServingConfig
from mlbox.events import Events
from mlbox.identity import digest, new_token
from mlbox.serving.supervisor import InferenceSupervisor
from mlbox.transport import listen_tcp
from tests.serving.onnx_models import adder, save

pytestmark = pytest.mark.slow

PATIENCE_S = 30.0
TOKEN = new_token()


async def eventually(what: str, probe: Callable[[], Any]) -> Any:
    until = time.monotonic() + PATIENCE_S
    while not (answer := probe()):
        assert time.monotonic() < until, f"did not happen within {PATIENCE_S:g} s: {what}"
        await asyncio.sleep(0.02)
    return answer


class Serving:
    """A supervisor with its folders and its listening socket; everything ends with `stop`."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.models = state / "models"
        self.access = state / "serving" / "access.json"
        self.tokens: list[dict[str, Any]] = [{"sha256": digest(TOKEN), "scopes": ["infer"], "expires": None}]
        self.listener = listen_tcp("127.0.0.1", 0)
        self.events = Events()
        self.supervisor = InferenceSupervisor(
            config=ServingConfig(settle_s=0.1),
            models=self.models,
            state=state,
            listener=self.listener,
            events=self.events,
            credentials=lambda: self.tokens,
        )
        self.task: asyncio.Task[None] | None = None

    def start(self) -> "Serving":
        self.task = asyncio.create_task(self.supervisor.run(), name="inference")
        return self

    async def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])

    async def stop(self) -> None:
        await self.cancel()
        self.listener.close()

    def place(self, name: str, weight: float = 1.0) -> None:
        """Copy a model in, as a user does."""
        save(adder(weight), self.models / name / "1")

    def ready(self) -> list[str]:
        return [row.name for row in self.supervisor.served or () if row.state == "READY"]

    async def ask(self, path: str, token: str = TOKEN, method: str = "GET") -> tuple[int, bytes]:
        """Status and body of an answer, however long it takes to come."""
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection(*self.listener.getsockname())
            fields = f"Host: localhost\r\nAuthorization: Bearer {token}\r\nConnection: close\r\nContent-Length: 0"
            writer.write(f"{method} {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode())
            whole = await reader.read()
            writer.close()
            await writer.wait_closed()
        head, _, body = whole.partition(b"\r\n\r\n")
        return int(head.split()[1]), body

    async def until_answered(self, wanted: int, token: str = TOKEN) -> None:
        until = time.monotonic() + PATIENCE_S
        while (await self.ask("/v2", token))[0] != wanted:
            assert time.monotonic() < until, f"no {wanted}"


DAEMON = """
import asyncio, logging, sys
from pathlib import Path
from tests.serving.test_supervisor import Serving
logging.basicConfig(level=logging.INFO)
serving = Serving(Path(sys.argv[1]))
serving.place("one")
asyncio.run(serving.supervisor.run())
"""


@pytest.fixture
async def serving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Serving]:
    caplog.set_level(logging.INFO)
    made = Serving(tmp_path)
    yield made
    await made.stop()


def pids(caplog: pytest.LogCaptureFixture) -> list[int]:
    """The servers that were started, oldest first."""
    return [int(pid) for pid in re.findall(r"inference server: started \(pid (\d+)\)", caplog.text)]


async def pid(caplog: pytest.LogCaptureFixture, number: int = 1) -> int:
    return (await eventually(f"server {number} is started", lambda: pids(caplog)[number - 1 :]))[0]


def gone(process: int) -> bool:
    return not Path(f"/proc/{process}").exists()


def descriptors(process: int | str) -> list[str]:
    """What a process holds open."""
    found: list[str] = []
    for fd in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # the one that reads the folder
            found.append(str(fd.readlink()))
    return found


async def test_a_server_is_started_when_there_is_a_model_and_its_models_are_known(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    serving.start()
    await eventually("the model folder is there", serving.models.is_dir)
    assert serving.supervisor.served is None
    assert pids(caplog) == []
    serving.place("one")
    await eventually("it is served", lambda: serving.ready() == ["one"])
    serving.place("two")
    await eventually("the second is, too", lambda: serving.ready() == ["one", "two"])
    assert len(pids(caplog)) == 1


async def test_a_server_is_started_when_somebody_asks(serving: Serving) -> None:
    serving.start()
    status, _ = await serving.ask("/v2")
    assert status == 200


async def test_a_killed_server_is_replaced_and_no_request_is_refused(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    serving.place("one")
    serving.start()
    await eventually("it is served", lambda: serving.ready() == ["one"])
    os.kill(await pid(caplog), signal.SIGKILL)
    await eventually("it is missed", lambda: serving.supervisor.served is None)
    assert serving.supervisor.why_down == "it ended with signal 9"
    status, _ = await serving.ask("/v2/health/live")
    assert status == 200
    await eventually("it is served again", lambda: serving.ready() == ["one"])
    assert serving.supervisor.why_down is None
    assert len(pids(caplog)) == 2


async def test_servers_that_end_at_once_are_started_ever_more_seldom(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    serving.start()
    asker = socket.create_connection(serving.listener.getsockname())
    for number in (1, 2):
        os.kill(await pid(caplog, number), signal.SIGKILL)
    await eventually("the second is missed", lambda: "again in 2 s" in caplog.text)
    asker.close()
    assert re.findall(r"started again in (\d+) s", caplog.text) == ["1", "2"]


async def test_a_server_inherits_the_socket_and_no_file_and_leaves_no_descriptor(
    serving: Serving, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "ours").touch()
    serving.place("one")
    before = len(descriptors("self"))
    with (tmp_path / "ours").open("rb") as ours:
        serving.start()
        await eventually("it is served", lambda: serving.ready() == ["one"])
        inherited = descriptors(server := await pid(caplog))
        assert f"socket:[{os.fstat(serving.listener.fileno()).st_ino}]" in inherited
        assert ours.name not in inherited
    await serving.cancel()
    assert gone(server)
    assert len(descriptors("self")) <= before


def test_with_the_daemon_its_server_ends_though_nobody_told_it(tmp_path: Path) -> None:
    """As after a kill -9, of which nothing but a closed pipe tells the server."""
    with subprocess.Popen([sys.executable, "-c", DAEMON, tmp_path], stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        server = int(next(line for line in daemon.stderr if "started (pid" in line).split("pid ")[1].split(")")[0])
        daemon.kill()
    until = time.monotonic() + PATIENCE_S
    while not gone(server):
        assert time.monotonic() < until
        time.sleep(0.02)


async def test_a_server_that_cannot_be_started_is_tried_again_and_says_why(serving: Serving) -> None:
    serving.models.write_text("in the way")
    serving.start()
    asker = socket.create_connection(serving.listener.getsockname())
    why = await eventually("it says why", lambda: serving.supervisor.why_down)
    assert why.startswith("it cannot be started: ")
    assert str(serving.models) in why
    serving.models.unlink()
    await eventually("it runs", lambda: serving.supervisor.served == [])
    asker.close()


async def test_tokens_are_for_their_owner_only_and_in_force_at_once(serving: Serving) -> None:
    serving.start()
    status, _ = await serving.ask("/v2")
    assert status == 200
    assert stat.S_IMODE(serving.access.stat().st_mode) == 0o600
    assert stat.S_IMODE(serving.access.parent.stat().st_mode) == 0o700
    assert TOKEN not in serving.access.read_text()
    serving.tokens.clear()
    serving.supervisor.write_access()

    await serving.until_answered(401)
    fresh = new_token()
    serving.tokens.append({"sha256": digest(fresh), "scopes": ["infer"], "expires": None})
    serving.supervisor.write_access()
    await serving.until_answered(200, fresh)


async def test_tokens_that_cannot_be_written_down_are_when_they_can(serving: Serving) -> None:
    serving.start()
    await serving.ask("/v2")
    obstacle = serving.access.with_suffix(".new")
    obstacle.mkdir()
    serving.tokens.append({"sha256": "0" * 64, "scopes": ["infer"], "expires": None})
    serving.supervisor.write_access()
    assert "0" * 64 not in serving.access.read_text()
    obstacle.rmdir()
    await eventually("it is written", lambda: "0" * 64 in serving.access.read_text())
    assert len(json.loads(serving.access.read_text())["tokens"]) == 3


async def test_changes_are_told_to_who_listens(serving: Serving) -> None:
    serving.place("one")
    with serving.events.subscribe("models") as changes:
        serving.start()
        async with asyncio.timeout(PATIENCE_S):
            while serving.ready() != ["one"]:
                assert await changes.take(PATIENCE_S) == {"models"}


async def test_a_stop_ends_a_server_that_does_not_hear(
    serving: Serving, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlbox.serving.supervisor._STOP_S", 0.5)
    serving.start()
    await serving.ask("/v2")
    server = await pid(caplog)
    os.kill(server, signal.SIGSTOP)
    await serving.cancel()
    assert gone(server)
