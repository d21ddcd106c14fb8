"""The loading road of a real server: what it takes from the model folder, what it refuses, what serves meanwhile."""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto

from tests.serving import onnx_models
from tests.serving.onnx_models import save
from tests.serving.process import InferenceServer, eventually

pytestmark = pytest.mark.slow


def answers(server: InferenceServer, model: str = "m", version: str = "") -> float | None:
    """The weight of the `adder` that answers, None when none does."""
    reply = server.add(f"{model}{version}")
    return reply.json["outputs"][0]["data"][0] if reply.status == 200 else None


def wait_answer(server: InferenceServer, weight: float | None, model: str = "m") -> None:
    eventually(f"{model} answers {weight}", lambda: answers(server, model) == weight)


class TestVersions:
    def test_copying_a_file_in_is_a_deployment(self, server: InferenceServer) -> None:
        save(onnx_models.adder(1.0), server.models / "m" / "1")
        wait_answer(server, 1.0)

    def test_a_folder_renamed_into_place_is_one_too(self, server: InferenceServer) -> None:
        server.place(onnx_models.adder(1.0), "m")
        wait_answer(server, 1.0)

    def test_the_newest_version_replaces_the_one_before(self, server: InferenceServer) -> None:
        server.place(onnx_models.adder(1.0), "m", 1)
        wait_answer(server, 1.0)
        server.place(onnx_models.adder(10.0), "m", 10)
        wait_answer(server, 10.0)
        server.place(onnx_models.adder(9.0), "m", 9)
        row = eventually("version 1 went", lambda: server.index().get(("m", "1")))
        assert row["state"] == "UNAVAILABLE"
        assert row["reason"] == "unloaded"
        assert server.get("/v2/models/m").json["versions"] == ["10"]
        assert server.get("/v2/models/m/versions/1/ready").status == 503
        assert answers(server, version="/versions/10") == 10.0
        assert ("m", "9") not in server.index()

    def test_removing_the_newest_brings_back_the_one_before(self, server: InferenceServer) -> None:
        server.place(onnx_models.adder(1.0), "m", 1)
        server.place(onnx_models.adder(2.0), "m", 2)
        wait_answer(server, 2.0)
        shutil.rmtree(server.models / "m" / "2")
        wait_answer(server, 1.0)
        assert ("m", "2") not in server.index()

    def test_a_config_keeps_more_versions(self, server: InferenceServer) -> None:
        (server.models / "m").mkdir()
        (server.models / "m" / "config.pbtxt").write_text("version_policy { latest { num_versions: 2 } }")
        for number in (1, 2, 3):
            server.place(onnx_models.adder(float(number)), "m", number)
        wait_answer(server, 3.0)
        eventually("versions 2 and 3", lambda: server.get("/v2/models/m").json.get("versions") == ["2", "3"])
        assert answers(server, version="/versions/2") == 2.0
        (server.models / "m" / "config.pbtxt").write_text("version_policy { specific { versions: [1] } }")
        wait_answer(server, 1.0)
        eventually("version 1 alone", lambda: server.get("/v2/models/m").json.get("versions") == ["1"])

    def test_removing_the_folder_unloads(self, server: InferenceServer) -> None:
        server.place(onnx_models.adder(1.0), "m")
        wait_answer(server, 1.0)
        shutil.rmtree(server.models / "m")
        eventually("it is unknown", lambda: server.get("/v2/models/m").status == 404)
        assert server.index() == {}
        eventually("its copy is gone", lambda: [p.name for p in server.store.iterdir()] == [".lock"])

    def test_unloading_lasts_until_it_is_asked_for_or_changes(self, server: InferenceServer) -> None:
        server.place(onnx_models.adder(1.0), "m")
        wait_answer(server, 1.0)
        assert server.post("/v2/repository/models/m/unload").status == 200
        assert server.add("m").status == 503
        assert server.index()[("m", "1")]["reason"] == "unloaded"
        server.place(onnx_models.adder(5.0), "other")
        wait_answer(server, 5.0, "other")
        assert server.add("m").status == 503
        assert server.post("/v2/repository/models/m/load").status == 200
        assert answers(server) == 1.0
        assert server.post("/v2/repository/models/m/unload").status == 200
        server.place(onnx_models.adder(2.0), "m", 2)
        wait_answer(server, 2.0)

    def test_a_load_is_done_when_it_says_so(self, server: InferenceServer) -> None:
        for number in range(1, 6):
            server.place(onnx_models.adder(float(number)), "m", number)
            assert server.post("/v2/repository/models/m/load").status == 200
            assert answers(server) == number

    def test_strange_folders_are_passed_over_and_told(self, server: InferenceServer) -> None:
        save(onnx_models.adder(1.0), server.models / "bad name" / "1")
        save(onnx_models.adder(1.0), server.models / ".hidden" / "1")
        save(onnx_models.adder(1.0), server.models / "m" / "latest")
        Path(os.fsdecode(os.fsencode(server.models) + b"/\xff")).mkdir()
        rows = eventually("the index tells", lambda: len(server.index()) == 3 and server.index())
        assert "1 to 64 letters" in rows[("bad name", None)]["reason"]
        assert "no version" in rows[("m", None)]["reason"]
        assert server.log.read_text().count("'bad name' is passed over") == 1
        server.place(onnx_models.adder(1.0), "good")
        wait_answer(server, 1.0, "good")
        assert server.get("/v2/health/ready").status == 200


TRUNCATED = onnx_models.adder(2.0).SerializeToString()[:-20]
ENDLESS = onnx_models.endless().SerializeToString()


def break_with(content: bytes) -> Callable[[Path, Path], None]:
    return lambda path, _: path.write_bytes(content)


def hard_link(path: Path, outside: Path) -> None:
    path.unlink()
    save(onnx_models.adder(66.0), outside)
    path.hardlink_to(outside / "model.onnx")


def symbolic_link(path: Path, outside: Path) -> None:
    path.unlink()
    save(onnx_models.adder(66.0), outside)
    path.symlink_to(outside / "model.onnx")


def external_outside(path: Path, outside: Path) -> None:
    save(onnx_models.adder(66.0), outside, external="w.bin")
    made = onnx.load(outside / "model.onnx", load_external_data=False)
    for tensor in made.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = os.path.relpath(outside / "w.bin", path.parent)
    path.write_bytes(made.SerializeToString())


def missing(path: Path, _: Path) -> None:
    path.unlink()


def fifo(path: Path, _: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def bad_config(path: Path, _: Path) -> None:
    (path.parent.parent / "config.pbtxt").write_text("max_batch_size: {")


def half_another(path: Path, _: Path) -> None:
    whole = bytearray(path.read_bytes())
    digest = hashlib.sha256(whole).hexdigest()
    (path.parent / "SHA256SUMS").write_text(f"{digest}  model.onnx\n")
    whole[-8:] = b"\0" * 8
    path.write_bytes(whole)


class TestFilesThatCannotBeServed:
    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            pytest.param(break_with(b"garbage"), "Protobuf parsing failed", id="garbage"),
            pytest.param(break_with(TRUNCATED), "Protobuf parsing failed", id="truncated"),
            pytest.param(break_with(ENDLESS), "did not end within", id="endless"),
            pytest.param(hard_link, "hard links", id="hard link"),
            pytest.param(bad_config, "config.pbtxt", id="bad config"),
            pytest.param(break_with(b""), "graph", id="empty", marks=pytest.mark.slow),
            pytest.param(symbolic_link, "symbolic link", id="symbolic link", marks=pytest.mark.slow),
            pytest.param(external_outside, "w.bin", id="external data outside", marks=pytest.mark.slow),
            pytest.param(half_another, "not what SHA256SUMS says", id="half another", marks=pytest.mark.slow),
            pytest.param(missing, "model.onnx is missing", id="missing", marks=pytest.mark.slow),
            pytest.param(fifo, "not a regular file", id="fifo", marks=pytest.mark.slow),
        ],
    )
    def test_the_old_content_serves_on_the_reason_is_told_and_the_right_file_loads_by_itself(
        self, tmp_path: Path, spoil: Callable[[Path, Path], Any], reason: str
    ) -> None:
        server = InferenceServer(tmp_path / "server", options=("--warm-up-timeout", "0.5"))
        try:
            path = server.place(onnx_models.adder(1.0), "m")
            server.start()
            wait_answer(server, 1.0)
            spoil(path, tmp_path / "outside")
            row = server.wait_reason("m", reason)
            assert row["state"] == "READY"
            assert answers(server) == 1.0
            for _ in range(2):  # broken twice: error twice
                reply = server.post("/v2/repository/models/m/load")
                assert reply.status == 400
                assert reply.error.startswith("failed to load 'm'")
                assert reason in reply.error
                assert answers(server) == 1.0
            for extra in ("SHA256SUMS", "../config.pbtxt"):
                (path.parent / extra).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            save(onnx_models.adder(3.0), path.parent)
            wait_answer(server, 3.0)
            assert server.index()[("m", "1")]["reason"] == ""
        finally:
            server.close()

    def test_a_new_version_that_is_broken_leaves_the_one_before(self, server: InferenceServer) -> None:
        server.place(onnx_models.adder(1.0), "m", 1)
        wait_answer(server, 1.0)
        save(onnx_models.adder(2.0), server.models / "m" / "2")
        (server.models / "m" / "2" / "model.onnx").write_bytes(b"garbage")
        row = server.wait_reason("m", "parsing failed", 2)
        assert row["state"] == "UNAVAILABLE"
        assert answers(server) == 1.0
        assert server.get("/v2/models/m/versions/2/ready").status == 503
        assert "parsing failed" in server.post("/v2/repository/models/m/load").error

    def test_a_model_that_never_loaded_says_why(self, server: InferenceServer) -> None:
        server.place(onnx_models.model([], [], []), "m")
        (server.models / "m" / "1" / "model.onnx").write_bytes(b"garbage")
        server.wait_reason("m", "failed")
        reply = server.add("m")
        assert reply.status == 503
        assert reply.error.startswith("Request for unknown model: 'm' has no available versions (1: ")

    def test_a_type_that_cannot_be_told_is_refused(self, server: InferenceServer) -> None:
        made = onnx_models.model(
            [onnx.helper.make_node("SequenceConstruct", ["x"], ["y"])],
            [onnx_models.value("x", TensorProto.FLOAT, ["N"])],
            [onnx.helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)],
        )
        server.place(made, "m")
        server.wait_reason("m", "seq(tensor(float))")


class TestWhileFilesAreWritten:
    def test_a_file_that_grows_slowly_is_loaded_when_it_is_whole(self, server: InferenceServer) -> None:
        whole = onnx_models.adder(2.0).SerializeToString()
        server.place(onnx_models.adder(1.0), "m")
        wait_answer(server, 1.0)
        with (server.models / "m" / "1" / "model.onnx").open("r+b") as file:
            file.truncate(0)
            for byte in range(0, len(whole), 20):
                file.write(whole[byte : byte + 20])
                file.flush()
                assert answers(server) == 1.0
                time.sleep(0.05)
        wait_answer(server, 2.0)
        assert "not loaded" not in server.log.read_text()

    def test_a_writer_that_stalls_is_waited_for(self, server: InferenceServer) -> None:
        server.place(onnx_models.adder(1.0), "m")
        wait_answer(server, 1.0)
        whole = onnx_models.adder(2.0).SerializeToString()
        with (server.models / "m" / "1" / "model.onnx").open("r+b") as file:
            file.write(whole[:-8])  # the head of the new one, the weights of the old one: it would load
            file.flush()
            server.wait_reason("m", "still open for writing")
            assert answers(server) == 1.0
            file.write(whole[-8:])
        wait_answer(server, 2.0)

    def test_weights_that_come_before_or_after_the_model(self, server: InferenceServer) -> None:
        source = server.root / "source"
        save(onnx_models.table(2.0), source, external="w.bin")
        for name, order in (("first", ["w.bin", "model.onnx"]), ("last", ["model.onnx", "w.bin"])):
            folder = server.models / name / "1"
            folder.mkdir(parents=True)
            for number, file in enumerate(order):
                shutil.copyfile(source / file, folder / file)
                if number == 0:
                    eventually("the half was looked at", lambda name=name: (name, "1") in server.index())
                    server.wait_reason(name, "missing" if file == "w.bin" else "w.bin")
            server.wait_loaded(name)
            reply = server.infer(name, {"i": ("INT64", [1], [3])})
            assert set(reply.json["outputs"][0]["data"]) == {2.0}

    def test_an_upload_beside_the_model_is_waited_for(self, server: InferenceServer) -> None:
        """Rsync writes to a hidden name first: new weights must not be mixed with what it has renamed already."""
        server.place(onnx_models.adder(1.0), "m")
        wait_answer(server, 1.0)
        folder = server.models / "m" / "1"
        with (folder / ".w.bin.Xy12").open("wb") as upload:
            save(onnx_models.adder(2.0), server.root / "new")
            (server.root / "new" / "model.onnx").rename(folder / "model.onnx")
            for _ in range(20):
                upload.write(b"x")
                upload.flush()
                assert answers(server) == 1.0
                time.sleep(0.05)
        wait_answer(server, 2.0)

    def test_touching_a_file_reloads_nothing(self, server: InferenceServer) -> None:
        path = server.place(onnx_models.adder(1.0), "m")
        wait_answer(server, 1.0)
        path.touch()
        server.place(onnx_models.adder(5.0), "other")
        wait_answer(server, 5.0, "other")
        eventually("it is at rest", lambda: server.post("/v2/repository/models/m/load").status == 200)
        assert server.log.read_text().count("model m/1: ready") == 1

    def test_a_served_file_may_be_destroyed(self, server: InferenceServer) -> None:
        """Onnxruntime maps external data: truncating what it mapped would end the process with SIGBUS."""
        server.place(onnx_models.table(2.0, rows=4096, width=256), "m", external="w.bin")
        server.wait_loaded("m")
        os.truncate(server.models / "m" / "1" / "w.bin", 0)
        for row in (0, 2000, 4095):
            reply = server.infer("m", {"i": ("INT64", [1], [row])})
            assert set(reply.json["outputs"][0]["data"]) == {2.0}


class TestTheFolderItself:
    def test_a_folder_that_is_gone_takes_nothing_away(self, server: InferenceServer) -> None:
        server.place(onnx_models.adder(1.0), "m")
        wait_answer(server, 1.0)
        server.models.rename(server.root / "elsewhere")
        eventually("it was noticed", lambda: "cannot be read" in server.log.read_text())
        assert answers(server) == 1.0
        (server.root / "elsewhere").rename(server.models)
        server.place(onnx_models.adder(2.0), "m", 2)
        wait_answer(server, 2.0)

    def test_a_store_that_is_gone_is_made_again(self, server: InferenceServer) -> None:
        server.place(onnx_models.adder(1.0), "m")
        wait_answer(server, 1.0)
        shutil.rmtree(server.store)
        server.place(onnx_models.adder(2.0), "m", 2)
        wait_answer(server, 2.0)

    def test_many_models_come_up_together(self, tmp_path: Path) -> None:
        server = InferenceServer(tmp_path)
        for number in range(20):
            server.place(onnx_models.adder(float(number)), f"m{number}")
        (server.models / "m3" / "1" / "model.onnx").write_bytes(b"garbage")
        try:
            server.start()  # ready: all that can be loaded is
            for number in range(20):
                assert answers(server, f"m{number}") == (None if number == 3 else number)
        finally:
            server.close()

    def test_loads_from_many_clients_are_one(self, server: InferenceServer) -> None:
        server.place(onnx_models.adder(1.0), "m")
        replies: list[int] = []
        load = lambda: replies.append(server.post("/v2/repository/models/m/load").status)  # noqa: E731
        clients = [threading.Thread(target=load) for _ in range(10)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(20)
        assert replies == [200] * 10
        assert server.log.read_text().count("model m/1: ready") == 1
