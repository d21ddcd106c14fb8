"""Traces are read as they are documented, and a bad one is refused with what is wrong in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlbox.config import BadConfig
from mlbox.errors import Invalid
from mlbox.scheduler import traces
from mlbox.scheduler.policy import Rules

JOB = {"id": 1, "user": "ann", "duration": 60}
RUNNING = {"id": "R", "user": "xen", "gpus": [0], "duration": 60}
TWO = [{"memory_mib": 81_920}, {"memory_mib": 40_960}]


def replay(**trace: Any) -> traces.Report:
    data = json.dumps({"gpus": TWO, "jobs": [], **trace}).encode()
    return traces.replay(traces.loads(data), Rules())


def starts(report: traces.Report) -> dict[str | int, float]:
    return {one["job"]: one["t"] for one in report.events if one["event"] == "start"}


@pytest.mark.parametrize(
    ("trace", "named"),
    [
        ({"jobs": [{**JOB, "duration": -1}]}, r"jobs\[0\]\.duration"),
        ({"jobs": [{**JOB, "duration": "1h"}]}, r"jobs\[0\]\.duration"),
        ({"jobs": [JOB, {**JOB, "id": 2, "priority": 101}]}, r"jobs\[1\]\.priority"),
        ({"jobs": [{**JOB, "tiem_limit": 5}]}, r"jobs\[0\].*tiem_limit"),
        ({"jobs": [{"id": 1, "user": "ann"}]}, r"jobs\[0\].*duration"),
        ({"jobs": [{**JOB, "id": ""}]}, r"jobs\[0\]\.id"),
        ({"jobs": [{**JOB, "gpus": 3}]}, r"jobs\[0\] \(1\): the job asks 3 GPUs; this box has 2 GPUs"),
        ({"jobs": [{**JOB, "gpu_mem": "9 parsecs"}]}, r"jobs\[0\] \(1\): "),
        ({"jobs": [{**JOB, "gpu_mem": 90_000}]}, r"jobs\[0\] \(1\): the job asks 90000 MiB"),
        ({"jobs": [{**JOB, "gpu_mem": 1000, "gpus": 1}]}, r"jobs\[0\] \(1\): give gpus or gpu_mem, not both"),
        ({"jobs": [{**JOB, "gpus": 0, "cpus": 2}]}, r"jobs\[0\] \(1\): the job asks 2 CPUs"),
        ({"jobs": [{**JOB, "array": "3-1"}]}, r"jobs\[0\] \(1\): has a range that ends before it begins"),
        ({"jobs": [{**JOB, "array": "0-99999999"}]}, r"jobs\[0\] \(1\): has more than"),
        ({"jobs": [{**JOB, "depends_on": 7}]}, r"jobs\[0\] \(1\): depends on '7'"),
        ({"jobs": [{**JOB, "depends_on": 1}]}, r"jobs\[0\] \(1\): depends on '1'"),
        ({"jobs": [JOB, {**JOB, "id": 2, "depends_on": "aftr:1"}]}, r"jobs\[1\] \(2\): 'aftr' is no dependency"),
        ({"jobs": [JOB, JOB]}, "two jobs of the trace have the id 1"),
        ({"jobs": [JOB, {**JOB, "id": "1"}]}, "two jobs of the trace have the id '1'"),
        ({"jobs": [JOB, {**JOB, "array": "0-1"}]}, "two jobs of the trace have the id 1"),
        ({"jobs": [{**JOB, "array": "0-1"}, {**JOB, "array": "2-3"}]}, "two jobs of the trace have the id 1"),
        ({"jobs": [{**JOB, "id": "1_0"}, {**JOB, "array": "0-1"}]}, "two jobs of the trace have the id '1_0'"),
        ({"running": [RUNNING], "jobs": [{**JOB, "id": "R"}]}, "two jobs of the trace have the id 'R'"),
        ({"running": [{**RUNNING, "gpus": [2]}]}, r"running job 'R': gpus \[2\]"),
        ({"running": [{**RUNNING, "gpus": []}]}, r"running job 'R': gpus \[\]"),
        ({"running": [{**RUNNING, "gpus": [0, 0]}]}, r"running job 'R': gpus \[0, 0\]"),
        ({"running": [RUNNING, {**RUNNING, "id": "S"}]}, r"running job 'S': gpus \[0\]"),
        ({"running": [{**RUNNING, "started": 5}]}, "running job 'R': started is 5"),
        ({"gpus": []}, "has no GPUs"),
        ({"gpus": [{}] * 1025}, "at most 1024"),
        ({"gpus": [{"memory_mib": 0}]}, r"gpus\[0\]\.memory_mib"),
        ({"links": [[0, 2, 1]]}, r"links\[0\]"),
        ({"links": [[0, 1, 1], [1, 1, 4]]}, r"links\[1\]"),
        ({"shares": {"ann": 0}}, "shares"),
        ({"usage": {"ann": -1}}, "usage"),
        ({"job": []}, "`job`"),
    ],
)  # fmt: skip
def test_a_bad_trace_is_refused_by_its_field(trace: dict[str, Any], named: str) -> None:
    with pytest.raises(Invalid, match=named):
        replay(**trace)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"gpus": 1e999}', b'{"gpus":[],"jobs":["\\ud800"]}'],
)  # fmt: skip
def test_what_is_no_trace_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(Invalid, match="the trace cannot be used"):
        traces.loads(data)


@settings(max_examples=40)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_are_a_traceback(data: bytes) -> None:
    for read in (traces.loads, traces._read_swf):  # the other door, `command`, wants a file for each
        try:
            read(data)
        except Invalid:
            continue


def test_a_refusal_names_its_field_for_programs_too() -> None:
    with pytest.raises(Invalid) as refused:
        replay(jobs=[{**JOB, "duration": -1}])
    assert [one.field for one in refused.value.errors] == ["jobs[0].duration"]


def test_ids_may_be_text_or_numbers_and_come_back_as_they_were() -> None:
    jobs = [JOB, {**JOB, "id": "b"}, {**JOB, "id": "c", "fails": True}, {**JOB, "id": "d", "depends_on": ["c", 1]}]
    report = replay(jobs=jobs)
    assert [one["job"] for one in report.events if one["event"] == "cancel"] == ["d"]
    assert next(one["why"] for one in report.events if one["event"] == "cancel") == "dependency_failed: job c failed"
    assert starts(report) == {1: 0, "b": 0, "c": 60}


def test_jobs_come_in_the_order_of_submit_wherever_they_stand() -> None:
    late = {**JOB, "id": "late", "submit": 100, "depends_on": "early"}
    assert starts(replay(jobs=[late, {**JOB, "id": "early"}])) == {"early": 0, "late": 100}


def test_a_whole_array_an_element_and_what_runs_can_be_depended_on() -> None:
    report = replay(
        gpus=[{}] * 8,
        running=[RUNNING],
        jobs=[
            {**JOB, "id": "a", "array": "0-2"},
            {**JOB, "id": "all", "depends_on": "a", "duration": 1},
            {**JOB, "id": "star", "depends_on": "afterok:a_*", "duration": 1},
            {**JOB, "id": "one", "depends_on": "a_0", "duration": 1},
            {**JOB, "id": "after", "depends_on": "R", "duration": 1},
        ],
    )
    times = starts(report)
    assert {times[f"a_{n}"] for n in range(3)} == {0}
    assert {times[name] for name in ("all", "star", "one", "after")} == {60}


def test_a_trace_without_gpus_but_with_cpu_slots_runs() -> None:
    report = replay(gpus=[], cpu_slots=2, jobs=[{**JOB, "gpus": 0, "array": "0-3"}])
    assert sorted(starts(report).values()) == [0, 0, 60, 60]


SWF = """; Version: 2.2
; MaxProcs: 4

1 0 -1 60 2 -1 -1 2 120 -1 1 7 1 3 1 -1 -1 -1
2 10 -1 60 -1 -1 -1 4 -1 -1 1 8 1 3 1 -1 -1 -1
3 20 -1 -1 1 -1 -1 1 -1 -1 0 8 1 3 1 -1 -1 -1
4 30 -1 30 1 -1 -1 -1 -1 -1 1 7 1 3 1 -1 -1 -1
"""


def test_swf_is_read_by_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "lab.swf"
    path.write_text(SWF)
    report = traces.command(path)
    assert starts(report) == {1: 0, 2: 60, 4: 120}, "the third was cancelled before it ran"
    assert set(report.summary["by_user"]) == {"user7", "user8"}
    assert [one["gpus"] for one in report.events if one["event"] == "start" and one["job"] == 2] == [[0, 1, 2, 3]]


LINE = "1 0 -1 60 2 -1 -1 2 120 -1 1 7 1 3 1 -1 -1 -1"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (LINE + "\n1 2 3", "line 2 .* has 3 words"),
        (LINE.replace("60", "sixty"), "line 1 .* is not SWF"),
        (LINE.replace("60", "nan"), "line 1 .* is not SWF"),
        (LINE.replace(" 2 120", " 1e300 120"), "line 1 .* processors"),
        ("; MaxProcs: 99999999\n" + LINE, "99999999 processors"),
        (LINE + "\n" + LINE, "two jobs of the trace have the id 1"),
    ],
)
def test_bad_swf_is_refused_by_its_line(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(Invalid, match=named):
        traces.command(path, swf=True)


@pytest.mark.parametrize("size", ["", "many", "²", "9" * 5000])
def test_a_header_that_is_no_number_is_passed_over(tmp_path: Path, size: str) -> None:
    path = tmp_path / "trace.swf"
    path.write_text(f"; MaxProcs: {size}\n{LINE}")
    assert starts(traces.command(path)) == {1: 0}


def test_the_command_replays_a_file_by_the_rules_of_a_configuration(tmp_path: Path) -> None:
    path, config = tmp_path / "trace.json", tmp_path / "mlbox.toml"
    trace = {"gpus": TWO, "jobs": [{**JOB, "array": "0-1"}]}
    path.write_text(json.dumps(trace))
    assert set(starts(traces.command(path)).values()) == {0}
    config.write_text("[scheduler.quota]\ngpus = 1\n")
    report = traces.command(path, config)
    assert sorted(starts(report).values()) == [0, 60]
    shown = json.loads(json.dumps(traces.as_json(report)))
    assert set(shown) == {"events", "summary"}
    assert set(shown["events"][0]) == {"t", "event", "job", "gpus", "why"}
    assert {"makespan_s", "gpu_busy_fraction", "wait_mean_s", "wait_p95_s", "by_user"} <= set(shown["summary"])


def test_a_file_that_cannot_be_read_and_a_bad_configuration_are_said(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="cannot be read: No such file"):
        traces.command(tmp_path / "none.json")
    with pytest.raises(Invalid, match="cannot be read"):
        traces.command(tmp_path)
    config = tmp_path / "mlbox.toml"
    config.write_text("[schedular]\n")
    with pytest.raises(BadConfig):
        traces.command(tmp_path / "none.json", config)


def test_the_same_trace_gives_the_same_events() -> None:
    jobs = [{**JOB, "id": number, "user": f"u{number % 3}", "submit": number} for number in range(30)]
    assert replay(jobs=jobs).events == replay(jobs=jobs).events
