"""Small ONNX models whose answers tell which weights made them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET = 17
_IR = 8


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
    opset: int = _OPSET,
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(initializers))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = _IR
    return made


def value(name: str, kind: int, shape: Sequence[Any] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def adder(weight: float, width: int = 4, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """`y = x + weight` for rows of `width`; a batch of any size."""
    weights = numpy_helper.from_array(np.full((width,), weight, helper.tensor_dtype_to_np_dtype(dtype)), "w")
    return model(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [value("x", dtype, ["N", width])],
        [value("y", dtype, ["N", width])],
        [weights],
    )


def table(weight: float, rows: int = 64, width: int = 64) -> onnx.ModelProto:
    """`y = w[i]`, where every element of `w` is `weight`: onnxruntime reads `w` as it lies in the file."""
    weights = numpy_helper.from_array(np.full((rows, width), weight, np.float32), "w")
    return model(
        [helper.make_node("Gather", ["w", "i"], ["y"])],
        [value("i", TensorProto.INT64, ["N"])],
        [value("y", TensorProto.FLOAT, ["N", width])],
        [weights],
    )


def identity(kind: int, shape: Sequence[Any] | None = ("N",), names: tuple[str, str] = ("x", "y")) -> onnx.ModelProto:
    """`y = x` of any datatype."""
    return model(
        [helper.make_node("Identity", [names[0]], [names[1]])],
        [value(names[0], kind, shape)],
        [value(names[1], kind, shape)],
        opset=21,
    )


def simple() -> onnx.ModelProto:
    """The model of Triton's examples: INT32 sums and differences of 16 numbers, in batches."""
    names = ("INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1")
    first, second, total, difference = (value(name, TensorProto.INT32, ["batch", 16]) for name in names)
    return model(
        [helper.make_node("Add", names[:2], names[2:3]), helper.make_node("Sub", names[:2], names[3:])],
        [first, second],
        [total, difference],
    )


def endless() -> onnx.ModelProto:
    """A loop that never ends, on any input."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Identity", ["a"], ["b"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("a", TensorProto.FLOAT, None)],
        [value("go_on", TensorProto.BOOL, []), value("b", TensorProto.FLOAT, None)],
    )
    return model(
        [helper.make_node("Loop", ["", "yes", "x"], ["y"], body=body)],
        [value("x", TensorProto.FLOAT, [4])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(True), "yes")],
    )


def repeat() -> onnx.ModelProto:
    """`y = x + n` for rows of 4, by `n` rounds of a loop: how long it takes is the client's choice."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Add", ["a", "one"], ["b"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("a", TensorProto.FLOAT, None)],
        [value("go_on", TensorProto.BOOL, []), value("b", TensorProto.FLOAT, None)],
    )
    return model(
        [
            helper.make_node("Squeeze", ["n"], ["rounds"]),
            helper.make_node("Loop", ["rounds", "yes", "x"], ["y"], body=body),
        ],
        [value("x", TensorProto.FLOAT, [4]), value("n", TensorProto.INT64, [1])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(True), "yes"), numpy_helper.from_array(np.float32(1.0), "one")],
    )


def square() -> onnx.ModelProto:
    """One product of two matrices of `shape`: a single step, however large, which nothing interrupts."""
    return model(
        [
            helper.make_node("ConstantOfShape", ["shape"], ["ones"]),
            helper.make_node("MatMul", ["ones", "ones"], ["product"]),
            helper.make_node("ReduceMax", ["product"], ["y"], keepdims=0),
        ],
        [value("shape", TensorProto.INT64, [2])],
        [value("y", TensorProto.FLOAT, None)],
    )


def save(made: onnx.ModelProto, folder: Path, *, external: str | None = None) -> Path:
    """Write `folder/model.onnx`, its weights in the file `external` where that is named."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    if external is None:
        path.write_bytes(made.SerializeToString())
    else:
        onnx.save_model(made, path, save_as_external_data=True, location=external, size_threshold=0)
    return path
