"""The whole road on a real daemon: submit, run, log, deploy, predict; and what a user meets when it goes wrong."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
import tritonclient.http as triton

from tests.whole.harness import Daemon, eventually

pytestmark = pytest.mark.slow

EXPORT = """
import os, sys
import onnx, numpy
from onnx import TensorProto, helper, numpy_helper
factor = numpy_helper.from_array(numpy.array([float(sys.argv[1])], numpy.float32), "factor")
graph = helper.make_graph(
    [helper.make_node("Mul", ["x", "factor"], ["y"])], "scale",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])], [factor])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
onnx.save(model, os.path.join(os.environ["MLBOX_OUT"], "scale.onnx"))
print("exported")
"""


def infer_token(daemon: Daemon) -> str:
    answer = daemon.http.post("/api/tokens", json={"name": "test", "scopes": ["infer"]})
    assert answer.status_code == 201, answer.text
    return answer.json()["token"]


def ready_versions(daemon: Daemon, model: str) -> set[int]:
    answer = daemon.http.get(f"/api/models/{model}")
    if answer.status_code != 200:
        return set()
    return {version["version"] for version in answer.json()["versions"] if version["state"] == "READY"}


def predict(daemon: Daemon, token: str) -> tuple[str, numpy.ndarray]:
    client = triton.InferenceServerClient(daemon.endpoints["infer_http"])
    tensor = triton.InferInput("x", [2, 3], "FP32")
    tensor.set_data_from_numpy(numpy.arange(6, dtype=numpy.float32).reshape(2, 3))
    answer = client.infer("scale", [tensor], headers={"Authorization": f"Bearer {token}"})
    client.close()
    return answer.get_response()["model_version"], answer.as_numpy("y")


def test_a_jobs_model_is_served_and_a_second_job_becomes_the_next_version(daemon: Daemon, tmp_path: Path) -> None:
    script = tmp_path / "export.py"
    script.write_text(EXPORT)
    token = infer_token(daemon)
    for version, factor in ((1, 2.0), (2, 5.0)):
        job = daemon.submit(command=f"{sys.executable} {script} {factor}", model="scale")
        assert daemon.wait(job["id"])["state"] == "succeeded", daemon.text(job["id"])
        assert daemon.text(job["id"]) == "exported\n"
        eventually("the model is ready", lambda wanted=version: wanted in ready_versions(daemon, "scale"))
        served, values = predict(daemon, token)
        assert served == str(version)
        assert values.tolist() == (numpy.arange(6).reshape(2, 3) * factor).tolist()


def test_a_copied_file_is_served_and_survives_a_kill_of_the_inference_server(daemon: Daemon, tmp_path: Path) -> None:
    folder = daemon.state / "models" / "scale" / "1"
    folder.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", EXPORT, "3"], env={**os.environ, "MLBOX_OUT": str(tmp_path)}, check=True)
    (folder / "model.onnx").write_bytes((tmp_path / "scale.onnx").read_bytes())
    token = infer_token(daemon)
    eventually("the model is ready", lambda: ready_versions(daemon, "scale") == {1})
    server = int(daemon.log().rpartition("inference server: started (pid ")[2].split(")")[0])
    os.kill(server, signal.SIGKILL)
    # The socket is the daemon's: this request waits for the next server instead of being refused.
    assert predict(daemon, token)[1].tolist()[1] == [9.0, 12.0, 15.0]
    assert daemon.log().count("inference server: started") == 2


def test_no_inference_server_runs_while_nothing_asks_for_it(daemon: Daemon) -> None:
    assert "inference server: started" not in daemon.log()
    answer = httpx.get(f"http://{daemon.endpoints['infer_http']}/v2/health/ready", timeout=30)
    assert answer.status_code == 401
    assert "inference server: started" in daemon.log()


def test_a_job_that_left_no_model_says_so_where_the_model_is_looked_for(daemon: Daemon) -> None:
    job = daemon.submit(command="touch $MLBOX_OUT/other.onnx", model="missing")
    assert daemon.wait(job["id"])["state"] == "succeeded"

    def failed() -> dict[str, Any] | None:
        answer = daemon.http.get("/api/models/missing")
        version = answer.json()["versions"][0] if answer.status_code == 200 else {}
        return version if version.get("state") == "failed" else None

    version = eventually("it is recorded", failed)
    assert version["job"] == job["id"]
    assert "no 'missing.onnx'" in version["reason"]
    assert "other.onnx" in version["reason"]


def test_a_cancelled_job_leaves_no_process_whatever_it_does_about_it(daemon: Daemon) -> None:
    stubborn = "trap '' TERM INT HUP; (setsid sh -c 'trap \"\" TERM; sleep 1000; :' &) ; sleep 1000; :"
    job = daemon.submit(command=stubborn, grace_s=0.3)
    eventually("it runs", lambda: daemon.job(job["id"])["state"] == "running")
    eventually("it has forked", lambda: len(daemon.strays()) >= 3)
    daemon.http.post(f"/api/jobs/{job['id']}/cancel")
    assert daemon.wait(job["id"])["state"] == "cancelled"
    assert daemon.strays() == []


def test_a_log_is_followed_while_it_grows_and_to_its_end(daemon: Daemon, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = daemon.submit(command=f"echo first; until [ -e {gate} ]; do sleep 0.05; done; echo last")
    with daemon.http.stream("GET", f"/api/jobs/{job['id']}/log", params={"follow": 1}, timeout=20) as answer:
        pieces = answer.iter_text()
        assert next(pieces) == "first\n"
        gate.touch()
        assert "".join(pieces) == "last\n"


def test_a_failing_job_is_retried_as_often_as_it_asked(daemon: Daemon) -> None:
    job = daemon.submit(command="echo try $MLBOX_ATTEMPT; [ $MLBOX_ATTEMPT = 3 ]", retries=2)
    ended = daemon.wait(job["id"])
    assert (ended["state"], ended["attempt"]) == ("succeeded", 3)
    assert [daemon.text(job["id"], attempt=number) for number in (1, 2, 3)] == ["try 1\n", "try 2\n", "try 3\n"]


def test_a_time_limit_ends_a_job(daemon: Daemon) -> None:
    ended = daemon.wait(daemon.submit(command="sleep 1000", time_limit=1, grace_s=0.2)["id"])
    assert (ended["state"], ended["reason"]) == ("failed", "time_limit")


def test_jobs_beyond_the_slots_wait_and_say_why(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("scheduler.cpu_slots=1").start()
    first = daemon.submit(command="sleep 1000")
    second = daemon.submit(command="true")
    eventually("the first runs", lambda: daemon.job(first["id"])["state"] == "running")
    pending = daemon.job(second["id"])["pending"]
    assert pending["position"] == 1
    assert pending["why"] == "it needs 1 CPU slot, none is free of 1"
    daemon.http.post(f"/api/jobs/{first['id']}/cancel")
    assert daemon.wait(second["id"])["state"] == "succeeded"


@pytest.mark.parametrize(
    ("setting", "message"),
    [("server.lisen='x'", "did you mean 'listen'"), ("jobs.log_max=5", "wants a string"), ("nope.x=1", "unknown key")],
)
def test_a_mistake_in_the_configuration_ends_the_start_with_78(tmp_path: Path, setting: str, message: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "mlbox", "serve", "--state", str(tmp_path), "--set", setting],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 78
    assert message in ended.stderr


def test_a_state_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o777)
    command = [sys.executable, "-m", "mlbox", "serve", "--state", str(state), "--listen", "127.0.0.1:0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert f"chmod go-w {state}" in ended.stderr
    assert list(state.iterdir()) == []
