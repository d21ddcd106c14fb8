"""Open Inference Protocol v2 over HTTP: bytes to a typed request, a typed response to bytes. Pure.

Implements the `infer` part of the protocol with the binary tensor data extension, raw binary requests and the
classification extension, as Triton documents them (docs/protocol in triton-inference-server/server).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import numpy as np

from mlbox.errors import Invalid
from mlbox.serving.server import jsontext
from mlbox.serving.server.signature import (
    ANY,
    InferRequest,
    InferResponse,
    RequestedOutput,
    Signature,
    Tensor,
    TensorSpec,
)
from mlbox.serving.server.tensors import (
    BF16,
    BYTES,
    DATATYPES,
    INT64_MAX,
    Array,
    datatype,
    element_count,
    from_binary,
    from_json,
    to_binary,
    to_json,
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """An answer: its parts in order, and the length of the JSON before the binary parts (None: JSON is all)."""

    parts: Sequence[bytes | memoryview]
    header_length: int | None


def header_length(text: str | None, body_length: int) -> int | None:
    """What the header `Inference-Header-Content-Length` says; None when it is missing. Raises Invalid."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise Invalid(f"Unable to parse Inference-Header-Content-Length, got: {text[:40]}")
    length = int(text)
    if length > body_length:
        raise Invalid(f"inference header size should be in range (0, {body_length}), got: {length}")
    return length


def parse(body: bytes, length: int | None, signature: Signature) -> InferRequest:
    """The request in `body`, whose first `length` bytes are JSON (None: all of it; 0: raw bytes). Raises Invalid.

    The tensors are views of `body` where they can be. Whether they fit the model is `signature.check`'s to say.
    """
    if length == 0:
        return _parse_raw(body, signature)
    view = memoryview(body)
    fields = _object(jsontext.loads(body if length is None else view[:length]), "the request")
    parameters = _parameters(fields, "the request")
    blobs = _Blobs(view[length:] if length is not None else view[:0], signature.model)
    inputs: dict[str, Tensor] = {}
    for item in _array(fields, "inputs", required=True):
        tensor = _input(_object(item, "an input"), blobs, binary_possible=length is not None)
        if tensor.name in inputs:
            raise Invalid(f"input '{tensor.name}' already exists in request")
        inputs[tensor.name] = tensor
    blobs.finish()
    return InferRequest(
        id=_id(fields),
        inputs=inputs,
        outputs=_requested(fields, signature, binary=_flag(parameters, "binary_data_output")),
        timeout_s=_timeout(parameters),
    )


def encode(response: InferResponse, requested: Sequence[RequestedOutput]) -> Encoded:
    """The answer's bytes. Raises Invalid when an output cannot be told in JSON."""
    blobs: list[bytes | memoryview] = []
    outputs: list[dict[str, Any]] = []
    for tensor, wish in zip(response.outputs, requested, strict=True):
        output: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype.name,
            "shape": list(tensor.array.shape),
        }
        if wish.binary:
            blob = to_binary(tensor.datatype, tensor.array)
            output["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            values = to_json(tensor.datatype, tensor.array, f"output '{tensor.name}'")
            finite = tensor.array.dtype.kind != "f" or bool(np.isfinite(tensor.array).all())
            output["data"] = msgspec.Raw(jsontext.dumps_values(values, finite=finite))
        outputs.append(output)
    fields: dict[str, Any] = {"model_name": response.model, "model_version": str(response.version)}
    if response.id is not None:
        fields["id"] = response.id
    fields["outputs"] = outputs
    text = jsontext.dumps(fields)
    return Encoded([text, *blobs], len(text) if blobs else None)


def classify(tensor: Tensor, classes: int, *, batched: bool) -> Tensor:
    """The `classes` largest values as strings `value:index`, the largest first (classification extension)."""
    if tensor.datatype.name in (BYTES, BF16):
        raise Invalid(f"output '{tensor.name}' is {tensor.datatype.name}: its classes cannot be told")
    shape = tensor.array.shape if batched else (1, tensor.array.size)
    rows = tensor.array.reshape(shape[0], math.prod(shape[1:]))
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :classes]
    texts = [
        f"{value:f}:{index}"
        for row, indices in zip(rows, order, strict=True)
        for index, value in zip(indices.tolist(), row[indices].astype(np.float64).tolist(), strict=True)
    ]
    classes_shape = order.shape if batched else order.shape[1:]
    return Tensor(tensor.name, DATATYPES[BYTES], np.array(texts, np.object_).reshape(classes_shape))


class _Blobs:
    """The binary tensors behind the JSON, taken in the order of the inputs."""

    def __init__(self, rest: memoryview, model: str) -> None:
        self._rest = rest
        self._model = model

    def take(self, size: int, name: str) -> memoryview:
        if size > len(self._rest):
            raise Invalid(
                f"unexpected size for input '{name}', expecting {size - len(self._rest)} additional bytes for model "
                f"'{self._model}'"
            )
        blob, self._rest = self._rest[:size], self._rest[size:]
        return blob

    def finish(self) -> None:
        if len(self._rest):
            raise Invalid(
                f"unexpected additional input data for model '{self._model}': {len(self._rest)} bytes too many"
            )


def _parse_raw(body: bytes, signature: Signature) -> InferRequest:
    """A body that is nothing but the only input's bytes; its shape follows from their number."""
    if len(signature.inputs) != 1:
        raise Invalid(
            f"Raw request must only have 1 input (found 1) to be deduced but got {len(signature.inputs)} inputs in "
            f"'{signature.model}' model configuration"
        )
    spec = next(iter(signature.inputs.values()))
    array = _raw_string(body, spec, signature) if spec.datatype.name == BYTES else _raw_numbers(body, spec, signature)
    return InferRequest(
        id=None,
        inputs={spec.name: Tensor(spec.name, spec.datatype, array)},
        outputs=[RequestedOutput(name=name, binary=True) for name in signature.outputs],
    )


def _raw_string(body: bytes, spec: TensorSpec, signature: Signature) -> Array:
    shape = spec.shape or ()
    if (shape[1:] if signature.max_batch else shape) != (1,):
        raise Invalid(f"For BYTE datatype raw input '{spec.name}', the model must have input shape [1]")
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise Invalid(f"raw input '{spec.name}' is not UTF-8, as strings of ONNX models are") from error
    return np.full([1] * len(shape), text, np.object_)


def _raw_numbers(body: bytes, spec: TensorSpec, signature: Signature) -> Array:
    shape = list(spec.shape or ())
    if signature.max_batch and shape.count(ANY) > 1:
        shape[0] = 1  # the batch; where it is all that is free, it follows from the length
    if shape.count(ANY) > 1 or spec.shape is None:
        raise Invalid(
            f"The shape of the raw input '{spec.name}' can not be deduced because there are more than one "
            f"variable-sized dimension"
        )
    fixed = spec.datatype.size * element_count([size for size in shape if size != ANY], f"input '{spec.name}'")
    if ANY in shape:
        shape[shape.index(ANY)] = len(body) // fixed if fixed else 0
    return from_binary(spec.datatype, shape, memoryview(body), f"input '{spec.name}' for model '{signature.model}'")


def _input(fields: Mapping[str, object], blobs: _Blobs, *, binary_possible: bool) -> Tensor:
    name = _text(fields, "name", "an input")
    what = f"input '{name}'"
    kind = datatype(_text(fields, "datatype", what), what)
    shape = _shape(fields, what)
    parameters = _parameters(fields, what)
    if "shared_memory_region" in parameters:
        raise Invalid(f"{what} is in shared memory, which this server does not support: send its data")
    if ("data" in fields) == ("binary_data_size" in parameters):
        raise Invalid(
            f"Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters' ({what})"
        )
    if "data" in fields:
        return Tensor(name, kind, from_json(kind, shape, fields["data"], what))
    if not binary_possible:
        raise Invalid(
            "must specify valid 'Infer-Header-Content-Length' in request header and 'binary_data_size' when passing "
            "inputs in binary data format"
        )
    size = _whole(parameters["binary_data_size"], f"Unable to parse 'binary_data_size' of {what}")
    return Tensor(name, kind, from_binary(kind, shape, blobs.take(size, name), what))


def _requested(fields: Mapping[str, object], signature: Signature, *, binary: bool) -> Sequence[RequestedOutput]:
    outputs: dict[str, RequestedOutput] = {}
    for item in _array(fields, "outputs", required=False):
        output = _object(item, "an output")
        name = _text(output, "name", "an output")
        if name in outputs:
            raise Invalid(f"output '{name}' already exists in request")
        what = f"output '{name}'"
        parameters = _parameters(output, what)
        if "shared_memory_region" in parameters:
            raise Invalid(f"{what} wants shared memory, which this server does not support")
        classes = _whole(parameters.get("classification", 0), f"Unable to parse 'classification' of {what}")
        outputs[name] = RequestedOutput(
            name=name, binary=_flag(parameters, "binary_data", default=binary), classes=classes
        )
    return list(outputs.values()) or [RequestedOutput(name=name, binary=binary) for name in signature.outputs]


# Fields of the JSON, each checked as it is taken out


def _object(value: object, what: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise Invalid(f"Unable to parse {what}: expected a JSON object")
    return cast(dict[str, object], value)


def _array(fields: Mapping[str, object], key: str, *, required: bool) -> list[object]:
    value = fields.get(key)
    if value is None and not required:
        return []
    if not isinstance(value, list):
        raise Invalid(f"Unable to parse '{key}': expected an array")
    return cast(list[object], value)


def _text(fields: Mapping[str, object], key: str, what: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise Invalid(f"Unable to parse '{key}' of {what}: expected a string")
    return value


def _whole(value: object, problem: str) -> int:
    """A non-negative integer of 64 bits, where JSON's `true` is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= INT64_MAX:
        raise Invalid(f"{problem}: expected a non-negative integer")
    return value


def _shape(fields: Mapping[str, object], what: str) -> list[int]:
    problem = f"Unable to parse 'shape' of {what}"
    value = fields.get("shape")
    if not isinstance(value, list):
        raise Invalid(f"{problem}: expected an array")
    return [_whole(size, problem) for size in cast(list[object], value)]


def _parameters(fields: Mapping[str, object], what: str) -> Mapping[str, object]:
    value = fields.get("parameters")
    if value is None:
        return {}
    parameters = _object(value, f"'parameters' of {what}")
    for key, setting in parameters.items():
        if not isinstance(setting, str | int | float | bool):
            raise Invalid(f"parameter '{key[:64]}' of {what} must be a string, a number or a boolean")
    return parameters


def _flag(parameters: Mapping[str, object], key: str, *, default: bool = False) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise Invalid(f"Unable to set '{key}': expected a boolean")
    return value


def _id(fields: Mapping[str, object]) -> str | None:
    value = fields.get("id")
    if value is not None and not isinstance(value, str):
        raise Invalid("Unable to parse 'id': expected a string")
    return value


def _timeout(parameters: Mapping[str, object]) -> float | None:
    """The reserved parameter `timeout`, in microseconds; 0 is none."""
    timeout_us = _whole(parameters.get("timeout", 0), "Unable to parse 'timeout'")
    return timeout_us / 1e6 or None
