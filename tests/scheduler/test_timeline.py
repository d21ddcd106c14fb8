"""The picture of GPUs x time, made of what others decided."""

from mlbox.scheduler import timeline
from mlbox.scheduler.forecast import Bar as Planned
from mlbox.scheduler.forecast import Forecast
from mlbox.scheduler.gpu_state import Gpu, GpuProcess, GpuState
from mlbox.scheduler.history import History
from mlbox.scheduler.placement import Reservation
from mlbox.scheduler.policy import RunningJob
from mlbox.scheduler.rows import Held
from mlbox.scheduler.state import GpuReport
from mlbox.scheduler.timeline import Bar, Scene, Timeline

NOW = 1_800_000_000.0
HOUR = 3600.0


def report(index: int, state: GpuState = GpuState.FREE, why: str = "", *processes: GpuProcess) -> GpuReport:
    gpu = Gpu(uuid=f"GPU-{index}", index=index, name="x", bus_id=str(index), processes=processes)
    return GpuReport(gpu=gpu, state=state, why=why, job_ids=())


def drawn(**parts: object) -> Timeline:
    """The timeline of a box with two free GPUs, other than `parts` say."""
    scene: dict[str, object] = {
        "gpus": [report(0), report(1)], "past": [], "running": [], "forecast": Forecast(), "history": History(),
        "reservations": [], "names": {}, "now": NOW,
    }  # fmt: skip
    return timeline.timeline(Scene(**(scene | parts)))  # type: ignore[arg-type]  # the tests name the parts


def bars(plan: Timeline) -> list[list[Bar]]:
    return [list(lane.bars) for lane in plan.lanes]


def test_an_idle_box_shows_empty_lanes_and_an_hour_back_for_two_ahead() -> None:
    plan = drawn()
    assert bars(plan) == [[], []]
    assert (plan.now - plan.starts_at, plan.ends_at - plan.now) == (1 * HOUR, 2 * HOUR)


def test_a_running_job_ends_when_such_jobs_do_or_at_its_limit_or_nobody_knows() -> None:
    job = RunningJob(id=1, user="a", priority=0, started_at=NOW - HOUR, gpu_uuids=("GPU-0", "GPU-1"), kind="train.py")
    limited = RunningJob(id=1, user="a", priority=0, started_at=NOW - HOUR, gpu_uuids=("GPU-0",), time_limit_s=5 * HOUR)
    learned = History()
    for _ in range(5):
        learned.add("a", "default", "train.py", 3 * HOUR)
    assert [lane[0].ends_at for lane in bars(drawn(running=[job], history=learned))] == [NOW + 2 * HOUR] * 2
    assert bars(drawn(running=[limited]))[0][0].ends_at == NOW + 4 * HOUR
    assert bars(drawn(running=[job]))[0][0].ends_at is None


def test_what_is_planned_is_what_waits_not_what_has_begun_meanwhile() -> None:
    planned = tuple(Planned(job_id=number, user="a", gpus=(1,), start=NOW - 5, end=NOW + HOUR) for number in (1, 2, 3))
    running = [RunningJob(id=1, user="a", priority=0, started_at=NOW, gpu_uuids=("GPU-1",))]
    plan = drawn(forecast=Forecast(bars=planned), running=running, names={1: "one", 2: "two"})
    assert [(bar.kind, bar.job_id, bar.name) for bar in bars(plan)[1]] == [("running", 1, "one"), ("planned", 2, "two")]
    assert bars(plan)[1][1].starts_at == NOW


def test_the_past_and_what_keeps_jobs_off_have_their_bars() -> None:
    held = Held(job_id=9, user="b", name="old", gpu_uuids=("GPU-0", "GPU-gone"), started_at=NOW - 60, ended_at=NOW - 30)
    kept = Reservation(id=1, name="friday", gpu_uuids=("GPU-1",), starts_at=NOW, ends_at=NOW + HOUR, for_user="bob")
    foreign = GpuProcess(pid=7, kind="C", user="dave", command="python x.py", started_at=NOW - 100)
    drawing = GpuProcess(pid=8, kind="G", user="dave", command="Xorg")
    gpus = [report(0, GpuState.DRAINED, "is drained: dust"), report(1, GpuState.FOREIGN, "", foreign, drawing)]
    first, second = bars(drawn(gpus=gpus, past=[held], reservations=[kept]))
    assert [(bar.kind, bar.name, bar.ends_at) for bar in first] == [
        ("past", "old", NOW - 30), ("drained", "is drained: dust", None),
    ]  # fmt: skip
    assert [(bar.kind, bar.name, bar.user) for bar in second] == [
        ("reserved", "friday (bob)", None), ("foreign", "python x.py", "dave"),
    ]  # fmt: skip


def test_no_plan_is_so_long_that_the_next_hour_cannot_be_seen() -> None:
    far = Planned(job_id=2, user="a", gpus=(0,), start=NOW, end=NOW + 1000 * HOUR)
    plan = drawn(forecast=Forecast(bars=(far,)), names={2: "long"})
    assert (plan.now - plan.starts_at, plan.ends_at - plan.now) == (24 * HOUR, 48 * HOUR)
