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
from mlbox.jobs import After, ArraySpec, Dependency, Element, JobSpec, JobState
from mlbox.scheduler import gpu_queries, notices, queue
from mlbox.scheduler.gpu_queries import GpuFault
from mlbox.scheduler.gpus import GpuState
from mlbox.scheduler.notices import Notice
from mlbox.scheduler.queue import WaitingQuota
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
    now = time.time()
    state = box.scheduled
    return [job.id for job in state.backlog.ordered(100, state.standing(now), state.rules.weights, now)]


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


# Arrays and dependencies


def numbers(count: int, at_once: int | None = None) -> ArraySpec:
    return ArraySpec(elements=tuple(Element(index=n, env={"N": str(n)}) for n in range(count)), at_once=at_once)


async def test_an_array_is_one_submit_whose_jobs_all_wait_and_all_run(box: Box) -> None:
    first, made = await box.service.submit(ALICE, replace(SPEC, command='echo "$N"'), array=numbers(3))
    assert made
    jobs = [await box.ended(first.id + place) for place in range(3)]
    assert [job.state for job in jobs] == [JobState.SUCCEEDED] * 3
    assert [box.log(job.id) for job in jobs] == ["0\n", "1\n", "2\n"]
    assert [job.array.index for job in jobs if job.array] == [0, 1, 2]


async def test_every_job_of_an_array_has_its_code(quiet: Box) -> None:
    spec = replace(SPEC, code="zip")
    first, _ = await quiet.service.submit(ALICE, spec, array=numbers(3), code=upload(quiet))
    await quiet.service.cancel(ALICE, first.id)
    await quiet.service.remove_files(ALICE, first.id)
    for job_id in (first.id + 1, first.id + 2):
        kept = quiet.folders.code(await quiet.job(job_id))
        assert kept is not None
        assert kept.read_bytes() == ARCHIVE


async def test_an_array_that_is_refused_leaves_nothing(quiet: Box) -> None:
    spec = replace(SPEC, code="zip")
    with pytest.raises(TooMany, match="0 jobs wait, and no more than 3 may, these would be 4 more"):
        await quiet.service.submit(ALICE, spec, array=numbers(4), code=upload(quiet))
    unknown = replace(spec, depends_on=(Dependency(job_id=99),))
    with pytest.raises(Invalid, match="there is no job 99"):
        await quiet.service.submit(ALICE, unknown, array=numbers(2), code=upload(quiet))
    with pytest.raises(Invalid, match="model: an array leaves as many models as it has jobs"):
        await quiet.service.submit(ADMIN, replace(SPEC, model="digits"), array=numbers(2))
    with pytest.raises(Invalid, match="array: it has no elements"):
        await quiet.service.submit(ALICE, SPEC, array=numbers(0))
    assert waiting_ids(quiet) == []
    assert list(quiet.folders.jobs.iterdir()) == []


async def test_an_element_that_is_retried_still_knows_which_one_it_is(box: Box) -> None:
    spec = replace(SPEC, command='echo "$MLBOX_ARRAY_INDEX of $MLBOX_ARRAY_SIZE, $SLURM_ARRAY_TASK_ID, $N"')
    first, _ = await box.service.submit(ALICE, spec, array=numbers(3))
    await box.ended(first.id + 2)
    again = await box.service.retry(ALICE, first.id + 2)
    await box.ended(again.id)
    assert again.array is None
    assert box.log(again.id) == box.log(first.id + 2) == "2 of 3, 2, 2\n"


async def test_an_array_is_cancelled_at_once_whatever_its_jobs_are_at(box: Box, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    spec = replace(SPEC, command=f"until [ -e {gate} ]; do sleep 0.02; done")
    first, _ = await box.service.submit(ALICE, spec, array=numbers(4))
    await box.until(first.id, JobState.RUNNING)
    with pytest.raises(NotFound, match="is not the first of an array"):
        await box.service.cancel_array(ALICE, first.id + 1)
    with pytest.raises(NotFound, match="that you may see"):
        await box.service.cancel_array(BOB, first.id)
    assert [job.id for job in await box.service.cancel_array(ALICE, first.id)] == [first.id + n for n in range(4)]
    for place in range(4):
        assert (await box.ended(first.id + place)).state is JobState.CANCELLED
    assert waiting_ids(box) == []
    with pytest.raises(Conflict, match="every job of array 1 has ended already"):
        await box.service.cancel_array(ALICE, first.id)


async def test_jobs_wait_for_each_other_and_those_that_wait_in_vain_are_cancelled(box: Box, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    a = await box.submit(f"until [ -e {gate} ]; do sleep 0.02; done; exit 3")
    b = await box.submit(depends_on=(Dependency(job_id=a.id),))
    c = await box.submit(depends_on=(Dependency(job_id=b.id),))
    d = await box.submit(depends_on=(Dependency(job_id=a.id, after=After.ANY),))
    e = await box.submit(depends_on=(Dependency(job_id=a.id, after=After.NOT_OK),))
    pending = box.service.pending(b)
    assert pending is not None
    assert pending.position is None
    gate.touch()
    states = [(await box.ended(job.id)).state for job in (a, b, c, d, e)]
    failed, cancelled, succeeded = JobState.FAILED, JobState.CANCELLED, JobState.SUCCEEDED
    assert states == [failed, cancelled, cancelled, succeeded, succeeded]
    assert (await box.job(b.id)).cause == f"afterok:{a.id} can never be met: job {a.id} failed"
    with pytest.raises(Impossible, match=f"afterok:{a.id} can never be met"):
        await box.submit(depends_on=(Dependency(job_id=a.id),))
    again = await box.service.retry(ALICE, b.id)
    assert (await box.ended(again.id)).state is JobState.SUCCEEDED


async def test_a_cancel_takes_along_those_that_waited_for_it(quiet: Box) -> None:
    a = await quiet.submit()
    b = await quiet.submit(depends_on=(Dependency(job_id=a.id),))
    c = await quiet.submit(depends_on=(Dependency(job_id=b.id, after=After.NOT_OK),))
    await quiet.service.cancel(ALICE, a.id)
    assert waiting_ids(quiet) == [c.id]
    assert (await quiet.job(b.id)).state is JobState.CANCELLED


async def test_a_hundred_submits_at_once_keep_to_the_quota(tmp_path: Path) -> None:
    box = Box(tmp_path, waiting_quota=WaitingQuota(user=7))
    await box.open()
    await box.loop.recover()
    made = await asyncio.gather(*(box.service.submit(ALICE, SPEC) for _ in range(100)), return_exceptions=True)
    assert [type(answer) for answer in made].count(TooMany) == 93
    assert len(waiting_ids(box)) == 7
    await box.submit(who=BOB)
    await box.close()


async def test_a_share_larger_than_any_gpu_is_refused(gpu_box: Box) -> None:
    with pytest.raises(Impossible, match="asks 50000 MiB of one GPU's memory; the largest here has 49140 MiB"):
        await gpu_box.submit(gpu_mem_mib=50_000)


# Reservations, faults, usage, notices


async def test_reservations_are_made_by_admins_and_never_overlap_on_a_gpu(gpu_box: Box) -> None:
    service, now = gpu_box.service, time.time()
    window = {"name": "friday", "gpu_uuids": [UUID], "starts_at": now + 100, "ends_at": now + 200}
    for who in (ALICE, replace(ADMIN, job_id=3)):
        with pytest.raises(Denied):
            await service.reserve(who, **window)
    made = await service.reserve(ADMIN, **window, for_user="bob")
    assert (made.id, made.for_user, made.made_by, made.gpu_uuids) == (1, "bob", "ann", (UUID,))
    with pytest.raises(Conflict, match=r"reservation 1 \(friday\) has GPU-0.* from .* UTC to .* UTC"):
        await service.reserve(ADMIN, **window | {"starts_at": now + 150, "ends_at": now + 500})
    later = await service.reserve(ADMIN, **window | {"starts_at": now + 200, "ends_at": now + 300})
    assert await service.reservations(BOB) == [made, later]
    with pytest.raises(Denied):
        await service.cancel_reservation(BOB, made.id)
    assert await service.cancel_reservation(ADMIN, made.id) == made
    assert await service.cancel_reservation(ADMIN, made.id) == made
    assert await service.reservations(BOB) == [later]
    assert await service.reserve(ADMIN, **window) == replace(made, id=3, for_user=None)
    with pytest.raises(NotFound, match="there is no reservation 9"):
        await service.cancel_reservation(ADMIN, 9)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"gpu_uuids": ["GPU-x"]}, "gpu_uuids"),
        ({"gpu_uuids": []}, "gpu_uuids"),
        ({"starts_at": 5.0, "ends_at": 6.0}, "ends_at"),
        ({"starts_at": 9e9, "ends_at": 8e9}, "ends_at"),
    ],
)
async def test_a_reservation_of_nothing_is_refused(gpu_box: Box, change: dict[str, object], field: str) -> None:
    window = {"name": "n", "gpu_uuids": [UUID], "starts_at": 0.0, "ends_at": 9e9} | change
    with pytest.raises(Invalid) as refused:
        await gpu_box.service.reserve(ADMIN, **window)
    assert [error.field for error in refused.value.errors] == [field]


async def test_a_gpu_that_is_resumed_begins_with_a_clean_record(gpu_box: Box) -> None:
    fault = GpuFault(gpu_uuid=UUID, at=5.0, source="xid", code=79, cause="it fell off the bus", uid=1001)
    await gpu_box.database.write(gpu_queries.add_fault, fault)
    assert await gpu_box.database.read(gpu_queries.open_faults) == {UUID: [replace(fault, id=1)]}
    await gpu_box.service.resume(ADMIN, UUID)
    assert await gpu_box.database.read(gpu_queries.open_faults) == {}


async def test_everybody_sees_what_was_used_and_by_whom(box: Box) -> None:
    before = time.time()
    job = await box.submit()
    await box.ended(job.id)
    report = await box.service.usage(BOB, before - 1, time.time() + 1)
    assert [(line.name, line.jobs) for line in report.users] == [("alice", 1)]
    assert report.total.wait_mean_s is not None
    with pytest.raises(Denied):
        await box.service.usage(replace(ALICE, job_id=job.id), 0, 1)


async def test_notices_are_ones_own_and_sent_once(quiet: Box) -> None:
    mine = Notice(user="alice", uid=1001, at=1.0, kind="end", text="job 1 ended", addresses=("a@example.org",))
    shown = replace(mine, text="job 2 began", addresses=())
    await quiet.database.write(notices.add, [mine, shown, replace(mine, user="bob", uid=1002)])
    assert await quiet.service.notices(ALICE) == [replace(shown, id=2), replace(mine, id=1)]
    assert [one.id for one in await quiet.database.read(notices.unsent)] == [1, 3]
    await quiet.database.write(notices.mark_sent, 1, now=9.0, failure="no such host")
    assert [one.id for one in await quiet.database.read(notices.unsent)] == [3]
    assert (await quiet.service.notices(ALICE))[1] == replace(mine, id=1, sent_at=9.0, failure="no such host")
    with pytest.raises(Denied):
        await quiet.service.notices(replace(ALICE, job_id=1))


# Adoption

OWNER = person("me", os.getuid())


@pytest.fixture
async def foreign(tmp_path: Path) -> AsyncIterator[tuple[Box, int]]:
    """A box on whose GPU a process computes that mlbox did not start, and its pid."""
    process = await asyncio.create_subprocess_exec("sleep", "60")
    hardware = StandIn(tmp_path)
    hardware.show(
        FakeGpu(uuid=UUID, used=642, compute=[(process.pid, 642)]), FakeGpu(uuid="GPU-2", bus="00000000:02:00.0")
    )
    made = Box(tmp_path, hardware=hardware)
    await made.open()
    await made.loop.recover()
    yield made, process.pid
    await made.close()
    process.kill()
    await process.wait()


async def test_a_process_is_adopted_by_its_owner_and_holds_its_gpu(foreign: tuple[Box, int]) -> None:
    box, pid = foreign
    job = await box.service.adopt(OWNER, UUID, pid=pid, name="mine", project="p", time_limit_s=60.0)
    assert (job.state, job.adopted, job.user, job.uid) == (JobState.STARTING, True, "me", os.getuid())
    assert (job.spec.gpus, job.gpu_uuids, job.spec.project, job.spec.time_limit_s) == (1, (UUID,), "p", 60.0)
    (attempt,) = await box.service.attempts(OWNER, job.id)
    assert attempt.adopts is not None
    assert (attempt.adopts[0], attempt.charge_rate) == (pid, 1.0)
    assert [lease.job_id for lease in await box.database.read(queue.live_leases)] == [job.id]
    with pytest.raises(Conflict, match="is leased to a job"):
        await box.service.adopt(OWNER, UUID, pid=pid, name="again")


async def test_only_the_owner_or_an_admin_adopts(foreign: tuple[Box, int]) -> None:
    box, pid = foreign
    stranger = person("eve", os.getuid() + 1)
    with pytest.raises(Denied, match="only its owner or an admin"):
        await box.service.adopt(stranger, UUID, pid=pid, name="n")
    with pytest.raises(Denied, match="token of job 4 cannot adopt"):
        await box.service.adopt(replace(OWNER, job_id=4), UUID, pid=pid, name="n")
    with pytest.raises(NotFound, match="no process 1 computes on GPU 0"):
        await box.service.adopt(OWNER, UUID, pid=1, name="n")
    with pytest.raises(NotFound, match="computes on GPU 1"):
        await box.service.adopt(OWNER, "GPU-2", pid=pid, name="n")
    job = await box.service.adopt(person("root", os.getuid() + 2, Role.ADMIN), UUID, pid=pid, name="n")
    assert job.uid == os.getuid()


async def test_a_jobs_own_process_is_not_adopted(foreign: tuple[Box, int]) -> None:
    box, _ = foreign
    process = await asyncio.create_subprocess_exec("sleep", "60", env={**os.environ, "MLBOX_ATTEMPT_KEY": "0" * 32})
    assert box.hardware is not None
    box.hardware.show(FakeGpu(uuid=UUID, used=642, compute=[(process.pid, 642)]))

    def shown() -> bool:
        return any(one.pid == process.pid for gpu in box.gpus.current().gpus for one in gpu.processes or ())

    await eventually("the new process is shown", shown)
    with pytest.raises(Conflict, match="is a job's already"):
        await box.service.adopt(OWNER, UUID, pid=process.pid, name="n")
    process.kill()
    await process.wait()


# Retention


async def filled(box: Box, kib: int, **fields: object) -> int:
    """An ended job that left so much."""
    job = await box.submit(f"head -c {kib}k /dev/urandom > $MLBOX_OUT/left", **fields)
    await box.ended(job.id)
    return job.id


async def test_files_go_by_age_and_by_size_the_oldest_first(box: Box) -> None:
    jobs = [await filled(box, 400) for _ in range(4)]
    now = time.time()
    assert await box.service.prune(now, keep_days=1, keep_bytes=None) == []
    assert await box.service.prune(now, keep_days=None, keep_bytes=1_000 << 10) == jobs[:2]
    assert [(await box.job(job_id)).files_removed for job_id in jobs] == [True, True, False, False]
    assert [box.folders.job(job_id).exists() for job_id in jobs] == [False, False, True, True]
    assert await box.service.prune(now + 2 * 86_400, keep_days=1, keep_bytes=None) == jobs[2:]
    assert (await box.job(jobs[3])).state is JobState.SUCCEEDED


async def test_what_a_model_is_still_to_be_made_of_stays(box: Box) -> None:
    job_id = await filled(box, 4, who=person("dora", 1004, Role.DEPLOYER), model="digits")
    assert await box.service.prune(time.time(), keep_days=0, keep_bytes=0) == []
    await box.database.write(
        lambda connection: (
            connection.execute(
                "INSERT INTO model_versions (model, version, job_id, by_user, requested_at, deployed_at) "
                "VALUES ('digits', 1, ?, 'dora', 1, 2)",
                (job_id,),
            ).rowcount
        )
    )
    assert await box.service.prune(time.time(), keep_days=0, keep_bytes=0) == [job_id]


async def test_files_that_cannot_be_removed_hold_up_no_others(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [await filled(box, 4 + 400 * (not number)) for number in range(2)]
    remove = box.folders.remove

    def refuse(job_id: int) -> None:
        if job_id == jobs[0]:
            raise Conflict("job 1 left files that mlbox may not remove")
        remove(job_id)

    monkeypatch.setattr(box.folders, "remove", refuse)
    assert await box.service.prune(time.time(), keep_days=None, keep_bytes=100 << 10) == []
    assert await box.service.prune(time.time() + 1, keep_days=0, keep_bytes=None) == jobs[1:]
    assert not (await box.job(jobs[0])).files_removed
