"""The daemon's start and end: one clear line where it cannot start, and what its death leaves and takes along."""

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.whole.harness import Daemon, eventually

pytestmark = pytest.mark.slow


@pytest.fixture
def make_daemon(tmp_path: Path) -> Generator[Callable[..., Daemon]]:
    made: list[Daemon] = []

    def make(*settings: str) -> Daemon:
        made.append(Daemon(tmp_path / f"state{len(made)}", *settings))
        return made[-1]

    yield make
    for daemon in made:
        daemon.close()


def refused(state: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and the last line of a daemon that cannot start; every line must be one of the log."""
    command = [sys.executable, "-m", "mlbox", "serve", "--state", str(state), "--infer-http", "127.0.0.1:0"]
    listen = () if "--listen" in arguments else ("--listen", "127.0.0.1:0")
    ran = subprocess.run([*command, *listen, *arguments], capture_output=True, text=True, timeout=60)
    lines = ran.stderr.splitlines()
    assert all(re.match(r"\S+ (INFO|WARNING|ERROR) ", line) for line in lines), ran.stderr
    assert sum(" ERROR " in line for line in lines) == 1, ran.stderr
    return ran.returncode, lines[-1]


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def children(daemon: Daemon) -> dict[str, int]:
    """The daemon's gpu monitor and inference server, by name."""
    found: dict[str, int] = {}
    for child in Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        for name in (b"gpu_monitor", b"mlbox.serving.server"):
            if name in command:
                found[name.decode()] = int(child)
    return found


def test_a_port_in_use_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, line = refused(tmp_path / "state", "--listen", f"127.0.0.1:{port}")
        assert (status, f"cannot listen on 127.0.0.1:{port}: the port is in use" in line) == (75, True), line
        status, line = refused(tmp_path / "state", "--infer-http", f"127.0.0.1:{port}")
        assert (status, "the port is in use" in line) == (75, True), line
    assert not (tmp_path / "state" / "mlbox.sock").exists()


def test_a_state_folder_that_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, line = refused(tmp_path / "file" / "state")
    assert (status, f"the state folder {tmp_path}/file/state cannot be used" in line) == (1, True), line


def test_a_file_that_is_no_database_is_said_in_one_line_and_left_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "mlbox.db").write_bytes(b"no database " * 1000)
    status, line = refused(state)
    assert status == 75
    assert f"{state}/mlbox.db is no sound database" in line
    assert (state / "mlbox.db").read_bytes() == b"no database " * 1000


def test_a_folder_in_the_way_of_recovery_is_said_in_one_line(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "jobs").touch()
    status, line = refused(state)
    assert status == 1
    assert f"mlbox cannot start: [Errno 17] File exists: '{state}/jobs'" in line


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_takes_socket_endpoints_and_helpers_along_and_leaves_jobs(
    make_daemon: Callable[..., Daemon], signal_: signal.Signals
) -> None:
    daemon = make_daemon().start()
    job = daemon.submit(command="sleep 1000")
    eventually("it runs", lambda: daemon.job(job["id"])["state"] == "running")
    with socket.create_connection(daemon.endpoints["infer_http"].split(":")):
        helpers = eventually("both helpers run", lambda: len(children(daemon)) == 2 and children(daemon))
    os.kill(daemon.pid, signal_)
    assert daemon.stop() == 0
    assert not (daemon.state / "endpoints.json").exists()
    assert not (daemon.state / "mlbox.sock").exists()
    assert all(gone(pid) for pid in helpers.values())
    assert daemon.log().splitlines()[-1].endswith("mlbox: stopped; running jobs go on")
    daemon.start()
    assert daemon.job(job["id"])["state"] == "running"


def test_a_part_that_dies_ends_the_daemon_at_once_and_not_the_jobs(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    job = daemon.submit(command="sleep 1000")
    eventually("it runs", lambda: daemon.job(job["id"])["state"] == "running")
    with socket.create_connection(daemon.endpoints["infer_http"].split(":")):
        helpers = eventually("both helpers run", lambda: len(children(daemon)) == 2 and children(daemon))
    rename(daemon, "leases", "hidden")  # what nobody foresaw: the next tick cannot read them
    process = daemon.pid
    eventually("the daemon has ended", lambda: ended(process))
    assert daemon.stop() == 1
    log = daemon.log()
    assert "ERROR mlbox stops: a part of it died" in log
    assert "sqlite3.OperationalError: no such table: leases" in log
    assert all(gone(pid) for pid in helpers.values())
    assert not (daemon.state / "endpoints.json").exists()
    rename(daemon, "hidden", "leases")
    daemon.start()
    assert daemon.job(job["id"])["state"] == "running"


def rename(daemon: Daemon, old: str, new: str) -> None:
    with sqlite3.connect(daemon.state / "mlbox.db", timeout=10) as outsider:
        outsider.execute(f"ALTER TABLE {old} RENAME TO {new}")
    outsider.close()


def ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_stop_in_the_middle_of_a_start_is_heard(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon("serving.enabled=false")
    command = [sys.executable, "-m", "mlbox", "serve", "--state", str(daemon.state), "--listen", "127.0.0.1:0"]
    for pause_s in (0.4, 0.5, 0.6, 0.7, 0.8):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as starting:
            time.sleep(pause_s)
            starting.terminate()
            _, log = starting.communicate(timeout=20)
        assert starting.returncode in (0, -signal.SIGTERM), log
        assert "Traceback" not in log
        assert starting.returncode != 0 or "mlbox: stopped" in log
    daemon.start()
    assert daemon.stop() == 0


def test_a_locked_database_at_the_start_is_no_traceback(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    assert daemon.stop() == 0
    outsider = sqlite3.connect(daemon.state / "mlbox.db", isolation_level=None)
    outsider.execute("BEGIN EXCLUSIVE")
    status, line = refused(daemon.state)
    assert status == 75, line
    assert "locked" in line
    outsider.execute("ROLLBACK")
    outsider.close()
    daemon.start()


def test_an_idle_daemon_and_its_monitor_use_less_than_a_hundredth_of_a_core(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon().start()
    job = daemon.submit(command="sleep 1000")
    eventually("it runs", lambda: daemon.job(job["id"])["state"] == "running")
    time.sleep(1)
    watched = [daemon.pid, *children(daemon).values()]
    before, began = cpu_s(watched), time.monotonic()
    time.sleep(8)
    assert (cpu_s(watched) - before) / (time.monotonic() - began) < 0.01


def cpu_s(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
