"""onnxruntime behind its only importer: what loads, what is refused and why, and how a run is ended."""

import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mlbox.serving.server import sessions
from mlbox.serving.server.sessions import LoadFailed, RunFailed, RunStopped, Session, SessionSettings, Stop
from mlbox.serving.server.tensors import BF16, BYTES, DATATYPES
from tests.serving import onnx_models
from tests.serving.conftest import KINDS
from tests.serving.onnx_models import model, save, value

QUICK = SessionSettings(warm_up_timeout_s=0.5)


def load(made: onnx.ModelProto | Path, folder: Path, settings: SessionSettings = QUICK) -> Session:
    path = made if isinstance(made, Path) else save(made, folder)
    return sessions.load(path, settings, gpu="never")


class TestTypes:
    @pytest.mark.parametrize("kind", KINDS)
    def test_each_datatype_goes_through_unchanged(self, tmp_path: Path, kind: str) -> None:
        session = load(onnx_models.identity(KINDS[kind]), tmp_path)
        assert session.device == "cpu"
        assert [(spec.name, spec.datatype.name, spec.shape) for spec in session.inputs] == [("x", kind, (-1,))]
        for size in (0, 1, 5):
            array = (
                np.array([f"é{n}" for n in range(size)], np.object_)
                if kind == BYTES
                else np.arange(size).astype(DATATYPES[kind].storage)
            )
            (result,) = session.run({"x": array}, ["y"], Stop())
            assert result.dtype == array.dtype
            assert result.tolist() == array.tolist()

    def test_bfloat16_beside_other_types(self, tmp_path: Path) -> None:
        made = model(
            [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)],
            [value("x", TensorProto.FLOAT, ["N"])],
            [value("y", TensorProto.BFLOAT16, ["N"])],
        )
        (result,) = load(made, tmp_path).run({"x": np.array([1.0, -2.0], np.float32)}, ["y"], Stop())
        assert result.tolist() == [0x3F80, 0xC000]
        assert load(made, tmp_path).outputs[0].datatype.name == BF16

    def test_shapes_are_told_with_free_dimensions(self, tmp_path: Path) -> None:
        session = load(onnx_models.identity(TensorProto.FLOAT, ["N", None, 3]), tmp_path)
        assert session.inputs[0].shape == (-1, -1, 3)
        assert load(onnx_models.identity(TensorProto.FLOAT, None), tmp_path).inputs[0].shape is None

    def test_a_type_without_a_name_in_the_protocol_is_refused(self, tmp_path: Path) -> None:
        made = model(
            [helper.make_node("SequenceConstruct", ["x"], ["y"])],
            [value("x", TensorProto.FLOAT, ["N"])],
            [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)],
        )
        with pytest.raises(LoadFailed, match=r"its output 'y' is of type seq\(tensor\(float\)\)"):
            load(made, tmp_path)


class TestFiles:
    @pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x07" * 500], ids=["empty", "garbage", "noise"])
    def test_what_is_no_model(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(LoadFailed) as refused:
            load(tmp_path / "model.onnx", tmp_path)
        assert str(tmp_path) not in str(refused.value)

    def test_every_truncation_is_noticed(self, tmp_path: Path) -> None:
        whole = onnx_models.adder(1.0).SerializeToString()
        for size in range(0, len(whole), 7):
            (tmp_path / "model.onnx").write_bytes(whole[:size])
            with pytest.raises(LoadFailed):
                load(tmp_path / "model.onnx", tmp_path)

    def test_a_load_that_takes_too_long_is_given_up(self, tmp_path: Path) -> None:
        count = 6000
        nodes = [helper.make_node("Add", [f"a{number}", "w"], [f"a{number + 1}"]) for number in range(count)]
        rows = [value(name, TensorProto.FLOAT, ["N", 4]) for name in ("a0", f"a{count}")]
        made = model(nodes, rows[:1], rows[1:], [numpy_helper.from_array(np.ones(4, np.float32), "w")])
        with pytest.raises(LoadFailed, match=r"not loaded within 0\.01 s"):
            load(made, tmp_path, SessionSettings(load_timeout_s=0.01))

    def test_external_data_is_found_beside_the_model_and_missed_when_it_is_not_there(self, tmp_path: Path) -> None:
        path = save(onnx_models.table(2.0), tmp_path, external="weights.bin")
        (result,) = load(path, tmp_path).run({"i": np.array([0])}, ["y"], Stop())
        assert set(result.ravel().tolist()) == {2.0}
        (tmp_path / "weights.bin").unlink()
        with pytest.raises(LoadFailed, match=r"weights\.bin"):
            load(path, tmp_path)

    def test_external_data_outside_the_folder_is_refused(self, tmp_path: Path) -> None:
        path = save(onnx_models.table(2.0), tmp_path / "model", external="weights.bin")
        (tmp_path / "model" / "weights.bin").rename(tmp_path / "weights.bin")
        made = onnx.load(path, load_external_data=False)
        for entry in made.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
        path.write_bytes(made.SerializeToString())
        with pytest.raises(LoadFailed):
            load(path, tmp_path)

    def test_mutated_models_load_or_are_refused(self, tmp_path: Path) -> None:
        """Nothing but LoadFailed comes out, whatever a byte of the file says (onnxruntime raises other things too)."""
        whole = onnx_models.simple().SerializeToString()
        random = np.random.default_rng(7)
        refused = 0
        for _ in range(300):
            mutated = bytearray(whole)
            for _ in range(int(random.integers(1, 4))):
                mutated[int(random.integers(len(mutated)))] = int(random.integers(256))
            (tmp_path / "model.onnx").write_bytes(mutated)
            try:
                load(tmp_path / "model.onnx", tmp_path)
            except LoadFailed:
                refused += 1
        assert refused > 30


class TestRuns:
    def test_a_run_is_ended_from_another_thread(self, tmp_path: Path) -> None:
        session = load(onnx_models.repeat(), tmp_path)
        stop = Stop()
        threading.Timer(0.2, stop.set).start()
        began = time.monotonic()
        with pytest.raises(RunStopped):
            session.run({"x": np.zeros(4, np.float32), "n": np.array([2**62])}, ["y"], stop)
        assert time.monotonic() - began < 3.0
        (result,) = session.run({"x": np.zeros(4, np.float32), "n": np.array([3])}, ["y"], Stop())
        assert result.tolist() == [3.0] * 4

    def test_an_input_that_the_model_refuses_is_told(self, tmp_path: Path) -> None:
        session = load(onnx_models.table(1.0), tmp_path)
        with pytest.raises(RunFailed, match="out of data bounds"):
            session.run({"i": np.array([99])}, ["y"], Stop())

    def test_a_model_that_never_ends_is_refused_at_its_first_run(self, tmp_path: Path) -> None:
        with pytest.raises(LoadFailed, match=r"did not end within 0\.5 s"):
            load(onnx_models.endless(), tmp_path)

    def test_a_model_that_dislikes_zeros_is_served(self, tmp_path: Path) -> None:
        made = model(
            [helper.make_node("Reshape", ["w", "shape"], ["y"])],
            [value("shape", TensorProto.INT64, [2])],
            [value("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.arange(6, dtype=np.float32), "w")],
        )
        session = load(made, tmp_path)
        with pytest.raises(RunFailed):
            session.run({"shape": np.array([5, 5])}, ["y"], Stop())
        (result,) = session.run({"shape": np.array([2, 3])}, ["y"], Stop())
        assert result.shape == (2, 3)

    def test_an_input_of_terabytes_is_not_warmed_up_with(self, tmp_path: Path) -> None:
        assert load(onnx_models.identity(TensorProto.FLOAT, [2**20, 2**20]), tmp_path).inputs[0].shape == (2**20, 2**20)

    def test_an_allocation_of_terabytes_fails_alone(self, tmp_path: Path) -> None:
        made = model(
            [helper.make_node("ConstantOfShape", ["shape"], ["y"])],
            [value("shape", TensorProto.INT64, [1])],
            [value("y", TensorProto.FLOAT, None)],
        )
        session = load(made, tmp_path)
        with pytest.raises(RunFailed):
            session.run({"shape": np.array([10**12])}, ["y"], Stop())
        assert session.run({"shape": np.array([3])}, ["y"], Stop())[0].tolist() == [0.0] * 3


class TestGpu:
    def test_what_requires_a_gpu_is_refused_where_there_is_none(self, tmp_path: Path) -> None:
        if sessions.cuda_problem() is None:
            pytest.skip("this box has a GPU")
        path = save(onnx_models.adder(1.0), tmp_path)
        with pytest.raises(LoadFailed, match="it requires a GPU: "):
            sessions.load(path, QUICK, gpu="require")

    def test_what_prefers_one_runs_where_it_can_and_says_where(self, tmp_path: Path) -> None:
        session = sessions.load(save(onnx_models.adder(1.0), tmp_path), QUICK, gpu="prefer")
        assert session.device == ("cpu" if sessions.cuda_problem() else "cuda:0")
        (result,) = session.run({"x": np.zeros((1, 4), np.float32)}, ["y"], Stop())
        assert result.tolist() == [[1.0] * 4]
