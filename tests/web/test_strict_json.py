import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.errors import Invalid
from mlbox.web import strict_json

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(PLAIN, st.booleans())
def test_what_is_plain_json_comes_back_as_it_was(value: object, ascii_only: bool) -> None:
    assert strict_json.loads(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_invalid(body: bytes) -> None:
    try:
        value = strict_json.loads(body)
    except Invalid:
        return
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


@given(st.text(alphabet='{}[]",:0123456789.eE+-\\utrflasn d8', max_size=60))
def test_what_looks_like_json_is_a_value_or_invalid(text: str) -> None:
    with contextlib.suppress(Invalid):
        strict_json.loads(text.encode())


def test_nesting_has_a_limit() -> None:
    def nested(depth: int) -> bytes:
        return b"[" * depth + b"]" * depth

    strict_json.loads(nested(strict_json.DEPTH_MAX))
    for depth in (strict_json.DEPTH_MAX + 1, 10_000, 100_000):
        with pytest.raises(Invalid, match="nested deeper"):
            strict_json.loads(nested(depth))
    strict_json.loads(b"[" + b",".join([b"[]"] * 1000) + b"]")


def test_numbers_have_limits() -> None:
    assert strict_json.loads(b"[9223372036854775807, -9223372036854775808, 1e308]") == [2**63 - 1, -(2**63), 1e308]
    for number in (
        "9223372036854775808",
        "-9223372036854775809",
        "9" * 5000,
        "1e309",
        "-1e309",
        "NaN",
        "Infinity",
        "-Infinity",
    ):
        with pytest.raises(Invalid):
            strict_json.loads(number.encode())
    value = strict_json.loads(b"1e-400")
    assert isinstance(value, float)
    assert math.isclose(value, 0.0)
