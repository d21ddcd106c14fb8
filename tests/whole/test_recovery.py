"""The recovery table on a real daemon: one test for each row, and each state in which the daemon can die."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.whole.harness import Daemon, eventually

pytestmark = pytest.mark.slow


def shim_of(daemon: Daemon, job_id: int) -> int:
    path = daemon.attempt(job_id) / "started.json"
    return int(json.loads(eventually("user code began", lambda: path.exists() and path.read_text()))["shim_pid"])


def until_running(daemon: Daemon, job_id: int) -> None:
    eventually("the job runs", lambda: daemon.job(job_id)["state"] == "running")


def test_a_running_job_goes_on_while_the_daemon_is_dead_and_is_adopted(daemon: Daemon, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = daemon.submit(command=f"echo before; until [ -e {gate} ]; do sleep 0.05; done; echo after; exit 3")
    until_running(daemon, job["id"])
    shim = shim_of(daemon, job["id"])
    daemon.kill()
    daemon.start()
    assert daemon.job(job["id"])["state"] == "running"
    assert shim_of(daemon, job["id"]) == shim
    gate.touch()
    ended = daemon.wait(job["id"])
    assert (ended["state"], ended["reason"], ended["exit_code"], ended["attempt"]) == ("failed", "exit_code", 3, 1)
    assert daemon.text(job["id"]) == "before\nafter\n"
    daemon.check_invariants()


def test_a_job_that_ended_while_the_daemon_was_dead_keeps_its_result(daemon: Daemon, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = daemon.submit(command=f"until [ -e {gate} ]; do sleep 0.05; done; echo done")
    until_running(daemon, job["id"])
    daemon.kill()
    gate.touch()
    eventually("the job ended", (daemon.attempt(job["id"]) / "exit.json").exists)
    daemon.start()
    ended = daemon.wait(job["id"])
    assert (ended["state"], ended["exit_code"], ended["attempt"]) == ("succeeded", 0, 1)
    assert daemon.text(job["id"]) == "done\n"


def test_a_job_whose_shim_died_is_lost_and_nothing_of_it_is_left(daemon: Daemon) -> None:
    job = daemon.submit(command="setsid sleep 1000 & sleep 1000")
    until_running(daemon, job["id"])
    os.kill(shim_of(daemon, job["id"]), signal.SIGKILL)
    ended = daemon.wait(job["id"])
    assert (ended["state"], ended["reason"]) == ("failed", "lost")
    assert "requeue" in ended["cause"]
    assert daemon.strays() == []


def test_a_lost_job_that_asked_for_it_gets_another_attempt(daemon: Daemon, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = daemon.submit(command=f"echo attempt $MLBOX_ATTEMPT; [ -e {gate} ] || sleep 1000", requeue=True)
    until_running(daemon, job["id"])
    shim = shim_of(daemon, job["id"])
    gate.touch()
    os.kill(shim, signal.SIGKILL)
    ended = daemon.wait(job["id"])
    assert (ended["state"], ended["attempt"]) == ("succeeded", 2)
    assert daemon.text(job["id"]) == "attempt 2\n"
    assert daemon.strays() == []


def test_a_job_lost_together_with_the_daemon_is_cleared_away_at_the_next_start(daemon: Daemon) -> None:
    job = daemon.submit(command="setsid sleep 1000 & sleep 1000")
    until_running(daemon, job["id"])
    shim = shim_of(daemon, job["id"])
    daemon.kill()
    os.kill(shim, signal.SIGKILL)
    daemon.start()
    ended = daemon.wait(job["id"])
    assert (ended["state"], ended["reason"]) == ("failed", "lost")
    assert daemon.strays() == []


def test_an_attempt_whose_user_code_never_ran_is_launched_again_under_the_same_number(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon().start()
    job = daemon.submit(command="echo ran $MLBOX_ATTEMPT", hold=True)
    daemon.kill()
    _pretend_committed_start(daemon, job["id"])
    daemon.start()
    ended = daemon.wait(job["id"])
    assert (ended["state"], ended["attempt"]) == ("succeeded", 1)
    assert daemon.text(job["id"]) == "ran 1\n"


@pytest.mark.parametrize(("requeue", "state", "attempt"), [(False, "failed", 1), (True, "succeeded", 2)])
def test_after_a_reboot_a_started_attempt_is_over(
    make_daemon: Callable[..., Daemon], tmp_path: Path, requeue: bool, state: str, attempt: int
) -> None:
    boot = tmp_path / "boot_id"
    boot.write_text("first-boot\n")
    daemon = make_daemon(environment={"MLBOX_BOOT_ID_PATH": str(boot)}).start()
    job = daemon.submit(command="[ $MLBOX_ATTEMPT = 2 ] || sleep 1000", requeue=requeue)
    until_running(daemon, job["id"])
    shim_of(daemon, job["id"])
    daemon.kill()
    for pid in daemon.strays():
        os.kill(pid, signal.SIGKILL)
    eventually("all processes are gone", lambda: not daemon.strays())
    boot.write_text("second-boot\n")
    daemon.start()
    ended = daemon.wait(job["id"])
    assert (ended["state"], ended["attempt"]) == (state, attempt)
    if not requeue:
        assert ended["reason"] == "reboot"


def test_a_cancel_that_the_daemon_did_not_live_to_carry_out_is_carried_out_by_the_next(daemon: Daemon) -> None:
    job = daemon.submit(command="trap '' TERM; sleep 1000", grace_s=0.2)
    until_running(daemon, job["id"])
    os.kill(shim_of(daemon, job["id"]), signal.SIGSTOP)
    daemon.http.post(f"/api/jobs/{job['id']}/cancel")
    daemon.kill()
    os.kill(shim_of(daemon, job["id"]), signal.SIGCONT)
    daemon.start()
    ended = daemon.wait(job["id"])
    assert (ended["state"], ended["reason"]) == ("cancelled", "user")
    assert daemon.strays() == []


def test_waiting_jobs_survive_and_start_in_their_order(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon("scheduler.cpu_slots=1").start()
    gate, order = tmp_path / "gate", tmp_path / "order"
    first = daemon.submit(command=f"until [ -e {gate} ]; do sleep 0.05; done")
    waiting = [daemon.submit(command=f"echo $MLBOX_JOB_ID >> {order}")["id"] for _ in range(5)]
    until_running(daemon, first["id"])
    daemon.kill()
    daemon.start()
    gate.touch()
    for job_id in waiting:
        assert daemon.wait(job_id)["state"] == "succeeded"
    assert order.read_text().split() == [str(job_id) for job_id in waiting]


def test_a_second_daemon_on_the_same_folder_is_refused(daemon: Daemon) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "mlbox", "serve", "--state", str(daemon.state), "--listen", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 75
    assert f"another mlbox (pid {daemon.pid})" in second.stderr
    assert daemon.http.get("/healthz").status_code == 200


def test_sigterm_ends_the_daemon_cleanly_and_leaves_the_jobs(daemon: Daemon) -> None:
    job = daemon.submit(command="sleep 1000")
    until_running(daemon, job["id"])
    shim = shim_of(daemon, job["id"])
    assert daemon.stop() == 0
    assert Path(f"/proc/{shim}").exists()
    daemon.start()
    assert daemon.job(job["id"])["state"] == "running"
    daemon.http.post(f"/api/jobs/{job['id']}/cancel")
    assert daemon.wait(job["id"])["state"] == "cancelled"


def _pretend_committed_start(daemon: Daemon, job_id: int) -> None:
    """Write what the daemon commits before it launches: a crash between the two leaves exactly this."""
    import sqlite3

    with sqlite3.connect(daemon.state / "mlbox.db") as database:
        database.execute("UPDATE jobs SET state = 'starting', attempt = 1, hold = 0 WHERE id = ?", (job_id,))
        database.execute(
            "INSERT INTO attempts (job_id, attempt, attempt_key, token_sha256, gpu_uuids, created_at) "
            "VALUES (?, 1, 'key', 'digest', '', 0)",
            (job_id,),
        )
    database.close()
