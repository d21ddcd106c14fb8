"""Servers for the tests of this room: one that many tests share, and one of a test's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx import TensorProto

from tests.serving import onnx_models
from tests.serving.process import InferenceServer

KINDS = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16,
    "BYTES": TensorProto.STRING,
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[InferenceServer]:
    """A started server on empty folders."""
    made = InferenceServer(tmp_path)
    try:
        yield made.start()
    finally:
        made.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceServer]:
    """A server with a model of each kind; tests leave it as they find it."""
    made = InferenceServer(tmp_path_factory.mktemp("shared"), options=("--body-max", "1000000", "--run-timeout", "2"))
    try:
        for kind, code in KINDS.items():
            made.place(onnx_models.identity(code), f"identity_{kind}")
        made.place(onnx_models.identity(TensorProto.FLOAT, None), "any_rank")
        made.place(onnx_models.identity(TensorProto.STRING, [1]), "one_string")
        made.place(onnx_models.simple(), "simple")
        (made.models / "simple" / "config.pbtxt").write_text('name: "simple"\nmax_batch_size: 8\n')
        made.place(onnx_models.adder(5.0), "adder")
        made.place(onnx_models.table(3.0), "table")
        made.place(onnx_models.repeat(), "repeat")
        yield made.start()
    finally:
        made.close()
