"""Kills at random moments under load, a hundred of them: nothing lost, nothing doubled, nothing left behind."""

import http.client
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.whole.harness import Daemon, UnixConnection, eventually

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("MLBOX_KILLS", "100"))


class Submitter(threading.Thread):
    """Submits jobs one after another, through every restart, and remembers which were acknowledged."""

    def __init__(self, daemon: Daemon, runs: Path) -> None:
        super().__init__(name="submitter")
        self.acknowledged: set[int] = set()
        self._daemon = daemon
        self._runs = runs
        self._enough = threading.Event()

    def run(self) -> None:
        number = 0
        while not self._enough.is_set():
            number += 1
            sleep = random.choice(("0", "0.05", "0.2"))
            command = f"echo $MLBOX_JOB_ID-$MLBOX_ATTEMPT >> {self._runs}; sleep {sleep}; echo line"
            while not self._enough.is_set() and not self._submitted(f"submit-{number}", command):
                self._enough.wait(0.01)
            self._enough.wait(0.02)

    def _submitted(self, key: str, command: str) -> bool:
        """Try once; False when the daemon did not live to answer. The key makes of many tries one job."""
        connection = UnixConnection(self._daemon.state / "mlbox.sock")
        try:
            headers = {"Content-Type": "application/json", "Idempotency-Key": key}
            connection.request("POST", "/api/jobs", json.dumps({"command": command}), headers)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        if answer.status not in (200, 201):
            return False
        self.acknowledged.add(json.loads(body)["id"])
        return True

    def finish(self) -> None:
        self._enough.set()
        self.join()


@pytest.mark.timeout(900)
def test_a_hundred_kills_of_the_daemon_lose_and_double_nothing(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = make_daemon("scheduler.cpu_slots=4", "serving.enabled=false").start()
    runs = tmp_path / "runs"
    submitter = Submitter(daemon, runs)
    submitter.start()
    randomness = random.Random(20261123)
    try:
        for _ in range(KILLS):
            time.sleep(randomness.uniform(0.0, 0.4))
            daemon.kill()
            daemon.start()
    finally:
        submitter.finish()
    assert len(submitter.acknowledged) > KILLS / 4
    for job_id in submitter.acknowledged:
        ended = daemon.wait(job_id, patience_s=120)
        assert (ended["state"], ended["attempt"]) == ("succeeded", 1), ended
        assert daemon.text(job_id) == "line\n"
    ran = runs.read_text().split()
    assert sorted(set(ran)) == sorted(ran), "user code of one attempt ran twice"
    assert {int(line.split("-")[0]) for line in ran} == submitter.acknowledged
    eventually("no process is left", lambda: not daemon.strays())
    daemon.check_invariants()


@pytest.mark.timeout(300)
def test_kills_of_shims_under_load_end_as_lost_and_leave_nothing(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon("scheduler.cpu_slots=8", "serving.enabled=false").start()
    jobs = [daemon.submit(command="setsid sleep 30 & sleep 30")["id"] for _ in range(8)]
    for job_id in jobs:
        eventually("user code began", (daemon.attempt(job_id) / "started.json").exists)
    shims = [json.loads((daemon.attempt(job_id) / "started.json").read_text())["shim_pid"] for job_id in jobs]
    assert len(set(shims)) == 8
    for pid in shims:
        os.kill(pid, signal.SIGKILL)
    for job_id in jobs:
        ended = daemon.wait(job_id)
        assert (ended["state"], ended["reason"]) == ("failed", "lost")
    assert daemon.strays() == []
    daemon.check_invariants()
