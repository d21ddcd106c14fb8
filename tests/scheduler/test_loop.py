"""The loop over the real database, shims and GPU inventory: starts, ends, restarts, and trouble of the box's own."""

import asyncio
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mlbox import database as database_module
from mlbox.jobs import JobState, Reason
from mlbox.scheduler import queue
from mlbox.scheduler.gpus import GpuState
from mlbox.scheduler.placement import Start
from mlbox.scheduler.queue import Launching
from tests.nvml.standin import FakeGpu, StandIn
from tests.scheduler.box import ADMIN, Box, eventually

pytestmark = pytest.mark.slow

UUIDS = [f"GPU-0000000{n}-1111-2222-3333-444444444444" for n in range(3)]


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    made = await Box(tmp_path).start()
    yield made
    await made.close()


@pytest.fixture
def hardware(tmp_path: Path) -> StandIn:
    stand_in = StandIn(tmp_path)
    show(stand_in)
    return stand_in


@pytest.fixture
async def gpu_box(tmp_path: Path, hardware: StandIn) -> AsyncIterator[Box]:
    made = await Box(tmp_path, hardware=hardware).start()
    yield made
    await made.close()


def show(hardware: StandIn, **compute: list[tuple[int, int | None]]) -> None:
    """The box has GPUs 0 and 1, with these processes (pid, MiB): `gpu0=[...]`."""
    hardware.show(*(FakeGpu(uuid=UUIDS[n], compute=compute.get(f"gpu{n}", [])) for n in range(2)))


def gated(gate: Path) -> str:
    return f"echo $CUDA_VISIBLE_DEVICES; until [ -e {gate} ]; do sleep 0.02; done"


def started(box: Box, job_id: int, attempt: int = 1) -> dict[str, int] | None:
    path = box.attempt(job_id, attempt) / "started.json"
    return json.loads(path.read_text()) if path.exists() else None


async def shim_of(box: Box, job_id: int) -> int:
    return (await eventually("user code began", lambda: started(box, job_id)))["shim_pid"]


def gpu_states(box: Box) -> list[GpuState]:
    return [report.state for report in box.service.gpus()]


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@contextmanager
def stranger(**environment: str) -> Iterator[int]:
    """The pid of a process that is no job's; with a job's key it is what a slow driver still shows of that job."""
    with subprocess.Popen(["sleep", "1000"], env={**os.environ, **environment}) as process:
        try:
            yield process.pid
        finally:
            process.kill()


async def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_MS", 50)
    return await Box(tmp_path, repair_s=0.2).start()


# From queue to end


async def test_a_job_runs_and_its_end_is_recorded(box: Box) -> None:
    job = await box.submit("echo hello; exit 3")
    ended = await box.ended(job.id)
    assert (ended.state, ended.reason, ended.exit_code, ended.attempt) == (JobState.FAILED, Reason.EXIT_CODE, 3, 1)
    assert box.log(job.id) == "hello\n"
    assert box.scheduled.active == {}


async def test_no_more_jobs_run_than_there_are_slots_and_they_start_in_order(box: Box, tmp_path: Path) -> None:
    gates = [tmp_path / f"gate{n}" for n in range(4)]
    jobs = [await box.submit(gated(gate)) for gate in gates]
    for job in jobs[:2]:
        await box.until(job.id, JobState.RUNNING)
    assert [(await box.job(job.id)).state for job in jobs[2:]] == [JobState.QUEUED, JobState.QUEUED]
    gates[1].touch()
    await box.until(jobs[2].id, JobState.RUNNING)
    assert (await box.job(jobs[3].id)).state is JobState.QUEUED
    for gate in gates:
        gate.touch()
    assert [(await box.ended(job.id)).state for job in jobs] == [JobState.SUCCEEDED] * 4


async def test_a_failure_is_tried_again_as_often_as_was_asked(box: Box) -> None:
    job = await box.submit("echo $MLBOX_ATTEMPT; exit 1", retries=2)
    ended = await box.ended(job.id)
    assert (ended.state, ended.attempt) == (JobState.FAILED, 3)
    assert [box.log(job.id, attempt) for attempt in (1, 2, 3)] == ["1\n", "2\n", "3\n"]


async def test_a_job_is_started_when_its_time_has_come(box: Box) -> None:
    due = time.time() + 0.4
    job = await box.submit(not_before=due)
    ended = await box.ended(job.id)
    assert ended.started_at is not None
    assert ended.started_at >= due - 0.01
    assert ended.started_at < due + 3, "it waited for the slow timer"


async def test_a_cancelled_job_ends_after_its_grace_though_it_ignores_term(box: Box) -> None:
    job = await box.submit("trap '' TERM; echo ready; while :; do sleep 0.02; done", grace_s=0.1)
    await shim_of(box, job.id)
    await box.service.cancel(ADMIN, job.id)
    ended = await box.ended(job.id)
    assert (ended.state, ended.reason) == (JobState.CANCELLED, Reason.USER)


async def test_cancelling_at_any_moment_of_a_start_ends_the_job(box: Box) -> None:
    for pause_s in (0, 0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04):
        job = await box.submit("sleep 1000", grace_s=0.1)
        await asyncio.sleep(pause_s)
        await box.service.cancel(ADMIN, job.id)
        assert (await box.ended(job.id)).state is JobState.CANCELLED


async def test_descriptors_of_ended_attempts_are_closed(box: Box) -> None:
    await box.ended((await box.submit()).id)
    before = open_fds()
    jobs = [await box.submit() for _ in range(10)]
    for job in jobs:
        await box.ended(job.id)
    assert open_fds() <= before


async def test_an_idle_loop_costs_nothing(box: Box, tmp_path: Path) -> None:
    """One job runs, one is held, one waits for a time far away and one for its turn."""
    await box.until((await box.submit(gated(tmp_path / "gate"), cpus=2)).id, JobState.RUNNING)
    await box.submit(hold=True)
    await box.submit(not_before=time.time() + 1e6)
    await box.submit()
    await asyncio.sleep(0.1)
    used = time.process_time()
    await asyncio.sleep(1)
    assert time.process_time() - used < 0.05


# Restarts: the recovery table, row by row


async def test_a_running_job_is_adopted(box: Box, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = await box.submit(f"{gated(gate)}; exit 4")
    await box.until(job.id, JobState.RUNNING)
    shim = await shim_of(box, job.id)
    await box.restart()
    assert (await box.job(job.id)).state is JobState.RUNNING
    gate.touch()
    ended = await box.ended(job.id)
    assert (ended.exit_code, ended.attempt) == (4, 1)
    assert await shim_of(box, job.id) == shim


async def test_a_job_adopted_before_it_was_recorded_as_running_began_when_it_began(box: Box) -> None:
    job = await box.submit("sleep 1000")
    await box.until(job.id, JobState.RUNNING)
    began = (await eventually("user code began", lambda: started(box, job.id)))["started_at"]
    await box.stop()
    with sqlite3.connect(box.state_folder / "mlbox.db") as outsider:  # as if the daemon had died a moment before
        outsider.execute("DROP TRIGGER jobs_move")
        outsider.execute("UPDATE jobs SET state = 'starting', started_at = NULL WHERE id = ?", (job.id,))
    outsider.close()
    await box.start()
    adopted = await box.job(job.id)
    assert adopted.state is JobState.RUNNING
    assert adopted.started_at == pytest.approx(began)


async def test_an_end_in_the_daemons_absence_is_recorded_before_anything_new(box: Box, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = await box.submit(gated(gate))
    await shim_of(box, job.id)
    await box.stop()
    gate.touch()
    await eventually("it ended", (box.attempt(job.id) / "exit.json").exists)
    await box.open()
    await box.loop.recover()
    assert (await box.job(job.id)).state is JobState.SUCCEEDED


@pytest.mark.parametrize(("requeue", "state", "attempt"), [(False, JobState.FAILED, 1), (True, JobState.SUCCEEDED, 2)])
@pytest.mark.parametrize("while_away", [False, True])
async def test_a_job_whose_shim_died_is_lost(
    box: Box, while_away: bool, requeue: bool, state: JobState, attempt: int
) -> None:
    job = await box.submit("[ $MLBOX_ATTEMPT = 2 ] || { setsid sleep 1000 & sleep 1000; }", requeue=requeue)
    shim = await shim_of(box, job.id)
    active = box.scheduled.active[job.id]
    if while_away:
        await box.stop()
    os.kill(shim, signal.SIGKILL)
    if while_away:
        await box.start()
    ended = await box.ended(job.id)
    assert (ended.state, ended.attempt) == (state, attempt)
    assert requeue or ended.reason is Reason.LOST
    assert not box.executor.processes(active.folder, active.key)


async def test_after_a_reboot_a_started_job_is_over(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = await box.submit("sleep 1000")
    shim = await shim_of(box, job.id)
    active = box.scheduled.active[job.id]
    await box.stop()
    os.kill(shim, signal.SIGKILL)
    await eventually("all are gone", lambda: not box.executor.kill_remains(active.folder, active.key))
    (tmp_path / "boot_id").write_text("another boot\n")
    monkeypatch.setenv("MLBOX_BOOT_ID_PATH", str(tmp_path / "boot_id"))
    await box.start()
    ended = await box.ended(job.id)
    assert (ended.state, ended.reason) == (JobState.FAILED, Reason.REBOOT)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_committed_start_that_never_ran_is_launched_under_its_number(box: Box, cancelled: bool) -> None:
    job = await box.submit("echo $MLBOX_ATTEMPT", hold=True)
    await box.stop()
    await box.open()
    await box.service.release(ADMIN, job.id)
    intent = Launching(start=Start(job_id=job.id, gpu_uuids=()), key="k" * 32, token_sha256="never written down")
    await box.database.write(queue.start, [intent], now=time.time())
    if cancelled:
        await box.service.cancel(ADMIN, job.id)
    await box.stop()
    await box.start()
    ended = await box.ended(job.id)
    assert ended.attempt == 1
    assert ended.state is (JobState.CANCELLED if cancelled else JobState.SUCCEEDED)
    assert cancelled or box.log(job.id) == "1\n"
    assert (box.attempt(job.id) / "started.json").exists() is not cancelled


@pytest.mark.slow
async def test_a_restart_with_ten_thousand_waiting_jobs_takes_no_two_seconds(box: Box) -> None:
    job = await box.submit(hold=True)

    def many(connection: sqlite3.Connection) -> None:
        for _ in range(10_000):
            queue.submit(connection, job.spec, user="alice", uid=1001, now=1.0)

    await box.database.write(many)
    await box.stop()
    await box.open()
    began = time.monotonic()
    await box.loop.recover()
    assert time.monotonic() - began < 2
    assert len(box.scheduled.backlog) == 10_001


# Trouble of the box's own


async def test_a_locked_database_delays_starts_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = await impatient(tmp_path, monkeypatch)
    gate = tmp_path / "gate"
    running = await box.submit(gated(gate), cpus=2)
    await box.until(running.id, JobState.RUNNING)
    waiting = await box.submit("echo $MLBOX_ATTEMPT")
    outsider = sqlite3.connect(tmp_path / "mlbox.db", isolation_level=None)
    outsider.execute("BEGIN IMMEDIATE")
    gate.touch()
    await eventually("it ended", (box.attempt(running.id) / "exit.json").exists)
    await eventually("its end cannot be recorded", lambda: box.scheduled.active[running.id].trouble)
    assert (await box.job(running.id)).state is JobState.RUNNING
    outsider.execute("ROLLBACK")
    outsider.close()
    assert (await box.ended(running.id)).state is JobState.SUCCEEDED
    assert (await box.ended(waiting.id)).attempt == 1
    await box.close()


async def test_a_database_that_is_locked_again_and_again_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await impatient(tmp_path, monkeypatch)
    runs = tmp_path / "runs"
    jobs = [await box.submit(f"echo $MLBOX_JOB_ID-$MLBOX_ATTEMPT >> {runs}") for _ in range(20)]
    outsider = sqlite3.connect(tmp_path / "mlbox.db", isolation_level=None, timeout=5)
    for _ in range(12):
        outsider.execute("BEGIN IMMEDIATE")
        await asyncio.sleep(0.08)
        outsider.execute("ROLLBACK")
        await asyncio.sleep(0.03)
    outsider.close()
    assert {(await box.ended(job.id)).state for job in jobs} == {JobState.SUCCEEDED}
    assert sorted(runs.read_text().split()) == sorted(f"{job.id}-1" for job in jobs)
    await box.close()


async def test_a_folder_that_cannot_be_made_delays_the_launch_and_says_so(box: Box) -> None:
    job = await box.submit(hold=True)
    box.folders.job(job.id).write_text("in the way")
    await box.service.release(ADMIN, job.id)

    async def why() -> str | None:
        pending = box.service.pending(await box.job(job.id))
        return pending.why if pending and "cannot be launched yet" in pending.why else None

    assert str(box.folders.job(job.id)) in await eventually("it says why", why)
    assert (await box.ended((await box.submit()).id)).state is JobState.SUCCEEDED, "others are not kept waiting"
    box.folders.job(job.id).unlink()
    assert (await box.ended(job.id)).attempt == 1


async def test_a_job_that_cannot_be_launched_can_be_cancelled(box: Box) -> None:
    job = await box.submit(hold=True)
    box.folders.job(job.id).write_text("in the way")
    await box.service.release(ADMIN, job.id)
    await eventually("it is tried", lambda: job.id in box.scheduled.active and box.scheduled.active[job.id].trouble)
    await box.service.cancel(ADMIN, job.id)
    assert (await box.ended(job.id)).state is JobState.CANCELLED


async def test_a_shim_that_ends_before_it_began_is_launched_again_and_never_ends_the_job(box: Box) -> None:
    job = await box.submit("echo $MLBOX_ATTEMPT", hold=True)
    obstacle = box.attempt(job.id) / "lock"  # where a full disk has no room for a file, say
    obstacle.mkdir(parents=True)
    await box.service.release(ADMIN, job.id)
    active = await eventually("it is launched", lambda: box.scheduled.active.get(job.id))
    await eventually("it is launched again and again", lambda: active.launches >= 4)
    assert (await box.job(job.id)).state in (JobState.STARTING, JobState.RUNNING)
    obstacle.rmdir()
    ended = await box.ended(job.id)
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 1)
    assert box.log(job.id) == "1\n"


async def test_a_lock_whose_holder_cannot_be_found_is_no_reason_to_spin(box: Box) -> None:
    job = await box.submit(hold=True)
    box.attempt(job.id).mkdir(parents=True)
    lock = os.open(box.attempt(job.id) / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    await box.service.release(ADMIN, job.id)
    active = await eventually("it is launched", lambda: box.scheduled.active.get(job.id))
    await eventually("its shim gave up", lambda: active.tries >= 2)
    tries = active.tries
    await asyncio.sleep(0.5)
    assert active.tries - tries <= 2
    os.close(lock)
    assert (await box.ended(job.id)).state is JobState.SUCCEEDED


async def test_a_submit_that_memory_missed_is_found_by_the_slow_timer(tmp_path: Path) -> None:
    box = await Box(tmp_path, repair_s=0.1).start()
    template = await box.submit(hold=True)
    job, _ = await box.database.write(
        queue.submit, replace(template.spec, hold=False), user="alice", uid=1001, now=time.time()
    )
    assert (await box.ended(job.id)).state is JobState.SUCCEEDED
    await box.close()


async def test_a_committed_start_that_memory_missed_is_carried_out(tmp_path: Path) -> None:
    box = await Box(tmp_path, repair_s=0.1).start()
    job = await box.submit(not_before=time.time() + 1e6)
    intent = Launching(start=Start(job_id=job.id, gpu_uuids=()), key="k" * 32, token_sha256="t")
    await box.database.write(queue.start, [intent], now=time.time())
    assert (await box.ended(job.id)).state is JobState.SUCCEEDED
    assert len(box.scheduled.backlog) == 0
    await box.close()


async def test_what_nobody_foresaw_ends_the_loop_and_not_the_jobs(box: Box) -> None:
    job = await box.submit("sleep 1000")
    shim = await shim_of(box, job.id)
    with sqlite3.connect(box.state_folder / "mlbox.db") as outsider:
        outsider.execute("ALTER TABLE attempts RENAME TO lost_attempts")
    outsider.close()
    box.loop.wake()
    os.kill((await eventually("it began", lambda: started(box, job.id)))["pid"], signal.SIGTERM)
    with pytest.raises(ExceptionGroup) as died:
        await box._tasks[-1]
    assert died.group_contains(sqlite3.OperationalError)
    box._tasks.clear()
    with sqlite3.connect(box.state_folder / "mlbox.db") as outsider:
        outsider.execute("ALTER TABLE lost_attempts RENAME TO attempts")
    outsider.close()
    await box.database.close()
    await box.start()
    assert (await box.ended(job.id)).signal == signal.SIGTERM
    assert shim


# GPUs


async def test_jobs_get_gpus_of_their_own_first_come_first_served(gpu_box: Box, tmp_path: Path) -> None:
    gates = [tmp_path / f"gate{n}" for n in range(3)]
    first, second = [await gpu_box.submit(gated(gate), gpus=1) for gate in gates[:2]]
    for job in (first, second):
        await gpu_box.until(job.id, JobState.RUNNING)
    wide = await gpu_box.submit(gated(gates[2]), gpus=2)
    narrow = await gpu_box.submit("true", gpus=1)
    assert gpu_states(gpu_box) == [GpuState.LEASED, GpuState.LEASED]
    gates[0].touch()
    await eventually("one GPU is free", lambda: GpuState.FREE in gpu_states(gpu_box))
    await asyncio.sleep(0.2)
    assert (await gpu_box.job(narrow.id)).state is JobState.QUEUED, "the wide job comes first"
    gates[1].touch()
    await gpu_box.until(wide.id, JobState.RUNNING)
    gates[2].touch()
    ended = [await gpu_box.ended(job.id) for job in (first, second, wide, narrow)]
    assert [job.gpu_uuids for job in ended[:3]] == [(UUIDS[0],), (UUIDS[1],), (UUIDS[0], UUIDS[1])]
    assert [gpu_box.log(job.id).strip() for job in ended[:3]] == [*UUIDS[:2], ",".join(UUIDS[:2])]
    await eventually("both are free", lambda: gpu_states(gpu_box) == [GpuState.FREE, GpuState.FREE])


async def test_a_foreign_process_keeps_jobs_off_its_gpu(gpu_box: Box, hardware: StandIn) -> None:
    with stranger() as foreign:
        show(hardware, gpu0=[(foreign, 642)])
        await eventually("it is seen", lambda: gpu_states(gpu_box)[0] is GpuState.FOREIGN)
        assert (await gpu_box.ended((await gpu_box.submit(gpus=1)).id)).gpu_uuids == (UUIDS[1],)


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_gpu_is_given_on_only_when_a_later_sample_shows_it_clean(
    gpu_box: Box, hardware: StandIn, restarted: bool
) -> None:
    job = await gpu_box.submit("sleep 1000", gpus=1, requeue=True)
    shim = await shim_of(gpu_box, job.id)
    key = gpu_box.scheduled.active[job.id].key
    with stranger(MLBOX_ATTEMPT_KEY=key) as leftover:
        show(hardware, gpu0=[(leftover, 100)])
        await gpu_box.service.cancel(ADMIN, job.id)
        assert (await gpu_box.ended(job.id)).state is JobState.CANCELLED
        await eventually("it drains", lambda: gpu_states(gpu_box) == [GpuState.DRAINING, GpuState.FREE])
        following = await gpu_box.submit(gpus=2)
        if restarted:
            await gpu_box.restart()
        await asyncio.sleep(0.3)
        # What it left was killed. A monitor that has just begun cannot tell whose a dead process was; it blocks alike.
        assert gpu_states(gpu_box)[0] in ((GpuState.DRAINING, GpuState.FOREIGN) if restarted else (GpuState.DRAINING,))
        assert (await gpu_box.job(following.id)).state is JobState.QUEUED
        show(hardware)
        assert (await gpu_box.ended(following.id)).state is JobState.SUCCEEDED
    assert gone(shim)


async def test_the_next_attempt_runs_elsewhere_while_the_first_ones_gpu_drains(gpu_box: Box, hardware: StandIn) -> None:
    job = await gpu_box.submit("[ $MLBOX_ATTEMPT = 2 ] || sleep 1000; exit 0", gpus=1, retries=1)
    await shim_of(gpu_box, job.id)
    active = gpu_box.scheduled.active[job.id]
    with stranger(MLBOX_ATTEMPT_KEY=active.key) as leftover:
        show(hardware, gpu0=[(leftover, 100)])
        await eventually("it is seen", lambda: gpu_box.service.gpus()[0].gpu.processes)
        main = await eventually("it began", lambda: started(gpu_box, job.id))
        os.kill(main["pid"], signal.SIGKILL)
        ended = await gpu_box.ended(job.id)
        assert (ended.state, ended.attempt, ended.gpu_uuids) == (JobState.SUCCEEDED, 2, (UUIDS[1],))
        await eventually("one is given back", lambda: gpu_states(gpu_box) == [GpuState.DRAINING, GpuState.FREE])
    show(hardware)
    await eventually("both are free", lambda: gpu_states(gpu_box) == [GpuState.FREE, GpuState.FREE])


async def test_nothing_starts_on_gpus_that_nobody_knows_about(gpu_box: Box, hardware: StandIn) -> None:
    hardware.show(*(FakeGpu(uuid=uuid, lost=True) for uuid in UUIDS[:2]))
    await eventually("they are lost", lambda: gpu_states(gpu_box) == [GpuState.UNKNOWN, GpuState.UNKNOWN])
    job = await gpu_box.submit(gpus=1)
    assert (await gpu_box.ended((await gpu_box.submit()).id)).state is JobState.SUCCEEDED
    assert (await gpu_box.job(job.id)).state is JobState.QUEUED
    show(hardware)
    assert (await gpu_box.ended(job.id)).state is JobState.SUCCEEDED


async def test_a_gpu_out_of_service_takes_nothing_also_after_a_restart(gpu_box: Box) -> None:
    await gpu_box.service.drain(ADMIN, UUIDS[0], "being mended")
    await gpu_box.restart()
    assert (await gpu_box.ended((await gpu_box.submit(gpus=1)).id)).gpu_uuids == (UUIDS[1],)
    waiting = await gpu_box.submit(gpus=2)
    pending = gpu_box.service.pending(waiting)
    assert pending is not None
    assert "being mended" in pending.why
    await gpu_box.service.resume(ADMIN, UUIDS[0])
    assert (await gpu_box.ended(waiting.id)).state is JobState.SUCCEEDED
