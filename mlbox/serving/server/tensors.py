"""Tensors between the wire and numpy: the protocol's datatypes, raw bytes, and JSON values. Pure.

On the wire a tensor is little-endian, row-major and without padding (binary tensor data extension of the Open
Inference Protocol). Inside it is an ndarray; BF16 is kept in uint16, for numpy has no such type, and BYTES in an
object array of `str`, for ONNX strings are UTF-8.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mlbox.errors import Invalid

Array = npt.NDArray[Any]
INT64_MAX = 2**63 - 1
_DEPTH_MAX = 100
_RANK_MAX = 64
"""numpy's own limit."""


@dataclass(frozen=True, slots=True)
class Datatype:
    """One datatype of the protocol. `size` is bytes per element, 0 for BYTES; `storage` is numpy's type for it."""

    name: str
    storage: np.dtype[Any]
    size: int
    in_json: frozenset[type]
    """The Python types of its values in JSON; empty where JSON is not supported, as in Triton."""


_INTEGER = frozenset({int})
_NUMBER = frozenset({int, float})
BYTES = "BYTES"
BF16 = "BF16"
DATATYPES = {
    name: Datatype(name, np.dtype(storage), 0 if name == BYTES else np.dtype(storage).itemsize, in_json)
    for name, storage, in_json in (
        ("BOOL", np.bool_, frozenset({bool})),
        ("UINT8", np.uint8, _INTEGER),
        ("UINT16", np.uint16, _INTEGER),
        ("UINT32", np.uint32, _INTEGER),
        ("UINT64", np.uint64, _INTEGER),
        ("INT8", np.int8, _INTEGER),
        ("INT16", np.int16, _INTEGER),
        ("INT32", np.int32, _INTEGER),
        ("INT64", np.int64, _INTEGER),
        ("FP16", np.float16, frozenset[type]()),
        ("FP32", np.float32, _NUMBER),
        ("FP64", np.float64, _NUMBER),
        (BF16, np.uint16, frozenset[type]()),
        (BYTES, np.object_, frozenset({str})),
    )
}


def datatype(name: str, what: str) -> Datatype:
    """The datatype called `name`. Raises Invalid."""
    try:
        return DATATYPES[name]
    except KeyError:
        raise Invalid(f"invalid datatype for {what}: {name[:40]!r}: known are {', '.join(DATATYPES)}") from None


def element_count(shape: Sequence[int], what: str) -> int:
    """How many elements a tensor of `shape` has. Raises Invalid for more than any address could hold."""
    count = math.prod(shape)
    if count > INT64_MAX:
        raise Invalid(
            f"invalid shape for {what}: shape {list(shape)} causes total element count to exceed maximum size of "
            f"{INT64_MAX}"
        )
    return count


def from_binary(kind: Datatype, shape: Sequence[int], blob: memoryview, what: str) -> Array:
    """The tensor in `blob`, without a copy where its memory allows. Raises Invalid when the sizes do not agree."""
    count = element_count(shape, what)
    if kind.name == BYTES:
        return _reshaped(_strings(blob, count, what), shape, what)
    if len(blob) != count * kind.size:
        raise Invalid(f"input byte size mismatch for {what}. Expected {count * kind.size}, got {len(blob)}")
    if kind.name == "BOOL":
        return _reshaped(np.frombuffer(blob, np.uint8) != 0, shape, what)
    flat = np.frombuffer(blob, kind.storage)
    return _reshaped(flat if flat.flags.aligned else flat.copy(), shape, what)


def from_json(kind: Datatype, shape: Sequence[int], data: object, what: str) -> Array:
    """The tensor that `data`, a flat or nested list in row-major order, spells out. Raises Invalid."""
    count = element_count(shape, what)
    if count * kind.size > INT64_MAX:
        raise Invalid(
            f"byte size overflow for {what}: element count ({count}) * data type size ({kind.size}) exceeds maximum "
            f"allowed size ({INT64_MAX})"
        )
    if not kind.in_json:
        raise Invalid(
            f"sending {kind.name} data via JSON is not supported. Please use the binary data format for {what}"
        )
    if not isinstance(data, list):
        raise Invalid(f"Unable to parse 'data' of {what}: expected an array")
    values: list[object] = []
    types: set[type] = set()
    _flatten(cast(list[object], data), values, types, 1)
    if not types <= kind.in_json:
        found = ", ".join(sorted(_json_name(each) for each in types - kind.in_json))
        raise Invalid(f"Unable to parse 'data' of {what}: {found} among {kind.name} values")
    if len(values) != count:
        raise Invalid(f"{what} has {len(values)} values, its shape {list(shape)} wants {count}")
    return _reshaped(_numbers(kind, values, what), shape, what)


def to_binary(kind: Datatype, array: Array) -> bytes | memoryview:
    """The tensor's bytes on the wire."""
    if kind.name == BYTES:
        encoded = [cast(str, text).encode() for text in array.ravel()]
        return b"".join(part for text in encoded for part in (struct.pack("<I", len(text)), text))
    if array.size == 0:
        return b""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def to_json(kind: Datatype, array: Array, what: str) -> list[Any]:
    """The tensor's values as a flat list. Raises Invalid for the datatypes that JSON is not supported for."""
    if not kind.in_json:
        raise Invalid(
            f"sending {kind.name} data via JSON is not supported. Please use the binary data format for {what}"
        )
    return array.ravel().tolist()


def _flatten(data: list[object], values: list[object], types: set[type], depth: int) -> None:
    found = set(map(type, data))
    if list not in found:
        types |= found
        values.extend(data)
        return
    if depth >= _DEPTH_MAX:
        raise Invalid(f"JSON nesting depth exceeds maximum allowed limit ({_DEPTH_MAX})")
    for item in data:
        if isinstance(item, list):
            _flatten(cast(list[object], item), values, types, depth + 1)
        else:
            types.add(type(item))
            values.append(item)


def _numbers(kind: Datatype, values: list[Any], what: str) -> Array:
    try:
        if kind.name != "FP32":
            return np.array(values, kind.storage)
        wide = np.array(values, np.float64)
    except OverflowError as error:
        raise Invalid(f"a value of {what} does not fit into {kind.name}: {error}") from error
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if np.any(np.isinf(narrow) & np.isfinite(wide)):
        raise Invalid(f"a value of {what} does not fit into FP32: it is larger than 3.4e38")
    return narrow


def _strings(blob: memoryview, count: int, what: str) -> Array:
    """The elements of a BYTES tensor: each a uint32 length and so many bytes of UTF-8."""
    texts: list[str] = []
    at = 0
    while at < len(blob):
        end = at + 4 + (int.from_bytes(blob[at : at + 4], "little") if at + 4 <= len(blob) else len(blob))
        if end > len(blob):
            raise Invalid(f"the bytes of {what} end within its string {len(texts)}")
        if len(texts) == count:
            raise Invalid(f"expected {count} string elements for inference {what}, got more")
        try:
            texts.append(str(blob[at + 4 : end], "utf-8"))
        except UnicodeDecodeError as error:
            raise Invalid(f"string {len(texts)} of {what} is not UTF-8, as strings of ONNX models are") from error
        at = end
    if len(texts) != count:
        raise Invalid(f"expected {count} string elements for inference {what}, got {len(texts)}")
    return np.array(texts, np.object_)


def _reshaped(flat: Array, shape: Sequence[int], what: str) -> Array:
    if len(shape) > _RANK_MAX:
        raise Invalid(f"invalid shape for {what}: {len(shape)} dimensions; {_RANK_MAX} are possible")
    try:
        return flat.reshape(shape)
    except (ValueError, OverflowError) as error:
        raise Invalid(f"invalid shape for {what}: {list(shape)}: {error}") from error


def _json_name(kind: type) -> str:
    return {
        bool: "a boolean",
        int: "an integer",
        float: "a number with a fraction",
        str: "a string",
        dict: "an object",
        type(None): "null",
    }.get(kind, kind.__name__)
