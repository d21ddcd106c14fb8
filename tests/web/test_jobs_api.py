import asyncio

import pytest

from tests.web.harness import Box, eventually


async def test_a_job_is_listed_and_shown_with_every_field_of_the_interface(box: Box) -> None:
    job = await box.submit("echo hello; exit 3", name="three", project="p")
    ended = await box.wait(job["id"])
    assert (ended["state"], ended["reason"], ended["exit_code"]) == ("failed", "exit_code", 3)
    assert {
        "id", "name", "project", "user", "state", "reason", "cause", "command", "gpus", "gpu_mem_mib", "cpus",
        "mem_mib", "time_limit_s", "priority", "preemptible", "depends_on", "array", "submitted_at", "started_at",
        "ended_at", "exit_code", "signal", "attempt", "gpu_uuids", "log_bytes", "usage", "progress", "verdict",
        "pending",
    } <= ended.keys()  # fmt: skip
    assert ended["submitted_at"].endswith("Z")
    assert ended["attempts"][0]["exit_code"] == 3
    listed = (await box.http.get("/api/jobs")).json()
    assert [row["id"] for row in listed["jobs"]] == [job["id"]]
    assert listed["next"] is None


async def test_lists_are_filtered_and_paged(box: Box) -> None:
    for number in range(5):
        await box.submit(name="even" if number % 2 == 0 else "odd", hold=True)
    page = (await box.http.get("/api/jobs", params={"limit": 2})).json()
    assert [row["id"] for row in page["jobs"]] == [5, 4]
    page = (await box.http.get("/api/jobs", params={"limit": 2, "before": page["next"]})).json()
    assert [row["id"] for row in page["jobs"]] == [3, 2]
    assert [row["id"] for row in (await box.http.get("/api/jobs?name=odd")).json()["jobs"]] == [4, 2]
    assert (await box.http.get("/api/jobs?state=running,failed")).json()["jobs"] == []
    assert len((await box.http.get("/api/jobs?state=queued&state=failed")).json()["jobs"]) == 5
    text = (await box.http.get("/api/jobs", headers={"Accept": "text/plain"})).text
    assert text.splitlines()[0].split()[:3] == ["ID", "STATE", "NAME"]
    assert len(text.splitlines()) == 6


async def test_a_bad_filter_is_malformed(box: Box) -> None:
    for query in ("limit=0", "limit=1001", "limit=x", "limit=-1", "before=" + "9" * 30, "state=nope", "colour=red",
                  "limit=1&limit=2"):  # fmt: skip
        assert (await box.http.get(f"/api/jobs?{query}")).status_code == 400, query


async def test_what_is_no_job_is_not_found(box: Box) -> None:
    for job in ("0", "999", "x", "-1", "1.0", "99999999999999999999", "9223372036854775807", "1" * 5000, "%00", "١"):
        for method, path in (("GET", ""), ("GET", "/log"), ("POST", "/cancel"), ("DELETE", ""), ("GET", "/artifacts")):
            assert (await box.http.request(method, f"/api/jobs/{job}{path}")).status_code == 404, (job, method, path)


async def test_waiting_answers_when_the_job_has_ended_or_the_time_is_up(box: Box) -> None:
    job = await box.submit("sleep 1000")
    early = await box.http.get(f"/api/jobs/{job['id']}/wait?timeout=0")
    assert early.json()["ended_at"] is None
    waiting = asyncio.create_task(box.http.get(f"/api/jobs/{job['id']}/wait?timeout=1h"))
    await box.running(job["id"])
    await box.http.post(f"/api/jobs/{job['id']}/cancel")
    assert (await waiting).json()["state"] == "cancelled"
    for bad in ("timeout=2h", "timeout=x", "timeout=-1", "time=1"):
        assert (await box.http.get(f"/api/jobs/{job['id']}/wait?{bad}")).status_code == 400


async def test_a_wait_is_answered_at_once_when_mlbox_stops(box: Box) -> None:
    job = await box.submit(hold=True)
    waiting = asyncio.create_task(box.http.get(f"/api/jobs/{job['id']}/wait?timeout=1h"))

    async def begun() -> bool:
        return len(box.app._streams) == 1

    await eventually("it waits", begun)
    box.app.stop()
    async with asyncio.timeout(5):
        assert (await waiting).json()["state"] == "queued"


async def test_what_may_be_done_with_a_waiting_job(box: Box) -> None:
    job = await box.submit(hold=True)
    path = f"/api/jobs/{job['id']}"
    assert job["pending"]["why"] == "it is held: release it when it may start"
    changed = await box.http.patch(path, json={"priority": -5, "time_limit": "2h"})
    assert (changed.json()["priority"], changed.json()["time_limit_s"]) == (-5, 7200)
    assert (await box.http.patch(path, json={})).status_code == 400
    assert (await box.http.patch(path, json={"name": "x"})).status_code == 400
    assert (await box.http.delete(path)).status_code == 409
    assert (await box.http.post(f"{path}/retry")).status_code == 409
    assert (await box.http.post(f"{path}/release")).json()["hold"] is False
    await box.wait(job["id"])
    for verb in ("hold", "release", "cancel"):
        assert (await box.http.post(f"{path}/{verb}")).status_code == 409
    assert (await box.http.post(f"{path}/cancel", json={"force": True})).status_code == 400
    again = await box.http.post(f"{path}/retry", headers={"Idempotency-Key": "k"})
    assert (again.status_code, again.json()["retry_of"]) == (201, job["id"])
    assert (await box.http.post(f"{path}/retry", headers={"Idempotency-Key": "k"})).json()["id"] == again.json()["id"]
    removed = await box.http.delete(path)
    assert removed.json()["files_removed"] is True
    assert (await box.http.get(f"{path}/log")).status_code == 404


async def test_an_unknown_method_names_those_that_are_known(box: Box) -> None:
    answer = await box.http.put("/api/jobs/1")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET, HEAD, PATCH")
    assert (await box.http.get("/api/nothing")).status_code == 404
    assert (await box.http.get("/api/jobs/")).status_code == 404


async def test_the_box_tells_of_itself(box: Box) -> None:
    job = await box.submit("echo begun; sleep 1000", cpus=2)
    await box.running(job["id"])

    async def written() -> bool:
        return (await box.http.get(f"/api/jobs/{job['id']}")).json()["log_bytes"] == 6

    await eventually("the bytes of its log are told while it runs", written)
    waiting = await box.submit(name="next")
    gpus = (await box.http.get("/api/gpus")).json()
    assert gpus["cpu_slots"] == {"total": 2, "free": 0}
    queue = (await box.http.get("/api/queue")).json()["jobs"]
    assert [(row["id"], row["pending"]["position"]) for row in queue] == [(waiting["id"], 1)]
    assert "command" not in queue[0]
    assert "next" in (await box.http.get("/api/queue", headers={"Accept": "text/plain"})).text
    metrics = (await box.http.get("/metrics")).text
    assert 'mlbox_jobs{state="running"} 1\n' in metrics
    assert "mlbox_cpu_slots_free{} 0\n" in metrics
    assert (await box.http.get("/readyz")).status_code == 200
    box.not_ready = "starting"
    answer = await box.http.get("/readyz")
    assert (answer.status_code, answer.json()["detail"]) == (503, "starting")
    assert (await box.http.get("/healthz")).json() == {"status": "ok"}


async def test_draining_an_unknown_gpu_is_not_found(box: Box) -> None:
    assert (await box.http.post("/api/gpus/GPU-1/drain", json={"reason": "dust"})).status_code == 404
    assert (await box.http.post("/api/gpus/GPU-1/resume")).status_code == 404
    assert (await box.http.post("/api/gpus/GPU-1/drain", json={"reason": 5})).status_code == 400


async def test_our_own_trouble_is_told_in_general_words(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise RuntimeError("the secret inside")

    box.jobs.counts = broken  # type: ignore[method-assign, assignment]
    answer = await box.http.get("/metrics")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "the secret inside" in caplog.text
