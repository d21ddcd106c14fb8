"""`config.pbtxt`: the text format, what may be said in it, and what follows when nothing is."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlbox.errors import Invalid
from mlbox.serving.server import jsontext, model_config, pbtxt
from mlbox.serving.server.model_config import ModelConfig, VersionPolicy
from mlbox.serving.server.signature import ANY, TensorSpec
from mlbox.serving.server.tensors import DATATYPES

TRITONS_OWN = """
name: "simple"
platform: "onnxruntime_onnx"  # as in Triton's examples
max_batch_size: 8
input [
  { name: "x" data_type: TYPE_INT32 dims: [ 16 ] },
  { name: "z" data_type: TYPE_INT32 dims: 16 }
]
output: [ { name: "y", data_type: TYPE_INT32, dims: [ 16 ] } ]
instance_group [ { count: 2 kind: KIND_CPU } ]
dynamic_batching { preferred_batch_size: 4 preferred_batch_size: 8 max_queue_delay_microseconds: 100 }
version_policy: { specific { versions: [ 1, 3 ] } }
parameters { key: "a" value: { string_value: "b" } }
parameters { key: "c" value { string_value: 'd' ' e' } }
model_warmup < name: "w" inputs { key: "x" value { dims: [16] zero_data: true } } >;
"""


def spec(name: str, shape: tuple[int, ...] | None, kind: str = "INT32") -> TensorSpec:
    return TensorSpec(name, DATATYPES[kind], shape)


def face(text: str, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> Any:
    config = model_config.read(text, "m")
    signature = model_config.signature(config, "m", inputs, outputs)
    return model_config.as_json(config, signature, instances=2, device="cpu")


class TestTextFormat:
    def test_everything_a_config_uses(self) -> None:
        read = pbtxt.parse(
            'a: 1 b: -2.5e3f c: "x\\n\\x41\\101\\u00e9" d: TYPE_A e { f: true } e { f: false } g: [1, 2]'
        )
        assert read == {
            "a": 1, "b": -2500.0, "c": "x\nAAé", "d": "TYPE_A", "e": [{"f": True}, {"f": False}], "g": [1, 2],
        }  # fmt: skip
        assert isinstance(read["d"], pbtxt.Word)
        assert not isinstance(read["c"], pbtxt.Word)

    def test_numbers_in_other_bases_and_infinities(self) -> None:
        assert pbtxt.parse("a: 0x1F b: 017 c: -inf d: - 3") == {"a": 31, "b": 15, "c": float("-inf"), "d": -3}

    @pytest.mark.parametrize(
        ("text", "where"),
        [
            ("a: 1\nb: {", "line 2"),
            ("a: [1 2]", "line 1"),
            ("a: [1,\n\n", "line 3"),
            ("a", "line 1"),
            ("a:", "line 1"),
            ("}", "line 1"),
            ('"a": 1', "line 1"),
            ('a: "x', "line 1"),
            ("a: 1x", "line 1"),
            ("a: $", "line 1"),
            ("a: " + "1" * 5000, "line 1"),
            ("a: 0x" + "f" * 17, "64 bits"),
            ("a: -9223372036854775809", "64 bits"),
            ("a: 1e999", "64 bits"),
            ("a {" * 50 + "}" * 50, "deeper than 32"),
        ],
    )
    def test_what_is_not_text_format_names_its_line(self, text: str, where: str) -> None:
        with pytest.raises(pbtxt.BadText, match=where):
            pbtxt.parse(text)

    @given(st.text(alphabet="abT_0123-.\"\\{}[]<>:,;# \n'xé", max_size=80))
    @settings(max_examples=500)
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        with suppress(pbtxt.BadText):
            assert isinstance(pbtxt.parse(text), dict)

    def test_a_field_ten_thousand_times_takes_no_time(self) -> None:
        assert len(pbtxt.parse("a: 1 " * 10_000)["a"]) == 10_000


class TestWhatIsSaid:
    def test_tritons_own_example(self) -> None:
        config = model_config.read(TRITONS_OWN, "simple")
        assert config.max_batch_size == 8
        assert config.instances == 2
        assert config.gpu == "never"
        assert config.version_policy == VersionPolicy(latest=None, versions=frozenset({1, 3}))
        assert config.fields["dynamic_batching"] == {
            "preferred_batch_size": [4, 8], "max_queue_delay_microseconds": 100,
        }  # fmt: skip
        assert config.fields["parameters"] == {"a": {"string_value": "b"}, "c": {"string_value": "d e"}}

    @pytest.mark.parametrize(
        ("text", "policy"),
        [
            ("", VersionPolicy(latest=1)),
            ("version_policy: { latest: { num_versions: 2 } }", VersionPolicy(latest=2)),
            ("version_policy { latest {} }", VersionPolicy(latest=1)),
            ("version_policy { all {} }", VersionPolicy(latest=None)),
            ("version_policy { specific { versions: 7 } }", VersionPolicy(latest=None, versions=frozenset({7}))),
        ],
    )
    def test_version_policies(self, text: str, policy: VersionPolicy) -> None:
        assert model_config.read(text, "m").version_policy == policy

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("max_batch_szie: 8", "did you mean 'max_batch_size'"),
            ("max_batch_size: -1", "whole number from 0"),
            ('max_batch_size: "8"', "whole number"),
            ("max_batch_size: 8 max_batch_size: 9", "whole number"),
            ('name: "other"', "name is 'other'"),
            ('backend: "pytorch"', "backend is 'pytorch'"),
            ('platform: "tensorrt_plan"', "platform"),
            ('default_model_filename: "other.onnx"', "default_model_filename"),
            ("ensemble_scheduling { step: 1 }", "not supported"),
            ("sequence_batching { a: 1 }", "not supported"),
            ('input { name: "x" reshape { shape: [1] } }', "reshape"),
            ("input { dims: [1] }", "no name"),
            ("input: 5", "list of messages"),
            ("instance_group { kind: KIND_TPU }", "KIND_AUTO"),
            ("instance_group { count: 0 }", "from 1"),
            ("version_policy { latest { num_versions: 0 } }", "from 1"),
            ("version_policy { newest {} }", "version_policy is one of"),
            ("version_policy: 3", "version_policy is one of"),
            ("parameters: 3", "a map"),
            ("a {", "config.pbtxt: line 1"),
        ],
    )
    def test_what_may_not_be_said(self, text: str, why: str) -> None:
        with pytest.raises(Invalid, match=why):
            model_config.read(text, "m")


FRAGMENTS = st.sampled_from(
    [
        "max_batch_size", "input", "output", "name", "dims", "data_type", "instance_group", "version_policy", "latest",
        "specific", "versions", "parameters", "key", "value", ":", "{", "}", "[", "]", ",", "1", "-1", "0x7", "1e999",
        "99999999999999999999", '"x"', '"m"', "'y'", "TYPE_FP32", "true", "nan", "-inf", "\n", "#",
    ]
)  # fmt: skip


class TestWhateverIsSaid:
    @given(st.lists(FRAGMENTS, max_size=30).map(" ".join))
    @settings(max_examples=1000)
    def test_it_is_refused_or_can_be_told(self, text: str) -> None:
        with suppress(Invalid):
            told = face(text, [spec("x", (ANY, 16))], [spec("y", (ANY,))])
            assert jsontext.dumps(told)


class TestWhatFollows:
    def test_free_first_dimensions_are_a_batch(self) -> None:
        told = face("", [spec("x", (ANY, 16))], [spec("y", (ANY, 3, ANY), "FP32")])
        assert told["max_batch_size"] > 0
        assert told["input"] == [{"name": "x", "data_type": "TYPE_INT32", "dims": [16]}]
        assert told["output"] == [{"name": "y", "data_type": "TYPE_FP32", "dims": [3, ANY]}]
        assert told["version_policy"] == {"latest": {"num_versions": 1}}
        assert told["parameters"]["device"] == {"string_value": "cpu"}

    @pytest.mark.parametrize("shape", [(16,), (1, 16), (), None])
    def test_anything_else_is_none(self, shape: tuple[int, ...] | None) -> None:
        told = face("", [spec("x", shape)], [spec("y", (ANY, 3))])
        assert told["max_batch_size"] == 0
        assert told["output"][0]["dims"] == [ANY, 3]

    def test_a_config_without_batch_keeps_all_dimensions(self) -> None:
        told = face("max_batch_size: 0", [spec("x", (ANY, 16))], [spec("y", (ANY,))])
        assert told["max_batch_size"] == 0
        assert told["input"][0]["dims"] == [ANY, 16]

    def test_only_a_limit_that_was_set_is_kept_to(self) -> None:
        inputs, outputs = [spec("x", (ANY, 16))], [spec("y", (ANY,))]
        assert model_config.signature(ModelConfig(), "m", inputs, outputs).batch_limit is None
        config = model_config.read("max_batch_size: 8", "m")
        assert model_config.signature(config, "m", inputs, outputs).batch_limit == 8

    def test_dims_narrow_the_models_own(self) -> None:
        text = 'max_batch_size: 4 input { name: "x" dims: [3, 8] format: FORMAT_NCHW }'
        told = face(text, [spec("x", (ANY, 3, ANY))], [spec("y", (ANY,))])
        assert told["input"] == [{"name": "x", "dims": [3, 8], "format": "FORMAT_NCHW", "data_type": "TYPE_INT32"}]

    def test_dims_tell_whether_the_first_one_is_a_batch(self) -> None:
        inputs, outputs = [spec("x", (ANY, 16))], [spec("y", (ANY,))]
        assert face('input { name: "x" dims: [-1, 16] }', inputs, outputs)["max_batch_size"] == 0
        assert face('input { name: "x" dims: [16] }', inputs, outputs)["max_batch_size"] > 0

    def test_strings_have_another_name_there(self) -> None:
        text = 'input { name: "x" data_type: TYPE_STRING dims: [-1] }'
        assert face(text, [spec("x", (ANY,), "BYTES")], [])["input"][0]["data_type"] == "TYPE_STRING"

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("max_batch_size: 4", "first dimension of 'x' is not free"),
            ('input { name: "q" }', "has no input 'q': it has x"),
            ('output { name: "x" }', "has no output 'x'"),
            ('input { name: "x" data_type: TYPE_FP32 }', "TYPE_FP32 there and INT32"),
            ('input { name: "x" dims: [2] }', r"mean shape \[2\], the model has \[1, 16\]"),
            ('input { name: "x" dims: [1, 17] }', "mean shape"),
            ('input { name: "x" dims: [1, -1] }', "mean shape"),
            ('input { name: "x" dims: [1, -2] }', "whole numbers"),
            ('input { name: "x" dims: "a" }', "whole numbers"),
        ],
    )
    def test_what_the_model_contradicts(self, text: str, why: str) -> None:
        with pytest.raises(Invalid, match=why):
            face(text, [spec("x", (1, 16))], [spec("y", (ANY,))])
