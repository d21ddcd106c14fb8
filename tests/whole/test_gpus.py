"""Jobs on GPUs, from curl to CUDA_VISIBLE_DEVICES: the real daemon, monitor and nvidia-ml-py on a stand-in driver."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.nvml.standin import FakeGpu, StandIn
from tests.whole.harness import Daemon, eventually

pytestmark = pytest.mark.slow

UUIDS = [f"GPU-0000000{n}-1111-2222-3333-444444444444" for n in range(4)]


@pytest.fixture
def hardware(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


def show(hardware: StandIn, *numbers: int, compute: dict[int, list[tuple[int, int | None]]] | None = None) -> None:
    """The box has these of UUIDS, and each of `compute` has those processes (pid, MiB) on it."""
    hardware.show(*(FakeGpu(uuid=UUIDS[n], compute=(compute or {}).get(n, [])) for n in numbers))


@pytest.fixture
def box(hardware: StandIn, make_daemon: Callable[..., Daemon]) -> Daemon:
    show(hardware, 0, 1)
    settings = ("scheduler.gpu_sample_s=0.2", "scheduler.gpu_silence_s=3", "serving.enabled=false")
    return make_daemon(*settings, environment=hardware.environment()).start()


def states(box: Daemon) -> dict[str, str]:
    return {gpu["uuid"]: gpu["state"] for gpu in box.http.get("/api/gpus").json()["gpus"]}


def gated(gate: Path) -> str:
    return f"echo $CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER; until [ -e {gate} ]; do sleep 0.05; done"


def test_jobs_are_pinned_to_gpus_of_their_own_first_come_first_served(box: Daemon, tmp_path: Path) -> None:
    gates = [tmp_path / f"gate{n}" for n in range(3)]
    jobs = [box.submit(command=gated(gate), gpus=1)["id"] for gate in gates]
    for job_id in jobs[:2]:
        eventually("it runs", lambda job_id=job_id: box.job(job_id)["state"] == "running")
    assert {tuple(box.job(job_id)["gpu_uuids"]) for job_id in jobs[:2]} == {(UUIDS[0],), (UUIDS[1],)}
    assert states(box) == {UUIDS[0]: "leased", UUIDS[1]: "leased"}
    why = box.job(jobs[2])["pending"]["why"]
    assert why.startswith("it needs 1 GPU, none is free of 2: GPU 0: ")
    assert f"job {jobs[0]}" in why
    for gate in gates:
        gate.touch()
    ended = [box.wait(job_id) for job_id in jobs]
    assert [job["state"] for job in ended] == ["succeeded"] * 3
    for job in ended:
        assert box.text(job["id"]) == f"{job['gpu_uuids'][0]} PCI_BUS_ID\n"
        assert job["usage"]["gpu_seconds"] > 0
    eventually("both are free", lambda: set(states(box).values()) == {"free"})
    box.check_invariants()


def test_a_wide_job_is_not_starved_by_narrow_ones_behind_it(box: Daemon, tmp_path: Path) -> None:
    gate, order = tmp_path / "gate", tmp_path / "order"
    first = box.submit(command=gated(gate), gpus=1)
    eventually("it runs", lambda: box.job(first["id"])["state"] == "running")
    wide = box.submit(command=f"echo wide >> {order}", gpus=2)
    narrow = box.submit(command=f"echo narrow >> {order}", gpus=1)
    eventually("it says whom it could delay", lambda: f"job {wide['id']}" in box.job(narrow["id"])["pending"]["why"])
    assert box.wait(box.submit(command="true")["id"])["state"] == "succeeded", "a CPU job waits for no GPU"
    gate.touch()
    assert box.wait(wide["id"])["state"] == "succeeded"
    assert box.wait(narrow["id"])["state"] == "succeeded"
    assert order.read_text() == "wide\nnarrow\n"


def test_a_job_without_gpus_sees_none(box: Daemon) -> None:
    job = box.submit(command='echo "[$CUDA_VISIBLE_DEVICES]"', env={"CUDA_VISIBLE_DEVICES": "0"})
    box.wait(job["id"])
    assert box.text(job["id"]) == "[]\n"


def test_nine_gpus_on_a_box_with_two_are_refused_at_once(box: Daemon) -> None:
    answer = box.http.post("/api/jobs", json={"command": "true", "gpus": 9})
    assert answer.status_code == 422
    assert "asks 9 GPUs; this box has 2 GPUs: ask for 2 or fewer" in answer.json()["detail"]


def test_a_foreign_process_keeps_jobs_off_its_gpu_and_is_named(box: Daemon, hardware: StandIn) -> None:
    with subprocess.Popen(["sleep", "1000"]) as foreign:
        try:
            show(hardware, 0, 1, compute={0: [(foreign.pid, 642)], 1: []})
            eventually("it is seen", lambda: states(box)[UUIDS[0]] == "foreign")
            job = box.submit(command="true", gpus=1)
            assert box.wait(job["id"])["gpu_uuids"] == [UUIDS[1]]
            eventually("GPU 1 is given back", lambda: states(box)[UUIDS[1]] == "free")
            waiting = box.submit(command="true", gpus=2)
            why = box.job(waiting["id"])["pending"]["why"]
            assert f"sleep (pid {foreign.pid}) holds 642 MiB" in why
            show(hardware, 0, 1)
            assert box.wait(waiting["id"])["state"] == "succeeded"
        finally:
            foreign.kill()


def test_a_gpu_is_given_on_only_when_nothing_of_the_job_before_is_left_on_it(
    box: Daemon, hardware: StandIn, tmp_path: Path
) -> None:
    """The driver shows the ended job's memory for a while: the GPU drains, and the next job waits."""
    job = box.submit(command="echo $MLBOX_ATTEMPT_KEY; exec sleep 1000", gpus=2)
    key = eventually("it runs", lambda: box.text(job["id"]).strip())
    # A process that carries the job's key but is no child of its shim: what a driver's leftover looks like.
    with subprocess.Popen(["sleep", "1000"], env={**os.environ, "MLBOX_ATTEMPT_KEY": key}) as leftover:
        try:
            show(hardware, 0, 1, compute={1: [(leftover.pid, 100)]})
            eventually("it is known as the job's", lambda: set(states(box).values()) == {"leased"})
            box.http.post(f"/api/jobs/{job['id']}/cancel")
            assert box.wait(job["id"])["state"] == "cancelled"
            eventually("one is clean", lambda: states(box) == {UUIDS[0]: "free", UUIDS[1]: "draining"})
            following = box.submit(command="true", gpus=2)
            assert f"job {job['id']} has ended" in box.job(following["id"])["pending"]["why"]
            box.kill()
            box.start()
            assert states(box)[UUIDS[1]] in ("draining", "foreign")  # a dead process has no environment to be known by
            show(hardware, 0, 1)
            assert box.wait(following["id"])["state"] == "succeeded"
        finally:
            leftover.kill()


def test_a_lost_gpu_takes_nothing_new_and_the_job_on_it_runs_on(box: Daemon, hardware: StandIn, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = box.submit(command=gated(gate), gpus=2)
    eventually("it runs", lambda: box.job(job["id"])["state"] == "running")
    hardware.show(FakeGpu(uuid=UUIDS[0]), FakeGpu(uuid=UUIDS[1], lost=True))
    eventually("it is unknown", lambda: states(box)[UUIDS[1]] == "unknown")
    gate.touch()
    assert box.wait(job["id"])["state"] == "succeeded"
    following = box.submit(command="true", gpus=2)
    eventually("the other is free", lambda: states(box)[UUIDS[0]] == "free")
    assert box.job(following["id"])["state"] == "queued"
    show(hardware, 0, 1)
    assert box.wait(following["id"])["state"] == "succeeded"


def test_a_drained_gpu_takes_nothing_until_it_is_resumed(box: Daemon) -> None:
    assert box.http.post(f"/api/gpus/{UUIDS[0]}/drain").status_code == 200
    job = box.submit(command="true", gpus=1)
    assert box.wait(job["id"])["gpu_uuids"] == [UUIDS[1]]
    waiting = box.submit(command="true", gpus=2)
    box.kill()
    box.start()
    assert states(box)[UUIDS[0]] == "drained"
    assert box.job(waiting["id"])["state"] == "queued"
    assert box.http.post(f"/api/gpus/{UUIDS[0]}/resume").status_code == 200
    assert box.wait(waiting["id"])["state"] == "succeeded"


def test_a_hanging_driver_hurts_no_job_and_no_request(box: Daemon, hardware: StandIn, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = box.submit(command=gated(gate), gpus=1)
    eventually("it runs", lambda: box.job(job["id"])["state"] == "running")
    hardware.show(FakeGpu(uuid=UUIDS[0], hang_s=1000), FakeGpu(uuid=UUIDS[1]))
    eventually("all are unknown", lambda: set(states(box).values()) == {"unknown"}, patience_s=20)
    assert box.wait(box.submit(command="true")["id"])["state"] == "succeeded"
    gate.touch()
    assert box.wait(job["id"])["state"] == "succeeded"
    show(hardware, 0, 1)
    eventually("they are back", lambda: set(states(box).values()) == {"free"}, patience_s=20)
