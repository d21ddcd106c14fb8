"""A real daemon as its users meet it: a process of its own, asked over its Unix socket and killed at will."""

import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx

T = TypeVar("T")
PATIENCE_S = 30.0
_PAUSE_S = 0.02


def eventually(what: str, probe: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """The first truthy answer of `probe`; fails with `what` when none comes."""
    until = time.monotonic() + patience_s
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > until:
            raise AssertionError(f"did not happen within {patience_s:g} s: {what}")
        time.sleep(_PAUSE_S)


def connects(path: Path) -> bool:
    """Whether somebody listens on a Unix socket. (httpx leaks its socket when nobody does.)"""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


class UnixConnection(http.client.HTTPConnection):
    """A connection that whoever opened it surely closes, also when the other end is killed (httpx leaks it)."""

    def __init__(self, path: Path) -> None:
        super().__init__("mlbox", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


class Daemon:
    """One daemon on one state folder; it can be stopped, killed and started again."""

    def __init__(self, state: Path, *settings: str, environment: dict[str, str] | None = None) -> None:
        self.state = state
        self._settings = settings
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self.log_path = state.parent / f"{state.name}.log"
        self.http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(state / "mlbox.sock"), retries=0), base_url="http://mlbox", timeout=60
        )

    def start(self) -> "Daemon":
        arguments = [argument for setting in self._settings for argument in ("--set", setting)]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlbox", "serve", "--state", str(self.state), "--listen", "127.0.0.1:0",
                 "--infer-http", "127.0.0.1:0", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment},
            )  # fmt: skip
        eventually("the daemon is ready", self._is_ready)
        return self

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self._process.returncode}:\n{self.log()}")
        try:
            return connects(self.state / "mlbox.sock") and self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False  # a connection kept from the daemon before

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(PATIENCE_S)

    def close(self) -> None:
        """End the daemon and everything that its jobs started."""
        if self._process is not None and self._process.poll() is None:
            self.stop()
        self.http.close()
        for pid in self.strays():
            os.kill(pid, signal.SIGKILL)

    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    @property
    def endpoints(self) -> dict[str, str]:
        return json.loads((self.state / "endpoints.json").read_text())

    def strays(self) -> list[int]:
        """Live processes of any attempt of this daemon, its shims included."""
        found: list[int] = []
        folder = str(self.state / "jobs").encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    text = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
                    text += b"\0" + bytes((entry / "cwd").readlink())  # by which shims are known
                    ended = (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                except OSError:
                    continue
                if folder in text and not ended:
                    found.append(int(entry.name))
        return found

    def submit(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/api/jobs", json=fields)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def job(self, job_id: int) -> dict[str, Any]:
        answer = self.http.get(f"/api/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait(self, job_id: int, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            job = self.http.get(f"/api/jobs/{job_id}/wait", params={"timeout": 10}).json()
            if job["ended_at"]:
                return job
        raise AssertionError(f"job {job_id} did not end: {self.job(job_id)}\n{self.log()}")

    def text(self, job_id: int, **query: Any) -> str:
        answer = self.http.get(f"/api/jobs/{job_id}/log", params=query)
        assert answer.status_code in (200, 206), answer.text
        return answer.text

    def attempt(self, job_id: int, attempt: int = 1) -> Path:
        return self.state / "jobs" / str(job_id) / f"attempt-{attempt}"

    def check_invariants(self) -> None:
        """What holds after every fault: nothing doubled, leased twice or corrupt, and no process without a job."""
        with sqlite3.connect(f"file:{self.state / 'mlbox.db'}?mode=ro", uri=True) as database:
            assert database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            assert database.execute("PRAGMA foreign_key_check").fetchall() == []
            doubled = database.execute(
                "SELECT gpu_uuid FROM leases WHERE released_at IS NULL GROUP BY gpu_uuid HAVING count(*) > 1"
            ).fetchall()
            assert doubled == []
            states = dict(database.execute("SELECT state, count(*) FROM jobs GROUP BY state"))
            counted = {state: n for state, n in database.execute("SELECT state, count FROM job_counts") if n}
            assert states == counted
        database.close()
