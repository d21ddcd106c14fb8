"""What clients notice while models are replaced, removed and spoilt under them: nothing."""

import http.client
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest

from tests.serving import onnx_models
from tests.serving.onnx_models import save
from tests.serving.process import InferenceServer, eventually

ROWS = 4096
ASKED = [0, 1, ROWS // 2, ROWS - 1]


class Clients:
    """Threads that ask a `table` model without a pause and keep count of what they hear.

    `heard` counts weights; an answer whose elements differ counts as `mixed`, any other trouble by its text.
    """

    def __init__(self, server: InferenceServer, model: str, count: int) -> None:
        self.heard: Counter[object] = Counter()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._server = server
        self._path = f"/v2/models/{model}/infer"
        self._threads = [threading.Thread(target=self._ask) for _ in range(count)]

    def _ask(self) -> None:
        value = {"name": "i", "datatype": "INT64", "shape": [len(ASKED)], "data": ASKED}
        body = json.dumps({"inputs": [value]})
        connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=20)
        while not self._stop.is_set():
            try:
                connection.request("POST", self._path, body, self._server.authorization)
                response = connection.getresponse()
                text = response.read()
                word: object = f"{response.status} {text.decode()[:200]}"
                if response.status == 200:
                    values = set(json.loads(text)["outputs"][0]["data"])
                    word = values.pop() if len(values) == 1 else "mixed"
            except Exception as error:
                word = repr(error)
                connection.close()
            with self._lock:
                self.heard[word] += 1
        connection.close()

    @contextmanager
    def asking(self) -> Iterator["Clients"]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(20)

    def wait_for(self, weight: float) -> None:
        """Until some client heard `weight`, and a little longer."""
        before = self.heard[weight]
        eventually(f"somebody hears {weight}", lambda: self.heard[weight] > before + 20)


def big(weight: float) -> onnx.ModelProto:
    return onnx_models.table(weight, rows=ROWS, width=128)  # 2 MiB: no write of it is one step


def write_slowly(target: Path, content: bytes, mode: str, pieces: int = 6) -> None:
    """Write in pieces, in place (`r+b`) or after truncating (`wb`)."""
    step = -(-len(content) // pieces)
    with target.open(mode) as file:
        for at in range(0, len(content), step):
            file.write(content[at : at + step])
            file.flush()
            time.sleep(0.03)


def in_place(folder: Path, new: Path) -> None:
    write_slowly(folder / "model.onnx", (new / "model.onnx").read_bytes(), "r+b")


def truncated(folder: Path, new: Path) -> None:
    write_slowly(folder / "model.onnx", (new / "model.onnx").read_bytes(), "wb")


def renamed(folder: Path, new: Path) -> None:
    (new / "model.onnx").replace(folder / "model.onnx")


def whole_folder(folder: Path, new: Path) -> None:
    folder.rename(folder.parent / ".old")
    new.rename(folder)
    shutil.rmtree(folder.parent / ".old")


def removed_first(folder: Path, new: Path) -> None:
    (folder / "model.onnx").unlink()
    shutil.copyfile(new / "model.onnx", folder / "model.onnx")


def weights_first(folder: Path, new: Path) -> None:
    write_slowly(folder / "w.bin", (new / "w.bin").read_bytes(), "r+b")
    write_slowly(folder / "model.onnx", (new / "model.onnx").read_bytes(), "wb", pieces=2)


def weights_last(folder: Path, new: Path) -> None:
    write_slowly(folder / "model.onnx", (new / "model.onnx").read_bytes(), "wb", pieces=2)
    write_slowly(folder / "w.bin", (new / "w.bin").read_bytes(), "wb")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("replace", "external"),
    [
        (in_place, None),
        (truncated, None),
        (renamed, None),
        (whole_folder, None),
        (removed_first, None),
        (weights_first, "w.bin"),
        (weights_last, "w.bin"),
    ],
)
def test_a_version_overwritten_under_12_clients(
    server: InferenceServer, replace: Callable[[Path, Path], None], external: str | None
) -> None:
    server.place(big(1.0), "m", external=external)
    server.wait_loaded("m")
    with Clients(server, "m", 12).asking() as clients:
        clients.wait_for(1.0)
        for weight in (2.0, 3.0, 4.0):
            new = server.root / f"new-{weight}"
            save(big(weight), new, external=external)
            replace(server.models / "m" / "1", new)
            clients.wait_for(weight)
    assert set(clients.heard) == {1.0, 2.0, 3.0, 4.0}


@pytest.mark.slow
def test_new_versions_under_12_clients(server: InferenceServer) -> None:
    server.place(big(1.0), "m")
    server.wait_loaded("m")
    with Clients(server, "m", 12).asking() as clients:
        for number in range(2, 8):
            server.place(big(float(number)), "m", number)
            clients.wait_for(float(number))
            assert list((server.models / "m").iterdir())
    assert set(clients.heard) == {float(number) for number in range(1, 8)}
    eventually("one copy is left", lambda: len(list(server.store.iterdir())) == 2)


@pytest.mark.slow
def test_broken_files_under_12_clients(server: InferenceServer) -> None:
    path = server.place(big(1.0), "m")
    server.wait_loaded("m")
    whole = path.read_bytes()
    with Clients(server, "m", 12).asking() as clients:
        for content in (b"", b"garbage", whole[:1000], whole[:-1]):
            path.write_bytes(content)
            server.wait_reason("m", "serve on")
            clients.wait_for(1.0)
            path.write_bytes(whole)
            eventually("it is mended", lambda: server.index()[("m", "1")]["reason"] == "")
    assert set(clients.heard) == {1.0}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unload", "remove"])
def test_unloading_with_50_in_flight_answers_all_50(tmp_path: Path, how: str) -> None:
    server = InferenceServer(tmp_path, options=("--run-timeout", "30"))
    server.place(onnx_models.repeat(), "m")
    rounds = 60_000
    replies: list[int | float] = []

    def ask() -> None:
        reply = server.infer("m", {"x": ("FP32", [4], [0] * 4), "n": ("INT64", [1], [rounds])})
        replies.append(reply.json["outputs"][0]["data"][0] if reply.status == 200 else reply.status)

    try:
        server.start()
        clients = [threading.Thread(target=ask) for _ in range(50)]
        for client in clients:
            client.start()
        eventually("the first is answered", lambda: replies)
        assert len(replies) < 50
        if how == "unload":
            assert server.post("/v2/repository/models/m/unload").status == 200
            assert server.infer("m", {"x": ("FP32", [4], [0] * 4), "n": ("INT64", [1], [1])}).status == 503
        else:
            shutil.rmtree(server.models / "m")
            eventually("it is unknown", lambda: server.get("/v2/models/m").status == 404)
        assert len(replies) < 50
        for client in clients:
            client.join(60)
        assert replies == [rounds] * 50
        eventually("its copy is gone", lambda: [path.name for path in server.store.iterdir()] == [".lock"])
    finally:
        server.close()


@pytest.mark.slow
def test_a_slow_model_does_not_hold_up_another(server: InferenceServer) -> None:
    server.place(onnx_models.repeat(), "slow")
    server.place(onnx_models.adder(1.0), "quick")
    server.wait_loaded("slow")
    server.wait_loaded("quick")

    def p90(count: int = 150) -> float:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            assert server.add("quick").status == 200
            times.append(time.perf_counter() - began)
        return sorted(times)[int(count * 0.9)]

    alone = p90()
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            server.infer("slow", {"x": ("FP32", [4], [0] * 4), "n": ("INT64", [1], [200_000])})

    busy = [threading.Thread(target=keep_busy) for _ in range(20)]
    for thread in busy:
        thread.start()
    try:
        stats = "/v2/models/slow/stats"
        eventually("they run", lambda: server.get(stats).json["model_stats"][0]["execution_count"] > 2)
        beside = p90()
    finally:
        stop.set()
        for thread in busy:
            thread.join(60)
    assert beside < max(0.1, 20 * alone)  # twenty requests of 100 ms each wait for the other model all the while


@pytest.mark.slow
def test_more_waiting_requests_than_allowed_are_refused_at_once(tmp_path: Path) -> None:
    server = InferenceServer(tmp_path, options=("--queue-max", "3", "--run-timeout", "3"))
    server.place(onnx_models.repeat(), "m")
    replies: list[tuple[int, float]] = []

    def ask() -> None:
        began = time.monotonic()
        reply = server.infer("m", {"x": ("FP32", [4], [0] * 4), "n": ("INT64", [1], [2**62])})
        replies.append((reply.status, time.monotonic() - began))

    try:
        server.start()
        clients = [threading.Thread(target=ask) for _ in range(12)]
        for client in clients:
            client.start()
        eventually("most are refused", lambda: len(replies) >= 7)
        assert all(status == 503 and took < 2.0 for status, took in replies)
        for client in clients:
            client.join(20)
        assert {status for status, _ in replies} == {503}
    finally:
        server.close()
