"""The way in: the example that users read first, the demo around it, and the settings that they bring along."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.nvml.standin import FakeGpu, StandIn
from tests.whole.harness import eventually

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/digits/train.py"
DEMO_PATIENCE_S = 90.0
BARE = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_", "SSL_CERT"))}


def uv_settings(tmp_path: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What uv is told, where nothing but `environment` configures pip and uv. The system's certificates aside."""
    empty = {"PIP_CONFIG_FILE": os.devnull, "XDG_CONFIG_HOME": str(tmp_path)}
    script = ROOT / "scripts/uv_settings.py"
    ran = subprocess.run(
        [sys.executable, script], env=BARE | empty | environment, capture_output=True, text=True, check=True
    )
    exports = (shlex.split(line) for line in ran.stdout.splitlines())
    settings = dict(assignment.split("=", 1) for export, assignment in exports if export == "export")
    settings.pop("UV_SYSTEM_CERTS", None)
    return settings


def train(example: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the example as a job would, in the environment that its own first lines ask for."""
    settings = subprocess.run([sys.executable, ROOT / "scripts/uv_settings.py"], capture_output=True, text=True)
    exports = dict(shlex.split(line)[1].split("=", 1) for line in settings.stdout.splitlines())
    return subprocess.run(
        [Path(sys.executable).parent / "uv", "run", "--quiet", "--script", example, *options],
        env=os.environ | exports | {"MLBOX_OUT": str(out), "MLBOX_METRICS": str(out / "metrics.jsonl")},
        capture_output=True,
        text=True,
        timeout=110,
    )


@pytest.mark.slow
def test_the_example_leaves_a_model_that_answers_as_it_reports(tmp_path: Path) -> None:
    ran = train(EXAMPLE, tmp_path, "--epochs", "12")

    assert ran.returncode == 0, ran.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "digits.onnx", "metrics.jsonl", "report.json", "test.json"
    ]  # fmt: skip
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 13))
    assert metrics[-1]["loss"] < metrics[0]["loss"] / 5

    session = onnxruntime.InferenceSession(tmp_path / "digits.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape[1]) for i in session.get_inputs()] == [("image", "tensor(float)", 64)]
    assert [(o.name, o.type) for o in session.get_outputs()] == [
        ("label", "tensor(int64)"),
        ("probabilities", "tensor(float)"),
    ]
    test = json.loads((tmp_path / "test.json").read_text())
    report = json.loads((tmp_path / "report.json").read_text())
    labels, probabilities = session.run(None, {"image": np.array(test["images"], np.float32)})
    assert np.mean(labels == np.array(test["labels"])) == report["accuracy"] > 0.93
    assert np.array_equal(probabilities.argmax(axis=1), labels)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_the_example_exports_nothing_when_the_model_says_something_else_than_the_network(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(EXAMPLE.read_text().replace("Relu (mixed_2)", "Tanh (mixed_2)"))
    out = tmp_path / "out"
    out.mkdir()

    ran = train(wrong, out, "--epochs", "2")

    assert ran.returncode == 1
    assert "nothing was exported" in ran.stderr
    assert [file.name for file in out.iterdir()] == ["metrics.jsonl"]


def test_answers_that_score_otherwise_than_the_report_fail_the_demo(tmp_path: Path) -> None:
    def write(name: str, content: object) -> Path:
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    def score(labels: list[int]) -> subprocess.CompletedProcess[str]:
        answer = write("answer.json", {"outputs": [{"name": "label", "data": labels}]})
        return subprocess.run(
            [sys.executable, ROOT / "scripts/digits.py", "score", test, answer, report], capture_output=True, text=True
        )

    test = write("test.json", {"images": [[0] * 64] * 4, "labels": [1, 2, 3, 4]})
    report = write("report.json", {"accuracy": 0.75})

    same = score([1, 2, 3, 0])
    assert same.returncode == 0
    assert same.stdout.startswith("3 of 4 right: 75.00% through the server")
    better = score([1, 2, 3, 4])
    assert better.returncode == 1
    assert "does not answer as the trained network did" in better.stderr
    assert score([1, 2, 3]).returncode == 1


def test_pip_settings_reach_uv(tmp_path: Path) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://one.example/simple\ntrusted-host = one.example\n"
        "[install]\nextra-index-url =\n  https://two.example/simple\n  https://three.example/it's\n"
        "find-links = /wheels /more\n"
    )

    settings = uv_settings(tmp_path, {"PIP_CONFIG_FILE": str(config), "PIP_CERT": "/company.pem"})

    assert settings == {
        "UV_DEFAULT_INDEX": "https://one.example/simple",
        "UV_INDEX": "https://two.example/simple https://three.example/it's",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INSECURE_HOST": "one.example",
        "SSL_CERT_FILE": "/company.pem",
    }


def test_without_pip_settings_uv_is_told_nothing(tmp_path: Path) -> None:
    assert uv_settings(tmp_path, {}) == {}


def test_settings_of_uv_itself_win_over_those_of_pip(tmp_path: Path) -> None:
    pip = {"PIP_INDEX_URL": "https://pip.example/simple", "PIP_CERT": "/pip.pem"}

    assert (
        uv_settings(tmp_path, pip | {"UV_DEFAULT_INDEX": "https://uv.example/simple", "SSL_CERT_FILE": "/uv.pem"}) == {}
    )

    (tmp_path / "uv").mkdir()
    (tmp_path / "uv/uv.toml").write_text('[[index]]\nurl = "https://uv.example/simple"\n')
    assert uv_settings(tmp_path, pip) == {"SSL_CERT_FILE": "/pip.pem"}


def test_the_lock_pins_by_hash_and_names_no_index() -> None:
    lock = (ROOT / "requirements.lock").read_text()

    assert "://" not in lock
    assert "--index" not in lock
    pins = [line for line in lock.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(pins) > 20
    assert all("==" in pin and pin.endswith("\\") for pin in pins)


class Demo:
    """scripts/demo in a folder of its own, slow enough to interfere with."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.output = folder.parent / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [ROOT / "scripts/demo"],
                env=os.environ | (environment or {}) | {"DEMO": str(folder), "SLOW": "0.3"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def reach(self, text: str) -> None:
        def printed() -> bool:
            assert self.process.poll() is None, self.output.read_text()
            return text in self.output.read_text()

        eventually(f"the demo prints {text!r}", printed, DEMO_PATIENCE_S)

    @property
    def daemon_pid(self) -> int:
        return int((self.folder / "daemon.pid").read_text())

    def running(self) -> list[str]:
        """Command lines and folders of processes that live in the demo's folder, the demo itself aside."""
        found: list[str] = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) not in (os.getpid(), self.process.pid):
                try:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    command += f"(in {(entry / 'cwd').readlink()})"
                except OSError:
                    continue
                if str(self.folder) in command:
                    found.append(command)
        return found

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            self.process.wait(DEMO_PATIENCE_S)
        subprocess.run([ROOT / "scripts/demo", "stop"], env=os.environ | {"DEMO": str(self.folder)}, check=True)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    with closing(Demo(tmp_path / "demo")) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("back", ["in the middle of the training", "when the training has ended"])
def test_the_demo_ends_well_although_the_daemon_is_killed_and_is_back(demo: Demo, back: str) -> None:
    demo.reach("epoch   4/20")
    os.kill(demo.daemon_pid, signal.SIGKILL)
    demo.reach("You may start it again")
    if back == "when the training has ended":
        ended = demo.folder / "state/jobs/1/attempt-1/exit.json"
        eventually("the job ends without a daemon", ended.exists)
    # The other terminal of the person who watches.
    with (demo.folder / "second.log").open("wb") as log:
        second = subprocess.Popen(
            [ROOT / ".venv/bin/mlbox", "serve", "--state", demo.folder / "state", "--listen", "127.0.0.1:0",
             "--infer-http", "127.0.0.1:0"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        status = demo.process.wait(DEMO_PATIENCE_S)
        output = demo.output.read_text()
        assert status == 0, output
        epochs = [line.split("/")[0] for line in output.splitlines() if line.startswith("epoch")]
        assert epochs == [f"epoch {epoch:3}" for epoch in range(1, 21)]
        assert "of 360 right" in output
        assert "mlbox keeps running" in output  # the second terminal's daemon is not the demo's to stop
    finally:
        second.send_signal(signal.SIGTERM)
        second.wait(30)


@pytest.mark.slow
def test_an_interrupted_demo_leaves_nothing_running(demo: Demo) -> None:
    demo.reach("epoch   2/20")

    os.killpg(demo.process.pid, signal.SIGINT)

    assert demo.process.wait(60) == 130
    assert "cancelled" in demo.output.read_text()
    assert demo.running() == []


@pytest.mark.slow
def test_on_a_box_with_gpus_the_demo_pins_a_free_card(tmp_path: Path) -> None:
    box = StandIn(tmp_path)
    box.show(FakeGpu(uuid="GPU-busy", used=4096, compute=[(os.getpid(), 4096)]), FakeGpu(uuid="GPU-idle"))

    with closing(Demo(tmp_path / "demo", box.environment())) as demo:
        assert demo.process.wait(DEMO_PATIENCE_S) == 0, demo.output.read_text()

    output = demo.output.read_text()
    assert "-F gpus=1 " in output
    assert "the GPU of this job, GPU-idle," in output
    assert "of 360 right" in output
