"""Every waiting job gets one true sentence that says why."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from mlbox.jobs import After, Dependency
from mlbox.scheduler.backfill import Plan
from mlbox.scheduler.explain import Around, clock, explain
from mlbox.scheduler.placement import Box
from mlbox.scheduler.policy import Quota, Rules, RunningJob, WaitingJob, barred
from tests.scheduler.queues import FOREIGN, MINUTE, NOW, Case, box, cases, gpu, running, waiting, window


def why(job: WaitingJob, case: Case, plan: Plan | None = None, *, depends_on: Sequence[Dependency] = ()) -> str:
    backlog, at = case.backlog, case.standing
    line = backlog.gpu_line if job.wants_gpu else backlog.slot_line
    around = Around(
        box=case.box,
        plan=plan or case.decide(),
        rules=case.rules,
        ahead=line.ahead(job, at, case.rules.weights, NOW),
        now=NOW,
        capped=backlog.is_capped(job),
        depends_on=depends_on,
    )
    return explain(job, around)


def after_starts(case: Case, plan: Plan) -> Case:
    """The box and its queue once the jobs that start have started."""
    jobs = {job.id: job for job in case.queue}
    held = {uuid for job in case.running if job.gpu_mem_mib is None for uuid in job.gpu_uuids}
    free = {
        view.uuid: replace(view, busy=view.busy or "leased") if view.closed or view.uuid in held else view
        for view in case.box.gpus
    }
    holders = list(case.running)
    for start in plan.starts:
        job = jobs.pop(start.job_id)
        holders.append(
            RunningJob(
                id=job.id, user=job.user, project=job.project, priority=job.priority, started_at=NOW,
                gpu_uuids=start.gpu_uuids, gpu_mem_mib=start.memory_mib, slots=job.slots,
                time_limit_s=job.time_limit_s, preemptible=job.preemptible, backfilled=start.backfilled,
                array_id=job.array_id,
            )
        )  # fmt: skip
        for uuid in start.gpu_uuids:
            view = free[uuid]
            if start.memory_mib is None:
                free[uuid] = replace(view, busy=f"leased by job {job.id}")
            else:
                left = view.memory_mib if view.shared_free_mib is None else view.shared_free_mib
                free[uuid] = replace(view, shared_free_mib=(left or 0) - start.memory_mib)
    stopped = {one.job_id for one in plan.preemptions}
    holders = [replace(one, stopping=one.stopping or one.id in stopped) for one in holders]
    slots = max(0, case.box.slots - sum(one.slots for one in holders))
    return replace(
        case,
        box=replace(case.box, gpus=tuple(free.values()), slots_free=slots),
        queue=list(jobs.values()),
        running=holders,
    )


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([None, -30, 30]))
def test_every_waiting_job_has_a_true_reason_of_one_sentence(case: Case, not_before: int | None) -> None:
    if not_before is not None:
        first, *others = case.queue
        case = replace(case, queue=[replace(first, not_before=NOW + not_before * MINUTE), *others])
    case = after_starts(case, case.decide())
    plan = case.decide()
    starting = {start.job_id for start in plan.starts}
    for job in case.queue:
        said = why(job, case, plan)
        assert said == said.strip()
        assert said.isprintable()
        assert len(said) > 10
        assert not said.endswith(".")
        assert ". " not in said
        if job.id not in starting:
            assert "about to start" not in said
        if barred(job, NOW):
            assert said == barred(job, NOW)


def test_what_is_needed_what_is_there_and_who_has_it_is_said() -> None:
    full = box([gpu(0, "leased by job 9"), gpu(1, FOREIGN)])
    case = Case(box=full, queue=[waiting(1, ago=3), waiting(2, ago=2), waiting(3, ago=1, gpus=2)])
    assert why(case.queue[0], case) == (
        "it needs 1 GPU, none is free of 2: GPU 0: leased by job 9; GPU 1: bob's python (pid 7) holds 642 MiB"
    )
    assert why(case.queue[1], case) == "1 job before it waits for GPUs, first job 1"
    assert why(case.queue[2], case) == "2 jobs before it wait for GPUs, first job 1"
    cpu = Case(box=replace(box(0), slots_free=0), queue=[waiting(4, slots=1)], running=[running(9, slots=4)])
    assert why(cpu.queue[0], cpu) == "it needs 1 CPU slot, none is free of 4"
    none = Case(box=box(0), queue=[waiting(7)])
    assert why(none.queue[0], none) == "it needs 1 GPU, and this box shows none now"


def blocked(behind: WaitingJob, **more: object) -> tuple[Case, WaitingJob]:
    """Job 1 wants both GPUs, one of which is held for 10 more minutes by job 9; `behind` waits behind it."""
    wide = waiting(1, gpus=2, priority=1, limit=30)
    holders = [running(9, [0], limit=10)]
    seen = box([gpu(0, "leased by job 9"), gpu(1)], **more)  # pyright: ignore[reportArgumentType]
    return Case(box=seen, queue=[wide, behind], running=holders), behind


def test_whom_a_job_would_delay_is_said_and_until_when() -> None:
    case, job = blocked(waiting(2, limit=20))
    assert why(job, case) == "it would delay job 1, which is to start at 08:10 UTC on the same GPUs"
    case, job = blocked(waiting(2))
    assert why(job, case) == (
        "it has no time limit, so it could delay job 1, which is to start at 08:10 UTC: "
        "one with a limit may go before it"
    )
    assert why(case.queue[0], case) == (
        "it needs 2 GPUs, 1 is free of 2: GPU 0: leased by job 9; by time limits it is planned for 08:10 UTC"
    )


def test_for_whom_a_gpu_is_kept_is_said() -> None:
    def kept(user: str | None) -> str:
        case = Case(box=box(1, windows=[window([0], 10, 20, user=user)]), queue=[waiting(1, limit=15)])
        return why(case.queue[0], case)

    assert kept("bob") == "GPU 0 is kept for bob from 08:10 to 08:20 UTC (w)"
    assert kept(None) == "GPU 0 is kept for maintenance from 08:10 to 08:20 UTC (w)"


def test_a_quota_is_said_to_every_job_that_it_keeps() -> None:
    rules = Rules(user_quotas={"ann": Quota(gpus=1)})
    case = Case(box=box(4), queue=[waiting(n) for n in (1, 2, 3)], running=[running(9, [0], user="ann")], rules=rules)
    for job in case.queue:
        assert why(job, case) == "ann holds 1 of the 1 GPUs allowed at once, and this job needs 1"
    rules = Rules(project_quotas={"vision": Quota(gpu_hours=5)})
    case = Case(box=box(1), queue=[waiting(1, project="vision")], rules=rules, hours={"@vision": 5.25})
    assert why(case.queue[0], case) == "project vision has used 5.2 of 5 GPU-hours allowed in 7 days"


def test_what_else_keeps_a_job_is_said_before_what_it_needs() -> None:
    case = Case(box=box(1), queue=[waiting(n, array_id=1, array_at_once=1) for n in (1, 2)])
    assert why(case.queue[1], case) == "of its array no more than 1 may run at once"
    held = Case(box=box(1), queue=[waiting(1, hold=True)])
    assert why(held.queue[0], held) == "it is held: release it when it may start"
    child = waiting(9, depends=True)
    parents = [
        Dependency(job_id=1),
        Dependency(job_id=2, after=After.ANY),
        Dependency(job_id=3, after=After.NOT_OK),
        Dependency(job_id=4),
    ]
    case = Case(box=box(1), queue=[child])
    assert why(child, case, depends_on=parents) == (
        "it waits for job 1 to succeed and job 2 to end and job 3 to fail and 1 more"
    )
    assert why(child, case) == "it waits for the end of the jobs that it depends on"


def test_a_share_is_told_what_is_left() -> None:
    full: Box = box([gpu(0, shared_free_mib=10), gpu(1, FOREIGN)])
    holders = [running(9, [0], gpu_mem_mib=90)]
    case = Case(box=full, queue=[waiting(1, gpu_mem_mib=50)], running=holders)
    assert why(case.queue[0], case) == (
        "it needs 50 MiB of one GPU: GPU 0: 10 MiB left for shares; GPU 1: bob's python (pid 7) holds 642 MiB"
    )


def test_a_time_is_shown_with_its_date_where_it_is_not_today() -> None:
    assert clock(NOW + 600, NOW) == "08:10"
    assert clock(NOW + 86_400, NOW) == "2027-01-16 08:00"


def test_a_share_is_told_whom_it_would_delay_and_that_a_size_is_unknown() -> None:
    case, job = blocked(waiting(2, gpu_mem_mib=50, limit=20))
    assert why(job, case) == "it would delay job 1, which is to start at 08:10 UTC on the same GPUs"
    kept = Case(box=box(1, windows=[window([0], 10, 20)]), queue=[waiting(1, gpu_mem_mib=50)])
    assert why(kept.queue[0], kept) == "GPU 0 is kept for maintenance from 08:10 to 08:20 UTC (w)"
    unknown = Case(box=box([gpu(0, memory_mib=None)]), queue=[waiting(1, gpu_mem_mib=50)])
    assert why(unknown.queue[0], unknown) == ("it needs 50 MiB of one GPU, and no GPU here is known to have so much")


def test_slices_are_not_counted_for_a_job_on_several_gpus() -> None:
    mixed = Case(box=box([gpu(0, slice=True), gpu(1, slice=True), gpu(2)]), queue=[waiting(1, gpus=2)])
    assert why(mixed.queue[0], mixed) == "it needs 2 GPUs, 1 is free of 1"
    slices = Case(box=box([gpu(0, slice=True), gpu(1, slice=True)]), queue=[waiting(1, gpus=2)])
    assert why(slices.queue[0], slices) == (
        "it needs 2 GPUs, and this box shows none now but MIG devices, of which a job gets one"
    )
