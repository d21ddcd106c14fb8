"""The wire format, both ways, and everything that is not quite it."""

import json
import math
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlbox.errors import Invalid
from mlbox.serving.server import jsontext, protocol
from mlbox.serving.server.signature import (
    ANY,
    InferRequest,
    InferResponse,
    RequestedOutput,
    Signature,
    Tensor,
    TensorSpec,
    check,
)
from mlbox.serving.server.tensors import BF16, BYTES, DATATYPES, Array

NUMERIC = [name for name in DATATYPES if name != BYTES]
IN_JSON = [name for name, kind in DATATYPES.items() if kind.in_json]


Spec = tuple[str, str, tuple[int, ...] | None]


def signature(*specs: Spec, max_batch: int = 0, limit: int | None = None) -> Signature:
    inputs = {name: TensorSpec(name, DATATYPES[kind], shape) for name, kind, shape in specs}
    outputs = {"y": TensorSpec("y", DATATYPES["FP32"], (ANY,))}
    return Signature(model="m", inputs=inputs, outputs=outputs, max_batch=max_batch, batch_limit=limit)


ONE = signature(("x", "FP32", (ANY,)))


def parse(value: Any, blobs: bytes = b"", face: Signature = ONE, *, binary: bool = False) -> InferRequest:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return protocol.parse(text + blobs, len(text) if binary or blobs else None, face)


def tensor(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]} | fields]}


@st.composite
def arrays(draw: st.DrawFn, kinds: list[str]) -> tuple[str, Array]:
    kind = draw(st.sampled_from(kinds))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    if kind == BYTES:
        count = math.prod(shape)
        texts = draw(st.lists(st.text(max_size=8), min_size=count, max_size=count))
        return kind, np.array(texts, np.object_).reshape(shape)
    return kind, draw(hnp.arrays(DATATYPES[kind].storage, shape))


def same(left: Array, right: Array) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype == np.object_:
        return bool((left == right).all())
    return np.array_equal(left, right, equal_nan=left.dtype.kind == "f")


class TestRoundTrips:
    """What `encode` writes as an output, `parse` reads as an input: the two formats are one."""

    @staticmethod
    def _through(kind: str, array: Array, *, binary: bool) -> tuple[dict[str, Any], Array]:
        wish = RequestedOutput(name="x", binary=binary)
        response = InferResponse(model="m", version=3, id="7", outputs=[Tensor("x", DATATYPES[kind], array)])
        encoded = protocol.encode(response, [wish])
        body = b"".join(encoded.parts)
        length = encoded.header_length
        assert (length is not None) == binary
        answer = jsontext.loads(body[:length] if length else body)
        assert isinstance(answer, dict)
        request = (
            jsontext.dumps({"inputs": answer["outputs"]}) if binary else body.replace(b'"outputs"', b'"inputs"', 1)
        )
        blobs = body[length:] if length else b""
        parsed = protocol.parse(request + blobs, len(request) if binary else None, ONE)
        return answer, parsed.inputs["x"].array

    @given(arrays(list(DATATYPES)))
    @settings(max_examples=300)
    def test_binary(self, given_: tuple[str, Array]) -> None:
        kind, array = given_
        answer, back = self._through(kind, array, binary=True)
        assert same(back, array)
        assert answer["model_version"] == "3"
        assert answer["id"] == "7"

    @given(arrays(IN_JSON))
    @settings(max_examples=300)
    def test_json(self, given_: tuple[str, Array]) -> None:
        kind, array = given_
        assert same(self._through(kind, array, binary=False)[1], array)

    @given(arrays([kind for kind in IN_JSON if kind != BYTES]))
    def test_nested_json_is_the_flat_one(self, given_: tuple[str, Array]) -> None:
        kind, array = given_
        if array.ndim == 0:
            return
        fields = {"name": "x", "datatype": kind, "shape": list(array.shape)}
        request = json.dumps({"inputs": [fields | {"data": array.tolist()}]}).encode()
        assert same(protocol.parse(request, None, ONE).inputs["x"].array, array)

    def test_numbers_are_little_endian_and_strings_have_their_length_before_them(self) -> None:
        texts = np.array(["é", ""], np.object_)
        outputs = [Tensor("n", DATATYPES["INT16"], np.array([258], np.int16)), Tensor("s", DATATYPES[BYTES], texts)]
        response = InferResponse(model="m", version=1, id=None, outputs=outputs)
        encoded = protocol.encode(response, [RequestedOutput(name=name, binary=True) for name in "ns"])
        assert bytes(encoded.parts[1]) == b"\x02\x01"
        assert encoded.parts[2] == b"\x02\0\0\0\xc3\xa9\0\0\0\0"
        assert "id" not in json.loads(encoded.parts[0])

    def test_nan_and_infinities_are_tokens_both_ways(self) -> None:
        parsed = parse(b'{"inputs":[{"name":"x","datatype":"FP32","shape":[3],"data":[NaN,Infinity,-Infinity]}]}')
        assert np.array_equal(parsed.inputs["x"].array, np.array([np.nan, np.inf, -np.inf], "f4"), equal_nan=True)

    def test_unaligned_bytes_are_read(self) -> None:
        for padding in range(8):
            value = {"pad": "p" * padding} | tensor(shape=[2], parameters={"binary_data_size": 8})
            del value["inputs"][0]["data"]
            array = parse(value, struct.pack("<2f", 1.5, -2.5)).inputs["x"].array
            assert array.tolist() == [1.5, -2.5]
            assert array.flags.aligned


DEEP = b"[" * 10_000 + b"]" * 10_000
MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "not json": b"{",
    "a list": b"[]",
    "a number": b"1",
    "not utf-8": b'{"inputs":[{"name":"\xff"}]}',
    "half a surrogate pair": rb'{"id":"\ud800","inputs":[]}',
    "half a surrogate pair beside NaN": rb'{"id":"\ud800","inputs":[NaN]}',
    "10,000 deep": b'{"inputs":' + DEEP + b"}",
    "10,000 deep with NaN": b'{"x":NaN,"inputs":' + DEEP + b"}",
    "data 10,000 deep": json.dumps(tensor()).encode().replace(b"[1, 2]", DEEP),
    "data 101 deep": json.dumps(tensor(shape=[1])).encode().replace(b"[1, 2]", b"[" * 101 + b"1" + b"]" * 101),
    "5,000 digits": json.dumps(tensor()).encode().replace(b"[1, 2]", b"[" + b"1" * 5000 + b", 2]"),
    "5,000 digits with NaN": json.dumps(tensor()).encode().replace(b"[1, 2]", b"[" + b"1" * 5000 + b", NaN]"),
    "no inputs": b"{}",
    "inputs null": b'{"inputs":null}',
    "inputs an object": b'{"inputs":{}}',
    "an input that is a number": b'{"inputs":[1]}',
    **{
        name: json.dumps(value).encode()
        for name, value in {
            "no name": {"inputs": [{"datatype": "FP32", "shape": [1], "data": [1]}]},
            "a name that is a number": tensor(name=1),
            "unknown datatype": tensor(datatype="FP31"),
            "datatype a list": tensor(datatype=[]),
            "datatype in lower case": tensor(datatype="fp32"),
            "shape a number": tensor(shape=2),
            "shape a string": tensor(shape="2"),
            "a negative dimension": tensor(shape=[2, -5]),
            "a dimension with a fraction": tensor(shape=[2.0]),
            "a dimension that is true": tensor(shape=[True, 2]),
            "a dimension of 65 bits": tensor(shape=[2**64]),
            "a dimension of 70 bits beside 0": tensor(shape=[0, 2**70], data=[]),
            "overflow of the count": tensor(shape=[2**4, 2**60 + 2]),
            "overflow of the bytes": tensor(shape=[2**2, 2**60 + 2]),
            "zero times huge": tensor(shape=[0, 2**62, 2**62], data=[]),
            "65 dimensions": tensor(shape=[1] * 65, data=[1]),
            "too few values": tensor(data=[1]),
            "too many values": tensor(data=[1, 2, 3]),
            "data an object": tensor(data={}),
            "data null": tensor(data=None),
            "data a number": tensor(data=5, shape=[1]),
            "a string among numbers": tensor(data=[1, "2"]),
            "null among numbers": tensor(data=[1, None]),
            "true among numbers": tensor(data=[1, True]),
            "an object among numbers": tensor(data=[1, {}]),
            "more than FP32 holds": tensor(data=[1, 1e39]),
            "an integer no float holds": tensor(data=[1, 10**400]),
            "300 in UINT8": tensor(datatype="UINT8", data=[1, 300]),
            "-1 in UINT8": tensor(datatype="UINT8", data=[1, -1]),
            "65 bits in INT64": tensor(datatype="INT64", data=[1, 2**63]),
            "65 bits in UINT64": tensor(datatype="UINT64", data=[1, 2**64]),
            "a fraction in INT32": tensor(datatype="INT32", data=[1, 2.5]),
            "1.0 in INT32": tensor(datatype="INT32", data=[1, 2.0]),
            "a number in BOOL": tensor(datatype="BOOL", data=[True, 1]),
            "a number in BYTES": tensor(datatype="BYTES", data=["a", 1]),
            "FP16 by JSON": tensor(datatype="FP16"),
            "BF16 by JSON": tensor(datatype="BF16"),
            "an input twice": {"inputs": tensor()["inputs"] * 2},
            "data and binary_data_size": tensor(parameters={"binary_data_size": 8}),
            "neither data nor binary_data_size": {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2]}]},
            "shared memory": tensor(parameters={"shared_memory_region": "r"}),
            "parameters a list": tensor(parameters=[]),
            "a nested parameter": tensor(parameters={"a": [1]}),
            "id a number": tensor() | {"id": 1},
            "outputs a number": tensor() | {"outputs": 1},
            "an output without a name": tensor() | {"outputs": [{}]},
            "an output twice": tensor() | {"outputs": [{"name": "y"}] * 2},
            "binary_data a string": tensor() | {"outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]},
            "classification negative": tensor() | {"outputs": [{"name": "y", "parameters": {"classification": -1}}]},
            "classification true": tensor() | {"outputs": [{"name": "y", "parameters": {"classification": True}}]},
            "output in shared memory": tensor()
            | {"outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]},
            "binary_data_output a number": tensor() | {"parameters": {"binary_data_output": 1}},
            "timeout negative": tensor() | {"parameters": {"timeout": -1}},
            "timeout a string": tensor() | {"parameters": {"timeout": "1"}},
        }.items()
    },
}


FIELDS = ["inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "id", "binary_data_size"]


class TestMalformed:
    @pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
    def test_it_is_refused_as_the_clients_fault(self, body: bytes) -> None:
        with pytest.raises(Invalid):
            protocol.parse(body, None, ONE)

    @pytest.mark.parametrize(
        ("fields", "blob", "text"),
        [
            ({"parameters": {"binary_data_size": 8}}, b"1234567", "expecting 1 additional bytes"),
            ({"parameters": {"binary_data_size": 8}}, b"123456789", "unexpected additional input data"),
            ({"parameters": {"binary_data_size": 4}}, b"1234", "Expected 8, got 4"),
            ({"parameters": {"binary_data_size": 2**62}}, b"", "additional bytes"),
            ({"parameters": {"binary_data_size": -8}}, b"", "binary_data_size"),
            ({"parameters": {"binary_data_size": "8"}}, b"12345678", "binary_data_size"),
            ({"parameters": {"binary_data_size": True}}, b"1", "binary_data_size"),
            ({"datatype": "BYTES", "parameters": {"binary_data_size": 5}}, b"\1\0\0\0a", "expected 2 string"),
            ({"datatype": "BYTES", "parameters": {"binary_data_size": 12}}, b"\0\0\0\0" * 3, "got more"),
            ({"datatype": "BYTES", "parameters": {"binary_data_size": 5}}, b"\xff\xff\xff\xffa", "end within"),
            ({"datatype": "BYTES", "parameters": {"binary_data_size": 3}}, b"\0\0\0", "end within"),
            ({"datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}}, b"\1\0\0\0\xff", "UTF-8"),
        ],
    )
    def test_binary_sizes_that_do_not_agree(self, fields: dict[str, Any], blob: bytes, text: str) -> None:
        value = tensor(**fields)
        del value["inputs"][0]["data"]
        with pytest.raises(Invalid, match=text):
            parse(value, blob, binary=True)

    def test_a_blob_needs_the_header_that_announces_it(self) -> None:
        value = tensor(parameters={"binary_data_size": 8})
        del value["inputs"][0]["data"]
        with pytest.raises(Invalid, match="Infer-Header-Content-Length"):
            parse(value)

    @pytest.mark.parametrize("text", ["-1", "11", "99999999999", "9" * 30, "1.0", "0x1", " 1", "", "١", "abc"])
    def test_a_header_length_out_of_range(self, text: str) -> None:
        with pytest.raises(Invalid, match=r"[Hh]eader"):
            protocol.header_length(text, 10)

    def test_header_lengths_within_the_body(self) -> None:
        assert [protocol.header_length(text, 10) for text in (None, "0", "10")] == [None, 0, 10]

    @given(st.binary(max_size=60), st.one_of(st.none(), st.integers(0, 60)))
    @settings(max_examples=500)
    def test_any_bytes_are_a_request_or_invalid(self, body: bytes, length: int | None) -> None:
        with suppress(Invalid):
            protocol.parse(body, None if length is None else min(length, len(body)), ONE)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(
                    st.sampled_from(
                        [
                            "inputs",
                            "outputs",
                            "name",
                            "shape",
                            "datatype",
                            "data",
                            "parameters",
                            "id",
                            "binary_data_size",
                        ]
                    ),
                    inner,
                    max_size=6,
                )
            ),
            max_leaves=25,
        )
    )
    @settings(max_examples=500)
    def test_any_json_is_a_request_or_invalid(self, value: Any) -> None:
        with suppress(Invalid):
            parse(value)

    @given(st.data())
    @settings(max_examples=300)
    def test_a_damaged_request_is_a_request_or_invalid(self, data: st.DataObject) -> None:
        body = bytearray(json.dumps(tensor() | {"outputs": [{"name": "y"}], "id": "é"}).encode())
        for _ in range(data.draw(st.integers(1, 4))):
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
        with suppress(Invalid):
            protocol.parse(bytes(body), None, ONE)

    def test_a_million_scalars_below_many_brackets_take_no_time(self) -> None:
        values = b"[" * 99 + b",".join([b"1"] * 200_000) + b"]" * 99
        body = json.dumps(tensor(shape=[200_000])).encode().replace(b"[1, 2]", values)
        assert protocol.parse(body, None, ONE).inputs["x"].array.size == 200_000


class TestWhatIsAsked:
    def test_all_outputs_when_none_is_named(self) -> None:
        assert [output.name for output in parse(tensor()).outputs] == ["y"]

    def test_an_outputs_own_wish_goes_before_the_requests(self) -> None:
        asked = {"outputs": [{"name": "y"}, {"name": "z", "parameters": {"binary_data": False}}]}
        parsed = parse(tensor() | asked | {"parameters": {"binary_data_output": True}})
        assert [(output.name, output.binary) for output in parsed.outputs] == [("y", True), ("z", False)]

    def test_the_timeout_is_in_microseconds(self) -> None:
        assert parse(tensor() | {"parameters": {"timeout": 1500}}).timeout_s == 0.0015
        assert parse(tensor() | {"parameters": {"timeout": 0}}).timeout_s is None

    def test_unknown_fields_and_parameters_are_let_through(self) -> None:
        extra = {"parameters": {"sequence_id": 7, "priority": 1, "custom": "x"}, "more": 1}
        assert parse(tensor() | extra).inputs["x"].array.tolist() == [1, 2]

    def test_classes_are_the_largest_first_row_by_row(self) -> None:
        scores = Tensor("y", DATATYPES["FP32"], np.array([[0.1, 0.7, 0.2], [3, 1, 2]], np.float32))
        told = protocol.classify(scores, 2, batched=True)
        assert told.datatype.name == BYTES
        assert told.array.tolist() == [["0.700000:1", "0.200000:2"], ["3.000000:0", "2.000000:2"]]
        flat = protocol.classify(scores, 99, batched=False)
        assert flat.array.tolist()[0] == "3.000000:3"
        assert flat.array.shape == (6,)

    def test_classes_of_no_rows_are_none(self) -> None:
        empty = Tensor("y", DATATYPES["FP32"], np.zeros((0, 3), np.float32))
        assert protocol.classify(empty, 2, batched=True).array.shape == (0, 2)

    @pytest.mark.parametrize("kind", [BYTES, BF16])
    def test_classes_of_what_has_no_order_are_refused(self, kind: str) -> None:
        with pytest.raises(Invalid, match="classes"):
            protocol.classify(Tensor("y", DATATYPES[kind], np.zeros((1, 1), np.uint16)), 1, batched=True)

    @pytest.mark.parametrize("kind", ["FP16", BF16])
    def test_sixteen_bit_floats_are_not_told_in_json(self, kind: str) -> None:
        response = InferResponse(
            model="m", version=1, id=None, outputs=[Tensor("y", DATATYPES[kind], np.zeros(1, DATATYPES[kind].storage))]
        )
        with pytest.raises(Invalid, match="via JSON is not supported"):
            protocol.encode(response, [RequestedOutput(name="y")])


class TestRaw:
    """Bodies that are nothing but a tensor's bytes."""

    def raw(self, body: bytes, *specs: Spec, max_batch: int = 0) -> Array:
        request = protocol.parse(body, 0, signature(*specs, max_batch=max_batch))
        assert [output.binary for output in request.outputs] == [True]
        return request.inputs["x"].array

    def test_one_free_dimension_follows_from_the_length(self) -> None:
        assert self.raw(bytes(24), ("x", "FP32", (2, ANY))).shape == (2, 3)

    def test_the_batch_is_one_unless_it_is_all_that_is_free(self) -> None:
        assert self.raw(bytes(24), ("x", "FP32", (ANY, 2)), max_batch=8).shape == (3, 2)
        assert self.raw(bytes(24), ("x", "FP32", (ANY, ANY)), max_batch=8).shape == (1, 6)

    def test_a_string_has_no_length_before_it(self) -> None:
        assert self.raw(b"427", ("x", BYTES, (1,))).tolist() == ["427"]
        assert self.raw(b"427", ("x", BYTES, (ANY, 1)), max_batch=8).tolist() == [["427"]]

    @pytest.mark.parametrize(
        ("body", "specs", "text"),
        [
            (bytes(8), [("x", "FP32", (ANY, ANY))], "can not be deduced because there are more than one variable"),
            (bytes(8), [("x", "FP32", None)], "can not be deduced"),
            (bytes(8), [("x", "FP32", (1,)), ("z", "FP32", (1,))], r"only have 1 input \(found 1\).*got 2 inputs in"),
            (b"427", [("x", BYTES, (ANY,))], r"the model must have input shape \[1\]"),
            (b"\xff", [("x", BYTES, (1,))], "UTF-8"),
            (bytes(7), [("x", "FP32", (ANY,))], "Expected 4, got 7"),
            (bytes(7), [("x", "FP32", (0, ANY))], "Expected 0, got 7"),
        ],
    )
    def test_what_cannot_be_deduced(self, body: bytes, specs: list[Any], text: str) -> None:
        with pytest.raises(Invalid, match=text):
            self.raw(body, *specs)


class TestFit:
    """Whether a request suits the model, in the words that Triton's clients know."""

    def fits(self, face: Signature, **inputs: tuple[str, tuple[int, ...]]) -> int:
        request = InferRequest(
            id=None,
            inputs={
                name: Tensor(name, DATATYPES[kind], np.zeros(shape, DATATYPES[kind].storage))
                for name, (kind, shape) in inputs.items()
            },
            outputs=[RequestedOutput(name="y")],
        )
        return check(request, face)

    def test_the_batch_is_told(self) -> None:
        face = signature(("x", "FP32", (ANY, 4)), max_batch=8)
        assert self.fits(face, x=("FP32", (5, 4))) == 5
        assert self.fits(face, x=("FP32", (0, 4))) == 0
        assert self.fits(signature(("x", "FP32", (4,))), x=("FP32", (4,))) == 1

    def test_any_rank_where_the_model_leaves_it_open(self) -> None:
        assert self.fits(signature(("x", "FP32", None)), x=("FP32", (1, 2, 3))) == 1

    @pytest.mark.parametrize(
        ("inputs", "text"),
        [
            ({}, r"expected 2 inputs but got 0 inputs for model 'm'.*Got input\(s\) \[\].*\['x','z'\]"),
            ({"x": ("FP32", (1, 4))}, r"Got input\(s\) \['x'\], but missing required input\(s\) \['z'\]"),
            ({"x": ("FP32", (1, 4)), "q": ("FP32", (1, 4))}, "unexpected inference input 'q' for model 'm'"),
            ({"x": ("INT32", (1, 4)), "z": ("FP32", (1, 4))}, "data-type is 'INT32', but model 'm' expects 'FP32'"),
            ({"x": ("FP32", (1, 5)), "z": ("FP32", (1, 4))}, r"unexpected shape.*Expected \[-1,4\], got \[1,5\]"),
            ({"x": ("FP32", (4,)), "z": ("FP32", (1, 4))}, r"unexpected shape.*got \[4\]"),
            ({"x": ("FP32", (1, 4)), "z": ("FP32", (2, 4))}, "batch size does not match"),
            ({"x": ("FP32", (9, 4)), "z": ("FP32", (9, 4))}, "batch-size must be <= 8"),
        ],
    )
    def test_what_does_not_fit(self, inputs: dict[str, Any], text: str) -> None:
        face = signature(("x", "FP32", (ANY, 4)), ("z", "FP32", (ANY, 4)), max_batch=8, limit=8)
        with pytest.raises(Invalid, match=text):
            self.fits(face, **inputs)

    def test_an_output_that_the_model_lacks(self) -> None:
        request = InferRequest(
            id=None,
            inputs={"x": Tensor("x", DATATYPES["FP32"], np.zeros(1, np.float32))},
            outputs=[RequestedOutput(name="q")],
        )
        with pytest.raises(Invalid, match="unexpected inference output 'q' for model 'm'"):
            check(request, ONE)
