"""Who gives way to whom, as `decide` sees it."""

from collections import Counter

from mlbox.scheduler import policy
from mlbox.scheduler.backfill import decide
from mlbox.scheduler.backlog import Backlog
from mlbox.scheduler.placement import view
from mlbox.scheduler.policy import Ledger, Rules, RunningJob, WaitingJob

NOW = 10_000.0


def test_a_job_is_stopped_for_one_other_only() -> None:
    # GPU 1 comes free before the victim's grace is over, so the first job is planned there, and not on GPU 0.
    running = [
        RunningJob(id=1, user="ann", priority=0, started_at=0.0, gpu_uuids=("GPU-0",), preemptible=True, rate=1.0),
        RunningJob(id=2, user="bob", priority=9, started_at=0.0, gpu_uuids=("GPU-1",), time_limit_s=NOW + 1, rate=1.0),
        RunningJob(id=9, user="bob", priority=9, started_at=0.0, gpu_uuids=("GPU-2",), preemptible=True, rate=1.0),
    ]
    box = view([("GPU-0", 0, None), ("GPU-1", 1, None), ("GPU-2", 2, None)], 1, 0)
    backlog = Backlog()
    for number in (3, 4):
        job = WaitingJob(id=number, uid=0, user="cid", priority=5, submitted_at=0.0, gpus=1, slots=0, time_limit_s=60.0)
        backlog.put(job, NOW)
    standing = policy.standing(Ledger(1e6), running, backlog.users, Rules(), NOW)

    plan = decide(backlog, running, box, standing, Rules(), NOW)

    assert Counter(one.job_id for one in plan.preemptions) == {1: 1}
