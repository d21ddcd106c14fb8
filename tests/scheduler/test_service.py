"""The scheduler's door: who may ask what, what it answers, and that memory follows the database whatever happens."""

import asyncio
import io
import os
import sqlite3
import time
import zipfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mlbox import database as database_module
from mlbox.errors import Conflict, Denied, Impossible, Invalid, NotFound, TooMany, Unavailable
from mlbox.identity import Role, digest
from mlbox.jobs import JobSpec, JobState
from mlbox.scheduler.gpus import GpuState
from tests.nvml.standin import FakeGpu, StandIn
from tests.scheduler.box import ADMIN, ALICE, BOB, Box, eventually, person

SPEC = JobSpec(command="true", name="test")
UUID = "GPU-00000000-1111-2222-3333-444444444444"


def archive(content: bytes = b"print('hello')\n") -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as file:
        file.writestr(zipfile.ZipInfo("train.py"), content)
    return whole.getvalue()


ARCHIVE = archive()


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    made = await Box(tmp_path).start()
    yield made
    await made.close()


@pytest.fixture
async def quiet(tmp_path: Path) -> AsyncIterator[Box]:
    """A box on which nothing starts: its loop does not run."""
    made = Box(tmp_path, waiting_max=3)
    await made.open()
    await made.loop.recover()
    yield made
    await made.close()


@pytest.fixture
async def gpu_box(tmp_path: Path) -> AsyncIterator[Box]:
    hardware = StandIn(tmp_path)
    hardware.show(FakeGpu(uuid=UUID))
    made = await Box(tmp_path, hardware=hardware).start()
    yield made
    await made.close()


def upload(box: Box, content: bytes = ARCHIVE) -> Path:
    path = box.service.incoming_folder / os.urandom(8).hex()
    path.write_bytes(content)
    return path


def waiting_ids(box: Box) -> list[int]:
    return [job.id for job in box.scheduled.backlog.ordered(100)]


# Submit


async def test_a_submitted_job_waits_and_says_why(quiet: Box) -> None:
    job = await quiet.submit(hold=True)
    pending = quiet.service.pending(job)
    assert pending is not None
    assert (pending.position, pending.why) == (None, "it is held: release it when it may start")


async def test_a_key_makes_one_job_however_often_it_is_sent(quiet: Box) -> None:
    made = await asyncio.gather(*(quiet.service.submit(ALICE, SPEC, idempotency_key="k") for _ in range(10)))
    assert len({job.id for job, _ in made}) == 1
    assert [new for _, new in made].count(True) == 1
    assert waiting_ids(quiet) == [made[0][0].id]
    other, new = await quiet.service.submit(BOB, SPEC, idempotency_key="k")
    assert new
    assert other.id != made[0][0].id


async def test_a_key_is_answered_though_nothing_more_may_wait(quiet: Box) -> None:
    job, _ = await quiet.service.submit(ALICE, SPEC, idempotency_key="k")
    for _ in range(2):
        await quiet.submit()
    with pytest.raises(TooMany, match="3 jobs wait, and no more than 3 may"):
        await quiet.submit()
    assert await quiet.service.submit(ALICE, SPEC, idempotency_key="k") == (job, False)


async def test_code_is_moved_to_its_job_and_a_repeated_submit_leaves_nothing(quiet: Box) -> None:
    spec = replace(SPEC, code="zip")
    job, _ = await quiet.service.submit(ALICE, spec, code=upload(quiet), idempotency_key="k")
    kept = quiet.folders.code(job)
    assert kept is not None
    assert kept.read_bytes() == ARCHIVE
    again = await asyncio.gather(
        *(quiet.service.submit(ALICE, spec, code=upload(quiet), idempotency_key="other") for _ in range(3))
    )
    assert len({job.id for job, _ in again}) == 1
    assert sorted(path.name for path in quiet.folders.jobs.iterdir()) == sorted(map(str, {job.id, again[0][0].id}))


async def test_an_archive_that_would_not_be_unpacked_is_refused_when_it_comes(quiet: Box) -> None:
    with pytest.raises(Invalid, match="the code archive was refused") as refused:
        await quiet.service.submit(ALICE, replace(SPEC, code="zip"), code=upload(quiet, b"neither tar nor zip"))
    assert [error.field for error in refused.value.errors] == ["code"]
    assert waiting_ids(quiet) == []


async def test_code_that_cannot_be_stored_is_the_boxs_trouble_and_queues_nothing(quiet: Box, tmp_path: Path) -> None:
    away = tmp_path / "away"
    quiet.folders.jobs.rename(away)
    with pytest.raises(Unavailable, match="the code archive cannot be stored now"):
        await quiet.service.submit(ALICE, replace(SPEC, code="zip"), code=upload(quiet))
    away.rename(quiet.folders.jobs)
    assert waiting_ids(quiet) == []
    assert list(quiet.folders.jobs.iterdir()) == []


async def test_a_locked_database_queues_nothing_and_says_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_MS", 50)
    box = await Box(tmp_path).start()
    outsider = sqlite3.connect(tmp_path / "mlbox.db", isolation_level=None)
    outsider.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="nothing was changed, try again"):
        await box.submit()
    with pytest.raises(Unavailable):
        await box.service.submit(ALICE, replace(SPEC, code="zip"), code=upload(box))
    outsider.execute("ROLLBACK")
    outsider.close()
    assert waiting_ids(box) == []
    assert list(box.folders.jobs.iterdir()) == []
    assert (await box.ended((await box.submit()).id)).state is JobState.SUCCEEDED
    await box.close()


async def test_a_caller_who_hangs_up_in_mid_commit_leaves_memory_in_step(quiet: Box) -> None:
    """A hundred calls, each cancelled a little later than the one before."""
    held = await quiet.submit(hold=True)
    for number in range(50):
        for act in (quiet.service.release, quiet.service.hold):
            call = asyncio.create_task(act(ALICE, held.id))
            await asyncio.sleep(0.0003 * (number % 7))
            call.cancel()
            await asyncio.wait([call])
    await quiet.database.write(lambda connection: None)  # whatever was under way is committed before this
    known = quiet.scheduled.backlog.get(held.id)
    assert known is not None
    assert known.hold is (await quiet.job(held.id)).spec.hold


async def test_a_submit_whose_caller_hangs_up_is_started_at_once_or_not_there(box: Box) -> None:
    calls = [asyncio.create_task(box.service.submit(ALICE, SPEC)) for _ in range(20)]
    for number, call in enumerate(calls):
        await asyncio.sleep(0.0005 * (number % 4))
        call.cancel()
    await asyncio.wait(calls)
    jobs = await box.service.list(ADMIN, limit=100)
    for job in jobs:
        assert (await box.ended(job.id)).state is JobState.SUCCEEDED, "before the slow timer, which is at 60 s"


async def test_what_can_never_start_is_refused(gpu_box: Box) -> None:
    with pytest.raises(Impossible, match="ask for 2 or fewer"):
        await gpu_box.submit(cpus=3)
    with pytest.raises(Impossible, match="the job asks 2 GPUs; this box has 1 GPU: ask for 1 or fewer"):
        await gpu_box.submit(gpus=2)


async def test_priority_above_zero_is_for_admins(quiet: Box) -> None:
    with pytest.raises(Denied, match="priority 1 is for admins"):
        await quiet.submit(priority=1)
    await quiet.submit(priority=1, who=ADMIN)
    mine = await quiet.submit()
    with pytest.raises(Denied, match="priority 5 is for admins"):
        await quiet.service.change(ALICE, mine.id, {"priority": 5})


async def test_a_model_is_deployed_only_for_who_may_deploy(quiet: Box) -> None:
    with pytest.raises(Denied, match="needs the scope 'deploy'"):
        await quiet.submit(model="digits")
    await quiet.submit(model="digits", who=person("dora", 1004, Role.DEPLOYER))


# Who sees what


async def test_others_jobs_do_not_exist_but_for_admins(quiet: Box) -> None:
    job = await quiet.submit()
    for act in (quiet.service.get, quiet.service.cancel, quiet.service.retry, quiet.service.hold,
                quiet.service.release, quiet.service.remove_files, quiet.service.attempts):  # fmt: skip
        with pytest.raises(NotFound, match=f"there is no job {job.id} that you may see"):
            await act(BOB, job.id)
    assert await quiet.service.list(BOB) == []
    assert [seen.id for seen in await quiet.service.list(ADMIN)] == [job.id]


@pytest.mark.parametrize("job_id", [0, -1, 999, 2**63, 10**30])
async def test_ids_that_no_job_has_are_not_found(quiet: Box, job_id: int) -> None:
    with pytest.raises(NotFound):
        await quiet.service.get(ADMIN, job_id)


async def test_a_jobs_own_token_sees_that_job_and_changes_nothing(quiet: Box) -> None:
    mine, other = await quiet.submit(), await quiet.submit()
    token = person("alice", ALICE.uid, job_id=mine.id)
    assert (await quiet.service.get(token, mine.id)).id == mine.id
    assert [job.id for job in await quiet.service.list(token)] == [mine.id]
    with pytest.raises(NotFound):
        await quiet.service.get(token, other.id)
    with pytest.raises(Denied, match="cannot change job"):
        await quiet.service.cancel(token, mine.id)
    with pytest.raises(Denied, match="cannot submit"):
        await quiet.service.submit(token, SPEC)


async def test_the_queue_shows_everybody_who_waits_and_nobody_what(quiet: Box) -> None:
    await quiet.submit("echo secret", env={"KEY": "secret"}, workdir="/secret")
    await quiet.submit("echo own", who=BOB)
    queue = await quiet.service.queue(BOB, 10)
    assert [job.user for job in queue] == ["alice", "bob"]
    assert "secret" not in repr(queue[0])
    assert queue[1].spec.command == "echo own"


# Moves


async def test_hold_release_and_change_are_for_waiting_jobs(box: Box) -> None:
    job = await box.submit("sleep 1000", hold=True)
    await box.service.change(ALICE, job.id, {"priority": -3, "time_limit_s": 900.0})
    released = await box.service.release(ALICE, job.id)
    assert (released.spec.hold, released.spec.priority, released.spec.time_limit_s) == (False, -3, 900.0)
    await box.until(job.id, JobState.RUNNING)
    for act in (box.service.hold(ALICE, job.id), box.service.change(ALICE, job.id, {"priority": -4})):
        with pytest.raises(Conflict, match=f"job {job.id} is running: only a waiting job can be changed"):
            await act


async def test_a_waiting_job_is_cancelled_at_once_and_twice_is_once(quiet: Box) -> None:
    job = await quiet.submit()
    cancelled = await quiet.service.cancel(ALICE, job.id)
    assert cancelled.state is JobState.CANCELLED
    assert await quiet.service.cancel(ALICE, job.id) == cancelled
    assert waiting_ids(quiet) == []


async def test_what_ended_by_itself_cannot_be_cancelled(box: Box) -> None:
    job = await box.submit()
    await box.ended(job.id)
    with pytest.raises(Conflict, match=f"job {job.id} has succeeded already"):
        await box.service.cancel(ALICE, job.id)


async def test_wait_answers_at_the_end_or_when_its_time_is_over(box: Box, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = await box.submit(f"until [ -e {gate} ]; do sleep 0.02; done")
    assert not (await box.service.wait(ALICE, job.id, 0.05)).ended
    waiting = asyncio.create_task(box.service.wait(ALICE, job.id, 20))
    gate.touch()
    assert (await waiting).state is JobState.SUCCEEDED


async def test_retry_makes_a_new_job_of_the_same_spec_and_code(quiet: Box) -> None:
    job, _ = await quiet.service.submit(ALICE, replace(SPEC, code="zip", hold=True), code=upload(quiet))
    with pytest.raises(Conflict, match=f"job {job.id} is queued: it can be retried when it has ended"):
        await quiet.service.retry(ALICE, job.id)
    await quiet.service.cancel(ALICE, job.id)
    again = await quiet.service.retry(ALICE, job.id, idempotency_key="k")
    assert (again.id, again.retry_of, again.spec) == (job.id + 1, job.id, replace(job.spec, hold=False))
    assert await quiet.service.retry(ALICE, job.id, idempotency_key="k") == again
    await quiet.service.remove_files(ALICE, job.id)
    kept = quiet.folders.code(again)
    assert kept is not None
    assert kept.read_bytes() == ARCHIVE
    assert list(quiet.service.incoming_folder.iterdir()) == []


async def test_a_retry_that_is_refused_leaves_no_copy(quiet: Box) -> None:
    job, _ = await quiet.service.submit(ALICE, replace(SPEC, code="zip"), code=upload(quiet))
    await quiet.service.cancel(ALICE, job.id)
    for _ in range(3):
        await quiet.submit()
    with pytest.raises(TooMany):
        await quiet.service.retry(ALICE, job.id)
    assert list(quiet.service.incoming_folder.iterdir()) == []


async def test_a_job_whose_files_were_removed_cannot_be_retried_with_its_code(quiet: Box) -> None:
    job, _ = await quiet.service.submit(ALICE, replace(SPEC, code="zip"), code=upload(quiet))
    with pytest.raises(Conflict, match="cancel it first, then remove its files"):
        await quiet.service.remove_files(ALICE, job.id)
    await quiet.service.cancel(ALICE, job.id)
    removed = await quiet.service.remove_files(ALICE, job.id)
    assert removed.files_removed
    assert not quiet.folders.job(job.id).exists()
    assert (await quiet.service.remove_files(ALICE, job.id)).files_removed, "twice is once"
    with pytest.raises(Conflict, match=f"the code of job {job.id} was removed: submit it anew"):
        await quiet.service.retry(ALICE, job.id)


async def test_retrying_while_the_files_are_removed_gives_whole_code_or_a_refusal(quiet: Box) -> None:
    content = archive(os.urandom(1 << 20))
    for _ in range(10):
        job, _ = await quiet.service.submit(ALICE, replace(SPEC, code="zip"), code=upload(quiet, content))
        await quiet.service.cancel(ALICE, job.id)
        again, _ = await asyncio.gather(
            quiet.service.retry(ALICE, job.id), quiet.service.remove_files(ALICE, job.id), return_exceptions=True
        )
        if isinstance(again, Conflict):
            continue
        assert not isinstance(again, BaseException), again
        kept = quiet.folders.code(again)
        assert kept is not None
        assert kept.read_bytes() == content
        await quiet.service.cancel(ALICE, again.id)


async def test_a_token_is_its_jobs_only_while_that_is_under_way(box: Box) -> None:
    job = await box.submit("printenv MLBOX_TOKEN; sleep 1000")
    token = await eventually("it is told", lambda: (box.attempt(job.id) / "log").exists() and box.log(job.id).strip())
    found = await box.service.job_of_token(digest(token))
    assert found is not None
    assert found.id == job.id
    assert box.service.under_way(job.id, 1)
    await box.service.cancel(ALICE, job.id)
    await box.ended(job.id)
    assert await box.service.job_of_token(digest(token)) is None
    assert not box.service.under_way(job.id, 1)


# GPUs


async def test_a_gpu_that_is_drained_lets_its_job_end_first(gpu_box: Box, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = await gpu_box.submit(f"until [ -e {gate} ]; do sleep 0.02; done", gpus=1)
    await gpu_box.until(job.id, JobState.RUNNING)
    await gpu_box.service.drain(ADMIN, UUID, "new fan")
    (report,) = gpu_box.service.gpus()
    assert report.state is GpuState.DRAINING
    assert f"job {job.id} still runs on it" in report.why
    assert report.job_ids == (job.id,)
    gate.touch()
    assert (await gpu_box.ended(job.id)).state is JobState.SUCCEEDED
    await eventually("it is out of service", lambda: gpu_box.service.gpus()[0].state is GpuState.DRAINED)
    await gpu_box.service.resume(ADMIN, UUID)
    assert gpu_box.service.gpus()[0].state is GpuState.FREE


async def test_a_gpu_that_is_not_here_is_not_found_and_the_known_are_named(gpu_box: Box) -> None:
    with pytest.raises(NotFound, match=f"there is no GPU GPU-x here; known: {UUID}"):
        await gpu_box.service.drain(ADMIN, "GPU-x", None)


async def test_gpu_jobs_may_wait_while_nobody_knows_how_many_gpus_there_are(quiet: Box) -> None:
    job = await quiet.submit(gpus=64)
    pending = quiet.service.pending(job)
    assert pending is not None
    assert pending.why == "it needs 64 GPUs: the GPUs are not known yet: NVML has not answered"


async def test_a_jobs_time_is_told_in_words(quiet: Box) -> None:
    job = await quiet.submit(not_before=time.time() + 3600)
    pending = quiet.service.pending(job)
    assert pending is not None
    assert pending.why.startswith("it may not start before ")
