"""Several people on one box, with real processes: who goes first, who gives way, who waits for whom."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mlbox.jobs import ArraySpec, Dependency, Element, Job, JobSpec, JobState, Reason
from mlbox.scheduler.policy import Quota, Rules
from tests.nvml.standin import FakeGpu, StandIn
from tests.scheduler.box import ADMIN, ALICE, BOB, Box, eventually

pytestmark = pytest.mark.slow

UUIDS = [f"GPU-0000000{n}-1111-2222-3333-444444444444" for n in range(4)]
RULES = Rules(min_run_s=0.0, grace_s=5.0, user_quotas={"alice": Quota(gpus=2)})


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    made = await Box(tmp_path, rules=Rules(min_run_s=0.0)).start()
    yield made
    await made.close()


@pytest.fixture
async def gpu_box(tmp_path: Path) -> AsyncIterator[Box]:
    hardware = StandIn(tmp_path)
    hardware.show(*(FakeGpu(uuid=uuid) for uuid in UUIDS))
    made = await Box(tmp_path, hardware=hardware, rules=RULES).start()
    yield made
    await made.close()


def until(gate: Path) -> str:
    return f"until [ -e {gate} ]; do sleep 0.02; done"


async def in_state(box: Box, jobs: list[Job], state: JobState) -> list[int]:
    return [job.id for job in jobs if (await box.job(job.id)).state is state]


async def test_who_used_the_box_waits_for_who_did_not(box: Box, tmp_path: Path) -> None:
    gates = [tmp_path / f"gate{n}" for n in range(8)]
    alices = [await box.submit(until(gate), who=ALICE) for gate in gates[:6]]
    for job in alices[:2]:
        await box.until(job.id, JobState.RUNNING)
    bobs = [await box.submit(until(gate), who=BOB) for gate in gates[6:]]
    assert [job.id for job in await box.service.queue(ADMIN, 10)][:2] == [job.id for job in bobs]
    rank = await box.service.rank(BOB, bobs[0].id)
    assert (rank.position, rank.fair_share) == (1, 1.0)
    assert (await box.service.rank(ALICE, alices[2].id)).fair_share < 0.5
    for gate in gates[:2]:
        gate.touch()
    for job in bobs:
        await box.until(job.id, JobState.RUNNING)
    assert await in_state(box, alices[2:], JobState.QUEUED) == [job.id for job in alices[2:]]
    for gate in gates:
        gate.touch()
    for job in (*alices, *bobs):
        assert (await box.ended(job.id)).state is JobState.SUCCEEDED


async def test_a_restart_forgets_nobodys_usage(box: Box) -> None:
    job = await box.submit("sleep 0.3", who=ALICE, cpus=2)
    await box.ended(job.id)
    now = time.time()
    before = box.scheduled.ledger.used("alice", now)
    await box.restart()
    assert before > 0
    assert box.scheduled.ledger.used("alice", now) == pytest.approx(before, rel=1e-6)


async def test_a_user_never_holds_more_gpus_than_the_quota_and_others_are_not_kept_by_it(gpu_box: Box) -> None:
    array = ArraySpec(elements=tuple(Element(index=index) for index in range(10)), at_once=3)
    spec = JobSpec(command="sleep 1000", name="sweep", gpus=1)
    first, _ = await gpu_box.service.submit(ALICE, spec, array=array)
    elements = [await gpu_box.job(first.id + n) for n in range(10)]

    async def running() -> list[int]:
        return await in_state(gpu_box, elements, JobState.RUNNING)

    await eventually("two of her jobs run", lambda: len(gpu_box.scheduled.active) == 2)
    bob = await gpu_box.submit("sleep 1000", who=BOB, gpus=2)
    await gpu_box.until(bob.id, JobState.RUNNING)
    assert len(await eventually("hers run", running)) == 2
    pending = gpu_box.service.pending(elements[2])
    assert pending is not None
    assert "alice holds 2 of the 2 GPUs allowed" in pending.why
    await gpu_box.service.cancel_array(ALICE, first.id)
    for element in elements:
        assert (await gpu_box.ended(element.id)).state is JobState.CANCELLED


async def test_a_higher_priority_takes_the_gpus_of_a_preemptible_job_which_comes_back(
    gpu_box: Box, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    low = await gpu_box.submit(f"echo try $MLBOX_ATTEMPT; {until(gate)}", who=BOB, gpus=4, preemptible=True, retries=1)
    await gpu_box.until(low.id, JobState.RUNNING)
    high = await gpu_box.submit("echo $CUDA_VISIBLE_DEVICES", who=ADMIN, gpus=3, priority=5)
    assert (await gpu_box.ended(high.id)).state is JobState.SUCCEEDED
    await eventually("it runs again", lambda: gpu_box.attempt(low.id, 2).exists())
    gate.touch()
    ended = await gpu_box.ended(low.id)
    assert (ended.state, ended.attempt, ended.submitted_at) == (JobState.SUCCEEDED, 2, low.submitted_at)
    first, _ = await gpu_box.service.attempts(BOB, low.id)
    assert (first.reason, f"it gave way to job {high.id}" in (first.cause or "")) == (Reason.PREEMPTED, True)


async def test_nobody_is_stopped_for_an_equal_or_where_it_would_not_help(gpu_box: Box) -> None:
    low = await gpu_box.submit("sleep 1000", who=BOB, gpus=2, preemptible=True)
    firm = await gpu_box.submit("sleep 1000", who=BOB, gpus=2)
    for job in (low, firm):
        await gpu_box.until(job.id, JobState.RUNNING)
    equal = await gpu_box.submit(who=ADMIN, gpus=2)
    wide = await gpu_box.submit(who=ADMIN, gpus=3, priority=9)
    await asyncio.sleep(0.3)
    assert await in_state(gpu_box, [low, firm], JobState.RUNNING) == [low.id, firm.id]
    for job in (equal, wide):
        await gpu_box.service.cancel(ADMIN, job.id)


async def test_shares_of_a_gpu_run_side_by_side_and_the_rest_waits(gpu_box: Box, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    jobs = [await gpu_box.submit(until(gate), who=BOB, gpu_mem_mib=20_000) for _ in range(9)]

    async def running() -> bool:
        return len(await in_state(gpu_box, jobs, JobState.RUNNING)) == 8

    await eventually("two on each of four GPUs", running)
    held = [(await gpu_box.job(job.id)).gpu_uuids for job in jobs[:8]]
    assert sorted(uuid for (uuid,) in held) == sorted(UUIDS * 2)
    assert "it needs 20000 MiB of one GPU" in (gpu_box.service.pending(jobs[8]) or jobs).why  # type: ignore[union-attr]
    gate.touch()
    for job in jobs:
        assert (await gpu_box.ended(job.id)).state is JobState.SUCCEEDED


async def test_estimates_follow_the_queue_and_say_what_fewer_gpus_would_bring(gpu_box: Box) -> None:
    for gpus, limit in ((1, 7200.0), (1, 2400.0), (2, 3600.0)):
        running = await gpu_box.submit("sleep 1000", who=BOB, gpus=gpus, time_limit_s=limit)
        await gpu_box.until(running.id, JobState.RUNNING)
    wide = await gpu_box.submit(who=BOB, gpus=4, time_limit_s=60.0)
    later = [await gpu_box.submit(who=BOB, gpus=1, time_limit_s=60.0) for _ in range(3)]

    def estimated() -> bool:
        found = [gpu_box.service.pending(job) for job in (wide, *later)]
        return all(one is not None and one.estimated_start is not None for one in found)

    await eventually("all of them have an estimate", estimated)
    pending = gpu_box.service.pending(wide)
    assert pending is not None
    assert pending.estimated_start == pytest.approx(time.time() + 7200, abs=60)
    assert (pending.estimated_start_p90 or 0) >= (pending.estimated_start or 0)
    fewer = await gpu_box.service.fewer_gpus(wide)
    assert fewer is not None
    assert (fewer.gpus, fewer.estimated_start) == (3, pytest.approx(time.time() + 3600, abs=60))
    narrow = gpu_box.service.pending(later[0])
    assert narrow is not None
    assert narrow.estimated_start == pytest.approx(time.time() + 2400, abs=60)


async def test_what_depends_on_a_failure_is_cancelled_at_once_and_the_rest_runs(box: Box) -> None:
    failing = await box.submit("exit 3", hold=True)
    good = await box.submit(depends_on=(Dependency(job_id=failing.id),))
    after = await box.submit(depends_on=(Dependency(job_id=good.id),))
    pending = box.service.pending(await box.job(good.id))
    assert pending is not None
    assert pending.why == f"it waits for job {failing.id} to succeed"
    await box.service.release(ALICE, failing.id)
    for job in (good, after):
        ended = await box.ended(job.id)
        assert (ended.state, ended.reason) == (JobState.CANCELLED, Reason.DEPENDENCY_FAILED)
