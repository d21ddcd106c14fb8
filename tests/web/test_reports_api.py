import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mlbox.identity import Identity
from mlbox.scheduler.timeline import Timeline
from tests.nvml.standin import FakeGpu, StandIn
from tests.web import standins
from tests.web.harness import Box, eventually, running_box

TEXT = {"Accept": "text/plain"}


@pytest_asyncio.fixture
async def gpu_box(tmp_path: Path) -> AsyncGenerator[Box]:
    standin = StandIn(tmp_path)
    standin.show(FakeGpu(uuid="GPU-a"), FakeGpu(uuid="GPU-b"))
    async with running_box(tmp_path, environment=standin.environment()) as box:
        yield box


async def test_the_plan_is_told_as_data_and_as_a_picture_of_text(box: Box) -> None:
    async def planned(who: Identity) -> Timeline:
        return standins.lab_plan(1_800_000_000.0)

    box.jobs.plan = planned  # type: ignore[method-assign]
    plan = (await box.http.get("/api/plan")).json()
    assert (plan["now"], len(plan["gpus"])) == ("2027-01-15T08:00:00.000Z", 4)
    assert plan["gpus"][2]["bars"][-1] == {
        "kind": "reserved", "job": None, "name": "maintenance", "user": "",
        "starts_at": "2027-01-15T10:30:00.000Z", "ends_at": "2027-01-15T17:00:00.000Z",
    }  # fmt: skip
    text = (await box.http.get("/api/plan?columns=60", headers=TEXT)).text
    assert max(len(line) for line in text.splitlines()[:-2]) <= 60
    assert "GPU 3" in text
    for bad in ("columns=39", "columns=401", "columns=x", "column=80"):
        assert (await box.http.get(f"/api/plan?{bad}")).status_code == 400


async def test_the_plan_follows_what_runs_waits_ended_and_is_reserved(gpu_box: Box) -> None:
    ended = await gpu_box.submit("true", name="quick", gpus=1)
    await gpu_box.wait(ended["id"])
    runs = await gpu_box.submit("sleep 1000", name="long", gpus=2, time_limit="3h")
    await gpu_box.running(runs["id"])
    waits = await gpu_box.submit("sleep 1000", name="next-one", gpus=1, time_limit="1h")
    await gpu_box.http.post("/api/reservations", json={"name": "friday", "gpus": [1], "duration": "4h"})

    async def planned() -> dict[str, Any] | None:
        plan = (await gpu_box.http.get("/api/plan")).json()
        kinds = {bar["kind"] for gpu in plan["gpus"] for bar in gpu["bars"]}
        return plan if "planned" in kinds else None

    plan = await eventually("the waiting job is in the plan", planned)
    bars = {(bar["kind"], bar["job"], bar["name"]) for gpu in plan["gpus"] for bar in gpu["bars"]}
    assert {("past", ended["id"], "quick"), ("running", runs["id"], "long"), ("planned", waits["id"], "next-one"),
            ("reserved", None, "friday")} <= bars  # fmt: skip
    running = [bar for gpu in plan["gpus"] for bar in gpu["bars"] if bar["kind"] == "running"]
    assert len(running) == 2
    assert "next-one" in (await gpu_box.http.get("/", headers={"Accept": "text/html"})).text
    row = (await gpu_box.http.get("/api/queue")).json()["jobs"][0]["pending"]
    assert row["estimated_start"] <= row["estimated_start_p90"]
    await gpu_box.http.post(f"/api/jobs/{waits['id']}/cancel")  # or it begins while the box is ending its jobs


async def test_usage_is_asked_since_a_time_or_for_a_time(box: Box) -> None:
    await box.wait((await box.submit())["id"])
    report = (await box.http.get("/api/usage?since=2d")).json()
    assert report["users"][0]["jobs"] == report["total"]["jobs"] == 1
    assert [row["name"] for row in report["projects"]] == ["default"]
    for since in ("2026-01-01T00:00:00Z", "1767225600", "2026-01-01"):
        answer = (await box.http.get(f"/api/usage?since={since}")).json()
        assert answer["since"] == "2026-01-01T00:00:00.000Z"
    future = (await box.http.get("/api/usage?since=2100-01-01")).json()
    assert future["since"] == future["until"]
    text = (await box.http.get("/api/usage", headers=TEXT)).text
    assert text.splitlines()[2].split() == [
        "USER", "GPU_HOURS", "GPU_HOURS_IDLE", "CPU_HOURS", "JOBS", "WAIT_MEAN_S", "WAIT_P95_S",
    ]  # fmt: skip
    for bad in ("since=yesterday", "since=-1", "until=1d"):
        assert (await box.http.get(f"/api/usage?{bad}")).status_code == 400


async def test_a_rank_is_told_part_by_part(box: Box) -> None:
    runs = await box.submit("sleep 1000", cpus=2)
    await box.running(runs["id"])
    waits = await box.submit(priority=-1)
    parts = (await box.http.get(f"/api/jobs/{waits['id']}/rank")).json()
    assert (parts["position"], parts["priority"]) == (1, -1)
    assert "fair_share:" in (await box.http.get(f"/api/jobs/{waits['id']}/rank", headers=TEXT)).text
    assert (await box.http.get(f"/api/jobs/{runs['id']}/rank")).status_code == 409
    assert (await box.http.get("/api/jobs/x/rank")).status_code == 404


async def test_an_array_is_submitted_listed_and_cancelled_as_one(box: Box) -> None:
    await box.submit(hold=True)
    first = await box.submit("sleep 1000", array="10-30:10%1", hold=True)
    assert first["array"] == {"id": first["id"], "index": 10, "size": 3, "at_once": 1}
    page = (await box.http.get("/api/jobs", params={"array": first["id"], "limit": 2})).json()
    assert [row["array"]["index"] for row in page["jobs"]] == [30, 20]
    page = (await box.http.get("/api/jobs", params={"array": first["id"], "before": page["next"]})).json()
    assert [row["id"] for row in page["jobs"]] == [first["id"]]
    html = {"Accept": "text/html"}
    assert f'href="/jobs?array={first["id"]}"' in (await box.http.get(f"/jobs/{first['id']}", headers=html)).text
    assert f"Array {first['id']}" in (await box.http.get(f"/jobs?array={first['id']}", headers=html)).text
    cancelled = (await box.http.post(f"/api/arrays/{first['id']}/cancel")).json()["jobs"]
    assert [job["state"] for job in cancelled] == ["cancelled"] * 3
    assert (await box.http.post("/api/arrays/1/cancel")).status_code == 404
    assert (await box.http.post("/api/arrays/x/cancel")).status_code == 404


async def test_a_clone_is_the_same_job_once_more_whatever_its_state(box: Box) -> None:
    job = await box.submit("sleep 1000", name="one", env={"A": "1"}, priority=-3, hold=True)
    path = f"/api/jobs/{job['id']}/clone"
    twin = await box.http.post(path, headers={"Idempotency-Key": "k"})
    assert twin.status_code == 201
    assert (twin.json()["id"], twin.json()["retry_of"]) == (job["id"] + 1, None)
    assert [twin.json()[key] for key in ("name", "env", "priority")] == ["one", {"A": "1"}, -3]
    assert (await box.http.post(path, headers={"Idempotency-Key": "k"})).json()["id"] == twin.json()["id"]
    assert (await box.http.post("/api/jobs/99/clone")).status_code == 404


async def test_a_job_page_names_what_it_waits_for(box: Box) -> None:
    parent = await box.submit("sleep 1000", name="first-one", hold=True)
    child = await box.submit(depends_on=[parent["id"], f"afterany:{parent['id']}"])
    assert sorted(child["depends_on"]) == [f"afterany:{parent['id']}", f"afterok:{parent['id']}"]
    assert child["eligible_at"] is None
    text = (await box.http.get(f"/jobs/{child['id']}", headers={"Accept": "text/html"})).text
    assert "1 first-one" in text
    assert "has succeeded" in text


async def test_reservations_are_made_listed_and_given_up(gpu_box: Box) -> None:
    friday = {"name": "bob-friday", "gpus": [1], "starts_at": "2100-01-01T00:00:00Z", "duration": "4h"}
    made = await gpu_box.http.post("/api/reservations", json={**friday, "for_user": "bob"})
    assert made.status_code == 201, made.text
    assert made.json() | {"made_by": ""} == {
        "id": 1, "name": "bob-friday", "gpu_uuids": ["GPU-b"], "starts_at": "2100-01-01T00:00:00.000Z",
        "ends_at": "2100-01-01T04:00:00.000Z", "for_user": "bob", "for_project": None, "made_by": "",
    }  # fmt: skip
    form = await gpu_box.http.post("/api/reservations", data={"name": "x", "duration": "1h"}, headers=TEXT)
    assert (form.status_code, form.text) == (201, "2\n")
    listed = (await gpu_box.http.get("/api/reservations")).json()["reservations"]
    assert sorted(kept["gpu_uuids"] for kept in listed) == [["GPU-a", "GPU-b"], ["GPU-b"]]
    assert "0,1" in (await gpu_box.http.get("/api/reservations", headers=TEXT)).text
    assert (await gpu_box.http.post("/api/reservations", json=friday)).status_code == 409
    assert (await gpu_box.http.delete("/api/reservations/1")).json()["id"] == 1
    assert (await gpu_box.http.delete("/api/reservations/9")).status_code == 404


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        ({}, 400, "name: is missing"),
        ({"name": "x"}, 400, "give either ends_at or duration"),
        ({"name": "x", "ends_at": 9e9, "duration": 60}, 400, "give either ends_at or duration"),
        ({"name": "a b", "duration": 0}, 400, "duration: wants"),
        ({"name": "x", "duration": 60, "user": "bob"}, 400, "did you mean 'for_user'?"),
        ({"name": "x", "duration": 60, "gpus": []}, 400, "gpus: wants"),
        ({"name": "x", "duration": 60, "gpus": [True]}, 400, "gpus: wants"),
        ({"name": "x", "duration": 60, "gpus": {"a": 1}}, 400, "gpus: wants"),
        ({"name": "x", "duration": 60, "for_user": " "}, 400, "for_user: wants"),
        ({"name": "x", "ends_at": 5}, 422, "end it later"),
        ({"name": "x", "duration": 60, "gpus": "0,7"}, 404, "there is no GPU 7 here; known: 0 (GPU-a), 1 (GPU-b)"),
    ],
)
async def test_a_bad_reservation_is_refused_with_what_is_wrong(
    gpu_box: Box, fields: dict[str, Any], status: int, told: str
) -> None:
    answer = await gpu_box.http.post("/api/reservations", json=fields)
    assert answer.status_code == status
    assert told in answer.json()["detail"]


async def test_only_admins_reserve(gpu_box: Box) -> None:
    token = {"Authorization": f"Bearer {await gpu_box.token(name='user', scopes=['read', 'submit'])}"}
    fields = {"name": "x", "duration": 60}
    assert (await gpu_box.tcp.post("/api/reservations", json=fields, headers=token)).status_code == 403
    assert (await gpu_box.tcp.get("/api/reservations", headers=token)).status_code == 200


async def test_a_process_from_outside_is_adopted_by_its_gpu(tmp_path: Path) -> None:
    outside = await asyncio.create_subprocess_exec("sleep", "1000")
    try:
        standin = StandIn(tmp_path)
        standin.show(FakeGpu(uuid="GPU-a", compute=[(outside.pid, 1000)]), FakeGpu(uuid="GPU-b"))
        async with running_box(tmp_path, environment=standin.environment()) as box:
            bad = await box.http.post("/api/gpus/GPU-a/adopt", json={"pid": 0, "name": "a b"})
            assert [error["field"] for error in bad.json()["errors"]] == ["pid", "name"]
            assert (await box.http.post("/api/gpus/GPU-b/adopt")).status_code == 404
            assert (await box.http.post("/api/gpus/GPU-x/adopt")).status_code == 404
            answer = await box.http.post("/api/gpus/GPU-a/adopt", json={"name": "mine"})
            assert answer.status_code == 201, answer.text
            job = answer.json()
            assert (job["name"], job["adopted"], job["gpu_uuids"]) == ("mine", True, ["GPU-a"])
            assert answer.headers["location"] == f"/api/jobs/{job['id']}"
            assert (await box.http.post(f"/api/jobs/{job['id']}/clone")).status_code == 409
    finally:
        if outside.returncode is None:
            outside.kill()
        await outside.wait()


async def test_notices_are_listed(box: Box) -> None:
    assert (await box.http.get("/api/notices?limit=5")).json() == {"notices": []}
    assert (await box.http.get("/api/notices", headers=TEXT)).text.startswith("AT")
    assert (await box.http.get("/api/notices?limit=0")).status_code == 400
