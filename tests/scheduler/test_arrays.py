"""An array has exactly the elements that its text or matrix names, or is refused at once."""

import json
import time
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlbox.jobs import ArraySpec
from mlbox.scheduler.arrays import ELEMENTS_MAX, INDEX_MAX, array, matrix
from mlbox.scheduler.values import Bad

T = TypeVar("T")


def indices(written: object) -> list[int]:
    return [element.index for element in array(written).elements]


@pytest.mark.parametrize(
    ("written", "meant", "at_once"),
    [
        ("0-3", [0, 1, 2, 3], None),
        ("0-9%3", list(range(10)), 3),
        ("7", [7], None),
        ("1,3,5-9:2%4", [1, 3, 5, 7, 9], 4),
        ("5, 1", [5, 1], None),
        ("0-10:4", [0, 4, 8], None),
        ("3-3", [3], None),
        ("1000000000", [10**9], None),
        ("0-1000000000:500000000", [0, 5 * 10**8, 10**9], None),
        ("0-1 % 8", [0, 1], 8),
    ],
)
def test_an_array_is_read_as_sbatch_reads_it(written: str, meant: list[int], at_once: int | None) -> None:
    assert indices(written) == meant
    assert array(written).at_once == at_once
    assert all(not element.env for element in array(written).elements)


NO_ARRAYS: list[tuple[object, str]] = [
    ("", "is empty"),
    (",", "wants indices and ranges"),
    ("1,", "wants indices and ranges"),
    ("a", "wants indices and ranges"),
    ("-1", "wants indices and ranges"),
    ("1-", "wants indices and ranges"),
    ("1-2-3", "wants indices and ranges"),
    ("1:2", "wants indices and ranges"),
    ("1.5", "wants indices and ranges"),
    ("[0-9]", "wants indices and ranges"),
    ("9-1", "ends before it begins"),
    ("1-10:0", "step of 0"),
    ("0-9%0", "wants 1 to"),
    ("0-9%", "behind one %"),
    ("0-9%-1", "behind one %"),
    ("0-9%2%3", "behind one %"),
    ("%3", "wants indices and ranges"),
    ("1,1", "names the index 1 twice"),
    ("0-9,5", "names the index 5 twice"),
    ("0-10000", "more than 10000 elements"),
    ("0-5000,6000-11000", "more than 10000 elements"),
    ("0-999999999999", "wants indices and ranges"),
    ("0-9999999999", "above 1000000000"),
    ("1000000001", "above 1000000000"),
    ("0-1000000000", "more than 10000 elements"),
    ("1" * 5000, "wants indices and ranges"),
    ("1," * 100_000, "bytes long"),
    ("\ud800", "surrogate"),
    ("1\0", "NUL"),
    (5, "wants text"),
    ([1, 2], "wants text"),
    (True, "wants text"),
    ({}, "wants text"),
]


def test_what_is_no_array_is_refused_with_the_reason() -> None:
    for written, says in NO_ARRAYS:
        assert says in refusal(array, written)


ranges = st.tuples(st.integers(0, 300), st.integers(0, 40), st.integers(1, 9))


@given(st.lists(ranges, min_size=1, max_size=8), st.none() | st.integers(1, 500))
def test_any_array_comes_back_as_it_was_written(wanted: list[tuple[int, int, int]], cap: int | None) -> None:
    expected = [index for low, length, step in wanted for index in range(low, low + length + 1, step)]
    texts = [f"{low}-{low + length}:{step}" if length else str(low) for low, length, step in wanted]
    written = ",".join(texts) + (f"%{cap}" if cap else "")
    if len(set(expected)) != len(expected):
        assert "twice" in refusal(array, written)
        return
    assert indices(written) == expected
    assert array(written).at_once == cap


@given(st.text() | st.from_regex(r"[0-9,:% -]{0,30}", fullmatch=True))
def test_any_text_is_an_array_or_refused(written: str) -> None:
    answer = attempt(array, written)
    if isinstance(answer, ArraySpec):
        found = {element.index for element in answer.elements}
        assert 0 < len(found) == len(answer.elements) <= ELEMENTS_MAX
        assert all(0 <= index <= INDEX_MAX for index in found)


def test_a_matrix_is_every_combination_in_order() -> None:
    wanted = {"lr": [0.1, 1e-5], "seed": [1, 2], "aug": [True], "name": ["two words"]}
    found = matrix(wanted)
    assert [element.index for element in found] == [0, 1, 2, 3]
    assert [dict(element.env) for element in found] == [
        {"lr": lr, "seed": seed, "aug": "true", "name": "two words"} for lr in ("0.1", "1e-05") for seed in ("1", "2")
    ]
    assert matrix(json.dumps(wanted)) == found


NO_MATRICES: list[tuple[object, str]] = [
    ({}, "wants an object of lists"),
    ("", "begins like a JSON object but is none"),
    ("[1]", "wants a JSON object, got a list"),
    ([1], "wants an object of lists"),
    (5, "wants an object of lists"),
    ({"a": []}, "a has no values"),
    ({"a": 1}, "a wants a list"),
    ({"a": "12"}, "a wants a list"),
    ({"a": {"b": 1}}, "a wants a list"),
    ({"a": [[1]]}, "a wants text, numbers, true or false, got a list"),
    ({"a": [None]}, "got null"),
    ({"a": [{}]}, "got an object"),
    ({"a": [float("nan")]}, "a wants"),
    ('{"a": [NaN]}', "a wants"),
    ('{"a": [1e999]}', "a wants"),
    ({"a": [10**5000]}, "a number beyond 64 bits"),
    ('{"a": [' + "9" * 5000 + "]}", "a number is too long"),
    ({"a": ["\ud800"]}, "surrogate"),
    ({"a": ["x\0"]}, "NUL"),
    ({"a": ["x" * 100_000]}, "bytes long"),
    ({"\ud800": [1]}, "cannot be a variable's name"),
    ({"a b": [1]}, "cannot be a variable's name"),
    ({"": [1]}, "cannot be a variable's name"),
    ({"MLBOX_TOKEN": [1]}, "mlbox's own"),
    ('{"a": [1], "a": [2]}', "has a name twice"),
    ({"a": list(range(101)), "b": list(range(100))}, "makes 101 x 100 elements, more than 10000"),
    ({f"v{number}": [1, 2] for number in range(64)}, "more than 10000"),
    ({f"v{number}": [1, 2] for number in range(65)}, "has 65 variables"),
    ('{"a":' + "[" * 10_000 + "]" * 10_000 + "}", "nested too deeply"),
    ("{" * 10_000, "is none"),
    ('{"a":' * 100_000, "nested too deeply"),
]


def test_what_is_no_matrix_is_refused_with_the_reason() -> None:
    for written, says in NO_MATRICES:
        assert says in refusal(matrix, written)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc") | st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(json_values | json_values.map(json.dumps) | st.text().map(lambda text: "{" + text))
def test_any_value_is_a_matrix_or_refused(written: object) -> None:
    answer = attempt(matrix, written)
    if not isinstance(answer, str):
        assert answer
        assert all(isinstance(value, str) for element in answer for value in element.env.values())


def test_the_largest_are_read_quickly() -> None:
    began = time.monotonic()
    assert len(indices("0-9999")) == ELEMENTS_MAX
    assert len(indices(",".join(str(number) for number in range(ELEMENTS_MAX)))) == ELEMENTS_MAX
    assert len(matrix({"a": list(range(100)), "b": list(range(100))})) == ELEMENTS_MAX
    assert time.monotonic() - began < 1


def attempt(read: Callable[[object], T], written: object) -> T | str:
    try:
        return read(written)
    except Bad:
        return refusal(read, written)


def refusal(read: Callable[[object], object], written: object) -> str:
    with pytest.raises(Bad) as error:
        read(written)
    assert len(str(error.value)) < 300
    assert str(error.value).isprintable()
    return str(error.value)
