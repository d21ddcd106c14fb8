"""The server as a process: how it starts, what it weighs, how it ends, and what survives its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from mlbox.transport import listen_unix
from tests.serving import onnx_models
from tests.serving.process import InferenceServer, eventually

pytestmark = pytest.mark.slow

LONG = {"x": ("FP32", [4], [0] * 4), "n": ("INT64", [1], [150_000])}
ENDLESS = {"x": ("FP32", [4], [0] * 4), "n": ("INT64", [1], [2**62])}


def resident_mib(server: InferenceServer) -> float:
    assert server.process is not None
    return psutil.Process(server.process.pid).memory_info().rss / 2**20


class TestWeight:
    @pytest.mark.slow
    def test_it_is_ready_in_seven_tenths_of_a_second_and_light(self, tmp_path: Path) -> None:
        server = InferenceServer(tmp_path)
        times = []
        try:
            for _ in range(5):
                began = time.monotonic()
                server.start()
                times.append(time.monotonic() - began)
                assert server.stop() == 0
            assert min(times) < 0.7, times
            server.start()
            server.place(onnx_models.adder(1.0), "m")
            server.wait_loaded("m")
            for _ in range(200):
                server.add("m")
            assert resident_mib(server) < 150
        finally:
            server.close()

    @pytest.mark.slow
    def test_replacing_a_model_a_hundred_times_leaks_nothing(self, tmp_path: Path) -> None:
        server = InferenceServer(tmp_path, options=("--settle", "0.02"))
        try:
            server.start()
            assert server.process is not None
            process = psutil.Process(server.process.pid)
            for number in range(1, 101):
                server.place(onnx_models.table(float(number), rows=2048, width=128), "m", number)  # 1 MiB
                assert server.post("/v2/repository/models/m/load").status == 200
                if number == 20:
                    eventually("the old ones are gone", lambda: len(list(server.store.iterdir())) == 2)
                    before = resident_mib(server), process.num_fds(), process.num_threads()
            eventually("the old ones are gone", lambda: len(list(server.store.iterdir())) == 2)
            after = resident_mib(server), process.num_fds(), process.num_threads()
            assert after[0] < before[0] + 20  # 80 models of a MiB came and went
            assert after[1] <= before[1] + 2
            assert after[2] <= before[2] + 4
        finally:
            server.close()


class TestTheEnd:
    def test_open_requests_are_answered_before_it_ends(self, server: InferenceServer) -> None:
        server.place(onnx_models.repeat(), "m")
        server.wait_loaded("m")
        replies: list[int] = []
        clients = [threading.Thread(target=lambda: replies.append(server.infer("m", LONG).status)) for _ in range(12)]
        for client in clients:
            client.start()
        eventually("the first is answered", lambda: replies)
        assert server.stop() == 0
        for client in clients:
            client.join(20)
        assert replies == [200] * 12
        assert "Traceback" not in server.log.read_text()

    def test_a_run_without_end_does_not_hold_it_up(self, tmp_path: Path) -> None:
        server = InferenceServer(tmp_path, options=("--drain", "1"))
        server.place(onnx_models.repeat(), "m")
        try:
            server.start()
            replies: list[int] = []
            client = threading.Thread(target=lambda: replies.append(server.infer("m", ENDLESS).status))
            client.start()
            assert server.process is not None
            process = psutil.Process(server.process.pid)
            before = process.cpu_times().user
            eventually("it runs", lambda: process.cpu_times().user > before + 0.3)
            began = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - began < 4.0
            client.join(10)
            assert replies == [503]
        finally:
            server.close()

    @pytest.mark.slow
    def test_a_run_that_cannot_be_ended_costs_its_client_and_nobody_else(self, tmp_path: Path) -> None:
        server = InferenceServer(tmp_path, options=("--run-timeout", "0.5", "--drain", "1"))
        server.place(onnx_models.square(), "m")
        server.place(onnx_models.adder(1.0), "other")
        try:
            server.start()
            began = time.monotonic()
            reply = server.infer("m", {"shape": ("INT64", [2], [9000, 9000])})  # some 10 s in one step
            assert reply.status == 503
            assert "did not end" in reply.error
            assert time.monotonic() - began < 5.0
            assert server.add("other").status == 200
            began = time.monotonic()
            assert server.stop() == 1  # its thread was given up
            assert time.monotonic() - began < 6.0
        finally:
            server.close()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signals_end_it_cleanly(self, server: InferenceServer, number: signal.Signals) -> None:
        assert server.process is not None
        server.process.send_signal(number)
        assert server.process.wait(10) == 0
        assert number.name in server.log.read_text()

    def test_a_stop_does_not_wait_for_files_that_never_come_to_rest(self, tmp_path: Path) -> None:
        server = InferenceServer(tmp_path)
        path = server.place(onnx_models.adder(1.0), "m")
        try:
            with path.open("ab"):
                server.start(wait=False)
                eventually("it looks at them", lambda: server.log.exists() and "models in" in server.log.read_text())
                began = time.monotonic()
                assert server.stop() == 0
                assert time.monotonic() - began < 3.0
        finally:
            server.close()

    def test_it_ends_when_its_parent_does(self, server: InferenceServer) -> None:
        assert server.process is not None
        os.close(server.parent_write)
        assert server.process.wait(10) == 0
        assert "the parent is gone" in server.log.read_text()

    def test_it_ends_when_its_parent_is_killed(self, tmp_path: Path) -> None:
        script = (
            "import sys, time\nfrom pathlib import Path\nfrom tests.serving.process import InferenceServer\n"
            "server = InferenceServer(Path(sys.argv[1])).start()\n"
            "print(server.process.pid, flush=True)\ntime.sleep(60)\n"
        )
        root = str(Path(__file__).parents[2])
        command = [sys.executable, "-c", script, str(tmp_path)]
        parent = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=os.environ | {"PYTHONPATH": root})
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait(10)
        parent.stdout.close()
        eventually("the server is gone", lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie")


class TestAfterAKill:
    def test_the_next_process_serves_again_from_the_folder(self, server: InferenceServer) -> None:
        server.place(onnx_models.adder(1.0), "m")
        server.place(onnx_models.table(2.0), "t", external="w.bin")
        server.wait_loaded("m")
        server.wait_loaded("t")
        for _ in range(3):
            server.kill()
            waiting: list[int] = []
            client = threading.Thread(target=lambda waiting=waiting: waiting.append(server.get("/v2").status))
            client.start()  # the socket is not the server's: nobody is turned away
            server.start()
            client.join(10)
            assert waiting == [200]
            assert server.add("m").json["outputs"][0]["data"] == [1.0] * 4
            assert server.is_loaded("t")
            assert len([path for path in server.store.iterdir() if not path.name.startswith(".")]) == 2

    @pytest.mark.slow
    def test_kills_at_any_moment_of_a_deployment(self, tmp_path: Path) -> None:
        server = InferenceServer(tmp_path, options=("--settle", "0.02"))
        server.place(onnx_models.adder(0.0), "m", 1)
        try:
            server.start()
            for number in range(2, 22):
                server.place(onnx_models.adder(float(number)), "m", number)
                time.sleep(0.005 * (number % 10))
                server.kill()
                server.start()
                eventually("the newest serves", lambda number=number: server.is_loaded("m", number))
                assert server.add("m").json["outputs"][0]["data"][0] == number
        finally:
            server.close()


class TestStart:
    def test_a_second_server_does_not_take_the_first_ones_store(self, server: InferenceServer, tmp_path: Path) -> None:
        other = InferenceServer(tmp_path / "other")
        other.store = server.store
        try:
            other.start(wait=False)
            assert other.process is not None
            assert other.process.wait(10) == 1
            assert "another inference server uses" in other.log.read_text()
            assert server.is_ready()
        finally:
            other.close()

    @pytest.mark.parametrize("fd", ["0", "99"])
    def test_a_descriptor_that_is_no_socket_is_told(self, tmp_path: Path, fd: str) -> None:
        command = [sys.executable, "-m", "mlbox.serving.server", "--fd", fd, "--models", str(tmp_path / "m")]
        command += ["--store", str(tmp_path / "s"), "--access", str(tmp_path / "a")]
        ended = subprocess.run(command, capture_output=True, timeout=20, stdin=subprocess.DEVNULL)
        assert ended.returncode == 1
        assert b"the inference server cannot run" in ended.stderr

    def test_several_sockets_a_unix_one_among_them(self, tmp_path: Path) -> None:
        server = InferenceServer(tmp_path)
        local = listen_unix(tmp_path / "s")
        command = [sys.executable, "-m", "mlbox.serving.server", "--fd", str(server.listener.fileno())]
        command += ["--fd", str(local.fileno()), "--models", str(server.models), "--store", str(server.store)]
        command += ["--access", str(server.access), "--name", "triton"]
        fds = (server.listener.fileno(), local.fileno())
        with server.log.open("ab") as log:
            server.process = subprocess.Popen(command, pass_fds=fds, stderr=log, stdin=subprocess.DEVNULL)
        try:
            server.wait_ready()
            assert server.get("/v2").json["name"] == "triton"
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(tmp_path / "s"))
                client.sendall(
                    b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer %b\r\n\r\n"
                    % server.token.encode()
                )
                answer = b""
                while data := client.recv(65536):
                    answer += data
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["name"] == "triton"
        finally:
            local.close()
            server.close()
