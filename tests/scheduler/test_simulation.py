"""The scheduler in virtual time: each scenario by the clock, and random traces in which nothing may go wrong."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlbox.scheduler import traces
from mlbox.scheduler.placement import Box, GpuView
from mlbox.scheduler.policy import Quota, Rules, RunningJob, WaitingJob
from mlbox.scheduler.simulation import Report, SimJob, Simulation

M = 60.0
HOUR_S = 3600.0


def gpus(count: int) -> list[dict[str, int]]:
    return [{"memory_mib": 81_920}] * count


def job(name: str | int, minutes: float, **asked: object) -> dict[str, Any]:
    """A job of a trace whose time limit, if `limit` is given, and submit are minutes."""
    limit, submit = asked.pop("limit", None), asked.pop("submit", 0)
    assert isinstance(submit, int | float)
    known: dict[str, Any] = {"id": name, "user": "ann", "duration": minutes * M, "submit": submit * M, **asked}
    if isinstance(limit, int | float):
        known["time_limit"] = limit * M
    return known


def replay(trace: Mapping[str, Any], **rules: Any) -> Report:
    return traces.replay(traces.loads(json.dumps(trace).encode()), Rules(**rules))


def moments(report: Report, event: str = "start") -> dict[str | int, float]:
    """The last time, in minutes, that something happened to each job."""
    return {one["job"]: one["t"] / M for one in report.events if one["event"] == event}


def places(report: Report) -> dict[str | int, list[int]]:
    return {one["job"]: one["gpus"] for one in report.events if one["event"] == "start"}


# The scenarios


def test_fair_order() -> None:
    report = replay(
        {
            "gpus": gpus(4),
            "jobs": [job(f"A{n}", 60, user="alice") for n in range(1, 9)]
            + [job(f"B{n}", 60, user="bob", submit=1) for n in (1, 2)],
        }
    )
    assert moments(report) == {
        **{f"A{n}": 0 for n in range(1, 5)},
        **dict.fromkeys(("B1", "B2", "A5", "A6"), 60),
        **dict.fromkeys(("A7", "A8"), 120),
    }
    assert report.summary["by_user"]["bob"]["jobs"] == 2
    assert report.summary["by_user"]["alice"]["gpu_hours"] == 8
    assert report.summary["makespan_s"] == 180 * M


def backfill(r1_minutes: float) -> Mapping[str, Any]:
    return {
        "gpus": gpus(4),
        "running": [
            {"id": "R1", "user": "x", "gpus": [0, 1], "duration": r1_minutes * M, "time_limit": 120 * M},
            {"id": "R2", "user": "x", "gpus": [2], "duration": 60 * M, "time_limit": 60 * M},
        ],
        "jobs": [
            job("H", 30, gpus=4, limit=30, priority=3),
            job("L1", 60, limit=60, priority=2),
            job("L2", 150, limit=150, priority=1),
            job("L3", 120, limit=120, priority=0),
        ],
    }


def test_backfill_by_time() -> None:
    assert moments(replay(backfill(120))) == {"L1": 0, "H": 120, "L2": 150, "L3": 150}


def test_backfill_by_time_when_a_job_ends_before_its_limit() -> None:
    assert moments(replay(backfill(80))) == {"L1": 0, "H": 80, "L2": 110, "L3": 110}


@pytest.mark.parametrize("limit", [None, 90])
def test_backfill_by_space(limit: float | None) -> None:
    """On a GPU that the blocked job does not need, anybody starts, even without a limit."""
    report = replay(
        {
            "gpus": gpus(4),
            "running": [{"id": "R", "user": "x", "gpus": [0, 1], "duration": 30 * M, "time_limit": 30 * M}],
            "jobs": [job("H", 10, gpus=3, limit=10, priority=1), job("L", 90, limit=limit), job("K", 90, limit=limit)],
        }
    )
    assert moments(report) == {"L": 0, "H": 30, "K": 40}


def test_no_starvation_under_an_endless_stream_without_limits() -> None:
    report = replay(
        {
            "gpus": gpus(4),
            "running": [{"id": f"R{n}", "user": "x", "gpus": [n], "duration": (10 + n) * M} for n in range(4)],
            "jobs": [job("H", 30, gpus=4, submit=0.01)]
            + [job(f"s{n}", 20, user="bob", submit=0.1 + n / 2) for n in range(100)],
        }
    )
    assert moments(report)["H"] == 13


def test_below_a_blocked_job_without_limits_only_preemptible_jobs_start_and_give_way() -> None:
    report = replay(
        {
            "gpus": gpus(2),
            "running": [{"id": "R", "user": "x", "gpus": [0], "duration": 60 * M}],
            "jobs": [
                job("H", 10, gpus=2),
                job("N", 10, submit=1),
                job("P", 600, submit=1, preemptible=True),
            ],
        }
    )
    first = [(one["event"], one["job"], one["t"] / M) for one in report.events]
    assert first[:4] == [("start", "P", 1), ("end", "R", 60), ("preempt", "P", 60), ("start", "H", 60)]
    assert moments(report)["N"] == moments(report)["P"] == 70


def preemption(*, started: float = -1000.0, priority: int = 5, preemptible: bool = True) -> Mapping[str, Any]:
    def run(name: str, on: Sequence[int]) -> dict[str, Any]:
        return {
            "id": name, "user": "x", "gpus": list(on), "started": started, "duration": 100 * M,
            "preemptible": preemptible,
        }  # fmt: skip

    return {
        "gpus": gpus(4),
        "running": [run("P0", [0]), run("P1", [1]), run("P2", [2, 3])],
        "jobs": [job("H", 10, submit=1, gpus=2, priority=priority)],
    }


def test_preemption_stops_the_fewest_and_the_victim_comes_back() -> None:
    report = replay(preemption())
    assert moments(report, "preempt") == {"P2": 1}
    assert moments(report)["H"] == 1
    assert moments(report)["P2"] == 11


def test_preemption_respects_the_minimum_run_time_and_comes_when_it_is_over() -> None:
    report = replay(preemption(started=0), min_run_s=300.0)
    assert moments(report, "preempt") == {"P2": 5}
    assert moments(report)["H"] == 5


@pytest.mark.parametrize("trace", [preemption(priority=0), preemption(preemptible=False)])
def test_nobody_is_preempted_for_an_equal_or_if_not_preemptible(trace: Mapping[str, Any]) -> None:
    assert moments(replay(trace), "preempt") == {}


def test_nobody_is_preempted_where_it_would_not_suffice() -> None:
    trace = {
        "gpus": gpus(2),
        "running": [
            {"id": "P", "user": "x", "gpus": [0], "started": -1000.0, "duration": 60 * M, "preemptible": True},
            {"id": "R", "user": "x", "gpus": [1], "started": -1000.0, "duration": 30 * M},
        ],
        "jobs": [job("H", 10, gpus=2, priority=5)],
    }
    report = replay(trace)
    assert moments(report, "preempt")["P"] == moments(report, "end")["R"]


@pytest.mark.parametrize("late", [0, 5])
def test_dependencies(late: float) -> None:
    """Also when those that depend come only after what they depend on has ended."""
    report = replay(
        {
            "gpus": gpus(4),
            "jobs": [
                job("A", 1, fails=True),
                job("B", 1, submit=late, depends_on=["afterok:A"]),
                job("C", 1, submit=late, depends_on=["B"]),
                job("D", 1, submit=late, depends_on=["afterany:A"]),
                job("E", 1, submit=late, depends_on=["afternotok:A"]),
            ],
        }
    )
    ended = max(1, late)
    assert moments(report, "cancel") == {"B": ended, "C": ended}
    assert moments(report) == {"A": 0, "D": ended, "E": ended}


def test_a_job_that_depends_on_one_job_twice_and_on_another_starts_when_both_have_ended() -> None:
    jobs = [job("A", 1), job("B", 2), job("C", 1, depends_on=["afterok:A", "afterany:A", "afterok:B"])]
    assert moments(replay({"gpus": gpus(4), "jobs": jobs}))["C"] == 2


def test_a_chain_of_thousands_ends_with_its_first() -> None:
    jobs = [job(0, 1, fails=True)] + [job(number, 1, depends_on=[number - 1]) for number in range(1, 3000)]
    report = replay({"gpus": gpus(1), "jobs": jobs})
    assert len(moments(report, "cancel")) == 2999


def test_arrays_and_quotas() -> None:
    """Alice may hold 2 GPUs: of her array exactly 2 run, and bob starts at once."""
    report = replay(
        {
            "gpus": gpus(4),
            "jobs": [job("a", 10, user="alice", array="0-9%3"), job("b", 10, user="bob", gpus=2)],
        },
        user_quotas={"alice": Quota(gpus=2)},
    )
    starts = moments(report)
    assert [starts[f"a_{n}"] for n in range(10)] == [0, 0, 10, 10, 20, 20, 30, 30, 40, 40]
    assert starts["b"] == 0


def test_an_array_keeps_to_its_cap() -> None:
    report = replay({"gpus": gpus(4), "jobs": [job("a", 10, array="0-5%3"), job("b", 5)]})
    starts = moments(report)
    assert [starts[f"a_{n}"] for n in range(6)] == [0, 0, 0, 10, 10, 10]
    assert starts["b"] == 0


def test_topology() -> None:
    links = [[0, 1, 4], [2, 3, 4], [4, 5, 4], [6, 7, 4]]
    jobs = [job("one", 1), job("two", 1, gpus=2), job("odd", 1), job("pair", 1, gpus=2), job("last", 1, gpus=2)]
    where = places(replay({"gpus": gpus(8), "links": links, "jobs": jobs}))
    assert {where["one"][0] // 2} == {where["odd"][0] // 2}, "the odd one out, rather than breaking a pair"
    for name in ("two", "pair", "last"):
        assert where[name][0] // 2 == where[name][1] // 2


def test_shares_fill_a_gpu_before_the_next_and_leave_whole_ones_to_whole_jobs() -> None:
    jobs = [job(n, 10, gpu_mem=30_000) for n in range(4)] + [job("whole", 10)]
    report = replay({"gpus": gpus(3), "jobs": jobs})
    assert places(report) == {0: [0], 1: [0], 2: [1], 3: [1], "whole": [2]}
    assert set(moments(report).values()) == {0}
    assert report.summary["gpu_busy_fraction"] == pytest.approx((4 * 30_000 / 81_920 + 1) / 3)


def test_usage_before_the_trace_counts() -> None:
    trace = {"gpus": gpus(1), "usage": {"ann": 10.0}, "jobs": [job("a", 1), job("b", 1, user="bob")]}
    assert moments(replay(trace)) == {"b": 0, "a": 1}


def test_larger_shares_come_sooner() -> None:
    trace = {
        "gpus": gpus(1),
        "usage": {"ann": 10.0, "bob": 9.0},
        "shares": {"ann": 3.0},
        "jobs": [job("b", 1, user="bob"), job("a", 1)],
    }
    assert moments(replay(trace)) == {"a": 0, "b": 1}


def test_a_job_is_stopped_at_its_limit_and_has_failed_also_when_it_ran_from_the_start() -> None:
    trace = {
        "gpus": gpus(2),
        "running": [{"id": "R", "user": "x", "gpus": [0], "started": -60.0, "duration": 999.0, "time_limit": 120.0}],
        "jobs": [job("L", 10, limit=2), job("afterR", 1, depends_on="R"), job("afterL", 1, depends_on="L")],
    }
    report = replay(trace)
    assert moments(report, "end") == {"R": 1, "L": 2}
    assert moments(report, "cancel") == {"afterR": 1, "afterL": 2}
    assert {one["why"] for one in report.events if one["event"] == "end"} == {"stopped at its time limit"}


def test_who_is_over_a_quota_of_hours_starts_when_they_have_left_its_window() -> None:
    trace = {"gpus": gpus(1), "jobs": [job("a", 60), job("b", 60, submit=1)]}
    starts = moments(replay(trace, user_quota=Quota(gpu_hours=0.5, window_s=2 * HOUR_S)))
    assert starts["a"] == 0
    assert starts["b"] == pytest.approx(150, abs=11)


def test_a_job_whose_quota_never_allows_it_is_named_as_never_started() -> None:
    report = replay({"gpus": gpus(4), "jobs": [job("wide", 1, gpus=3), job("b", 1)]}, user_quota=Quota(gpus=2))
    assert report.summary["never_started"] == ["wide"]
    assert moments(report) == {"b": 0}


def test_a_job_starts_no_sooner_than_it_may() -> None:
    assert moments(replay({"gpus": gpus(1), "jobs": [job("a", 1, not_before=600.0), job("b", 1)]})) == {"b": 0, "a": 10}


def test_the_summary_adds_up() -> None:
    report = replay({"gpus": gpus(1), "jobs": [job(n, 10, user=f"u{n % 2}") for n in range(4)]})
    assert report.summary["jobs"] == 4
    assert report.summary["makespan_s"] == 40 * M
    assert report.summary["gpu_busy_fraction"] == 1
    assert report.summary["wait_mean_s"] == 15 * M
    assert report.summary["wait_p95_s"] == 30 * M


# Whatever comes


@st.composite
def random_traces(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 4))
    minutes = st.integers(0, 20)
    running, free = [], list(range(count))
    while free and draw(st.booleans()):
        on = [free.pop() for _ in range(draw(st.integers(1, len(free))))]
        running.append(
            {
                "id": f"R{len(running)}",
                "user": "xen",
                "gpus": on,
                "started": -draw(minutes) * M,
                "duration": draw(minutes) * M,
                "time_limit": draw(st.none() | st.integers(1, 20).map(lambda n: n * M)),
                "priority": draw(st.integers(0, 2)),
                "preemptible": draw(st.booleans()),
            }
        )
    jobs: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 7))):
        asked = draw(st.sampled_from(["gpus", "gpus", "gpus", "gpu_mem", "cpus"]))
        size = {"gpus": draw(st.integers(1, count)), "gpu_mem": draw(st.integers(1000, 81_920)), "cpus": 1}[asked]
        earlier = [one["id"] for one in jobs]
        parents = draw(st.lists(st.sampled_from(earlier), max_size=2)) if earlier else []
        jobs.append(
            {
                "id": number,
                "user": draw(st.sampled_from(["ann", "bob", "cid"])),
                "submit": (jobs[-1]["submit"] if jobs else 0) + draw(st.sampled_from([0, 0, 1, 7])) * M,
                asked: size,
                **({"gpus": 0} if asked == "cpus" else {}),
                "duration": draw(minutes) * M,
                "time_limit": draw(st.none() | st.integers(1, 20).map(lambda n: n * M)),
                "priority": draw(st.sampled_from([0, 0, 1, 2])),
                "preemptible": draw(st.sampled_from([False, False, True])),
                "fails": draw(st.sampled_from([False, False, True])),
                "array": draw(st.sampled_from([None, None, None, "0-3%2", "0-2"])),
                "depends_on": [f"{draw(st.sampled_from(['afterok', 'afterany', 'afternotok']))}:{p}" for p in parents],
                "not_before": draw(st.sampled_from([None, None, None, 15 * M])),
            }
        )
    return {"gpus": gpus(count), "cpu_slots": 2, "running": running, "jobs": jobs}


NEXT = {
    None: {"start", "cancel"},
    "start": {"end", "preempt"},
    "preempt": {"start"},
    "end": set[str](),
    "cancel": set[str](),
}


def check_history(trace: Mapping[str, Any], report: Report) -> None:
    """Every job goes a legal way to an end, and at no time is a GPU given twice or a cap passed."""
    asked = {one["id"]: one for one in trace["jobs"]}
    sizes = {one["id"]: {"gpus": len(one["gpus"])} for one in trace["running"]}
    last: dict[Any, str | None] = {one["id"]: "start" for one in trace["running"]}
    holds: dict[Any, list[int]] = {one["id"]: sorted(one["gpus"]) for one in trace["running"]}
    ended: dict[Any, str] = {}
    now = 0.0
    for event in report.events:
        name, kind = event["job"], event["event"]
        line = sizes[name] if name in sizes else asked[int(str(name).partition("_")[0])]
        assert event["t"] >= now, "time goes forward"
        now = event["t"]
        assert kind in NEXT[last.get(name)], f"{name}: {kind} after {last.get(name)}"
        last[name] = kind
        assert now >= line.get("submit", 0)
        if kind == "start":
            assert now >= (line.get("not_before") or 0)
            assert len(event["gpus"]) == (1 if line.get("gpu_mem") else line.get("gpus", 1))
            holds[name] = event["gpus"]
        elif kind != "cancel":
            assert holds.pop(name) == event["gpus"], "it gives back what it got"
        if kind in ("end", "cancel"):
            ended[name] = event["why"]
        check_held(holds, asked)
    for name in (*asked, *(one["id"] for one in trace["running"])):
        many = 4 if asked.get(name, {}).get("array") == "0-3%2" else 3
        elements = [f"{name}_{n}" for n in range(many)] if asked.get(name, {}).get("array") else [name]
        assert all(element in ended for element in elements), f"{name} is stranded"
    assert not report.summary["never_started"]


def check_held(holds: Mapping[Any, Sequence[int]], asked: Mapping[Any, Mapping[str, Any]]) -> None:
    whole: list[int] = []
    shares: dict[int, int] = {}
    slots, array = 0, dict[int, int]()
    for name, on in holds.items():
        number = name if isinstance(name, int) else None if name[0] == "R" else int(name.partition("_")[0])
        line = {} if number is None else asked[number]
        if line.get("gpu_mem"):
            shares[on[0]] = shares.get(on[0], 0) + line["gpu_mem"]
        else:
            whole += on
        slots += not on
        if number is not None and line.get("array") == "0-3%2":
            array[number] = array.get(number, 0) + 1
    assert len(whole) == len(set(whole)), "no GPU is held twice"
    assert not shares.keys() & set(whole), "whole and shares are never mixed"
    assert max(shares.values(), default=0) <= 81_920
    assert slots <= 2
    assert max(array.values(), default=0) <= 2


@settings(max_examples=300, deadline=None)
@given(random_traces(), st.integers(1, 8))
def test_every_trace_runs_to_its_end_by_the_rules(trace: dict[str, Any], reservations: int) -> None:
    check_history(trace, replay(trace, reservations=reservations))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_wide_job_starts_in_bounded_time_under_any_stream_of_small_ones(data: st.DataObject) -> None:
    """What runs when it comes ends by itself; until the last without a limit has, others may start by theirs."""
    count = data.draw(st.integers(2, 4))
    longest = 20
    small = [
        job(
            f"s{number}",
            data.draw(st.integers(1, longest)),
            user=data.draw(st.sampled_from(["bob", "cid"])),
            submit=number / 2,
            limit=data.draw(st.sampled_from([None, longest])),
            preemptible=data.draw(st.booleans()),
        )
        for number in range(60)
    ]
    wide = job("wide", 1, submit=3.25, gpus=count)
    report = replay({"gpus": gpus(count), "jobs": [*small, wide]})
    assert moments(report)["wide"] <= 3.25 + 2 * longest


def sim(number: int, minutes: float, **asked: Any) -> SimJob:
    known = {"uid": 1, "user": "ann", "priority": 0, "submitted_at": 0.0, "gpus": 1, "slots": 0, **asked}
    return SimJob(job=WaitingJob(id=number, **known), duration_s=minutes * M)


def small_box(count: int) -> Box:
    return Box(
        gpus=tuple(GpuView(uuid=f"GPU-{n}", index=n, busy=None, memory_mib=100) for n in range(count)),
        slots=1,
        slots_free=1,
    )


def test_it_stops_where_it_is_told_to() -> None:
    simulation = Simulation(small_box(1), Rules())
    for number in range(1, 6):
        simulation.submit(sim(number, 10), 0.0)
    simulation.run(until=25 * M)
    assert [event.job_id for event in simulation.events if event.event == "start"] == [1, 2, 3]
    assert simulation.left == [4, 5]
    simulation.run(starts_max=1)
    assert simulation.left == [5]


def test_what_never_ends_keeps_what_waits_for_it_waiting() -> None:
    simulation = Simulation(small_box(1), Rules())
    simulation.add_running(
        RunningJob(id=1, user="xen", priority=0, started_at=-60.0, gpu_uuids=("GPU-0",)), math.inf
    )  # fmt: skip
    simulation.submit(sim(2, 1), 0.0)
    simulation.run(until=1e9)
    assert simulation.left == [2]


def test_a_share_on_a_gpu_that_is_gone_ends_like_any_other() -> None:
    simulation = Simulation(small_box(1), Rules())
    simulation.add_running(
        RunningJob(id=1, user="xen", priority=0, started_at=-60.0, gpu_uuids=("GPU-9",), gpu_mem_mib=50), 60.0
    )
    simulation.submit(sim(2, 1), 0.0)
    simulation.run()
    assert [event.event for event in simulation.events] == ["start", "end", "end"]


def test_it_learns_run_times_from_those_that_ended_well() -> None:
    simulation = Simulation(small_box(1), Rules())
    for number in range(1, 4):
        simulation.submit(sim(number, 10, kind="train.py"), 0.0)
    simulation.run()
    assert simulation.history.quantile("ann", "default", "train.py", 0.5) == 10 * M
