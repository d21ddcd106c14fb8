from tests.web.harness import Box


async def test_a_job_runs(box: Box) -> None:
    job = await box.submit("echo hello")
    ended = await box.wait(job["id"])
    assert ended["state"] == "succeeded"
    assert (await box.http.get(f"/api/jobs/{job['id']}/log")).text == "hello\n"
